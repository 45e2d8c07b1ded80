"""What `omnifm status` shows of a run folder while a server works in it, or after."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnifm.deploy.board import STATUS_FILE
from omnifm.deploy.server import is_locked
from omnifm.errors import CheckpointError
from omnifm.track.folder import read_json

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Status:
    """A status in words.

    Attributes:
        headline: state, round, loss and score in one line.
        clients: by id, a cell for every column.
    """

    headline: str
    clients: dict[str, tuple[str, ...]]


COLUMNS = ("client", "connected", "waiting for", "replies", "late", "twice", "errors", "MiB down", "MiB up", "seconds", "trouble")


def read_status(run: Path, now: float | None = None) -> Status:
    """Read a run's status. Raises CheckpointError if the folder has none."""
    if not (run / STATUS_FILE).is_file():
        raise CheckpointError(f"{run}: holds no {STATUS_FILE}; omnifm serve writes it once its program runs")
    found = read_json(run / STATUS_FILE)
    alive = is_locked(run / "flower" / "server.lock")
    age = max(0.0, (time.time() if now is None else now) - found["written"])
    state = found["state"] if alive or found["state"] == "finished" else f"not running (last state: {found['state']})"
    parts = [state, f"round {found['round']} of {found['rounds']}"]
    parts += [f"loss {found['loss']:.3f}"] if found["loss"] is not None else []
    parts += [f"val {found['primary']} {found['score']:.3f}"] if found["score"] is not None else []
    return Status(", ".join([*parts, f"as of {age:.0f} s ago"]), {c: _cells(c, facts) for c, facts in found["clients"].items()})


def _cells(client: str, facts: dict[str, Any]) -> tuple[str, ...]:
    counts = [str(facts[key]) for key in ("replies", "late", "repeated", "errors")]
    sizes = [f"{facts[key] / 2**20:.1f}" for key in ("bytes_down", "bytes_up")]
    connected = "yes" if facts["connected"] else "no"
    return (client, connected, facts["waiting"], *counts, *sizes, f"{facts['seconds']:.1f}", facts["said"] or facts["trouble"])


def table(status: Status) -> "Table":
    """Return the clients as a table."""
    from rich.markup import escape
    from rich.table import Table

    found = Table()
    for column in COLUMNS:
        found.add_column(column, justify="right" if column in COLUMNS[3:10] else "left")
    for cells in status.clients.values():
        found.add_row(*map(escape, cells))
    return found
