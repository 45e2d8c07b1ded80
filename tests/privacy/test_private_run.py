"""Whole runs with privacy on: what metrics.json and the report say, and that a refusal comes before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("dp_accounting")

from omnifm.config import parse
from omnifm.errors import ConfigError
from omnifm.privacy.accounting import Releases, epsilon, epsilon_of_examples
from omnifm.report.page import number
from omnifm.run import execute
from tests.run import jobs
from tests.tasks.atlas import make_cohorts

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


def test_omnifm_with_its_bank_and_neighbourhoods_on_the_atlas_has_one_statement(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("opacus")
    atlas = make_cohorts(tmp_path_factory)
    privacy = {"example_clip": 1.0, "example_noise": 1.0, "prototype_clip": 1.0, "prototype_noise": 2.0, "noise": "seeded"}
    federation = {"cohorts": [{"path": str(atlas / "atlas_cls_t1"), "clients": 3}], "rounds": 2, "participation": 1.0}
    federation["min_examples"] = 1
    data = {"image_size": 32, "cache": str(atlas / "cache")}
    bank = {"dim": 8, "band": 8, "neighbourhood_band": 8, "bank": {"prototypes": 1, "capacity": 12}}
    raw = jobs.raw_config(atlas, federation=federation, strategies={"omnifm": bank}, privacy=privacy) | {"data": data}
    execute(parse(raw), tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    found = metrics["privacy"]
    (unit,) = found["combined"]["units"]
    assert found["prototypes"]["releases"] == 1 and found["prototypes"]["mean_spectrum"] is True
    count = next(c["num_train"] for c in metrics["clients"] if c["id"] == unit["client"])
    steps, told = 2 * -(-count // 4), Releases(2.0, 2)  # prototypes once, the mean spectrum once
    assert unit["weights"] == epsilon_of_examples(1.0, 1e-5, steps, min(1.0, 4 / count))
    assert unit["prototypes"] == epsilon_of_examples(0.0, 1e-5, 0, 1.0, told)
    assert unit["together"] == epsilon_of_examples(1.0, 1e-5, steps, min(1.0, 4 / count), told)
    assert max(unit["weights"], unit["prototypes"]) < unit["together"] < unit["weights"] + unit["prototypes"]
    assert metrics["bytes"]["bank_up"] > 0 and metrics["bytes"]["bank_down"] > 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for words in (
        "both together",
        number(unit["together"]),
        number(unit["prototypes"]),
        "budget of the spectra",
        "retrieval counts",
    ):
        assert words in page, words
    assert page.count(found["not_covered"]) == 1
