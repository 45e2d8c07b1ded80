import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from omnifm.federation.effort import Effort
from omnifm.federation.strategies.fedrep import FedRep, FedRepOptions
from tests.support import HOSPITALS, Lab, Spy, differing, make_lab, spy

ONE = HOSPITALS[:1]


class Watch:
    """Notes after every optimiser step which tensors of the model it changed."""

    def __init__(self, lab: Lab) -> None:
        self.changed: list[set[str]] = []
        self.sizes: list[int] = []
        step, model = lab.site._step, lab.site.model

        def watched(*arguments: Any, **keywords: Any) -> Tensor:
            start = {n: t.clone() for n, t in model.state_dict().items()}
            found = step(*arguments, **keywords)
            self.changed.append(set(differing(start, dict(model.state_dict()))))
            self.sizes.append(len(arguments[1].target))
            return found

        lab.site._step = watched  # type: ignore[method-assign]


def steps_of(lab: Lab) -> list[str]:
    """Return of each step whose tensors moved, `head` or `backbone`; both joined if both did."""
    watch = Watch(lab)
    lab.run()
    return ["+".join(sorted({name.partition(".")[0] for name in names})) for names in watch.changed]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_first_the_head_then_the_backbone_and_what_does_not_train_does_not_move(norm: str, tmp_path: Path) -> None:
    """With BatchNorm too: the running statistics of a backbone that stands still are as they were."""
    lab = make_lab(tmp_path, "fedrep", hospitals=ONE, federation__local_epochs=5, federation__rounds=2, model__norm=norm)
    moved = steps_of(lab)
    assert moved == [*["head"] * 12, *["backbone"] * 3] * 2
    if norm == "batch":
        assert int(lab.site.model.get_buffer("backbone.norm.num_batches_tracked")) == 2 * 3


