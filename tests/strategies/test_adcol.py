import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omnifm.errors import FederationError
from omnifm.federation.discriminator import divergence_from_uniform
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from omnifm.federation.strategies.adcol import ADCOL
from omnifm.federation.strategy import Step
from tests.support import HOSPITALS, Altered, Hospital, Lab, Spy, differing, make_lab, spy

JUDGE = "adcol/discriminator/"


def strategy_of(lab: Lab) -> ADCOL:
    assert isinstance(lab.strategy, ADCOL)
    return lab.strategy


def judge_in(server: ServerState) -> dict[str, Tensor]:
    return {n.removeprefix(JUDGE): t for n, t in server.extra.items() if n.startswith(JUDGE)}


def verdict(judge: Mapping[str, Tensor], f: Tensor) -> Tensor:
    """The discriminator in evaluation mode, written out."""
    for layer, norm in ((0, 1), (3, 4)):
        f = f @ judge[f"{layer}.weight"].t()
        f = (f - judge[f"{norm}.running_mean"]) / (judge[f"{norm}.running_var"] + 1e-5).sqrt()
        f = (f * judge[f"{norm}.weight"] + judge[f"{norm}.bias"]).clamp_min(0)
    return f @ judge["6.weight"].t()


@pytest.mark.parametrize("changes", [{}, {"model__norm": "batch", "federation__participation": 0.5}])
def test_without_its_term_the_model_is_fedavgs_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    ours = make_lab(tmp_path / "1", "adcol", {"mu": 0.0}, **changes).run()
    assert differing(ours.shared, make_lab(tmp_path / "2", **changes).run().shared) == []


def test_the_first_round_is_fedavgs_and_the_second_is_not(tmp_path: Path) -> None:
    """There is no discriminator before there are prototypes."""
    seen: list[dict[str, Tensor]] = []
    for name in ("adcol", "fedavg"):
        lab = make_lab(tmp_path / name, name)
        lab.after_round = lambda lab, server, done: seen.append(dict(server.shared))
        lab.run()
    assert differing(seen[0], seen[2]) == [] and differing(seen[1], seen[3])


def test_the_divergence_is_kl_from_uniform_to_the_answer() -> None:
    logits = torch.randn(5, 4)
    terms = [0.25 * math.log(0.25 / q) for row in logits.softmax(1).tolist() for q in row]
    assert float(divergence_from_uniform(logits)) == pytest.approx(sum(terms) / 5, rel=1e-5)
    assert float(divergence_from_uniform(torch.full((3, 7), 2.0))) == pytest.approx(0, abs=1e-6)


def test_prototypes_are_means_of_the_trained_models_features(tmp_path: Path) -> None:
    """With one prototype a client uploads the mean feature of its images, of the model that it sends."""
    lab = make_lab(tmp_path, "adcol", {"prototypes": 1}, engine=Spy, federation__rounds=1)
    server = lab.run()
    for reply in spy(lab).trained():
        backbone = lab.site.model.backbone
        own = {n.removeprefix("backbone."): t for n, t in reply.tensors.items() if n.startswith("backbone.")}
        backbone.load_state_dict(own)
        train = lab.task.client_data(reply.client).train
        f = backbone(train.batch(torch.arange(len(train))).inputs).tokens.mean(dim=1)
        torch.testing.assert_close(reply.extra["adcol/prototypes"], f.mean(0, keepdim=True).detach(), atol=1e-6, rtol=1e-5)
        assert reply.extra["adcol/counts"].tolist() == [len(train)]
        assert torch.equal(server.extra[f"adcol/prototypes/{reply.client}"], reply.extra["adcol/prototypes"])


def test_what_travels_is_at_most_k_prototypes_and_the_discriminator(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "adcol", {"prototypes": 3, "hidden": 16}, engine=Spy)
    server = lab.run()
    for reply in spy(lab).trained():
        assert set(reply.extra) == {"adcol/prototypes", "adcol/counts"}
        assert reply.extra["adcol/prototypes"].shape == (3, 8) and reply.extra["adcol/counts"].sum() == reply.num_examples
    for request in spy(lab).requests:
        names = {n for n in request.extra if n.startswith(JUDGE)}
        assert set(request.extra) == names and bool(names) == (request.round == 1)
    sizes = {n: tuple(t.shape) for n, t in judge_in(server).items() if n.endswith("weight")}
    assert sizes == {"0.weight": (16, 8), "1.weight": (16,), "3.weight": (16, 16), "4.weight": (16,), "6.weight": (4, 16)}


