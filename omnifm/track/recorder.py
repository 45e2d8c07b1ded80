"""Takes the facts of a run as they happen: events to disk and to whoever watches, checkpoints, totals."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omnifm.errors import CheckpointError
from omnifm.federation.state import ServerState
from omnifm.track.checkpoint import Checkpoint
from omnifm.track.folder import remove_partials

Watcher = Callable[[Mapping[str, Any]], None]


class RunRecorder:
    """Implements `federation.rounds.Recorder` for a run folder. Its start is the run's: half-written files of earlier starts go.

    Args:
        folder: the run folder.
        checkpoint: where states go.
        primary: the score that `best` goes by.
        watch: called with each event (the progress view).

    Raises:
        CheckpointError: the disk is full or refuses; so do all methods that write events.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, primary: str, watch: Watcher | None = None) -> None:
        self._path = folder / "events.jsonl"
        self._checkpoint = checkpoint
        self._primary = primary
        self._watch = watch
        self._started = time.perf_counter()
        self.seconds_before = 0.0
        self.best: tuple[int, float] | None = None
        self._new_best = False
        remove_partials(folder)
        with self._writing():
            self._file = self._path.open("a", encoding="utf-8")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be written ({error.strerror})") from None

    def rewind(self, record: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's facts: cut off events of rounds that did not complete.

        Raises:
            CheckpointError: events.jsonl is shorter than it was.
        """
        self._file.close()
        size = self._path.stat().st_size if self._path.is_file() else 0
        if size < record["events_bytes"]:
            raise CheckpointError(f"{self._path}: {size} bytes, {record['events_bytes']} when the checkpoint was written")
        with self._writing():
            os.truncate(self._path, record["events_bytes"])
            self._file = self._path.open("a", encoding="utf-8")
        self.seconds_before = record["seconds"]
        self.best = tuple(record["best"]) if record["best"] else None
        if self.best and self.best[0] == record["rounds_completed"]:
            # A crash may have come between saving the best round and pinning it.
            self._checkpoint.pin_best()

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, over all its starts."""
        return self.seconds_before + time.perf_counter() - self._started

    def announce(self, completed: int, rounds: int, per_round: int, clients: int) -> None:
        """Tell the watcher what is coming. Not an event of the run: a resumed run announces again."""
        if self._watch:
            facts = {
                "completed": completed,
                "rounds": rounds,
                "per_round": per_round,
                "clients": clients,
                "primary": self._primary,
            }
            self._watch({"event": "start", **facts})

    def event(self, record: Mapping[str, Any]) -> None:
        """Append one event and show it to the watcher."""
        with self._writing():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if record["event"] == "evaluation" and record["split"] == "val":
            score = record["personal"].get(self._primary)
            if score is not None and (self.best is None or score > self.best[1]):
                self.best = (record["round"] + 1, score)
                self._new_best = True
        if self._watch:
            self._watch(record)

    def commit(self, server: ServerState, rounds_completed: int) -> None:
        """Flush the events, then save the state; pin it if it is the best on validation."""
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())
        server.meta["keep"] = [self.best[0]] if self.best else []
        facts = {"events_bytes": self._file.tell(), "seconds": self.seconds, "best": self.best}
        self._checkpoint.save(server, rounds_completed, facts)
        if self._new_best:
            self._checkpoint.pin_best()
            self._new_best = False

    def close(self) -> None:
        """Close the file of events."""
        with suppress(OSError):  # events after the last commit count for nothing
            self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read events.jsonl. Raises CheckpointError naming the line that is damaged."""
    events = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            raise CheckpointError(f"{path}, line {number}: damaged") from None
    return events
