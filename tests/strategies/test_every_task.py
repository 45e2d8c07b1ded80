"""Strategies with parts of their own in the network, on all five tasks: one federation in which every client has another."""

from pathlib import Path
from typing import Any

import pytest

from omnifm import build, run
from omnifm.config import parse
from tests.tasks.atlas import COHORTS, make_cohorts
from tests.tasks.test_mixed import raw
from tests.tasks.test_vqa import fake_words

STRATEGIES = [
    "fedadam",
    "scaffold",
    "feddyn",
    "fedrep",
    "ditto",
    "adcol",
    "feddat",
    "feddg",
    "fediir",
    "gpfl",
    "harmofl",
    "f3ocus",
    "lora",
    "moon",
    "median",
    "trimmed_mean",
    "multikrum",
    "clipped_mean",
    "fedgma",
    "and_mask",
]

# Options under which a strategy has other parts.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("adcol", {"upload": "features"}),
    ("f3ocus", {"search": "greedy", "layers": 2}),
    ("lora", {"average": "share_a"}),
    ("lora", {"average": "freeze_a"}),
]


@pytest.mark.parametrize(("strategy", "options"), [(s, {}) for s in STRATEGIES] + VARIANTS)
def test_every_task_is_trained_and_scored(
    strategy: str,
    options: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(build.TASKS, "vqa", "omnifm.tasks.vqa:Vqa")
    monkeypatch.setattr("omnifm.tasks.vqa_models.minilm_words", fake_words)
    config = raw(make_cohorts(tmp_path_factory), strategy, *COHORTS)
    config["data"]["channels"] = 1
    config["federation"]["rounds"] = 2
    config.setdefault("strategies", {})[strategy] = options
    config["tasks"]["mixed"]["set"] = {"vqa": {"tasks.vqa.compact.layers": 1}}
    metrics = run.execute(parse(config), tmp_path / "out")
    assert len(metrics["clients"]) == len(COHORTS)
    for client in metrics["clients"]:
        assert client["test"]["personal"]["score"] is not None
