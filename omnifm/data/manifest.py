"""The table `manifest.csv` of a cohort: its rows, and what can be said about them without knowing the task."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath

from omnifm.errors import DataError

MANIFEST_FILE = "manifest.csv"
SPLITS = ("train", "val", "test")
REQUIRED_COLUMNS = ("id", "split", "patient", "image")
PATH_COLUMNS = ("image", "image_b", "mask", "mask_b")


@dataclass(frozen=True)
class Row:
    """One example. Every column is text, empty where the manifest says nothing; paths are relative to the cohort folder."""

    id: str
    split: str = ""
    patient: str = ""
    site: str = ""
    modality: str = ""
    image: str = ""
    label: str = ""
    mask: str = ""
    mask_b: str = ""
    image_b: str = ""
    question: str = ""
    answer: str = ""
    answer_type: str = ""
    question_type: str = ""
    organ: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    def value(self, column: str) -> str:
        """Return the text of a column of the format or of a further one; empty if the row has no such column."""
        return str(getattr(self, column)) if column in COLUMNS else self.extra.get(column, "")


def units(rows: Sequence[Row]) -> list[str]:
    """Return for each row the name of what is never cut in two: its patient, where none is known its image.

    Several rows are about one image where it is asked several questions.
    """
    first: dict[str, str] = {}
    for row in rows:
        image = row.image or row.id
        first[image] = min(row.id, first.get(image, row.id))
    return [f"patient {row.patient}" if row.patient else f"row {first[row.image or row.id]}" for row in rows]


COLUMNS = tuple(f.name for f in fields(Row) if f.name != "extra")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a cohort: the file, its row as a spreadsheet counts (the header is row 1), and what is wrong."""

    file: str
    row: int | None
    message: str

    def __str__(self) -> str:
        """Return the problem as one line."""
        place = self.file if self.row is None else f"{self.file} row {self.row}"
        return f"{place}: {' '.join(self.message.split())}"


@dataclass(frozen=True)
class Manifest:
    """What could be read of a manifest: its header, its rows with their row numbers, and the problems met on the way."""

    columns: tuple[str, ...]
    rows: tuple[tuple[int, Row], ...]
    problems: tuple[Problem, ...]


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.csv`. Never raises for bad content: what is wrong is among the problems."""
    try:
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8-sig")
        table = [cells for cells in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True), start=1) if any(cells[1])]
    except FileNotFoundError:
        return _unreadable("file is missing")
    except OSError as error:
        return _unreadable(f"cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        return _unreadable(f"is not UTF-8 (line {line}): save it as 'CSV UTF-8'")
    except csv.Error as error:
        return _unreadable(f"is not a comma-separated table: {error}")
    if not table:
        return _unreadable("is empty: the first line must be the header")
    header = tuple(cell.strip() for cell in table[0][1])
    problems = _header_problems(header)
    if problems:
        return Manifest(header, (), tuple(problems))
    return _rows(header, table[1:])


def _unreadable(message: str) -> Manifest:
    return Manifest((), (), (Problem(MANIFEST_FILE, None, message),))


def _header_problems(header: tuple[str, ...]) -> list[Problem]:
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        return [Problem(MANIFEST_FILE, 1, "columns must be separated by commas, not by semicolons or tabs")]
    messages = [f"missing column '{name}'" for name in REQUIRED_COLUMNS if name not in header]
    messages += [f"column '{name}' appears twice" for name in sorted(set(header)) if name and header.count(name) > 1]
    messages += ["a column has no name"] if "" in header else []
    return [Problem(MANIFEST_FILE, 1, message) for message in messages]


def _rows(header: tuple[str, ...], table: Sequence[tuple[int, list[str]]]) -> Manifest:
    rows, problems = [], []
    for number, cells in table:
        if len(cells) != len(header):
            message = f"has {len(cells)} cells where the header has {len(header)} (quote a text that holds a comma)"
            problems.append(Problem(MANIFEST_FILE, number, message))
            continue
        named = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        extra = {name: named.pop(name) for name in header if name not in COLUMNS}
        rows.append((number, Row(**named, extra=extra)))
    if not rows and not problems:
        problems.append(Problem(MANIFEST_FILE, None, "no rows below the header"))
    return Manifest(header, tuple(rows), tuple(problems))


def manifest_text(rows: Iterable[Row]) -> str:
    """Return rows as CSV text: the four required columns, the further columns of the format that are used, then the others."""
    rows = list(rows)
    columns = [c for c in COLUMNS if c in REQUIRED_COLUMNS or any(row.value(c) for row in rows)]
    columns += list(dict.fromkeys(name for row in rows for name in row.extra))
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row.value(column) for column in columns] for row in rows)
    return buffer.getvalue()


def outside_reason(path: str) -> str | None:
    """Return why a manifest path cannot lie inside the cohort folder, judging by its text alone; None if it can."""
    if "\\" in path:
        return "write paths with '/', not with a backslash"
    if PurePosixPath(path).is_absolute() or ":" in path.split("/")[0] or ".." in PurePosixPath(path).parts:
        return "the path leaves the cohort folder"
    return "the path holds a control character" if not path.isprintable() else None


def resolve_inside(folder: Path, path: str) -> Path:
    """Return the file a manifest path names.

    Raises:
        DataError: the path, or a symbolic link on its way, leaves the folder.
    """
    reason = outside_reason(path)
    if reason is None:
        try:
            full = (folder / path).resolve()
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path!r}: the path cannot be followed ({type(error).__name__})") from error
        if full.is_relative_to(folder.resolve()):
            return full
        reason = "a symbolic link leaves the cohort folder"
    raise DataError(f"{path!r}: {reason}")
