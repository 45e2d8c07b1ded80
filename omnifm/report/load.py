"""Read what a run or a comparison left behind, and check it.

Every fault is a `CheckpointError` of one line that names the file, and the line or key inside it. Keys this report does not
know are ignored, so that a run folder may say more than is drawn here. A score is a number, or None where it is undefined.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from omnifm.errors import CheckpointError
from omnifm.report.records import ClientEvent, DescriptionEvent, EvaluationEvent, Event, Example, Metrics, RoundEvent, Split

Row = dict[str, str]
T = TypeVar("T")

AnyEvent = ClientEvent | RoundEvent | EvaluationEvent | DescriptionEvent
_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(Event)
# The columns of table.csv that hold a number, by how their names begin; an empty field is an undefined number.
_NUMBERS = (
    *("participation", "personal_", "global_", "worst_", "finetuned_", "best_"),
    *("bytes_", "bank_", "seconds", "peak_rss_mib"),
)
_EVENT_KINDS = ("client", "round", "evaluation", "description")


@dataclass(frozen=True)
class Snapshot:
    """The bank after one round: `vectors` (m, d) float32, and the client and modality name of each row."""

    round: int
    vectors: np.ndarray
    clients: tuple[str, ...]
    modalities: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One run folder, read and checked. Events are in file order, one per round and client: a repeated round counts once."""

    folder: Path
    config: str
    environment: dict[str, Any]
    split: Split
    metrics: Metrics
    client_events: tuple[ClientEvent, ...]
    round_events: tuple[RoundEvent, ...]
    evaluations: tuple[EvaluationEvent, ...]
    descriptions: tuple[DescriptionEvent, ...]

    @property
    def simulated(self) -> bool:
        """Whether any of the images are simulated."""
        return self.metrics.simulated or self.split.simulated

    @cached_property
    def modality(self) -> dict[str, str]:
        """Map each client to its modality."""
        named = {client.id: client.modality for client in self.split.clients}
        return named | {client.id: client.modality for client in self.metrics.clients}

    @cached_property
    def bank(self) -> tuple[Snapshot, ...]:
        """The bank's snapshots by round; empty for a strategy without a bank."""
        return tuple(sorted(map(_read_snapshot, (self.folder / "bank").glob("round-*.safetensors")), key=lambda s: s.round))

    @cached_property
    def examples(self) -> tuple[tuple[Example, bytes], ...]:
        """Example predictions with the bytes of their PNG."""
        path = self.folder / "examples" / "examples.json"
        if not path.is_file():
            return ()
        rows: list[Example] = _parse(TypeAdapter(list[Example]), _read_json(path), path)
        return tuple((row, _read_png(path.parent, row.file)) for row in rows)


@dataclass(frozen=True)
class Comparison:
    """A comparison folder: the lines of `table.csv` and the cells' run folders.

    `cells[i]` is the name of the folder under `cells/` that line i came from, or None if no folder fits it.
    """

    folder: Path
    rows: tuple[Row, ...]
    cells: tuple[str | None, ...]
    runs: dict[str, Run]


def read_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        CheckpointError: a file is missing, unreadable or not what it should be; the message names it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such run folder")
    environment = _read_json(folder / "environment.json")
    if not isinstance(environment, dict):
        raise CheckpointError(f"{folder / 'environment.json'}: expected an object")
    events = _read_events(folder / "events.jsonl")
    return Run(
        folder=folder,
        config=_read_text(folder / "config.toml"),
        environment=environment,
        split=_parse(TypeAdapter(Split), _read_json(folder / "split.json"), folder / "split.json"),
        metrics=_parse(TypeAdapter(Metrics), _read_json(folder / "metrics.json"), folder / "metrics.json"),
        client_events=tuple(e for e in events if isinstance(e, ClientEvent)),
        round_events=tuple(e for e in events if isinstance(e, RoundEvent)),
        evaluations=tuple(e for e in events if isinstance(e, EvaluationEvent)),
        descriptions=tuple(e for e in events if isinstance(e, DescriptionEvent)),
    )


