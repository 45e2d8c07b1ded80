"""FedAvgM, FedAdam, FedYogi: an optimiser at the server."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omnifm.errors import ConfigError
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from tests.support import HOSPITALS, Altered, Lab, Spy, differing, make_lab, spy

RULES = ["fedavgm", "fedadam", "fedyogi"]
ABSENT = [["a", "b"], ["c"], ["a", "d"], ["b", "c", "d"]]


def reference(name: str, start: Any, replies: list[list[Reply]], tensor: str, options: dict[str, float]) -> np.ndarray[Any, Any]:
    """The rule in float64, one number at a time."""
    theta = np.array(start, dtype=np.float64)
    flat = theta.reshape(-1)
    m, v = np.zeros_like(flat), np.full_like(flat, options.get("tau", 0.0) ** 2)
    for sent in replies:
        total = sum(r.num_examples for r in sent)
        for k in range(len(flat)):
            delta = sum(r.num_examples / total * (float(r.tensors[tensor].reshape(-1)[k]) - flat[k]) for r in sent)
            if name == "fedavgm":
                m[k] = options["beta"] * m[k] + delta
                flat[k] += options["server_step"] * m[k]
                continue
            m[k] = options["beta1"] * m[k] + (1 - options["beta1"]) * delta
            if name == "fedadam":
                v[k] = options["beta2"] * v[k] + (1 - options["beta2"]) * delta**2
            else:
                v[k] -= (1 - options["beta2"]) * delta**2 * np.sign(v[k] - delta**2)
            flat[k] += options["server_step"] * m[k] / (np.sqrt(v[k]) + options["tau"])
    return theta


NUMBERS: dict[str, dict[str, float]] = {
    "fedavgm": {"beta": 0.7, "server_step": 1.3},
    "fedadam": {"beta1": 0.8, "beta2": 0.7, "tau": 0.02, "server_step": 0.05},
    "fedyogi": {"beta1": 0.8, "beta2": 0.7, "tau": 0.02, "server_step": 0.05},
}


@pytest.mark.parametrize("name", RULES)
def test_it_is_the_formula_whoever_takes_part(name: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, name, NUMBERS[name], engine=Spy, schedule=ABSENT, federation__rounds=4)
    start, final = lab.start().shared, lab.run().shared
    replies = [spy(lab).trained(i) for i in range(4)]
    assert final.keys() == start.keys() and len(final) == 6
    for tensor, value in final.items():
        expected = reference(name, start[tensor].numpy(), replies, tensor, NUMBERS[name])
        np.testing.assert_allclose(value.numpy(), expected, atol=2e-5, rtol=1e-4)


def test_without_momentum_fedavgm_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"federation__participation": 0.5, "federation__rounds": 3, "model__norm": "batch"}
    ours, plain = make_lab(tmp_path / "1", "fedavgm", {"beta": 0.0}, **changes), make_lab(tmp_path / "2", **changes)
    assert differing(ours.run().shared, plain.run().shared) == []


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_with_a_huge_tau_nothing_adapts_and_it_is_fedavg(name: str, tmp_path: Path) -> None:
    """eta m / (sqrt(v) + tau) with v = tau^2 and eta = 2 tau is m."""
    options = {"beta1": 0.0, "tau": 1e4, "server_step": 2e4}
    ours, plain = make_lab(tmp_path / "1", name, options), make_lab(tmp_path / "2")
    first, second = ours.run().shared, plain.run().shared
    for tensor, value in first.items():
        # v falls by (1 - beta2) in a round of Adam's: a step is longer by some thousandths.
        torch.testing.assert_close(value, second[tensor], atol=2e-3, rtol=2e-2)


def one_number(lab: Lab, *changes: float) -> ServerState:
    """Feed the server a model of one number that clients move by `changes`, round after round."""
    server = ServerState({"w": torch.zeros(1)})
    for index, change in enumerate(changes):
        lab.strategy.begin_round(server)
        lab.strategy.receive(server, Reply("train", index, "a", 10, {"w": server.shared["w"] + change}))
        lab.strategy.end_round(server, index)
    return server


def test_the_first_step_of_each_by_hand(tmp_path: Path) -> None:
    """Delta = .5 with the default beta1 = .9, beta2 = .99, tau = .001, eta = .01."""
    found = {name: one_number(make_lab(tmp_path / name, name), 0.5) for name in RULES}
    v = 0.99 * 1e-6 + 0.01 * 0.25, 1e-6 + 0.01 * 0.25
    expected = {"fedavgm": 0.5, **{n: 0.01 * 0.05 / (x**0.5 + 1e-3) for n, x in zip(RULES[1:], v, strict=True)}}
    for name, server in found.items():
        assert float(server.shared["w"]) == pytest.approx(expected[name], rel=1e-5)
    assert sorted(found["fedadam"].extra) == ["fedadam/m/w", "fedadam/v/w"]
    assert float(found["fedadam"].extra["fedadam/v/w"]) == pytest.approx(v[0], rel=1e-5)
    assert float(found["fedyogi"].extra["fedyogi/v/w"]) == pytest.approx(v[1], rel=1e-5)


def test_yogi_forgets_a_large_change_more_slowly_than_adam(tmp_path: Path) -> None:
    options = {"beta2": 0.5}
    adam, yogi = (one_number(make_lab(tmp_path / n, n, options), 1.0, *[0.01] * 5) for n in RULES[1:])
    assert float(adam.extra["fedadam/v/w"]) < 0.05 < 0.49 < float(yogi.extra["fedyogi/v/w"])


def test_momentum_goes_on_after_the_clients_stand_still(tmp_path: Path) -> None:
    server = one_number(make_lab(tmp_path, "fedavgm"), 1.0, 0.0, 0.0)
    assert float(server.shared["w"]) == pytest.approx(1 + 0.9 + 0.81)


@pytest.mark.parametrize("name", RULES)
def test_running_statistics_are_fedavgs(name: str, tmp_path: Path) -> None:
    """Of equal parameters FedAvg and the rule make other models; the mean of the statistics sent is the same rule in both."""
    lab = make_lab(tmp_path, name, engine=Spy, model__norm="batch", federation__rounds=4)
    server = lab.run()
    sent = spy(lab).trained(3)
    for tensor in ("running_mean", "running_var"):
        key = f"backbone.norm.{tensor}"
        mean = sum(r.num_examples / 36 * r.tensors[key].double() for r in sent)
        torch.testing.assert_close(server.shared[key].double(), mean, atol=1e-7, rtol=1e-6)
    assert float(server.shared["backbone.norm.running_var"].min()) > 0
    assert int(server.shared["backbone.norm.num_batches_tracked"]) == 4 * 3
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert server.extra and not any(key.rpartition(".")[2] in statistics for key in server.extra)


@pytest.mark.parametrize("name", RULES)
def test_a_tensor_that_nobody_of_a_round_holds_stays_and_so_does_its_memory(name: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, name)
    server = ServerState({"w": torch.zeros(1), "u": torch.ones(2)})
    for index, held in enumerate((("w", "u"), ("w",), ("w",))):
        before = {n: t.clone() for n, t in (server.shared | server.extra).items() if n.endswith("u")}
        lab.strategy.begin_round(server)
        lab.strategy.receive(server, Reply("train", index, "a", 10, {n: server.shared[n] + 0.5 for n in held}))
        lab.strategy.end_round(server, index)
        assert len(before) == (1 if index == 0 else 1 + len(server.extra) // 2)
        if index:
            assert differing(before, {n: t for n, t in (server.shared | server.extra).items() if n.endswith("u")}) == []
    assert float(server.shared["u"][0]) > 1


@pytest.mark.parametrize("name", RULES)
def test_one_model_has_no_neighbourhoods(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"strategies.{name}.aggregation"):
        make_lab(tmp_path, name, {"aggregation": "neighbours"})


def test_clients_are_fedavgs(tmp_path: Path) -> None:
    """In the first round, before any server rule, uploads are the same bits."""
    first: list[dict[str, torch.Tensor]] = []
    for name in ("fedavg", *RULES):
        lab = make_lab(tmp_path / name, name, engine=Spy, federation__rounds=1)
        lab.run()
        first.append({f"{r.client}:{n}": t for r in spy(lab).trained() for n, t in r.tensors.items()})
        assert all(not m.extra for m in spy(lab).messages()) and not any(lab.private(h.id) for h in HOSPITALS)
    assert all(differing(first[0], other) == [] for other in first[1:])


def still(reply: Reply, start: dict[str, Any], name: str) -> Reply:
    """Return a reply as of a client that trained without the tensor `name`, from the second round on."""
    return replace(reply, tensors={**reply.tensors, name: start[name]}) if reply.kind == "train" and reply.round else reply


@pytest.mark.parametrize("strategy", [*RULES, "feddyn"])
def test_a_tensor_that_nobody_trains_stands_still_with_its_memory(strategy: str, tmp_path: Path) -> None:
    """Momentum, or h / alpha, would carry a frozen part on."""
    first = make_lab(tmp_path / "first", strategy, federation__rounds=1).run()
    name = next(n for n in first.shared if n.endswith("weight"))
    lab = make_lab(tmp_path / "all", strategy, federation__rounds=4)
    lab.engine = Altered(lab.site, partial(still, start=dict(first.shared), name=name))
    server = lab.run()
    memory = {key for key in first.extra if key.endswith(name)}
    assert memory and torch.equal(server.shared[name], first.shared[name])
    assert all(torch.equal(server.extra[key], first.extra[key]) for key in memory)
    others = {n for n in first.shared if n != name and n not in lab.strategy.buffers}
    assert others <= set(differing(first.shared, server.shared))
