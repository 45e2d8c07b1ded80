from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from omnifm.errors import FederationError
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from tests.support import HOSPITALS, Altered, Hospital, MemoryTask, Spy, differing, make_lab, spy

PSI = ("head.linear.weight", "head.linear.bias")
NAN = float("nan")


def test_a_run_agrees_with_one_written_by_hand(tmp_path: Path) -> None:
    """Plain torch: three rounds of a lone client in full batches. G is of the model received, and stays from round to round."""
    penalty, ema, lr, decay = 0.7, 0.4, 0.1, 1e-4
    lab = make_lab(
        tmp_path / "1",
        "fediir",
        {"penalty": penalty, "ema": ema},
        hospitals=HOSPITALS[:1],
        optimiser__batch_size=10,
        optimiser__momentum=0.0,
        federation__local_epochs=2,
        federation__rounds=3,
    )
    model = make_lab(tmp_path / "2", "fedavg", hospitals=HOSPITALS[:1]).site.model
    parameters = dict(model.named_parameters())
    psi = [parameters[n] for n in PSI]
    train = lab.task.client_data("a").train
    batch = train.batch(torch.arange(len(train)))
    mean: list[Tensor] | None = None
    for _ in range(3):
        received = torch.autograd.grad(functional.cross_entropy(model(batch.inputs).prediction, batch.target), psi)
        for _ in range(2):
            loss = functional.cross_entropy(model(batch.inputs).prediction, batch.target)
            found = torch.autograd.grad(loss, psi, create_graph=True)
            total = loss
            if mean is not None:
                total = loss + penalty * sum(((g - m) ** 2).sum() for g, m in zip(found, mean, strict=True))
            for p, g in zip(parameters.values(), torch.autograd.grad(total, list(parameters.values())), strict=True):
                p.data -= lr * (g + decay * p.data)
        new = [(1 - ema) * g for g in received]
        mean = new if mean is None else [ema * m + n for m, n in zip(mean, new, strict=True)]
    server = lab.run()
    for name, p in parameters.items():
        torch.testing.assert_close(server.shared[name], p.detach(), atol=2e-6, rtol=1e-5)
    assert mean is not None
    for name, g in zip(PSI, mean, strict=True):
        torch.testing.assert_close(server.extra[f"fediir/mean/{name}"], g, atol=2e-6, rtol=1e-5)


