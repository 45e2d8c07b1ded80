import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from omnifm.federation.state import LocalJob
from omnifm.federation.strategies.moon import MOON, Encoder, contrast
from omnifm.federation.strategy import Step
from tests.support import HOSPITALS, Lab, differing, make_lab


def test_the_contrast_is_log_2_when_both_models_are_one_and_has_no_gradient() -> None:
    z, other = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    loss = contrast(z, other, other, 0.5)
    (gradient,) = torch.autograd.grad(loss, z)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6) and float(gradient.abs().max()) < 1e-7


def test_the_contrast_is_the_papers_and_stays_finite() -> None:
    z, near, far = torch.randn(3, 5, 7).unbind()
    for temperature in (0.1, 0.5, 1.0):
        a, b = (torch.exp((z * o).sum(1) / z.norm(dim=1) / o.norm(dim=1) / temperature) for o in (near, far))
        torch.testing.assert_close(contrast(z, near, far, temperature), (-torch.log(a / (a + b))).mean())
    assert bool(contrast(z, z, -z, 1e-4).isfinite()) and bool(contrast(z, -z, z, 1e-4).isfinite())


def penalties(lab: Lab) -> dict[tuple[int, str], float]:
    return {(e["round"], e["client"]): e["penalty"] for e in lab.events if e["event"] == "client"}


def test_a_clients_first_round_has_log_2_and_trains_as_fedavg(tmp_path: Path) -> None:
    schedule = [["a", "b"], ["b", "c"], ["a", "c"]]
    lab = make_lab(tmp_path / "1", "moon", {"mu": 2.0}, schedule=schedule, federation__rounds=3)
    lab.run()
    first = {(0, "a"), (0, "b"), (1, "c")}
    for key, value in penalties(lab).items():
        assert (abs(value - 2 * math.log(2)) < 1e-5) == (key in first)
    changes: dict[str, Any] = {"federation__rounds": 1, "model__norm": "batch"}
    ours, plain = make_lab(tmp_path / "2", "moon", **changes).run(), make_lab(tmp_path / "3", "fedavg", **changes).run()
    for name, tensor in plain.shared.items():
        torch.testing.assert_close(ours.shared[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"federation__participation": 0.5, "model__norm": "batch"}])
def test_without_its_term_it_is_fedavg_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    ours, plain = make_lab(tmp_path / "1", "moon", {"mu": 0.0}, **changes), make_lab(tmp_path / "2", "fedavg", **changes)
    first, second = ours.run().shared, plain.run().shared
    assert differing({n: first[n] for n in second}, second) == []
    assert all(name.startswith("path.layers.") for name in first.keys() - second.keys())
    assert all(ours.private(h.id) == {} for h in HOSPITALS)


