from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from omnifm.federation.state import LocalJob
from omnifm.federation.strategies.feddat import AdapterPath, Pair, divergence
from omnifm.federation.strategy import Step
from omnifm.tasks.base import Backbone, Batch, Features, Inputs
from tests.support import HOSPITALS, Lab, Spy, TinyBackbone, differing, make_lab, spy

OWN, SHARED = "path.pairs.0.own.", "path.pairs.0.shared."


def pair_of(lab: Lab) -> Pair:
    path = lab.site.model.path
    assert isinstance(path, AdapterPath)
    (pair,) = path.every()
    return pair


def values(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in module.state_dict().items()}


def kl(wanted: Tensor, learned: Tensor) -> Tensor:
    p, q = (wanted / 3).softmax(1), (learned / 3).softmax(1)
    return 9 * (p * (p / q).log()).sum(dim=1).mean()


def test_adapters_are_bottlenecks_with_small_weights(tmp_path: Path) -> None:
    pair = Pair(640, 16)
    down, _, up = pair.own
    assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
    assert down.weight.shape == (40, 640) and up.weight.shape == (640, 40)
    for layer in (down, up):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05) and not bool(layer.bias.any())
    assert not torch.equal(down.weight, pair.shared.get_parameter("0.weight"))
    x = torch.randn(2, 3, 640)
    one, other, kept = (a[2](a[0](x).clamp_min(0)) for a in (pair.own, pair.shared, pair.shared))
    torch.testing.assert_close(pair(x), x + one / 2 + other / 2)
    pair.keep()
    pair.shared[2].bias.data += 1
    torch.testing.assert_close(pair(x), x + one / 2 + kept / 2)
    pair.student = True
    torch.testing.assert_close(pair(x), x + other + 1)


