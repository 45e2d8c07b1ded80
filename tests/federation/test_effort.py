"""Phases of local training: which parameters train, in which order, on which batches."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from omnifm.errors import ConfigError
from omnifm.federation.effort import Effort, Phase
from omnifm.federation.sharing import names_under
from omnifm.federation.state import LocalJob
from omnifm.federation.strategies.fedavg import FedAvg
from tests.support import HOSPITALS, Lab, differing, make_lab

ONE = HOSPITALS[:1]


class Staged(FedAvg):
    """Head first, then the backbone; notes what it sees."""

    def begin(self, job: LocalJob) -> None:
        self.seen: list[tuple[int, int, bool]] = []
        self.job = job

    def phases(self, job: LocalJob, effort: Effort) -> Sequence[Phase]:
        note = lambda: self.seen.append((job.phase, job.steps, job.training))  # noqa: E731
        head, body = names_under(job.model, job.model.head), names_under(job.model, job.model.backbone)
        return (Phase(effort, head, note), Phase(effort, body, note))


def staged(folder: Path, kind: type[FedAvg] = Staged) -> Lab:
    lab = make_lab(folder, hospitals=ONE, federation__rounds=1)
    strategy = kind(lab.strategy.options, lab.strategy.context)
    lab.strategy = lab.site.strategy = strategy
    return lab


def test_each_phase_trains_its_own_parameters(tmp_path: Path) -> None:
    lab = staged(tmp_path)
    before = {n: t.clone() for n, t in lab.site.model.state_dict().items()}
    moved: list[set[str]] = []
    step = lab.site._step

    def watch(*arguments: object, **keywords: object) -> torch.Tensor:
        start = {n: t.clone() for n, t in lab.site.model.state_dict().items()}
        found = step(*arguments, **keywords)  # type: ignore[arg-type]
        moved.append(set(differing(start, dict(lab.site.model.state_dict()))))
        return found

    lab.site._step = watch  # type: ignore[method-assign]
    lab.run()
    assert len(moved) == 6
    assert all(name.startswith("head") for names in moved[:3] for name in names) and all(moved)
    assert all(name.startswith("backbone") for names in moved[3:] for name in names)
    strategy = lab.site.strategy
    assert isinstance(strategy, Staged) and strategy.seen == [(0, 0, True), (1, 3, True)]
    assert strategy.job.steps == 6 and strategy.job.lr == lab.config.optimiser.lr
    assert all(p.requires_grad for p in lab.site.model.parameters()) and differing(before, dict(lab.site.model.state_dict()))


def test_what_the_task_froze_stays_frozen(tmp_path: Path) -> None:
    model = make_lab(tmp_path, hospitals=ONE).site.model
    frozen = next(iter(model.head.parameters())).requires_grad_(False)
    with Phase(Effort(1), names_under(model, model.backbone)).of(model):
        assert not any(p.requires_grad for p in model.head.parameters())
        assert all(p.requires_grad for p in model.backbone.parameters())
    assert not frozen.requires_grad and sum(not p.requires_grad for p in model.parameters()) == 1


def test_a_phase_that_trains_nothing_is_an_error(tmp_path: Path) -> None:
    class Nothing(Staged):
        def phases(self, job: LocalJob, effort: Effort) -> Sequence[Phase]:
            return (Phase(effort, frozenset()),)

    with pytest.raises(ConfigError, match="selects no parameter"):
        staged(tmp_path, Nothing).run()


def test_a_second_phase_draws_other_batches(tmp_path: Path) -> None:
    class Twice(Staged):
        def phases(self, job: LocalJob, effort: Effort) -> Sequence[Phase]:
            return (Phase(effort), Phase(effort))

    lab = staged(tmp_path, Twice)
    rows: list[list[int]] = []
    loss = lab.task.loss
    lab.task.loss = lambda p, b: rows.append(b.row.tolist()) or loss(p, b)  # type: ignore[method-assign, func-returns-value]
    lab.run()
    first, second = (sorted(itertools.chain.from_iterable(part)) for part in (rows[:3], rows[3:]))
    assert len(rows) == 6 and rows[:3] != rows[3:] and first == second


def test_an_evaluation_is_no_training(tmp_path: Path) -> None:
    lab = staged(tmp_path)
    lab.evaluate(lab.run(), finetune=True)
    strategy = lab.site.strategy
    assert isinstance(strategy, Staged) and not strategy.job.training and strategy.seen == []
