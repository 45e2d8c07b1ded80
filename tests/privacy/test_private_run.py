"""Whole runs with privacy on: what metrics.json and the report say, and that a refusal comes before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("dp_accounting")

from omnifm.errors import ConfigError
from omnifm.privacy.accounting import epsilon, epsilon_of_examples
from omnifm.report.page import number
from omnifm.run import execute
from tests.run import jobs

PRIVATE: dict[str, Any] = {
    "federation": {"weighting": "equal", "rounds": 2},
    "privacy": {"clip": 0.5, "noise_multiplier": 2.0, "noise": "seeded", "secure_aggregation": True},
}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.data_folder(tmp_path_factory.getbasetemp())


def test_metrics_and_report_state_what_is_private_and_what_is_not(data: Path, tmp_path: Path) -> None:
    execute(jobs.config(data, "fedavg", **PRIVATE), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["privacy"]
    level = found["client_level"]
    assert (level["clients_per_round"], level["clients"], level["rounds"], level["delta"]) == (3, 4, 2, 1e-5)
    assert level["epsilon"] == epsilon(2.0, 1e-5, 2, (3, 4)) < level["epsilon_participation_known"] == epsilon(2.0, 1e-5, 2)
    assert found["secure_aggregation"]["threshold"] == 3
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for words in (
        "Privacy",
        number(level["epsilon"]),
        "1e-05",
        "2 times the clip",
        "Secure aggregation",
        "Not covered by any of",
    ):
        assert words in page, words
    assert "whoever knows the seed can take it off" in page


def test_two_runs_with_seeded_noise_are_the_same_bits(data: Path, tmp_path: Path) -> None:
    """Masks and keys differ from run to run; the model does not."""
    for name in ("one", "two"):
        execute(jobs.config(data, "fedavg", **PRIVATE), tmp_path / name)
    weights = [
        {p.relative_to(tmp_path / name): p.read_bytes() for p in sorted((tmp_path / name / "checkpoint").rglob("*.safetensors"))}
        for name in ("one", "two")
    ]
    assert weights[0] and weights[0] == weights[1]


def test_a_refusal_leaves_no_folder(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.clip: the server of strategy scaffold"):
        execute(jobs.config(data, "scaffold", **PRIVATE | {"privacy": {"clip": 1.0}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_privacy_says_nothing_of_it(data: Path, tmp_path: Path) -> None:
    execute(jobs.config(data, "fedavg", federation={"rounds": 1}), tmp_path / "run")
    assert "privacy" not in json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert "Secure aggregation" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_residual_network_trains_with_example_level_privacy(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    privacy = {"example_clip": 1.0, "example_noise": 1.0}
    execute(jobs.config(data, "fedavg", federation={"rounds": 1}, privacy=privacy), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["privacy"]["example_level"]
    # One of three clients of 12 examples: three steps, each of a third.
    assert found["epsilon"] == epsilon_of_examples(1.0, 1e-5, 3, 4 / 12)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "example-level differential privacy" in page and number(found["epsilon"]) in page
