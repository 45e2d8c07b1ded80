"""A fifth of the clients is hostile: the robust strategies hold the optimum of the others, the mean does not."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnifm.errors import FederationError
from omnifm.federation.messages import Reply, Request
from omnifm.federation.robust import hostile_among
from omnifm.federation.state import LocalJob, ServerState
from omnifm.federation.strategy import Upload
from omnifm.tasks.base import ClientData
from omnifm.track.checkpoint import Checkpoint
from omnifm.track.recorder import RunRecorder
from tests.support import Altered, Hospital, Lab, MemorySplit, Spy, Wire, differing, make_lab, make_split, spy

ROBUST = ["median", "trimmed_mean", "multikrum", "clipped_mean"]
CLIENTS = tuple(Hospital(name, "CT", 8) for name in "abcdefghij")
HOSTILE = ("c", "h")
RATE, SPREAD = 0.5, 0.1
Tensors = dict[str, Tensor]


def flipped(theta: Tensor, honest: Tensor) -> Tensor:
    return -honest


def reversed_and_scaled(theta: Tensor, honest: Tensor) -> Tensor:
    return theta - 10 * (honest - theta)


def scaled(theta: Tensor, honest: Tensor) -> Tensor:
    return 100 * honest


def huge(theta: Tensor, honest: Tensor) -> Tensor:
    return torch.full_like(honest, 1e30)


def no_number(theta: Tensor, honest: Tensor) -> Tensor:
    return honest * float("nan")


Attack = Callable[[Tensor, Tensor], Tensor]
ATTACKS: list[Attack] = [flipped, reversed_and_scaled, scaled, huge, no_number]


def noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else torch.zeros_like(tensor)


@dataclass
class Quadratic:
    """Clients that step half the way to an optimum of their own, || theta - o_i ||^2; the hostile ones then attack."""

    optima: dict[str, Tensors]
    attack: Attack | None

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        for request in requests:
            own = self.optima[request.client]
            tensors = {n: t + RATE * (own[n] - t) if t.is_floating_point() else t for n, t in request.tensors.items()}
            if self.attack and request.client in HOSTILE:
                tensors = {n: self.attack(request.tensors[n], t) if t.is_floating_point() else t for n, t in tensors.items()}
            yield Reply("train", request.round, request.client, 8, tensors, metrics={"loss": 1.0}, nonce=request.nonce)


def quadratic(folder: Path, strategy: str, attack: Attack | None, norm: str = "group") -> tuple[Lab, Tensors]:
    """Return a lab on the toy problem, and the optimum of the honest clients."""
    lab = make_lab(folder, strategy, hospitals=CLIENTS, federation__rounds=20, model__norm=norm)
    generator = torch.Generator().manual_seed(1)
    centre = {n: noise(t, generator) for n, t in lab.untrained.items()}
    optima = {h.id: {n: t + SPREAD * noise(t, generator) for n, t in centre.items()} for h in CLIENTS}
    lab.engine = Quadratic(optima, attack)
    honest = [optima[h.id] for h in CLIENTS if h.id not in HOSTILE]
    return lab, {n: torch.stack([o[n] for o in honest]).double().mean(dim=0) for n, t in centre.items() if t.is_floating_point()}


def distance(found: Tensors, optimum: Tensors) -> float:
    """Root mean square over all coordinates."""
    return float(torch.cat([(found[n] - t).flatten() for n, t in optimum.items()]).square().mean().sqrt())


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("strategy", ROBUST)
def test_a_fifth_of_hostile_clients_does_not_move_it_further_than_honest_ones_differ(
    strategy: str, attack: Attack, norm: str, tmp_path: Path
) -> None:
    lab, optimum = quadratic(tmp_path, strategy, attack, norm)
    assert distance(dict(lab.untrained), optimum) > 0.9
    found = lab.run().shared
    assert ("backbone.norm.running_mean" in optimum) == (norm == "batch"), "running statistics are attacked, too"
    assert distance(found, optimum) < SPREAD / 2
    rounds = [e["discarded"] for e in lab.events if e["event"] == "round"]
    assert rounds == [len(HOSTILE) if attack is no_number else 0] * 20


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a is not no_number])
def test_the_mean_is_moved_far(attack: Attack, tmp_path: Path) -> None:
    lab, optimum = quadratic(tmp_path, "fedavg", attack)
    try:
        assert distance(lab.run().shared, optimum) > 4 * SPREAD
    except FederationError as error:
        assert "is not finite" in str(error)  # it grew until the hostile clients' replies overflowed


def test_the_mean_ends_with_the_first_reply_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"client c, round 0: tensor .* is not finite"):
        quadratic(tmp_path, "fedavg", no_number)[0].run()


@pytest.mark.parametrize("strategy", [*ROBUST, "fedavg"])
def test_without_an_attack_all_find_the_optimum(strategy: str, tmp_path: Path) -> None:
    lab, optimum = quadratic(tmp_path, strategy, None)
    assert distance(lab.run().shared, optimum) < SPREAD


def honest_loss(folder: Path, strategy: str) -> float:
    """Return the mean loss of the honest clients in the last round of real training."""
    hospitals = tuple(Hospital(name, m, 12) for name, m in zip("abcdefghij", ["CT", "MRI"] * 5, strict=True))
    changes: dict[str, Any] = {"federation__rounds": 8, "federation__local_epochs": 5, "optimiser__lr": 0.3}
    lab = make_lab(folder, strategy, hospitals=hospitals, **changes)

    def attack(reply: Reply) -> Reply:
        return replace(reply, tensors={n: -3 * t for n, t in reply.tensors.items()}) if reply.client in HOSTILE else reply

    lab.engine = Altered(lab.site, attack)
    lab.run()
    last = [e for e in lab.events if e["event"] == "client" and e["round"] == 7 and e["client"] not in HOSTILE]
    return sum(e["loss"] for e in last) / len(last)


def test_real_training_goes_on_among_hostile_clients(tmp_path: Path) -> None:
    found = {s: honest_loss(tmp_path / s, s) for s in (*ROBUST, "fedavg")}
    assert found.pop("fedavg") > math.log(3), "the mean has learned nothing"
    assert all(loss < 0.95 for loss in found.values()), found


@pytest.mark.parametrize("strategy", ROBUST)
def test_a_round_without_a_finite_reply_ends_the_run(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy)
    lab.engine = Altered(lab.site, lambda r: replace(r, metrics={"loss": float("inf")}) if r.round else r)
    with pytest.raises(FederationError, match="round 1: no client's reply is finite"):
        lab.run()


def test_a_discarded_reply_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lab, _ = quadratic(tmp_path, "median", no_number)
    lab.run()
    assert caplog.messages[0].startswith("client c, round 0: tensor ") and len(caplog.messages) == 40


def test_a_share_of_clients_is_rounded_up() -> None:
    assert [hostile_among(0.2, n) for n in (1, 4, 5, 6, 10, 15)] == [1, 1, 1, 2, 2, 3]
    assert hostile_among(0.07, 100) == 7, "0.07 * 100 is a little more than 7"
    assert hostile_among(0.0, 9) == 0


@pytest.mark.parametrize(
    ("strategy", "options"), [("trimmed_mean", {"beta": 0}), ("multikrum", {"hostile": 0}), ("clipped_mean", {"bound": 99})]
)
def test_without_a_guard_statistics_alone_are_not_fedavgs(strategy: str, options: dict[str, float], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"federation__rounds": 1, "federation__weighting": "equal", "model__norm": "batch"}
    lab = make_lab(tmp_path / "1", strategy, options, engine=Spy, **changes)
    ours, plain = lab.run().shared, make_lab(tmp_path / "2", **changes).run().shared
    moving = {n for n in ours if "running" in n}
    assert set(differing(ours, plain)) == moving and len(moving) == 2
    for name in moving:
        middle = torch.stack([reply.tensors[name] for reply in spy(lab).trained()]).sort(dim=0).values[1:3].mean(dim=0)
        torch.testing.assert_close(ours[name], middle)


# --------------------------------------------------------------------------- a client that fails by itself
def sick(folder: Path, strategy: str, **changes: Any) -> Lab:
    """A lab in which client d has an image that is no number, in every round but the first."""
    healthy = make_lab(folder / "0", strategy).task.client_data("d")
    images = make_split(8, "US", "sick")
    lab = make_lab(folder / "1", strategy, data={"d": replace(healthy, train=images)}, engine=Wire, **changes)

    def fall_ill(lab: Lab, server: ServerState, done: int) -> None:
        images.images[3, 0, 5, 5] = float("nan")

    lab.after_round = fall_ill
    return lab


@pytest.mark.parametrize("strategy", ROBUST)
def test_a_client_whose_training_fails_is_discarded_and_keeps_its_private_state(strategy: str, tmp_path: Path) -> None:
    lab = sick(tmp_path, strategy, model__norm="batch", model__buffers="local", federation__rounds=3)
    kept: list[dict[str, Tensor]] = []
    fall_ill = lab.after_round

    def after(lab: Lab, server: ServerState, done: int) -> None:
        fall_ill(lab, server, done)
        kept.append(lab.private("d"))

    lab.after_round = after
    server = lab.run()
    assert [e["discarded"] for e in lab.events if e["event"] == "round"] == [0, 1, 1]
    events = [e for e in lab.events if e["event"] == "client" and "discarded" in e]
    assert [(e["client"], e["round"], e["loss"]) for e in events] == [("d", 1, None), ("d", 2, None)]
    assert all(e["bytes_up"] for e in events)
    assert all(bool(t.isfinite().all()) for t in server.shared.values())
    assert kept[0] and differing(kept[0], kept[1]) == differing(kept[0], kept[2]) == []
    assert differing(lab.private("a"), lab.private("a", 1)), "the others went on"
    found = lab.evaluate(server, finetune=True)
    assert found.clients["d"]["personal"] is not None and found.clients["d"]["finetuned"] is None
    assert found.clients["a"]["finetuned"] is not None and found.views["finetuned"] is not None


def test_without_a_client_whose_fine_tuning_fails_there_is_no_mean_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab = sick(tmp_path, "median")
    server = lab.run()
    caplog.clear()
    found = lab.evaluate(server, finetune=True)
    assert found.views["finetuned"] == dict.fromkeys(found.views["personal"] or {})
    assert found.views["personal"] is not None and None not in found.views["personal"].values()
    assert caplog.messages == [
        "client d, round 2: a loss or prediction is not finite; the scores over all clients (finetuned) are undefined"
    ]


def test_a_round_without_a_mean_is_not_the_best(tmp_path: Path) -> None:
    """The network of client d says NaN for its own validation images, so those of the others say nothing of all."""
    lab = make_lab(tmp_path, "median", data={"d": holed(make_lab(tmp_path / "0").task.client_data("d"))})
    found = lab.evaluate(lab.run(), "val")
    assert found.clients["d"]["personal"] is None and found.clients["a"]["personal"] is not None
    assert all(value is None for view in ("personal", "worst", "global") for value in (found.views[view] or {"": 0}).values())
    recorder = RunRecorder(tmp_path, Checkpoint(tmp_path / "checkpoint"), "accuracy")
    recorder.event({"event": "evaluation", "round": 0, "split": "val", **found.views, "clients": {}})
    assert recorder.best is None
    recorder.close()


def holed(data: ClientData) -> ClientData:
    assert isinstance(data.val, MemorySplit)
    data.val.images[0, 0, 5, 5] = float("nan")
    return data


def test_the_others_go_on_as_if_the_client_had_not_been_asked(tmp_path: Path) -> None:
    lab = sick(tmp_path, "median")
    data = {"d": replace(lab.task.client_data("d"), train=make_split(8, "US", "sick"))}
    without = make_lab(tmp_path / "2", "median", data=data, schedule=[["a", "b", "c", "d"], ["a", "b", "c"]])
    assert differing(lab.run().shared, without.run().shared) == []


def test_the_mean_ends_with_a_client_whose_training_fails(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"^client d, round 1: the loss is not finite \(lower optimiser.lr\?\)$"):
        sick(tmp_path, "fedavg").run()


def test_weights_that_are_no_numbers_after_the_last_step_leave_private_state_alone(tmp_path: Path) -> None:
    """The loss is that of the steps before."""
    changes: dict[str, Any] = {"model__norm": "batch", "model__buffers": "local", "optimiser__batch_size": 16}
    lab = make_lab(tmp_path, "median", **changes)
    finish = lab.site.strategy.finish

    def spoil(job: LocalJob) -> Upload:
        if (job.client, job.round) == ("d", 1):
            next(job.model.head.parameters()).data.mul_(float("inf"))
        return finish(job)

    lab.site.strategy.finish = spoil  # type: ignore[method-assign]
    lab.run()
    assert [e["discarded"] for e in lab.events if e["event"] == "round"] == [0, 1]
    assert differing(lab.private("d"), lab.private("d", 1)) == []
