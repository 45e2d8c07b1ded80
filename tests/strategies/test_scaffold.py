from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from omnifm.errors import ConfigError, FederationError
from omnifm.federation.client import STATE
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from omnifm.federation.strategies.scaffold import CHANGE, CONTROL
from omnifm.tasks.base import Batch
from tests.strategies.quadratic import CLIENTS, CURVES, OPTIMUM, minimise
from tests.support import HOSPITALS, Altered, Lab, Spy, differing, make_lab, spy

PLAIN: dict[str, Any] = {"optimiser__momentum": 0.0, "optimiser__weight_decay": 0.0}
ABSENT = [["a", "b"], ["c"], ["a", "d"], ["b", "c", "d"]]


def own(lab: Lab, client: str, name: str, done: int = 10**6) -> Tensor:
    """c_i, zero at a client that never trained."""
    return lab.private(client, done).get(STATE + CONTROL + name, torch.zeros_like(lab.untrained[name]))


def test_the_first_round_is_fedavgs_bit_for_bit(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"federation__rounds": 1, "federation__weighting": "equal", "model__norm": "batch"}
    ours, plain = make_lab(tmp_path / "1", "scaffold", **changes), make_lab(tmp_path / "2", **changes)
    assert differing(ours.run().shared, plain.run().shared) == []
    changes["federation__rounds"] = 2
    ours, plain = make_lab(tmp_path / "3", "scaffold", **changes), make_lab(tmp_path / "4", **changes)
    assert differing(ours.run().shared, plain.run().shared)


def test_one_full_step_everywhere_is_gradient_descent_with_the_mean_gradient(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "scaffold", optimiser__batch_size=99, federation__rounds=4, **PLAIN)
    model = make_lab(tmp_path, "fedavg").site.model
    batches = [lab.task.client_data(h.id).train.batch(torch.arange(h.train)) for h in HOSPITALS]
    for _ in range(4):
        parameters = list(model.parameters())
        # Clients count the same, though they hold 10, 6, 12 and 8 examples.
        losses = [functional.cross_entropy(model(b.inputs).prediction, b.target) for b in batches]
        for p, g in zip(parameters, torch.autograd.grad(torch.stack(losses).mean(), parameters), strict=True):
            p.data -= 0.1 * g
    for name, tensor in lab.run().shared.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("schedule", [None, ABSENT])
def test_the_clients_control_variates_sum_to_n_times_the_servers(schedule: list[list[str]] | None, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "scaffold", schedule=schedule, federation__rounds=4)
    checked: list[int] = []

    def check(lab: Lab, server: ServerState, done: int) -> None:
        for name in server.shared:
            total = torch.stack([own(lab, h.id, name) for h in HOSPITALS]).sum(0)
            torch.testing.assert_close(total, 4 * server.extra[CONTROL + name], atol=1e-6, rtol=1e-4)
        checked.append(done)

    lab.after_round = check
    assert lab.run().extra.keys() == {CONTROL + n for n in lab.untrained} and checked == [1, 2, 3, 4]


