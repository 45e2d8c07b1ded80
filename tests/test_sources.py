"""A run goes on, or counts as finished, only with the files it was started with."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from omnifm.compare import Cell, Variant
from omnifm.compare import finished as is_finished
from omnifm.config import Config
from omnifm.errors import CheckpointError
from omnifm.run import execute
from omnifm.sources import what_changed
from omnifm.track.folder import write_json
from tests.data.builders import noise, save_png
from tests.run import jobs


@pytest.fixture
def job(tmp_path: Path) -> Config:
    return jobs.config(jobs.write_federation(tmp_path / "data"), "fedavg", federation={"rounds": 1})


def finished_cell(job: Config, run: Path) -> bool:
    cell = Cell(Variant("fedavg"), 1.0, 0, job)
    folder = cell.folder(run.parent / "table")
    shutil.copytree(run, folder, dirs_exist_ok=True)
    return is_finished(cell, run.parent / "table", "metrics.json")


def test_another_image_under_the_same_name_is_seen(job: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    execute(job, run)
    assert what_changed(job, run) == "" and finished_cell(job, run)
    save_png(tmp_path / "data/scan/images/train0.png", (255 * noise(jobs.SIDE, jobs.SIDE)).astype("uint8"))
    changed = f"files of cohort {tmp_path / 'data/scan'} are not those this run was started with"
    with pytest.raises(CheckpointError, match=changed):
        execute(job, run, resume=True)
    assert not finished_cell(job, run)
    assert what_changed(job, run, files=False) == ""


def test_a_run_of_an_older_version_says_nothing_of_files(job: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    execute(job, run)
    record = json.loads((run / "split.json").read_text())
    del record["files"], record["weights"]
    write_json(run / "split.json", record)
    save_png(tmp_path / "data/scan/images/train0.png", (255 * noise(jobs.SIDE, jobs.SIDE)).astype("uint8"))
    assert what_changed(job, run) == ""


def test_other_weights_under_the_same_name_are_seen(job: Config, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_file({"x": noise(3)}, weights)
    named = job.model_copy(update={"model": job.model.model_copy(update={"weights": str(weights)})})
    record = {"weights": {"model.weights": what_is(weights)}}
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "split.json", record)
    assert what_changed(named, tmp_path / "run") == ""
    save_file({"x": noise(3, stream=1)}, weights)
    assert what_changed(named, tmp_path / "run").startswith("model.weights = ")
    weights.unlink()  # gone is not changed
    assert what_changed(named, tmp_path / "run") == ""


def what_is(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
