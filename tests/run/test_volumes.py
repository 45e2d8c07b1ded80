"""Where a row is a volume, a client trains on its slices, and slices are what everybody counts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from omnifm import build
from omnifm.config import Config, parse
from omnifm.run import execute
from omnifm.tasks.base import Batch
from omnifm.tasks.classification import Classification
from tests.run import jobs

DEPTH, VOLUMES = jobs.DEPTH, jobs.VOLUMES


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.write_volumes(tmp_path_factory.mktemp("volumes"))


def config_of(volumes: Path, strategy: str, **changes: Any) -> Config:
    raw = jobs.raw_config(volumes, strategy, **changes)
    cohorts = [{"path": str(volumes / name), "clients": 1} for name in jobs.MODALITIES]
    raw["federation"].update(cohorts=cohorts, rounds=1, participation=1.0, finetune_epochs=0)
    return parse(raw)


@pytest.mark.parametrize("strategy", ["fedavg", "local", "centralised"])
def test_every_strategy_trains_on_as_many_slices(
    strategy: str, volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    loss = Classification.loss

    def count(self: Classification, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        seen.append(len(batch.target) if torch.is_grad_enabled() else 0)
        return loss(self, prediction, batch)

    monkeypatch.setattr(Classification, "loss", count)
    execute(config_of(volumes, strategy), tmp_path / "run")
    assert sum(seen) == len(jobs.MODALITIES) * VOLUMES["train"] * DEPTH
    replies = [e["num_examples"] for e in jobs.lines(tmp_path / "run" / "events.jsonl") if e["event"] == "client"]
    assert sum(replies) == sum(seen)


def test_epsilon_is_that_of_a_slice(volumes: Path, tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    from omnifm.privacy.accounting import epsilon_of_examples

    metrics = execute(config_of(volumes, "fedavg", privacy={"example_clip": 1.0, "example_noise": 1.0}), tmp_path / "run")
    slices, batch = VOLUMES["train"] * DEPTH, 4
    (unit,) = metrics["privacy"]["combined"]["units"]
    delta = metrics["privacy"]["combined"]["delta"]
    assert unit["together"] == pytest.approx(epsilon_of_examples(1.0, delta, slices // batch, batch / slices))


def test_volumes_elsewhere_are_counted_as_rows(volumes: Path, tmp_path: Path) -> None:
    """The server knows no more of them, and what rests on the number is refused when the client answers."""
    config = config_of(volumes, "fedavg")
    data = build.load_data(config, check=False)
    task = build.make_task(config, data)
    assert set(build.num_train(data, task).values()) == {VOLUMES["train"] * DEPTH}
    cohorts = {name: type(cohort).elsewhere(cohort.spec) for name, cohort in data.cohorts.items()}
    assert set(build.num_train(build.Data(cohorts, data.plans, data.cache), task).values()) == {VOLUMES["train"]}