def test_two_rounds_agree_with_ones_written_by_hand(tmp_path: Path) -> None:
    """Plain torch, two clients in full batches: z of three models, the last one the client's own before the mean."""
    mu, temperature, lr, decay = 0.8, 0.4, 0.1, 1e-4
    options, hospitals = {"mu": mu, "temperature": temperature, "dim": 5}, HOSPITALS[:2]
    lab = make_lab(
        tmp_path / "1",
        "moon",
        options,
        hospitals=hospitals,
        optimiser__batch_size=10,
        optimiser__momentum=0.0,
        federation__local_epochs=2,
        federation__rounds=3,
    )
    theta: nn.Module = make_lab(tmp_path / "2", "moon", options, hospitals=hospitals).site.model
    last: dict[str, nn.Module] = {}

    def z(model: Any, inputs: Any) -> Tensor:
        first, _, second = model.path.layers
        found: Tensor = second(functional.relu(first(model.backbone(inputs).tokens.mean(1))))
        return found

    for _ in range(3):
        trained: dict[str, nn.Module] = {}
        for h in hospitals:
            train = lab.task.client_data(h.id).train
            batch = train.batch(torch.arange(len(train)))
            model = copy.deepcopy(theta)
            parameters = list(model.parameters())
            for _ in range(2):
                loss = functional.cross_entropy(model(batch.inputs).prediction, batch.target)
                own, near, far = (z(net, batch.inputs) for net in (model, theta, last.get(h.id, theta)))
                a, b = ((functional.cosine_similarity(own, other.detach()) / temperature).exp() for other in (near, far))
                loss = loss + mu * (-torch.log(a / (a + b))).mean()
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p.data -= lr * (g + decay * p.data)
            trained[h.id] = model
        last = trained
        theta = copy.deepcopy(theta)
        for mean, *own in zip(theta.parameters(), *(trained[h.id].parameters() for h in hospitals), strict=True):
            mean.data = sum(h.train * p.data for h, p in zip(hospitals, own, strict=True)) / sum(h.train for h in hospitals)
    server = lab.run()
    for name, tensor in theta.state_dict().items():
        torch.testing.assert_close(server.shared[name], tensor, atol=3e-6, rtol=1e-5)
    for h in hospitals:
        kept = {n.removeprefix("state:"): t for n, t in lab.private(h.id).items()}
        assert kept.keys() == {n for n in theta.state_dict() if not n.startswith("head.")}
        for name, tensor in kept.items():
            torch.testing.assert_close(tensor, last[h.id].state_dict()[name], atol=3e-6, rtol=1e-5)


def test_the_other_two_models_are_frozen_and_move_no_statistics(tmp_path: Path) -> None:
    """The published fault: with them in training mode, every client changes the statistics of the received model."""
    lab = make_lab(tmp_path / "1", "moon", federation__rounds=3, model__norm="batch")
    strategy = lab.site.strategy
    assert isinstance(strategy, MOON)
    penalty, begin = strategy.penalty, strategy.begin
    before: list[dict[str, Tensor]] = []
    both = 0

    def encoders() -> list[Encoder]:
        return [e for e in (strategy._received, strategy._last) if e is not None]

    def started(job: LocalJob) -> None:
        begin(job)
        before[:] = [{n: t.clone() for n, t in e.state_dict().items()} for e in encoders()]

    def stepped(step: Step) -> Tensor | None:
        nonlocal both
        found = penalty(step)
        both += len(encoders()) == 2
        for encoder, start in zip(encoders(), before, strict=True):
            assert not any(m.training for m in encoder.modules()) and not any(p.requires_grad for p in encoder.parameters())
            assert differing(dict(encoder.state_dict()), start) == []
        assert all(m.training for m in step.job.model.modules())
        return found

    strategy.begin, strategy.penalty = started, stepped  # type: ignore[method-assign]
    shared = lab.run().shared
    assert both > 10
    plain = make_lab(tmp_path / "2", "fedavg", federation__rounds=3, model__norm="batch").run().shared
    assert int(shared["backbone.norm.num_batches_tracked"]) == int(plain["backbone.norm.num_batches_tracked"]) > 0


def test_the_received_model_is_this_rounds(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "moon")
    strategy = lab.site.strategy
    assert isinstance(strategy, MOON)
    begin, found = strategy.begin, []

    def started(job: LocalJob) -> None:
        begin(job)
        if job.training:
            assert strategy._received is not None
            state = dict(strategy._received.state_dict())
            assert differing(state, {n: job.anchor[n] for n in state}) == []
            found.append(job.round)
        else:
            assert strategy._received is None, "an evaluation needs no copies"

    strategy.begin = started  # type: ignore[method-assign]
    lab.evaluate(lab.run(), finetune=True)
    assert sorted(set(found)) == [0, 1]


def test_training_lowers_the_contrast(tmp_path: Path) -> None:
    def last(mu: float) -> float:
        lab = make_lab(tmp_path / str(mu), "moon", {"mu": mu}, federation__rounds=4, federation__local_epochs=5)
        lab.run()
        return sum(value / mu for (index, _), value in penalties(lab).items() if index == 3) / len(HOSPITALS)

    assert last(1.0) < 0.8 * last(1e-6)