def test_a_round_agrees_with_one_written_by_hand(tmp_path: Path) -> None:
    """The second round of a client in full batches: the task's loss and mu times the divergence of its mean tokens."""
    changes: dict[str, Any] = {"optimiser__batch_size": 99, "optimiser__momentum": 0.0, "federation__local_epochs": 2}
    lab = make_lab(tmp_path / "1", "adcol", {"mu": 2.0}, engine=Spy, **changes)
    lab.run()
    request = next(r for r in spy(lab).requests if (r.kind, r.round, r.client) == ("train", 1, "b"))
    reply = next(r for r in spy(lab).trained(1) if r.client == "b")
    judge = {n.removeprefix(JUDGE): t for n, t in request.extra.items()}
    model = make_lab(tmp_path / "2", **changes).site.model
    model.load_state_dict(dict(request.tensors))
    train = lab.task.client_data("b").train
    batch = train.batch(torch.arange(len(train)))
    parameters = list(model.parameters())
    for _ in range(2):
        f = model.backbone(batch.inputs).tokens.mean(dim=1)
        chances = verdict(judge, f).softmax(dim=1)
        term = (0.25 * (0.25 / chances).log()).sum(dim=1).mean()
        loss = lab.task.loss(model(batch.inputs).prediction, batch) + 2.0 * term
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= 0.1 * (g + 1e-4 * p.data)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(reply.tensors[name], tensor, atol=3e-6, rtol=1e-5)


def test_the_discriminator_stays_as_it_is_at_the_client(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "adcol", engine=Spy, federation__rounds=3)
    lab.run()
    sent: dict[int, list[dict[str, Tensor]]] = {}
    for request in spy(lab).requests:
        sent.setdefault(request.round, []).append(dict(request.extra))
    assert all(differing(first, other) == [] for first, *rest in sent.values() for other in rest)
    assert differing(sent[1][0], sent[2][0])


def test_the_server_learns_who_is_who(tmp_path: Path) -> None:
    """Prototypes of two clients that lie apart are told apart; weights say how much each counts."""
    lab = make_lab(tmp_path, "adcol", {"discriminator_epochs": 60, "discriminator_lr": 0.1})
    strategy, server = strategy_of(lab), ServerState({})
    g = torch.Generator().manual_seed(0)
    vectors = torch.cat([torch.randn(8, 8, generator=g) + 2 * shift for shift in (-1, 1)])
    target = torch.tensor([3] * 8 + [1] * 8)
    assert strategy._learn(server, vectors, target, torch.ones(16), 0) == 1.0
    # Where everything has two names, the one that stands for more images wins.
    heavy = torch.tensor([9.0] * 8 + [1.0] * 8)
    other = ServerState({})
    strategy._learn(other, vectors[:8].repeat(2, 1), target, heavy, 0)
    assert verdict(judge_in(other), vectors[:8]).argmax(dim=1).tolist() == [3] * 8


def test_the_discriminator_agrees_with_one_trained_by_hand(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "adcol", {"hidden": 6, "discriminator_lr": 0.3})
    strategy, server = strategy_of(lab), ServerState({})
    start = {n: t.clone() for n, t in strategy._discriminator({}, 8).state_dict().items()}
    vectors, target, counts = torch.randn(10, 8), torch.arange(10) % 4, torch.rand(10) + 0.5
    strategy._learn(server, vectors, target, counts, 0)
    layers = [nn.Linear(8, 6, False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6, False), nn.BatchNorm1d(6), nn.ReLU()]
    judge = nn.Sequential(*layers, nn.Linear(6, 4, False))
    judge.load_state_dict(start)
    parameters = list(judge.parameters())
    for _ in range(3):
        chance = judge(vectors).log_softmax(dim=1)[torch.arange(10), target]
        loss = -sum(c * x for c, x in zip(counts, chance, strict=True)) / counts.sum()
        for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= 0.3 * grad
    for name, tensor in judge.state_dict().items():
        torch.testing.assert_close(judge_in(server)[name], tensor, atol=1e-5, rtol=1e-4)


