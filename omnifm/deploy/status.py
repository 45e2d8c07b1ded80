"""What `omnifm status` shows of a run folder while a server works in it, or after."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omnifm.deploy.board import STATUS_FILE
from omnifm.deploy.words import COLUMNS, NUMBERS, cells, headline
from omnifm.errors import CheckpointError
from omnifm.track.folder import read_json
from omnifm.track.lock import is_locked

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


def read_status(run: Path, now: float | None = None) -> Status:
    """Read a run's status. Raises CheckpointError if the folder has none."""
    if not (run / STATUS_FILE).is_file():
        raise CheckpointError(f"{run}: holds no {STATUS_FILE}; omnifm serve writes it once its program runs")
    found = read_json(run / STATUS_FILE)
    if found["state"] != "finished" and not is_locked(run / "flower" / "server.lock"):
        found["state"] = f"not running (last state: {found['state']})"
    age = max(0.0, (time.time() if now is None else now) - found["written"])
    return Status(f"{headline(found)}, as of {age:.0f} s ago", {c: cells(c, facts) for c, facts in found["clients"].items()})


def table(status: Status) -> "Table":
    """Return the clients as a table."""
    from rich.markup import escape
    from rich.table import Table

    found = Table()
    for column in COLUMNS:
        found.add_column(column, justify="right" if column in NUMBERS else "left")
    for row in status.clients.values():
        found.add_row(*map(escape, row))
    return found