def test_the_mean_is_over_batches_of_all_clients(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fediir", {"ema": 0.5}, engine=Spy, federation__rounds=2)
    server = lab.run()
    replies = [spy(lab).trained(i) for i in (0, 1)]
    assert [int(r.extra["fediir/batches"]) for r in replies[0]] == [-(-h.train // 4) for h in HOSPITALS]
    for name in PSI:
        means = [
            sum(r.extra[f"fediir/sum/{name}"] for r in rs) / sum(int(r.extra["fediir/batches"]) for r in rs) for rs in replies
        ]
        torch.testing.assert_close(server.extra[f"fediir/mean/{name}"], 0.25 * means[0] + 0.5 * means[1])
    sent = [r.extra for r in spy(lab).requests if r.kind == "train"]
    assert all(not extra for extra in sent[:4]), "there is no mean in the first round"
    assert all(set(extra) == {f"fediir/mean/{n}" for n in PSI} for extra in sent[4:])


def test_the_first_round_is_fedavg(tmp_path: Path) -> None:
    labs = [make_lab(tmp_path / s, s, federation__rounds=1, model__norm="batch") for s in ("fediir", "fedavg")]
    assert differing(*(lab.run().shared for lab in labs)) == []


@pytest.mark.parametrize("changes", [{}, {"federation__participation": 0.5, "model__norm": "batch"}])
def test_without_its_penalty_it_is_fedavg_bit_for_bit_and_sends_no_more(changes: dict[str, Any], tmp_path: Path) -> None:
    ours = make_lab(tmp_path / "1", "fediir", {"penalty": 0.0}, engine=Spy, **changes)
    plain = make_lab(tmp_path / "2", "fedavg", **changes)
    assert differing(ours.snapshot(ours.run()), plain.snapshot(plain.run())) == []
    assert all(not message.extra for message in spy(ours).messages())


def test_a_strong_penalty_brings_gradients_together(tmp_path: Path) -> None:
    def spread(penalty: float) -> float:
        lab = make_lab(tmp_path / str(penalty), "fediir", {"penalty": penalty, "ema": 0.0}, engine=Spy, federation__rounds=8)
        lab.run()
        name = f"fediir/sum/{PSI[0]}"
        means = torch.stack([r.extra[name] / r.extra["fediir/batches"] for r in spy(lab).trained(7)])
        return float((means - means.mean(dim=0)).square().sum())

    assert spread(10.0) < 0.5 * spread(1e-9)


def test_statistics_are_moved_once_a_step(tmp_path: Path) -> None:
    ours = make_lab(tmp_path / "1", "fediir", model__norm="batch")
    plain = make_lab(tmp_path / "2", "fedavg", model__norm="batch")
    name = "backbone.norm.num_batches_tracked"
    assert int(ours.run().shared[name]) == int(plain.run().shared[name]) > 0


Extra = dict[str, Tensor]
FIRST = f"fediir/sum/{PSI[0]}"
BAD: dict[str, tuple[Callable[[Extra], Extra], str]] = {
    "nothing": (lambda x: {}, "of how many batches its gradients are is missing"),
    "no batches": (lambda x: {**x, "fediir/batches": torch.tensor(0)}, "of how many batches"),
    "batches of another shape": (lambda x: {**x, "fediir/batches": torch.ones(2)}, "of how many batches"),
    "another shape": (lambda x: {**x, FIRST: x[FIRST][None]}, "head.linear.weight has shape"),
    "unknown": (lambda x: {**x, "fediir/sum/zz": torch.ones(1)}, "zz has shape"),
    "not finite": (lambda x: {**x, FIRST: x[FIRST] * NAN}, "head.linear.weight is not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_gradients_name_the_client(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    lab = make_lab(tmp_path, "fediir")
    lab.engine = Altered(lab.site, lambda r: replace(r, extra=change(dict(r.extra))) if (r.client, r.round) == ("d", 1) else r)
    with pytest.raises(FederationError, match=f"client d, round 1: .*{message}"):
        lab.run()


def test_a_head_that_few_hold_has_the_mean_of_those(tmp_path: Path) -> None:
    strategy = make_lab(tmp_path, "fediir", {"ema": 0.0}).strategy
    server = ServerState({"v": torch.zeros(1), "w": torch.zeros(1)})
    for round_index, sent in enumerate([{"a": {"v": 6.0, "w": 3.0}, "b": {"w": 5.0}}, {"b": {"w": 8.0}}]):
        strategy.begin_round(server)
        for client, sums in sent.items():
            extra = {f"fediir/sum/{n}": torch.tensor([x]) for n, x in sums.items()} | {"fediir/batches": torch.tensor(2)}
            strategy.receive(server, Reply("train", round_index, client, 3, {}, extra))
        strategy.end_round(server, round_index)
    assert {n: float(t) for n, t in server.extra.items()} == {"fediir/mean/v": 3.0, "fediir/mean/w": 4.0}
    strategy.holds = {"b": frozenset({"w"})}
    assert set(strategy.extra_for(server, "a")) == {"fediir/mean/v", "fediir/mean/w"}
    assert set(strategy.extra_for(server, "b")) == {"fediir/mean/w"}, "nobody gets the gradient of a head that it has not"


def test_gradients_are_of_every_batch_but_one_of_one(tmp_path: Path) -> None:
    """With BatchNorm a single example cannot be passed, and the local loop leaves it out as well."""
    hospitals = (Hospital("a", "CT", 9), Hospital("b", "MRI", 3), Hospital("c", "US", 10))
    lab = make_lab(tmp_path, "fediir", hospitals=hospitals, engine=Spy, model__norm="batch", federation__local_epochs=3)
    lab.run()
    assert [int(r.extra["fediir/batches"]) for r in spy(lab).trained(1)] == [2, 1, 3], "and not of every step"


def test_a_head_that_is_frozen_has_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryTask, "begin_training", lambda self, model, t: model.head.requires_grad_(t > 0))
    lab = make_lab(tmp_path, "fediir", engine=Spy, federation__rounds=3)
    lab.run()
    told = [[sorted(r.extra) for r in spy(lab).trained(t)] for t in (0, 1)]
    assert told == [[["fediir/batches"]] * 4, [["fediir/batches", *sorted(f"fediir/sum/{n}" for n in PSI)]] * 4]
