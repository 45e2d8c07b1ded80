"""Faults on the way, at the hospitals and at the server: what counted is all that the result knows of, and all of it."""

import ast
import inspect
import itertools
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import omnifm
from omnifm.config import Config, dump
from omnifm.deploy.board import Board
from omnifm.deploy.data import public
from omnifm.deploy.hospital import Hospital
from omnifm.deploy.serve import Server
from omnifm.deploy.server import Job, serve_job
from omnifm.engines.calls import Call, pack, unpack
from omnifm.engines.parcels import Arrival, Node
from omnifm.engines.remote import Patience, RemoteEngine
from omnifm.errors import CheckpointError, FederationError
from omnifm.federation.messages import Reply, Request, decode, encode
from omnifm.track.folder import write_config
from omnifm.track.recorder import RunRecorder
from tests.deploy.post import hurry
from tests.deploy.storm import FAULTS, Calm, Killed, Storm, full_disk
from tests.run import jobs

CLIENTS = ("scan-0", "scan-1", "echo-0", "echo-1")
ROUNDS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.data_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def hospital(data: Path, folder: Path, client: str) -> Hospital:
    return Hospital(data / client.partition("-")[0], client, folder / client, str(data / "cache"))


def hospitals(data: Path, folder: Path) -> dict[str, Hospital]:
    return {client: hospital(data, folder, client) for client in CLIENTS}


def config(data: Path, rounds: int = ROUNDS, **federation: Any) -> Config:
    changes = {"rounds": rounds, "participation": 1.0, "finetune_epochs": 0, "evaluate_every": rounds, **federation}
    return jobs.config(data, "fedper", federation=changes)


def serve(config: Config, carrier: Calm, out: Path) -> None:
    (out / "flower").mkdir(parents=True, exist_ok=True)
    if not (out / "config.toml").is_file():
        write_config(out / "config.toml", dump(public(config)))
    serve_job(Job(out=out, clients=CLIENTS, certs=None), carrier)


def counted(out: Path) -> list[tuple[int, str]]:
    return [(e["round"], e["client"]) for e in jobs.lines(out / "events.jsonl") if e["event"] == "client"]


def server_state(out: Path) -> dict[str, Any]:
    last = json.loads((out / "checkpoint" / "last.json").read_text())
    return {"rounds": last["rounds_completed"], "tensors": jobs.contents(out / "checkpoint" / last["file"])}


