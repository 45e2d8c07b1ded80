"""What is left to share where the head is all that trains, weights for no trunk, and images that several splits share."""

from dataclasses import replace
from pathlib import Path

import pytest

from omnifm import build
from omnifm.config import parse
from omnifm.data.cohort import Cohort, write_cohort
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


def test_a_file_of_a_trunks_weights_is_refused_by_what_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.TASKS, "vqa", "omnifm.tasks.vqa:Vqa")
    write_questions(tmp_path / "scan", "scan", "MRI")
    write_questions(tmp_path / "echo", "echo", "US", image_disjoint="1")
    raw = raw_config(tmp_path, model="llava")
    config = parse({**raw, "model": {**raw["model"], "weights": "trunk.safetensors"}})
    with pytest.raises(ConfigError, match=r"^model\.weights: tasks\.vqa\.model = 'llava' reads its weights from"):
        build.make_task(config, build.load_data(config))


def test_test_questions_about_images_of_training_are_in_the_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of eight test questions are about two images of training; the other cohort says nothing."""
    monkeypatch.setitem(build.TASKS, "vqa", "omnifm.tasks.vqa:Vqa")
    monkeypatch.setattr("omnifm.tasks.vqa_models.minilm_words", fake_words)
    write_questions(tmp_path / "echo", "echo", "US", image_disjoint="1")
    folder = write_questions(tmp_path / "scan", "scan", "MRI")
    cohort = Cohort.read(folder)
    other = {"test0": "train1", "test1": "train1", "test5": "train2"}
    rows = [replace(row, image=f"images/{other[row.id]}.png") if row.id in other else row for row in cohort.rows]
    write_cohort(folder, cohort.spec, rows)
    config = parse(raw_config(tmp_path, "fedavg"))
    notes = build.make_task(config, build.load_data(config)).notes
    (said,) = [note for note in notes if "training" in note]
    assert said == "scan: 3 of 8 test questions are about images that are in training too."
