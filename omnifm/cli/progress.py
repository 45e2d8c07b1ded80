"""The live views: of a run (rounds, clients, loss, score, time left), and of many runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from omnifm.compare import Cell


@contextmanager
def cells_bar(total: int) -> Iterator[Callable[[Cell, str], None]]:
    """Yield what to call with each cell that has ended and what became of it; the bar moves, and failures are said at once."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("cells", total=total)

        def show(cell: Cell, outcome: str) -> None:
            progress.update(bar, advance=1)
            if outcome != "ok":
                progress.console.print(f"{cell.name}: {outcome}", highlight=False, markup=False)

        yield show


class RunView:
    """A progress bar that is fed with the events of a run. Where there is no terminal, a line per evaluation is printed."""

    def __init__(self, title: str) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar = self._progress.add_task(f"{title}: reading data", total=None, facts="")
        self._title = title
        self._facts: dict[str, str] = {}
        self._primary = "score"

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Stopping a bar that was never started prints an empty line.
        if self._console.is_terminal:
            self._progress.stop()

    def event(self, record: Mapping[str, Any]) -> None:
        """Take one event."""
        kind = record["event"]
        if kind == "start":
            self._primary = record["primary"]
            self._progress.update(
                self._bar, description=f"{self._title}, rounds", total=record["rounds"], completed=record["completed"]
            )
        elif kind == "client":
            self._facts["client"] = record["client"]
        elif kind == "round":
            self._facts.update(client=f"{len(record['clients'])} clients", loss=f"loss {record['loss']:.3f}")
            self._progress.update(self._bar, completed=record["round"] + 1)
        elif kind == "evaluation":
            self._evaluation(record)
        self._progress.update(self._bar, facts="  ".join(self._facts.values()))

    def _evaluation(self, record: Mapping[str, Any]) -> None:
        name, score = self._primary, record["personal"].get(self._primary)
        shown = "undefined" if score is None else f"{score:.3f}"
        self._facts["score"] = f"val {name} {shown}"
        if not self._console.is_terminal:
            loss = self._facts.get("loss", "")
            self._console.print(f"round {record['round'] + 1}: {loss}, personal {name} on validation {shown}", highlight=False)
