"""A checkpoint is whole or refused, in one line that names the file; nothing is overwritten on the way."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from omnifm.errors import CheckpointError, OmnifmError
from omnifm.federation.state import ServerState
from omnifm.federation.store import write_tensors
from omnifm.run import execute
from omnifm.track.checkpoint import Checkpoint
from omnifm.track.recorder import RunRecorder
from tests.run.jobs import config, left_behind

FACTS = {"events_bytes": 0, "seconds": 0.0, "best": None}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    assert not checkpoint.exists()
    shared = torch.randn(3, generator=torch.Generator().manual_seed(0))
    server = ServerState({"backbone.w": shared}, {"bank/rows": torch.tensor([1, 2]), "twin": shared}, {"keep": [2]})
    checkpoint.save(server, 4, {**FACTS, "best": (2, 0.25)})
    found, record = checkpoint.load()
    assert torch.equal(found.shared["backbone.w"], shared)
    assert torch.equal(found.extra["twin"], shared)
    assert torch.equal(found.extra["bank/rows"], torch.tensor([1, 2]))
    assert found.meta == {"keep": [2]}
    assert (record["rounds_completed"], record["best"]) == (4, [2, 0.25])


def test_best_stays_while_last_moves_on_and_the_rest_goes(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    for completed in range(1, 6):
        write_tensors(checkpoint.clients / "a" / f"{completed:06d}.safetensors", {"x": torch.tensor(float(completed))})
        checkpoint.save(ServerState({"x": torch.tensor(float(completed))}), completed, FACTS)
        if completed == 2:
            checkpoint.pin_best()
    assert sorted(p.name for p in tmp_path.glob("server-*")) == ["server-000002.safetensors", "server-000005.safetensors"]
    assert float(checkpoint.load("best")[0].shared["x"]) == 2
    assert float(checkpoint.load("last")[0].shared["x"]) == 5
    assert [list(checkpoint.load(n)[1]["clients"]) for n in ("best", "last")] == [
        ["a/000002.safetensors"],
        ["a/000005.safetensors"],
    ]


def test_a_commit_names_the_newest_state_of_each_client_and_none_of_a_later_round(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    for client, versions in {"a": (1, 3), "b": (2,), "c": (4,)}.items():
        for version in versions:
            write_tensors(checkpoint.clients / client / f"{version:06d}.safetensors", {"x": torch.tensor(version)})
    checkpoint.save(ServerState({"x": torch.zeros(1)}), 3, FACTS)
    assert list(checkpoint.load()[1]["clients"]) == ["a/000003.safetensors", "b/000002.safetensors"]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the kernel refuse to write beyond `size` bytes of any file, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


Finished = Callable[[str], Path]
FILES = ("last.json", "best.json", "server", "client")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbled": lambda path: path.write_bytes(_garble(path.read_bytes())),
}


def _garble(content: bytes) -> bytes:
    """Change one byte in the last quarter: in a tensor file that is a weight, which no format check can see."""
    place = len(content) - len(content) // 8 - 1
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def interrupted(run: Path) -> Path:
    """Make a finished run one that was interrupted before its tests, and that was best on validation in its first round."""
    for name in ("metrics.json", "report.html"):
        (run / name).unlink()
    record = json.loads((run / "checkpoint" / "last.json").read_text()) | {"best": [1, 0.99]}
    (run / "checkpoint" / "last.json").write_text(json.dumps(record))
    (run / "checkpoint" / "best.json").write_text(json.dumps(record | {"rounds_completed": 1}))
    return run


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_nothing_is_overwritten(
    name: str, damage: str, data: Path, tmp_path: Path, finished: Finished
) -> None:
    run = interrupted(Path(shutil.copytree(finished("local"), tmp_path / "run")))
    record = json.loads((run / "checkpoint" / "last.json").read_text())
    client = run / "checkpoint" / "clients" / max(record["clients"])
    path = {"server": run / "checkpoint" / record["file"], "client": client}.get(name, run / "checkpoint" / name)
    DAMAGES[damage](path)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(OmnifmError) as caught:
        execute(config(data, "local"), run, resume=True)
    assert isinstance(caught.value, CheckpointError)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize("name", ["events.jsonl", "split.json", "config.toml"])
def test_other_files_a_resumed_run_needs(name: str, damage: str, data: Path, tmp_path: Path, finished: Finished) -> None:
    run = interrupted(Path(shutil.copytree(finished("local"), tmp_path / "run")))
    DAMAGES[damage](run / name)
    with pytest.raises(OmnifmError) as caught:
        execute(config(data, "local"), run, resume=True)
    assert str(run if (name, damage) == ("config.toml", "missing") else run / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_that_lacks_a_key_is_named(tmp_path: Path) -> None:
    Checkpoint(tmp_path).save(ServerState({"x": torch.zeros(1)}), 1, FACTS)
    record = json.loads((tmp_path / "last.json").read_text())
    for key in record:
        (tmp_path / "last.json").write_text(json.dumps({k: v for k, v in record.items() if k != key}))
        with pytest.raises(CheckpointError, match=rf"last\.json: lacks {key}"):
            Checkpoint(tmp_path).load()


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "clients").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"000001\.safetensors: cannot be written"):
        write_tensors(tmp_path / "clients" / "a" / "000001.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "000002.safetensors" / "x").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"000002\.safetensors: cannot be written"):
        write_tensors(tmp_path / "000002.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "folder" / "last.json").mkdir(parents=True)
    (tmp_path / "folder" / "last.json" / "x").touch()
    with pytest.raises(CheckpointError, match=r"last\.json: cannot be written"):
        Checkpoint(tmp_path / "folder").save(ServerState({"x": torch.zeros(1)}), 1, FACTS)
    assert not list(tmp_path.rglob(".*.part"))


def test_tensors_that_do_not_fit_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "000001.safetensors"
    write_tensors(path, {"x": torch.zeros(1)})
    before = path.read_bytes()
    with file_size_limit(4096), pytest.raises(CheckpointError, match=r"000001\.safetensors: cannot be written") as caught:
        write_tensors(path, {"x": torch.zeros(4096)})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_what_killed_writes_left_goes_at_the_next_start(data: Path, tmp_path: Path, finished: Finished) -> None:
    run = interrupted(Path(shutil.copytree(finished("local"), tmp_path / "run")))
    client = next((run / "checkpoint" / "clients").iterdir())
    places = [run, run / "checkpoint", client, run / "bank"]
    (run / "bank").mkdir(exist_ok=True)
    for place in places:
        (place / ".000003.safetensors.4711.part").write_bytes(b"cut sho")
    (run / "mine.part").touch()
    with pytest.raises(CheckpointError, match="already holds a run"):
        execute(config(data, "local"), run)
    assert len(list(run.rglob(".*.part"))) == len(places)
    execute(config(data, "local"), run, resume=True)
    assert [path.name for path in run.rglob("*.part")] == ["mine.part"]


def test_a_disk_that_is_full_of_events_is_one_line_and_nothing_is_lost(data: Path, tmp_path: Path, finished: Finished) -> None:
    def fill(record: Mapping[str, Any]) -> None:
        if record["event"] == "round" and record["round"] == 1:
            limits.enter_context(file_size_limit((tmp_path / "run" / "events.jsonl").stat().st_size))

    with ExitStack() as limits, pytest.raises(CheckpointError, match=r"events\.jsonl: cannot be written \(File too") as caught:
        execute(config(data, "fedavg"), tmp_path / "run", watch=fill)
    assert "\n" not in str(caught.value)
    execute(config(data, "fedavg"), tmp_path / "run", resume=True)
    assert left_behind(tmp_path / "run") == left_behind(finished("fedavg"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
def test_events_that_do_not_fit_are_one_line_whoever_writes_them(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    message = r"^[^\n]*events\.jsonl: cannot be written \(No space left on device\)$"
    recorder = RunRecorder(tmp_path, Checkpoint(tmp_path / "checkpoint"), "accuracy")
    recorder.event({"event": "round"})
    with pytest.raises(CheckpointError, match=message):
        recorder.commit(ServerState({"x": torch.zeros(1)}), 1)
    with pytest.raises(CheckpointError, match=message):
        recorder.event({"event": "x" * 2**20})
    recorder.close()
    with pytest.raises(CheckpointError, match=r"^[^\n]*events\.jsonl: cannot be written \([^\n]*\)$"):
        recorder.rewind({"events_bytes": 0})
    assert not (tmp_path / "checkpoint").exists()


def test_a_crash_between_saving_the_best_round_and_pinning_it_is_mended(data: Path, tmp_path: Path, finished: Finished) -> None:
    run = Path(shutil.copytree(finished("local"), tmp_path / "run"))
    last = json.loads((run / "checkpoint" / "last.json").read_text())
    (run / "checkpoint" / "last.json").write_text(json.dumps(last | {"best": [3, 0.99]}))
    (run / "checkpoint" / "best.json").unlink(missing_ok=True)
    for name in ("metrics.json", "report.html"):
        (run / name).unlink()
    metrics = execute(config(data, "local"), run, resume=True)
    assert metrics["best_validation_round"] == 2
    assert metrics["best"]["test"] == metrics["test"]
