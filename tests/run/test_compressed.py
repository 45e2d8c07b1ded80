"""A compressed run: the same bits with one worker, with two, through a kill, and with hospitals that keep their own residuals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from omnifm.config import dump
from omnifm.deploy.data import public
from omnifm.deploy.server import Job, serve_job
from omnifm.federation.client import RESIDUAL
from omnifm.run import execute
from omnifm.track.folder import write_config
from tests.deploy.post import Post, open_bays
from tests.run import killed
from tests.run.jobs import config, contents, left_behind, lines, raw_config

CLIENTS = ("scan-0", "scan-1", "echo-0", "echo-1")
TOPK: dict[str, Any] = {"compression": {"upload": "topk", "topk_share": 0.05}}


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in one process."""
    run = tmp_path_factory.mktemp("compressed") / "one"
    execute(config(data, "omnifm", **TOPK), run)
    return run


def residuals(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{p}:{n}": t for p in files for n, t in load_file(p).items() if n.startswith(RESIDUAL)}


def test_killed_with_two_workers_and_resumed_with_one_it_is_the_same_run(one: Path, data: Path, tmp_path: Path) -> None:
    assert any(t.any() for t in residuals(one / "checkpoint" / "clients").values())
    raw = raw_config(data, "omnifm", engine={"workers": 2}, **TOPK)
    # Five replies are in the middle of the second round, to which clients have brought residuals.
    assert killed.dies(killed.run_until_reply, raw, tmp_path / "run", 5) == -9
    execute(config(data, "omnifm", engine={"workers": 1}, **TOPK), tmp_path / "run", resume=True)
    assert left_behind(tmp_path / "run") == left_behind(one)


def test_hospitals_that_keep_their_own_residuals_give_the_same_run(
    one: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_POLL_SECONDS", "_RESEND_SECONDS", "_CHECK_SECONDS"):
        monkeypatch.setattr(f"omnifm.engines.remote.{name}", 0.0)
    out, hospitals = tmp_path / "apart", tmp_path / "hospitals"
    (out / "flower").mkdir(parents=True)
    write_config(out / "config.toml", dump(public(config(data, "omnifm", **TOPK))))
    serve_job(Job(out=out, clients=CLIENTS, certs=None), Post(open_bays(data, hospitals, CLIENTS), faults=10))
    kept = [
        {f"{path.parent.name}/{path.name}": contents(path) for path in folder.rglob("*.safetensors")}
        for folder in (hospitals, one / "checkpoint" / "clients")
    ]
    assert kept[0] == kept[1] and residuals(hospitals) and not residuals(out)
    servers = [{p.name: contents(p) for p in (f / "checkpoint").glob("server-*")} for f in (out, one)]
    assert servers[0] == servers[1]
    sizes = [[e["bytes_up"] for e in lines(f / "events.jsonl") if e["event"] == "client"] for f in (out, one)]
    assert sizes[0] == sizes[1]


def test_fewer_bytes_go_up_and_as_many_down(one: Path, finished: Callable[[str], Path]) -> None:
    compressed, plain = (json.loads((run / "metrics.json").read_text())["bytes"] for run in (one, finished("omnifm")))
    assert compressed["down"] == plain["down"] and compressed["up"] < 0.3 * plain["up"]
