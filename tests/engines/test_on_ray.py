"""Whole runs in Flower's simulation on Ray, in a network of nothing but the loopback: they leave what one process leaves."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from omnifm.config import load
from omnifm.errors import OmnifmError
from omnifm.run import execute
from tests.run import jobs, killed
from tests.tasks.atlas import make_cohorts

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ("omnifm", "scaffold")
ALONE = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
SECONDS = 1800.0
"""Many times what it takes on a machine that has nothing else to do."""

if find_spec("flwr") is None or find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'omnifm[flower-simulation]'", allow_module_level=True)


def can_be_alone() -> bool:
    there = shutil.which("unshare") is not None and shutil.which("ip") is not None
    return there and subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0


@dataclass(frozen=True)
class Runs:
    """What the runs on Ray left, and what was seen on the way."""

    folder: Path
    seen: dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    if not can_be_alone():
        pytest.skip("no network of its own can be made here (unshare -n, ip), and Ray is not to be near another")
    folder, atlas = tmp_path_factory.mktemp("on-ray"), make_cohorts(tmp_path_factory)
    federation = {"cohorts": [{"path": str(atlas / f"atlas_cls_{kind}")} for kind in ("t1", "t2", "ct")]}
    federation |= {"rounds": 2, "participation": 1.0, "finetune_epochs": 0}
    for strategy in STRATEGIES:
        jobs.write_toml(folder / f"{strategy}.toml", jobs.raw_config(folder, strategy, federation=federation))
    failing = jobs.raw_config(folder, "fedavg", federation=federation, optimiser={"lr": 1e30})
    jobs.write_toml(folder / "failing.toml", failing)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [*ALONE, sys.executable, "-m", "tests.engines.on_ray", str(folder)]
    for _ in range(3):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
        if "timed out during startup" not in done.stdout + done.stderr:
            break  # a machine with much else to do may not give Ray its 30 seconds to start in
        shutil.rmtree(folder / "omnifm-ray", ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Runs(folder, json.loads((folder / "seen.json").read_text()))


def shared(run: Path) -> dict[str, Any]:
    """Return the server's tensors after the last round, as bytes, and all private ones."""
    last = json.loads((run / "checkpoint" / "last.json").read_text())
    found = {"server": jobs.contents(run / "checkpoint" / last["file"])}
    return found | {str(p.relative_to(run)): jobs.contents(p) for p in sorted((run / "checkpoint" / "clients").rglob("*.s*"))}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_seed_gives_the_same_bits_in_every_engine(strategy: str, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    server = killed.processes()  # what workers import anyway is imported once
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: server)
    for workers in (1, 2):
        execute(load(runs.folder / f"{strategy}.toml", [f"engine.workers={workers}"]), runs.folder / f"{strategy}-{workers}")
    expected = shared(runs.folder / f"{strategy}-1")
    assert len(expected) > 3, "no private state: the run is no test"
    assert shared(runs.folder / f"{strategy}-2") == expected
    assert shared(runs.folder / f"{strategy}-ray") == expected
    one, other = (jobs.left_behind(runs.folder / f"{strategy}-{name}") for name in ("1", "ray"))
    assert one == other


@pytest.mark.slow
def test_ctrl_c_leaves_the_last_whole_round(runs: Runs) -> None:
    assert runs.seen["interrupted"] == 1


@pytest.mark.slow
def test_a_client_that_fails_ends_the_run_with_the_line_of_one_process(runs: Runs) -> None:
    with pytest.raises(OmnifmError) as caught:
        execute(load(runs.folder / "failing.toml"), runs.folder / "failing-1")
    assert runs.seen["failure"] == str(caught.value)
    assert runs.seen["failure"].startswith("client atlas_cls_ct-0, round 0: the loss is not finite")


@pytest.mark.slow
def test_ray_listens_on_loopback_alone_and_nothing_of_it_is_left(runs: Runs) -> None:
    assert runs.seen["listening"] == ["127.0.0.1"]
    programs = " ".join(runs.seen["programs"])
    assert "gcs_server" in programs and "dashboard.py" not in programs
    assert runs.seen["left"] == [] and runs.seen["environment"] == []
    assert "ServerApp finished running" in (runs.folder / "omnifm-ray" / "simulation.log").read_text()