def private_state(folder: Path) -> dict[str, Any]:
    """Return the newest state of every hospital."""
    newest = {c: max((folder / c).glob(f"run-*/{c}/*.safetensors"), default=None) for c in CLIENTS}
    return {c: path and (path.name, jobs.contents(path)) for c, path in newest.items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_after_thirty_faults_the_result_is_that_of_the_replies_that_counted(data: Path, tmp_path: Path, seed: int) -> None:
    patient = config(data, min_replies=2, deadline=0.05)
    homes = tmp_path / "hospitals"
    storm = Storm(hospitals(data, homes), fresh=lambda client: hospital(data, homes, client), seed=seed)
    while True:
        try:
            serve(patient, storm, tmp_path / "storm")
            break
        except Killed:
            assert len(storm.met) <= 30
    assert len(storm.met) == 30 and set(storm.met) == set(FAULTS)
    found = counted(tmp_path / "storm")
    assert len(found) == len(set(found)) and set(found) <= storm.done and len(found) < ROUNDS * len(CLIENTS)
    rounds = [e for e in jobs.lines(tmp_path / "storm" / "events.jsonl") if e["event"] == "round"]
    assert [e["round"] for e in rounds] == list(range(ROUNDS))
    assert all(sorted([*(c for r, c in found if r == e["round"]), *e.get("missing", [])]) == sorted(CLIENTS) for e in rounds)
    calm = Calm(hospitals(data, tmp_path / "others"), storm.done, found)
    serve(patient, calm, tmp_path / "calm")
    assert counted(tmp_path / "calm") == found
    assert server_state(tmp_path / "calm") == server_state(tmp_path / "storm")
    assert private_state(tmp_path / "others") == private_state(homes)


def test_a_full_disk_at_a_hospital_is_one_line_and_its_state_stays_as_it_was(data: Path, tmp_path: Path) -> None:
    """Round 1 cannot be kept at scan-1. Once there is room the run goes on, to the end that it would have had anyway."""
    own = "homes/scan-1/run-*/scan-1"

    class Filling(Calm):
        full = True

        def send(self, node: int, blob: bytes) -> str:
            if self.full and self.client_at(node) == "scan-1" and list(tmp_path.glob(f"{own}/000001.safetensors")):
                with full_disk():
                    return super().send(node, blob)
            return super().send(node, blob)

    carrier = Filling(hospitals(data, tmp_path / "homes"))
    line = r"^client scan-1: [^\n]*000002\.safetensors: cannot be written \([^\n]*No space left on device\)$"
    with pytest.raises(FederationError, match=line):
        serve(config(data, 3), carrier, tmp_path / "run")
    assert server_state(tmp_path / "run")["rounds"] == 1
    assert [p.name for p in tmp_path.glob(f"{own}/*")] == ["000001.safetensors"]
    carrier.full = False
    serve(config(data, 3), carrier, tmp_path / "run")
    serve(config(data, 3), Calm(hospitals(data, tmp_path / "others")), tmp_path / "calm")
    assert server_state(tmp_path / "run") == server_state(tmp_path / "calm")
    assert private_state(tmp_path / "homes") == private_state(tmp_path / "others")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB. Skipped where nobody may mount one; what `full_disk` and file size limits show holds there too."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("which", ["checkpoint", "events.jsonl", "status.json"])
def test_a_full_disk_at_the_server_is_one_line_and_the_run_goes_on_when_there_is_room(
    data: Path, tmp_path: Path, small_disk: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ballast = tmp_path / "run", small_disk / "ballast"
    write = RunRecorder.commit

    def fill(recorder: RunRecorder, server: Any, completed: int) -> None:
        write(recorder, server, completed)
        if completed == 2 and not ballast.exists():
            with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    monkeypatch.setattr(RunRecorder, "commit", fill)
    if which == "status.json":
        out = small_disk / "run"
    else:
        out.mkdir()
        (out / which).symlink_to(small_disk / which)
        (small_disk / "checkpoint").mkdir()
    carrier = Calm(hospitals(data, tmp_path / "homes"))
    with pytest.raises(
        CheckpointError, match=rf"^[^\n]*{which}[^\n]*: cannot be written \([^\n]*(No space left|code: 28)[^\n]*\)$"
    ):
        serve(config(data, 4), carrier, out)
    assert 2 <= server_state(out)["rounds"] < 4
    ballast.write_bytes(b"")
    serve(config(data, 4), carrier, out)
    serve(config(data, 4), Calm(hospitals(data, tmp_path / "others")), tmp_path / "calm")
    assert server_state(out) == server_state(tmp_path / "calm")


FOR_PEOPLE = {"deploy/board.py", "deploy/status.py", "deploy/doctor.py", "deploy/certs.py"}
"""Where the time of day is shown, or is itself what it is about."""


def test_who_serves_says_that_the_disk_is_full_if_the_server_program_cannot(data: Path, small_disk: Path) -> None:
    said: list[str] = []
    server = Server(config(data, 1), small_disk, CLIENTS, None, "127.0.0.1", 1, said.append)
    server._count_restart("the server's program died")
    assert said == ["the server's program died; going on from the last round"]
    (small_disk / "ballast").write_bytes(bytes(15 * 2**20 + 2**19))
    line = rf"^{small_disk}: the server's program died, and the disk is full; free some, then go on with --resume$"
    with pytest.raises(CheckpointError, match=line):
        server._count_restart("the server's program died")


def reads_the_time_of_day(node: ast.AST) -> bool:
    """Whether code reads a clock that may jump."""
    if isinstance(node, ast.ImportFrom):
        return node.module in ("time", "datetime")
    return isinstance(node, ast.Attribute) and (ast.unparse(node) == "time.time" or node.attr in ("now", "utcnow", "today"))


def test_nothing_waits_by_the_time_of_day() -> None:
    """A clock that jumps an hour moves no deadline: whatever waits goes by a clock that never runs backwards."""
    package = Path(omnifm.__file__).parent
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")}
    found = {path for path, tree in trees.items() if any(map(reads_the_time_of_day, ast.walk(tree)))}
    assert {str(path.relative_to(package)) for path in found} == FOR_PEOPLE
    for waits, clock in ((RemoteEngine, "clock"), (Board, "steady")):
        assert inspect.signature(waits).parameters[clock].default is time.monotonic


@pytest.mark.parametrize("hour", [3600.0, -3600.0])
def test_a_deadline_passes_when_it_should_while_the_clock_on_the_wall_jumps(hour: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One client never answers. The round takes the deadline's time, neither none nor an hour more."""
    wall, looks = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: wall() + hour * (next(looks) % 2))
    places = {"a": Node(1), "b": Node(2)}

    class Deaf:
        def nodes(self) -> list[Node]:
            return list(places.values())

        def send(self, node: int, blob: bytes) -> str:
            self.asked = decode(unpack(blob).body) if node == 1 else self.asked
            return f"p{node}"

        def take(self, parcels: Any) -> list[Arrival]:
            reply = Reply(self.asked.kind, self.asked.round, "a", 1)
            return [Arrival("p1", pack(Call("reply", {}, encode(reply))))] if "p1" in parcels else []

    engine = RemoteEngine(Deaf(), places, places.__getitem__, {}, Patience(1, 0.3))
    started = time.monotonic()
    found = list(engine.exchange(Request("train", 0, client) for client in places))
    assert [reply.client for reply in found] == ["a"]
    assert 0.3 <= time.monotonic() - started < 60