def test_clients_are_numbered_by_their_ids_or_their_modalities(tmp_path: Path) -> None:
    turned = HOSPITALS[::-1]
    by_client = strategy_of(make_lab(tmp_path, "adcol", hospitals=turned))
    assert [by_client._number(c) for c in "abcd"] == [0, 1, 2, 3]
    by_kind = strategy_of(make_lab(tmp_path, "adcol", {"predicts": "modality"}, hospitals=turned))
    assert [by_kind._number(c) for c in "abcd"] == [0, 1, 0, 2]
    assert by_kind._discriminator({}, 8).state_dict()["6.weight"].shape[0] == 3


def test_it_remembers_the_latest_prototypes_of_who_is_away(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "adcol", {"prototypes": 2}, schedule=[["a", "b"], ["c"]])
    lab.run()
    rounds = [e["discriminator"]["prototypes"] for e in lab.events if e["event"] == "round"]
    assert rounds == [4, 6]


def test_the_discriminator_that_was_received_knows_less_after_training(tmp_path: Path) -> None:
    """What the term is for. Both runs start the second round from one model and one discriminator."""

    def sureness(mu: float) -> list[float]:
        lab = make_lab(tmp_path / str(mu), "adcol", {"mu": mu}, engine=Spy, federation__local_epochs=4)
        lab.run()
        found = []
        for request in (r for r in spy(lab).requests if r.kind == "train" and r.round == 1):
            judge = {n.removeprefix(JUDGE): t for n, t in request.extra.items()}
            after = next(r for r in spy(lab).trained(1) if r.client == request.client)
            found.append(float(divergence_from_uniform(verdict(judge, after.extra["adcol/prototypes"]))))
        return found

    assert all(less < 0.7 * more for less, more in zip(sureness(20.0), sureness(0.0), strict=True))


# --------------------------------------------------------------------------- features, as in the paper
FEATURES: dict[str, Any] = {"upload": "features"}


@pytest.mark.parametrize("changes", [{}, {"model__norm": "batch", "federation__participation": 0.5}])
def test_with_features_and_without_its_term_the_model_is_fedavgs_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    ours = make_lab(tmp_path / "1", "adcol", {**FEATURES, "mu": 0.0}, **changes).run()
    assert differing(ours.shared, make_lab(tmp_path / "2", **changes).run().shared) == []


@pytest.mark.parametrize("length", [{"federation__local_epochs": 3}, {"federation__local_steps": 7}])
def test_features_are_those_of_the_passes_of_the_last_epoch(length: dict[str, Any], tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "adcol", FEATURES, engine=Spy, **length)
    passes: dict[tuple[str, int], list[Tensor]] = {}
    penalty = lab.site.strategy.penalty

    def listen(step: Step) -> Tensor | None:
        pooled = step.output.trace.detach().mean(dim=1)
        passes.setdefault((step.job.client, step.job.round), []).append(pooled)
        return penalty(step)

    lab.site.strategy.penalty = listen  # type: ignore[method-assign]
    lab.run()
    for reply in spy(lab).trained():
        assert set(reply.extra) == {"adcol/features"}
        found, every = reply.extra["adcol/features"], torch.cat(passes[reply.client, reply.round])
        assert torch.equal(found, every[-len(found) :])
        if "federation__local_epochs" in length:
            assert len(found) == reply.num_examples and len(every) == 3 * reply.num_examples
        else:
            assert reply.num_examples - 4 < len(found) <= reply.num_examples


def test_an_epoch_with_a_batch_that_batch_norm_skips_is_still_one_epoch(tmp_path: Path) -> None:
    hospitals = (Hospital("a", "CT", 9), Hospital("b", "US", 8))
    changes: dict[str, Any] = {"model__norm": "batch", "federation__local_epochs": 2}
    lab = make_lab(tmp_path, "adcol", FEATURES, engine=Spy, hospitals=hospitals, **changes)
    lab.run()
    assert [len(reply.extra["adcol/features"]) for reply in spy(lab).trained()] == [8, 8, 8, 8]