def test_a2_is_a1_as_received_and_stays_so_for_the_round(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "feddat", engine=Spy, federation__local_epochs=2)
    found: list[tuple[LocalJob, dict[str, Tensor]]] = []
    finish, correct = lab.site.strategy.finish, lab.site.strategy.correct

    def at_step(step: Step) -> None:
        found.append((step.job, values(pair_of(lab).kept)))
        correct(step)

    def at_end(job: LocalJob) -> Any:
        found.append((job, values(pair_of(lab).kept)))
        assert differing(values(pair_of(lab).shared), values(pair_of(lab).kept)), "a_1 moved"
        return finish(job)

    lab.site.strategy.correct, lab.site.strategy.finish = at_step, at_end  # type: ignore[method-assign]
    server = lab.run()
    assert len(found) == sum(2 * 2 * -(-h.train // 4) + 2 for h in HOSPITALS)
    for job, kept in found:
        assert differing(kept, {n.removeprefix(SHARED): t for n, t in job.anchor.items() if n.startswith(SHARED)}) == []
    lab.evaluate(server)
    assert differing(values(pair_of(lab).kept), {n.removeprefix(SHARED): server.shared[n] for n in server.shared}) == []


def test_a0_and_the_head_never_leave_and_the_base_never_changes(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "feddat", engine=Spy)
    base = {n: t.clone() for n, t in lab.site.model.backbone.state_dict().items()}
    lab.evaluate(lab.run(), finetune=True)
    for message in [*spy(lab).requests, *spy(lab).replies]:
        assert not message.tensors or all(n.startswith(SHARED) for n in message.tensors)
        assert not any(n.startswith("path") for n in message.extra)
    sent = {n for r in spy(lab).trained() for n in r.tensors}
    assert sent == {SHARED + n for n in ("0.weight", "0.bias", "2.weight", "2.bias")}
    kept = lab.private("a")
    assert {n for n in kept if n.startswith(OWN)} == {n.replace(SHARED, OWN) for n in sent}
    assert set(kept) - {n for n in kept if n.startswith(OWN)} == {"head.linear.weight", "head.linear.bias"}
    assert differing(base, dict(lab.site.model.backbone.state_dict())) == []
    assert not torch.equal(kept[OWN + "2.weight"], lab.private("b")[OWN + "2.weight"])


def test_the_mean_is_plain_whatever_the_sizes(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "feddat", engine=Spy, federation__rounds=1)
    server = lab.run()
    for name, tensor in server.shared.items():
        mean = sum(r.tensors[name].double() for r in spy(lab).trained()) / 4
        torch.testing.assert_close(tensor.double(), mean, atol=1e-7, rtol=1e-6)


def test_a_round_agrees_with_one_written_by_hand(tmp_path: Path) -> None:
    """Two rounds of a lone client: each adapter by its own loss, the head by both."""
    changes: dict[str, Any] = {"hospitals": HOSPITALS[:1], "optimiser__batch_size": 10, "optimiser__momentum": 0.0}
    changes["federation__local_epochs"] = 2
    lab = make_lab(tmp_path / "1", "feddat", **changes)
    model = make_lab(tmp_path / "2", "feddat", **changes).site.model
    path, head = model.path, model.head.get_submodule("linear")
    assert isinstance(path, AdapterPath)
    own, shared = path.every()[0].own, path.every()[0].shared
    train = lab.task.client_data("a").train
    batch = train.batch(torch.arange(len(train)))
    tokens = model.backbone(batch.inputs).tokens.detach()
    groups = [list(m.parameters()) for m in (own, shared, head)]
    for _ in range(2):
        received = [p.detach().clone() for p in shared.parameters()]
        for _ in range(2):
            hidden = (tokens @ received[0].t() + received[1]).clamp_min(0)
            frozen = hidden @ received[2].t() + received[3]
            teacher = head((tokens + own(tokens) / 2 + frozen / 2).mean(1))
            student = head((tokens + shared(tokens)).mean(1))
            of_own = (functional.cross_entropy(teacher, batch.target) + kl(student.detach(), teacher)) / 2
            of_shared = (functional.cross_entropy(student, batch.target) + kl(teacher.detach(), student)) / 2
            gradients = [
                torch.autograd.grad(of_own, groups[0], retain_graph=True),
                torch.autograd.grad(of_shared, groups[1], retain_graph=True),
                torch.autograd.grad(of_own + of_shared, groups[2]),
            ]
            for group, found in zip(groups, gradients, strict=True):
                for p, g in zip(group, found, strict=True):
                    p.data -= 0.1 * (g + 1e-4 * p.data)
    after = {**lab.run().shared, **lab.private("a")}
    for name, tensor in model.state_dict().items():
        if not name.startswith("backbone."):
            torch.testing.assert_close(after[name], tensor, atol=2e-6, rtol=1e-5)


def test_scores_are_of_the_teachers_path(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "feddat", engine=Spy)
    server = lab.run()
    request = next(r for r in spy(lab).requests if r.kind == "train" and r.client == "b")
    predict = lab.site.predictor(replace(request, kind="evaluate", round=2, tensors=server.shared))
    test = lab.task.client_data("b").test
    batch = test.batch(torch.arange(len(test)))
    found = predict(batch)
    model, pair = lab.site.model, pair_of(lab)
    with torch.no_grad():
        r = model.backbone(batch.inputs).tokens
        read = r + pair.own(r) / 2 + pair.shared(r) / 2
        torch.testing.assert_close(found, model.head.get_submodule("linear")(read.mean(1)))
    assert differing({n.removeprefix(OWN): t for n, t in lab.private("b").items() if n.startswith(OWN)}, values(pair.own)) == []


# --------------------------------------------------------------------------- other tasks and backbones
def make_batch(target: Tensor, **side: Tensor) -> Batch:
    return Batch(torch.zeros(len(target)), target, torch.zeros(len(target)), side)


def test_the_divergence_finds_the_classes() -> None:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(*shape, generator=g), torch.randn(*shape, generator=g)

    a, b = draw(5, 4)
    torch.testing.assert_close(divergence(a, b, make_batch(torch.zeros(5).long()), 3.0), kl(b, a))
    # Masks: classes in the second dimension, the mean over all pixels.
    a, b = draw(2, 4, 3, 6)
    flat = [z.permute(0, 2, 3, 1).reshape(-1, 4) for z in (b, a)]
    torch.testing.assert_close(divergence(a, b, make_batch(torch.zeros(2, 3, 6).long()), 3.0), kl(*flat))
    # Answers of several tokens: classes in the last dimension, padding left out.
    a, b = draw(2, 3, 7)
    answer = torch.tensor([[1, 2, -1], [5, -1, -1]])
    known = answer >= 0
    found = divergence(a, b, make_batch(torch.zeros(2).long(), answer=answer), 3.0)
    torch.testing.assert_close(found, kl(b[known], a[known]))
    # Pictures and numbers have none.
    a, b = draw(2, 1, 4, 4)
    torch.testing.assert_close(divergence(a, b, make_batch(torch.zeros(2, 1, 4, 4)), 3.0), (a - b).square().mean())
    assert float(divergence(a, a, make_batch(torch.zeros(2, 1, 4, 4)), 3.0)) == 0


class Blocks(TinyBackbone):
    """Tokens that pass through two blocks."""

    def __init__(self, norm: str) -> None:
        super().__init__(norm)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, inputs: Inputs) -> Features:
        tokens = super().forward(inputs).tokens
        for layer in self.layers:
            tokens = layer(tokens)
        return Features(tokens)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.layers)


def test_a_backbone_of_blocks_has_a_pair_after_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.TinyBackbone", Blocks)
    lab = make_lab(tmp_path, "feddat")
    model = lab.site.model
    backbone, path = model.backbone, model.path
    assert isinstance(backbone, Blocks) and isinstance(path, AdapterPath) and isinstance(backbone, Backbone)
    first, second = path.every()
    inputs = lab.task.client_data("a").train.batch(torch.arange(3)).inputs
    for student in (False, True):
        first.student = second.student = student
        x = TinyBackbone.forward(backbone, inputs).tokens
        for layer, pair in zip(backbone.layers, (first, second), strict=True):
            seen = x @ layer.get_parameter("weight").t() + layer.get_parameter("bias")
            x = seen + (pair.shared(seen) if student else (pair.own(seen) + pair.shared(seen)) / 2)
        torch.testing.assert_close(model(inputs).prediction, model.head.get_submodule("linear")(x.mean(1)))
    server = lab.run()
    assert {n.split(".")[2] for n in server.shared} == {"0", "1"}
    lab.evaluate(server)