def read_comparison(folder: Path) -> Comparison:
    """Read `table.csv` and the finished cells it is of (folders under `cells/` with a `metrics.json`).

    What is in the folder of a cell that failed is another run, an older one: it is not read.

    Raises:
        CheckpointError: the table is missing, lacks a column or says one cell twice, or a finished cell is malformed.
    """
    rows = _read_table(folder / "table.csv")
    failed = {row.get("cell") for row in rows if not _finished(row)}
    paths = sorted(p.parent for p in (folder / "cells").glob("*/metrics.json") if p.parent.name not in failed)
    runs = {path.name: read_run(path) for path in paths}
    cells = tuple(_cell_of(row, runs) for row in rows)
    return Comparison(folder, rows, cells, {name: run for name, run in runs.items() if name in cells})


def _finished(row: Row) -> bool:
    return row.get("status", "ok") in ("ok", "")


def _cell_of(row: Row, runs: dict[str, Run]) -> str | None:
    fits = [name for name, run in runs.items() if _finished(row) and _same(row, run.metrics)]
    return row["cell"] if row.get("cell") in fits else next(iter(fits), None)


def _same(row: Row, found: Metrics) -> bool:
    """Say whether a run is the one a line is of: a folder may hold a run of another config under the cell's name."""
    named = (found.strategy, str(found.seed), found.config_hash) == (row["strategy"], row["seed"], row.get("config_hash", ""))
    return named and found.participation == float(row["participation"])


def _read_table(path: Path) -> tuple[Row, ...]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    missing = {"strategy", "participation", "seed"} - set(reader.fieldnames or ())
    if missing:
        raise CheckpointError(f"{path}: no column {', '.join(sorted(missing))}")
    rows: list[Row] = []
    seen: dict[tuple[str, ...], int] = {}
    for row in reader:
        number = reader.line_num
        if None in row or None in row.values():
            raise CheckpointError(f"{path}: line {number} has not as many fields as the head line")
        key = (row["strategy"], row.get("variant", ""), row["participation"], row["seed"])
        if key in seen:
            raise CheckpointError(f"{path}: line {number} is the same cell as line {seen[key]}: {', '.join(key)}")
        for column in [column for column in row if column.startswith(_NUMBERS)]:
            _check_number(row[column], column, path, number)
        seen[key] = number
        rows.append(row)
    if not rows:
        raise CheckpointError(f"{path}: no finished cell")
    return tuple(rows)


def _check_number(text: str, column: str, path: Path, number: int) -> None:
    try:
        float(text or "nan" if column != "participation" else text)
    except ValueError as error:
        raise CheckpointError(f"{path}: line {number}: {column} is not a number: {text!r}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON: line {error.lineno}: {error.msg}") from error


def _parse(kind: TypeAdapter[T], value: Any, path: Path, where: str = "") -> T:
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}{key or 'content'}: {first['msg']}") from error


def _read_events(path: Path) -> Sequence[AnyEvent]:
    events: dict[tuple[str | int, ...], AnyEvent] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path}: line {number} is not JSON: {error.msg}") from error
        if not isinstance(value, dict) or value.get("event") not in _EVENT_KINDS:
            continue
        event = _parse(_EVENT, value, path, f"line {number}: ")
        who = event.split if isinstance(event, EvaluationEvent) else "" if isinstance(event, RoundEvent) else event.client
        events[event.event, event.round, who] = event
    return sorted(events.values(), key=lambda e: e.round)


def _read_snapshot(path: Path) -> Snapshot:
    try:
        with safe_open(path, framework="numpy") as file:
            vectors, client, modality = (file.get_tensor(name) for name in ("vectors", "client", "modality"))
            names = {key: json.loads((file.metadata() or {})[key]) for key in ("clients", "modalities")}
        snapshot = Snapshot(
            round=int(path.stem.removeprefix("round-")),
            vectors=vectors,
            clients=tuple(str(names["clients"][i]) for i in client),
            modalities=tuple(str(names["modalities"][i]) for i in modality),
        )
    except (SafetensorError, OSError, KeyError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a snapshot of the bank: {_first_line(error)}") from error
    if vectors.ndim != 2 or not len(vectors) == len(client) == len(modality):
        raise CheckpointError(f"{path}: vectors {vectors.shape}, client {client.shape}, modality {modality.shape} do not fit")
    if not np.isfinite(vectors).all():
        raise CheckpointError(f"{path}: a vector of the bank is not finite")
    return snapshot


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_png(folder: Path, name: str) -> bytes:
    path = folder / name
    if Path(name).name != name:
        raise CheckpointError(f"{folder / 'examples.json'}: {name!r} is not a plain file name")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: the example's image cannot be read") from error
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise CheckpointError(f"{path}: not a PNG file")
    return content
