"""What is left to share where the head is all that trains."""

from pathlib import Path

import pytest

from omnifm import build
from omnifm.config import parse
from omnifm.errors import ConfigError
from tests.tasks.test_vqa import fake_words, raw_config
from tests.tasks.vqa_cohort import write_questions


@pytest.mark.parametrize(
    ("tune", "strategy", "refused"), [("F-C", "fedper", True), ("F-C", "fedavg", False), ("F-CL", "fedper", False)]
)
def test_an_average_of_nothing_is_refused(
    tune: str, strategy: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strategy that keeps the head would be `local` there."""
    monkeypatch.setitem(build.TASKS, "vqa", "omnifm.tasks.vqa:Vqa")
    monkeypatch.setattr("omnifm.tasks.vqa_models.minilm_words", fake_words)
    write_questions(tmp_path / "scan", "scan", "MRI")
    write_questions(tmp_path / "echo", "echo", "US", image_disjoint="1")
    config = parse(raw_config(tmp_path, strategy, model="llava", llava={"tune": tune}))
    data = build.load_data(config)
    site = build.make_site(config, tmp_path / "clients", data)
    assert bool(site.initial_shared()) != refused
    clients = [plan.id for plan in data.plans]
    if refused:
        with pytest.raises(ConfigError, match="strategy fedper: nothing that trains here is shared"):
            build.make_schedule(config, site, clients)
    else:
        build.make_schedule(config, site, clients)