def test_features_are_metered_and_forgotten(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "adcol", FEATURES, schedule=[["a", "b"], ["c"]])
    server = lab.run()
    sent = {e["client"]: e["bytes_up"]["adcol"] for e in lab.events if e["event"] == "client"}
    assert sent == {"a": 10 * 8 * 4, "b": 6 * 8 * 4, "c": 12 * 8 * 4}
    assert [e["discriminator"]["features"] for e in lab.events if e["event"] == "round"] == [16, 12]
    assert server.extra and all(name.startswith(JUDGE) for name in server.extra)


def test_the_discriminator_learns_from_every_feature_with_equal_weight(tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "1", "adcol", FEATURES, engine=Spy, federation__rounds=1)
    server = lab.run()
    replies = spy(lab).trained()
    vectors = torch.cat([reply.extra["adcol/features"] for reply in replies])
    target = torch.arange(4).repeat_interleave(torch.tensor([10, 6, 12, 8]))
    other = ServerState({})
    strategy_of(lab)._learn(other, vectors, target, torch.ones(36), 0)
    assert differing(server.extra, other.extra) == []


def test_a_run_with_features_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    whole, cut = (make_lab(tmp_path / n, "adcol", FEATURES, federation__rounds=3, checkpoint=True) for n in ("whole", "cut"))
    cut.schedule = cut.schedule[:2]
    cut.run()
    resumed = make_lab(tmp_path / "cut", "adcol", FEATURES, federation__rounds=3, checkpoint=True)
    assert resumed.checkpoint is not None
    server = resumed.run(resumed.checkpoint.load()[0], 2)
    assert differing(whole.snapshot(whole.run()), resumed.snapshot(server)) == []


def as_features(x: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {**x, "adcol/features": change(x["adcol/features"])}


Change = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {}, "prototypes are missing"),
        (lambda x: {n: t for n, t in x.items() if n != "adcol/counts"}, "are missing, or how many"),
        (lambda x: {**x, "adcol/prototypes": x["adcol/prototypes"][:, 1:]}, "have shape"),
        (lambda x: {n: t.repeat(99, *[1] * (t.dim() - 1)) for n, t in x.items()}, "have shape"),
        (lambda x: {**x, "adcol/prototypes": x["adcol/prototypes"] * float("nan")}, "a value of its prototypes is not finite"),
        (lambda x: {**x, "adcol/counts": -x["adcol/counts"]}, "positive"),
        (lambda x: {**x, "adcol/counts": x["adcol/counts"][1:]}, "positive number for each"),
    ],
)
def test_bad_prototypes_name_client_and_round(change: Change, message: str, tmp_path: Path) -> None:
    refuse("prototypes", change, message, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {}, "features are missing"),
        (lambda x: as_features(x, lambda f: f[:, 1:]), "features have shape"),
        (lambda x: as_features(x, lambda f: f[:0]), "features have shape"),
        (lambda x: as_features(x, lambda f: f[0, 0]), "features are missing"),
        (lambda x: as_features(x, lambda f: f.repeat(2, 1)), "features have shape"),
        (lambda x: as_features(x, lambda f: f * float("nan")), "a value of its features is not finite"),
    ],
)
def test_bad_features_name_client_and_round(change: Change, message: str, tmp_path: Path) -> None:
    refuse("features", change, message, tmp_path)


def refuse(upload: str, change: Change, message: str, folder: Path) -> None:
    def alter(reply: Reply) -> Reply:
        return replace(reply, extra=change(reply.extra)) if (reply.client, reply.round) == ("c", 1) else reply

    lab = make_lab(folder, "adcol", {"upload": upload}, engine=lambda site: Altered(site, alter))
    with pytest.raises(FederationError, match=rf"client c, round 1: .*{message}") as caught:
        lab.run()
    assert "\n" not in str(caught.value)
