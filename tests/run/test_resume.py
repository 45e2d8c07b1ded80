"""`kill -9` at any moment, then `--resume`: bitwise what an uninterrupted run leaves."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

from omnifm.compare import Cell, Variant
from omnifm.compare import finished as is_finished
from omnifm.config import digest
from omnifm.errors import CheckpointError, ConfigError
from omnifm.run import execute
from omnifm.seeds import numpy_generator
from tests.run import killed
from tests.run.jobs import config, left_behind, lines, raw_config

Finished = Callable[[str], Path]
KILLED = -9

# Each start of the run dies just before this file gets its final name (or, for server-000001, before it is deleted).
MOMENTS = {
    "omnifm": [
        ("config.toml", 1),
        ("events.jsonl", 1),
        ("split.json", 1),
        ("000001.safetensors", 2),  # in the middle of round 0
        ("server-000001.safetensors", 1),
        ("last.json", 1),
        ("best.json", 1),  # round 0 is saved, but not pinned as the best
        ("000002.safetensors", 3),
        ("last.json", 1),
        ("round-0002.safetensors", 1),
        ("metrics.json", 1),
        ("report.html", 1),
    ],
    "local": [("000001.safetensors", 1), ("best.json", 1), ("000003.safetensors", 2), ("examples.json", 1)],
}


@pytest.mark.parametrize("strategy", MOMENTS)
def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(
    strategy: str, data: Path, tmp_path: Path, finished: Finished
) -> None:
    raw = raw_config(data, strategy)
    for name, count in MOMENTS[strategy]:
        assert killed.dies(killed.run, raw, tmp_path / "run", name, count) == KILLED, (name, count)
        assert not (tmp_path / "run" / "report.html").exists()
    execute(config(data, strategy), tmp_path / "run", resume=True)
    assert left_behind(tmp_path / "run") == left_behind(finished(strategy))


@pytest.mark.parametrize(("strategy", "stream"), [("omnifm", 0), ("local", 1), ("fedavg", 2)])
def test_killed_at_random_moments(strategy: str, stream: int, data: Path, tmp_path: Path, finished: Finished) -> None:
    draw = numpy_generator(20260, "kill", stream)
    for _ in range(3):
        operations = int(draw.integers(1, 60))
        assert killed.dies(killed.run, raw_config(data, strategy), tmp_path / "run", "", operations) in (KILLED, 0)
    execute(config(data, strategy), tmp_path / "run", resume=True)
    assert left_behind(tmp_path / "run") == left_behind(finished(strategy))


# Rounds 0 and 1 of omnifm are two workers' alone: what they are sent must not depend on replies that came meanwhile.
@pytest.mark.parametrize(("strategy", "before", "replies", "after"), [("omnifm", 2, 8, 1), ("local", 1, 5, 2)])
def test_killed_in_the_middle_of_a_round_and_resumed_with_other_workers(
    strategy: str, before: int, replies: int, after: int, data: Path, tmp_path: Path, finished: Finished
) -> None:
    raw = raw_config(data, strategy, engine={"workers": before})
    assert killed.dies(killed.run_until_reply, raw, tmp_path / "run", replies) == KILLED
    workers = json.loads((tmp_path / "run.workers").read_text())
    assert len(workers) == (before if before > 1 else 0)
    _wait_until_gone(workers)
    execute(config(data, strategy, engine={"workers": after}), tmp_path / "run", resume=True)
    assert left_behind(tmp_path / "run") == left_behind(finished(strategy))


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, f"orphans: {left}"
        time.sleep(0.05)


def test_a_second_run_is_bitwise_the_first(data: Path, tmp_path: Path, finished: Finished) -> None:
    execute(config(data, "omnifm"), tmp_path / "run")
    assert left_behind(tmp_path / "run") == left_behind(finished("omnifm"))


def test_another_seed_is_another_run(data: Path, tmp_path: Path, finished: Finished) -> None:
    execute(config(data, "fedavg", seed=1), tmp_path / "run")
    losses = [[e["loss"] for e in lines(run / "events.jsonl") if "loss" in e] for run in (tmp_path / "run", finished("fedavg"))]
    assert losses[0] != losses[1]


def test_a_finished_run_is_not_touched_by_resume(
    data: Path, tmp_path: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished("fedavg"), tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr("omnifm.build.load_data", None)  # whoever loads data fails
    metrics = execute(config(data, "fedavg"), run, resume=True)
    assert metrics == json.loads((run / "metrics.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_that_goes_on_in_another_version_says_so(
    data: Path, tmp_path: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished("fedavg"), tmp_path / "run"))
    (run / "metrics.json").unlink()
    first = json.loads((run / "environment.json").read_text())["commit"]
    monkeypatch.setattr("omnifm.track.folder.commit", lambda: "another")
    execute(config(data, "fedavg"), run, resume=True)
    assert json.loads((run / "environment.json").read_text())["commit"] == f"{first}..another"


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_process_does_not_work_in_the_folder(resume: bool, data: Path, tmp_path: Path, finished: Finished) -> None:
    run, refused = tmp_path / "run", []

    def meanwhile(event: Mapping[str, object]) -> None:
        if event["event"] == "round" and not refused:
            with pytest.raises(CheckpointError) as caught:
                execute(config(data, "fedper"), run, resume=resume)
            refused.append(str(caught.value))

    execute(config(data, "fedper"), run, watch=meanwhile)
    known = "another run works in this folder" if resume else "already holds a run"
    assert len(refused) == 1 and known in refused[0]
    assert left_behind(run) == left_behind(finished("fedper"))


def test_a_folder_in_use_is_refused(data: Path, tmp_path: Path, finished: Finished) -> None:
    run = finished("fedavg")
    before = left_behind(run)
    with pytest.raises(CheckpointError, match=r"uninterrupted-fedavg: already holds a run; continue it with --resume"):
        execute(config(data, "fedavg"), run)
    with pytest.raises(CheckpointError, match="was started with another config"):
        execute(config(data, "fedavg", federation={"rounds": 4}), run, resume=True)
    assert left_behind(run) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for out, words in (
        ("mine", "is not empty and holds no run"),
        ("mine/thesis.tex", "is a file"),
        ("mine/thesis.tex/a", "made"),
    ):
        with pytest.raises(CheckpointError, match=words):
            execute(config(data, "fedavg"), tmp_path / out)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_config_that_cannot_be_built_leaves_the_folder_free(data: Path, tmp_path: Path) -> None:
    bad = config(data, "omnifm", strategies={"omnifm": {"band": 64}})
    with pytest.raises(ConfigError, match="the model cannot be built"):
        execute(bad, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("end", ["metrics.json", "checkpoint/last.json"])
def test_a_cohort_of_the_same_name_that_is_another_is_told_of(data: Path, tmp_path: Path, finished: Finished, end: str) -> None:
    """A config's hash has no paths: without a look at the rows, the finished run would pass for one on these cohorts."""
    run = Path(shutil.copytree(finished("fedavg"), tmp_path / "run"))
    if end != "metrics.json":
        (run / "metrics.json").unlink()
    for name in ("scan", "echo"):
        shutil.copytree(data / name, tmp_path / "twin" / name)
    twin = config(tmp_path / "twin", "fedavg")
    assert digest(twin) == digest(config(data, "fedavg"))
    if end == "metrics.json":
        assert execute(twin, run, resume=True) == json.loads((run / end).read_text()), "the same rows elsewhere"
    manifest = tmp_path / "twin" / "echo" / "manifest.csv"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join([lines[0], *lines[2:], lines[1]]))
    with pytest.raises(CheckpointError, match=r"split\.json: cohort .*twin/echo is not the one this run was started with"):
        execute(twin, run, resume=True)
    cell = Cell(Variant("fedavg"), 1.0, 0, twin)
    shutil.copytree(run, cell.folder(tmp_path / "cells"))
    assert not is_finished(cell, tmp_path / "cells", end)


def test_cohorts_that_changed_are_not_resumed(data: Path, tmp_path: Path, finished: Finished) -> None:
    run = Path(shutil.copytree(finished("fedavg"), tmp_path / "run"))
    (run / "metrics.json").unlink()
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps({**split, "sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"split\.json: the cohorts are not those"):
        execute(config(data, "fedavg"), run, resume=True)