def test_a_backbone_that_stands_still_normalises_with_its_running_statistics(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedrep", hospitals=ONE, federation__local_epochs=2, federation__rounds=1, model__norm="batch")
    norm = lab.site.model.backbone.norm
    assert isinstance(norm, torch.nn.BatchNorm2d)
    seen: list[bool] = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    lab.run()
    assert seen == [False] * 3 + [True] * 3


def test_norms_that_a_task_keeps_still_stay_so(tmp_path: Path) -> None:
    """A frozen trunk that refuses to train is not woken when the backbone's turn comes."""
    lab = make_lab(tmp_path, "fedrep", hospitals=ONE, federation__local_epochs=2, federation__rounds=1, model__norm="batch")
    backbone = lab.site.model.backbone
    norm = backbone.norm
    assert isinstance(norm, torch.nn.BatchNorm2d)
    backbone.train = lambda mode=True: norm.eval()  # type: ignore[assignment, return-value, method-assign]
    lab.run()
    assert int(norm.num_batches_tracked or 0) == 0


@pytest.mark.parametrize(("still", "moves"), [("head", "backbone"), ("backbone", "head")])
def test_where_a_task_lets_one_part_stand_still_the_other_trains_all_the_time(still: str, moves: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedrep", hospitals=ONE, federation__local_epochs=5, federation__rounds=1)
    getattr(lab.site.model, still).requires_grad_(False)
    assert steps_of(lab) == [moves] * 15


def cut(folder: Path, share: float, effort: Effort, examples: int = 20) -> tuple[Any, ...] | None:
    found = FedRep(FedRepOptions(head_share=share), make_lab(folder).strategy.context)._cut(effort, examples)
    return found and tuple((e.epochs, e.budget, e.steps) for e in found)


def test_the_effort_is_cut_and_none_of_it_lost(tmp_path: Path) -> None:
    assert cut(tmp_path, 0.8, Effort(5)) == ((4, None, 0), (1, None, 0))
    assert cut(tmp_path, 0.4, Effort(5)) == ((2, None, 0), (3, None, 0))
    assert cut(tmp_path, 0.9, Effort(11)) == ((10, None, 0), (1, None, 0))
    assert cut(tmp_path, 0.99, Effort(2)) == cut(tmp_path, 0.01, Effort(2)) == ((1, None, 0), (1, None, 0))
    assert cut(tmp_path, 0.8, Effort(1, steps=10)) == ((1, None, 8), (1, None, 2))
    assert cut(tmp_path, 0.8, Effort(1)) == ((1, 16, 0), (1, 4, 0))
    assert cut(tmp_path, 0.8, Effort(1, budget=10)) == ((1, 8, 0), (1, 2, 0))
    assert cut(tmp_path, 0.8, Effort(1), 4) == ((1, 2, 0), (1, 2, 0))
    assert cut(tmp_path, 0.8, Effort(1), 3) is cut(tmp_path, 0.8, Effort(1, steps=1)) is None


def test_one_epoch_is_cut_by_examples(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedrep", hospitals=ONE, federation__rounds=1)
    watch = Watch(lab)
    lab.run()
    assert watch.sizes == [4, 4, 2] and sum(watch.sizes) == ONE[0].train
    assert [{n.partition(".")[0] for n in names} for names in watch.changed] == [{"head"}, {"head"}, {"backbone"}]


def test_of_a_single_step_it_is_fedper_bit_for_bit(tmp_path: Path) -> None:
    ours, plain = (make_lab(tmp_path / s, s, federation__local_steps=1, federation__rounds=3) for s in ("fedrep", "fedper"))
    assert differing(ours.snapshot(ours.run()), plain.snapshot(plain.run())) == []
    ours, plain = (make_lab(tmp_path / f"{s}2", s, federation__local_steps=2) for s in ("fedrep", "fedper"))
    assert differing(ours.snapshot(ours.run()), plain.snapshot(plain.run()))


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """Full batches of two epochs: one step of the head, then one of the backbone against the new head."""
    changes: dict[str, Any] = {"optimiser__batch_size": 99, "optimiser__momentum": 0.0, "federation__local_epochs": 2}
    lab = make_lab(tmp_path, "fedrep", **changes)
    model = make_lab(tmp_path, "fedavg").site.model
    heads = {h.id: {n: t.clone() for n, t in model.head.state_dict().items()} for h in HOSPITALS}
    phi = {n: t.clone() for n, t in model.backbone.state_dict().items()}
    for _ in range(2):
        mean = {n: torch.zeros_like(t) for n, t in phi.items()}
        for h in HOSPITALS:
            model.backbone.load_state_dict(phi)
            model.head.load_state_dict(heads[h.id])
            batch = lab.task.client_data(h.id).train.batch(torch.arange(h.train))
            for part in (model.head, model.backbone):
                parameters = list(part.parameters())
                loss = functional.cross_entropy(model(batch.inputs).prediction, batch.target)
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p.data -= 0.1 * (g + 1e-4 * p.data)
            heads[h.id] = {n: t.clone() for n, t in model.head.state_dict().items()}
            for n, t in model.backbone.state_dict().items():
                mean[n] += h.train / 36 * t
        phi = mean
    server = lab.run()
    assert server.shared.keys() == {f"backbone.{n}" for n in phi}
    for n, t in phi.items():
        torch.testing.assert_close(server.shared[f"backbone.{n}"], t, atol=2e-6, rtol=1e-5)
    for h, n in itertools.product(HOSPITALS, heads["a"]):
        torch.testing.assert_close(lab.private(h.id)[f"head.{n}"], heads[h.id][n], atol=2e-6, rtol=1e-5)


def test_no_head_is_sent(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedrep", engine=Spy, model__norm="batch")
    lab.evaluate(lab.run(), finetune=True)
    assert {n.partition(".")[0] for m in spy(lab).messages() for n in m.tensors} == {"backbone"}
    assert not lab.site.has_global() and all(not r.extra for r in spy(lab).trained())


def test_fine_tuning_trains_all_at_once(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedrep", hospitals=ONE)
    server = lab.run()
    watch = Watch(lab)
    lab.evaluate(server, finetune=True)
    assert watch.changed and all({n.partition(".")[0] for n in names} == {"head", "backbone"} for names in watch.changed)


def test_jobs_of_one_site_do_not_mix(tmp_path: Path) -> None:
    """Who trained before at the same site changes nothing, with statistics that move and those that do not."""
    alone = make_lab(tmp_path / "1", "fedrep", schedule=[["c"]], federation__rounds=1, model__norm="batch")
    among = make_lab(tmp_path / "2", "fedrep", federation__rounds=1, model__norm="batch")
    alone.run()
    among.run()
    assert differing(alone.private("c"), among.private("c")) == []