def test_it_is_option_two_with_the_steps_and_the_rate_of_the_round(tmp_path: Path) -> None:
    """c_i^+ = c_i - c + (theta^t - y_i) / (K_i eta_l), with SGD and nothing else; a has 3 steps, b 2."""
    changes: dict[str, Any] = {"optimiser__schedule": "cosine", "federation__local_epochs": 2, "federation__rounds": 3}
    lab = make_lab(tmp_path, "scaffold", engine=Spy, **changes, **PLAIN)
    seen: list[dict[str, dict[str, Tensor]]] = [{h.id: {} for h in HOSPITALS}]
    lab.after_round = lambda lab, server, done: seen.append({h.id: lab.private(h.id) for h in HOSPITALS})
    lab.run()
    requests = [r for r in spy(lab).requests if r.kind == "train"]
    rates = [0.1, 0.075, 0.025]
    for request, reply in zip(requests, spy(lab).trained(), strict=True):
        steps = 2 * -(-reply.num_examples // 4)
        for name, start in request.tensors.items():
            before, after = (seen[request.round + k][request.client].get(STATE + CONTROL + name) for k in (0, 1))
            assert after is not None
            before = torch.zeros_like(after) if before is None else before
            c = request.extra.get(CONTROL + name, torch.zeros_like(after))
            expected = before - c + (start - reply.tensors[name]) / (steps * rates[request.round])
            torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(reply.extra[CHANGE + name], after - before)


@pytest.mark.parametrize(
    "optimiser",
    [
        {"momentum": 0.9},
        {"name": "adamw", "lr": 0.01},
        {"momentum": 0.9, "clip_norm": 0.01, "weight_decay": 0.1},
    ],
)
def test_a_control_variate_is_a_gradient_whatever_the_optimiser(optimiser: dict[str, Any], tmp_path: Path) -> None:
    """Of a loss with one gradient everywhere it is that gradient; from a distance travelled it would be another."""
    lab = make_lab(tmp_path, "scaffold", federation__local_epochs=3, **{f"optimiser__{k}": v for k, v in optimiser.items()})

    def linear(prediction: Tensor, batch: Batch) -> Tensor:
        return (prediction * torch.tensor([1.0, -2.0, 3.0])).sum(1).mean()

    lab.task.loss = linear  # type: ignore[method-assign]
    server = lab.run()
    name = next(n for n, t in server.shared.items() if n.startswith("head") and t.shape == (3,))
    for h in HOSPITALS:
        torch.testing.assert_close(own(lab, h.id, name), torch.tensor([1.0, -2.0, 3.0]))
    torch.testing.assert_close(server.extra[CONTROL + name], torch.tensor([1.0, -2.0, 3.0]))


def test_it_ends_where_fedavg_does_not(tmp_path: Path) -> None:
    """On three parabolas, ten steps a round: FedAvg stops beside the optimum, SCAFFOLD at it, with half the clients too."""
    labs = {s: make_lab(tmp_path / s, s, hospitals=CLIENTS) for s in ("scaffold", "fedavg")}
    theta = {s: float(minimise(lab.strategy, 200, 10, 0.05)[0].shared["theta"]) for s, lab in labs.items() if s == "scaffold"}
    assert theta["scaffold"] == pytest.approx(OPTIMUM, abs=1e-6)
    server, states = minimise(labs["scaffold"].strategy, 600, 10, 0.05, (("a", "b"), ("b", "c"), ("a", "c")))
    assert float(server.shared["theta"]) == pytest.approx(OPTIMUM, abs=1e-6)
    total = sum(float(state[CONTROL + "theta"]) for state in states.values())
    assert total == pytest.approx(3 * float(server.extra[CONTROL + "theta"]), abs=1e-9)
    plain = float(minimise(labs["fedavg"].strategy, 200, 10, 0.05)[0].shared["theta"])
    assert abs(plain - OPTIMUM) > 0.02


@pytest.mark.parametrize("schedule", [(("a", "b", "c"),), (("a", "b"), ("b", "c"), ("a", "c"))])
def test_with_momentum_it_ends_at_the_optimum_too(schedule: tuple[tuple[str, ...], ...], tmp_path: Path) -> None:
    """Control variates are mean gradients. From the distance, which momentum makes longer, they would be too large to settle."""
    lab = make_lab(tmp_path, "scaffold", hospitals=CLIENTS)
    server, states = minimise(lab.strategy, 600, 20, 0.02, schedule, momentum=0.9)
    assert float(server.shared["theta"]) == pytest.approx(OPTIMUM, abs=1e-6)
    for client, (a, b) in CURVES.items():
        assert float(states[client][CONTROL + "theta"]) == pytest.approx(a * (OPTIMUM - b), abs=1e-5)


def test_a_tensor_that_few_hold_counts_those(tmp_path: Path) -> None:
    """c of a tensor that one client of four has is that client's, so that nothing corrects it; the others are not sent it."""
    lab = make_lab(tmp_path, "scaffold")
    strategy = lab.strategy
    server = ServerState({"w": torch.zeros(1), "head.own": torch.zeros(1)})
    strategy.holds = {h.id: frozenset({"w"}) for h in HOSPITALS[:3]}
    strategy.begin_round(server)
    strategy.receive(server, Reply("train", 0, "a", 10, {"w": torch.ones(1)}, {CHANGE + "w": torch.ones(1)}))
    both = {"w": torch.ones(1), "head.own": torch.ones(1)}
    strategy.receive(server, Reply("train", 0, "d", 8, both, {CHANGE + n: 2 * t for n, t in both.items()}))
    strategy.end_round(server, 0)
    assert float(server.extra[CONTROL + "w"]) == 3 / 4 and float(server.extra[CONTROL + "head.own"]) == 2
    assert strategy.extra_for(server, "a").keys() == {CONTROL + "w"}
    assert strategy.extra_for(server, "d").keys() == {CONTROL + "w", CONTROL + "head.own"}


def test_c_is_sent_for_training_alone(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "scaffold", engine=Spy)
    server = lab.run()
    lab.evaluate(server, finetune=True)
    asked = {kind: [r.extra for r in spy(lab).requests if r.kind == kind] for kind in ("train", "evaluate")}
    assert server.extra and all(extra.keys() == server.extra.keys() for extra in asked["train"][4:])
    assert len(asked["evaluate"]) == 12 and not any(asked["evaluate"])


def test_statistics_have_no_control_variates_and_are_fedavgs(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "scaffold", engine=Spy, model__norm="batch")
    server = lab.run()
    parameters = {n for n, _ in lab.site.model.named_parameters()}
    assert server.extra.keys() == {CONTROL + n for n in parameters} and parameters < server.shared.keys()
    assert lab.private("a").keys() == {STATE + CONTROL + n for n in parameters}
    sent = spy(lab).trained(1)
    assert all(reply.extra.keys() == {CHANGE + n for n in parameters} for reply in sent)
    for name, tensor in server.shared.items():
        weights = [0.25] * 4 if name in parameters else [r.num_examples / 36 for r in sent]
        if tensor.is_floating_point():
            mean = sum(w * r.tensors[name].double() for w, r in zip(weights, sent, strict=True))
            torch.testing.assert_close(tensor.double(), mean, atol=1e-7, rtol=1e-6)


def test_the_server_may_go_part_of_the_way(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "scaffold", {"server_step": 0.3}, engine=Spy, federation__rounds=1)
    old, new = lab.start().shared, lab.run().shared
    for name, start in old.items():
        mean = torch.stack([r.tensors[name] for r in spy(lab).trained()]).mean(0)
        torch.testing.assert_close(new[name], start + 0.3 * (mean - start), atol=1e-6, rtol=1e-5)


def test_traffic_is_twice_fedavgs(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "scaffold")
    lab.run()
    first, *_, last = (e for e in lab.events if e["event"] == "client")
    model = sum(size for group, size in last["bytes_up"].items() if group != "scaffold")
    assert last["bytes_up"]["scaffold"] == last["bytes_down"]["scaffold"] == model
    assert "scaffold" not in first["bytes_down"]


BAD: dict[str, tuple[Callable[[Tensor], Tensor | None], str]] = {
    "missing": (lambda t: None, "missing"),
    "shape": (lambda t: t[None], "of another shape"),
    "not finite": (lambda t: t * float("nan"), "not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_change_names_client_and_round(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]

    def alter(reply: Reply) -> Reply:
        if (reply.kind, reply.client, reply.round) != ("train", "c", 1):
            return reply
        found = {n: change(t) if n.endswith("conv.weight") else t for n, t in reply.extra.items()}
        return replace(reply, extra={n: t for n, t in found.items() if t is not None})

    lab = make_lab(tmp_path, "scaffold", engine=partial(Altered, change=alter))
    with pytest.raises(FederationError, match=f"client c, round 1: tensor {CHANGE}backbone.conv.weight is {message}"):
        lab.run()


def test_one_control_variate_has_no_neighbourhoods(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategies\.scaffold\.aggregation"):
        make_lab(tmp_path, "scaffold", {"aggregation": "neighbours"})
