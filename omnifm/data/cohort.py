"""A cohort: one site's or one public data set's examples for one task, as a folder with `cohort.toml` and `manifest.csv`."""

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from omnifm.data.manifest import (
    MANIFEST_FILE,
    PATH_COLUMNS,
    SPLITS,
    Problem,
    Row,
    manifest_text,
    outside_reason,
    read_manifest,
    resolve_inside,
    units,
)
from omnifm.data.splits import assign_splits
from omnifm.errors import DataError

__all__ = ["MODALITIES", "Cohort", "CohortSpec", "Row", "Scan", "scan", "write_cohort"]

SPEC_FILE = "cohort.toml"
MODALITIES = ("MRI", "CT", "XR", "US", "PET", "SPECT", "HISTO", "FLUO", "FUNDUS", "DERM", "EM", "OTHER")
_NEEDED = {
    "classification": ("label",),
    "segmentation": ("mask",),
    "super_resolution": (),
    "vqa": ("question", "answer", "answer_type"),
    "fusion": ("image_b",),
}
OneLine = Annotated[str, Field(min_length=1, pattern=r"^[^\r\n]+$")]


class CohortSpec(BaseModel):
    """The keys of `cohort.toml`. Raises pydantic's ValidationError (a ValueError) if they do not fit each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    task: Literal["classification", "segmentation", "super_resolution", "vqa", "fusion"]
    title: OneLine
    modality: str | None = None
    classes: tuple[OneLine, ...] = ()
    mask_kind: Literal["semantic", "instances"] | None = None
    slice_axis: Literal[0, 1, 2] | None = None
    licence: OneLine
    redistribution: Literal["allowed", "non-commercial", "testing-only"]
    source: str
    citation: str
    notes: str

    @model_validator(mode="after")
    def _keys_fit_the_task(self) -> Self:
        if self.modality is not None and not is_modality(self.modality, self.task):
            raise ValueError(f"key 'modality': {modality_hint(self.modality, self.task)}")
        if self.task in ("classification", "segmentation") and len(self.classes) < 2:
            raise ValueError(f"key 'classes': {self.task} needs at least two class names")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("key 'classes': a name appears twice")
        if (self.task == "segmentation") != (self.mask_kind is not None):
            raise ValueError("key 'mask_kind': segmentation needs it ('semantic' or 'instances'), other tasks have none")
        return self


def is_modality(text: str, task: str) -> bool:
    """Return whether `text` is one of `MODALITIES`, or for fusion a pair of two of them such as `CT-MRI`."""
    parts = text.split("-")
    return len(parts) == (2 if task == "fusion" else 1) and all(part in MODALITIES for part in parts)


def modality_hint(text: str, task: str) -> str:
    """Return what to write instead of `text`."""
    form = "a pair such as CT-MRI of" if task == "fusion" else "one of"
    return f"'{text}' is not {form} {', '.join(MODALITIES)}"


@dataclass(frozen=True)
class Scan:
    """All that can be learnt from the two text files of a cohort: rows come with the row number of the manifest."""

    spec: CohortSpec | None
    rows: tuple[tuple[int, Row], ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Cohort:
    """A cohort whose text files are sound: modality filled in, every row in a split. Image files are not opened here.

    One that is at another hospital has a spec and nothing else: no folder, no rows, and `here` is False.
    """

    folder: Path
    spec: CohortSpec
    rows: tuple[Row, ...]
    here: bool = True

    def patients(self) -> dict[str, set[str]]:
        """Return the patients who are known, by split."""
        found: dict[str, set[str]] = {}
        for row in self.rows:
            found.setdefault(row.split, set()).update({row.patient} - {""})
        return found

    @classmethod
    def read(cls, folder: Path | str, seed: int = 0) -> "Cohort":
        """Read a cohort folder.

        Args:
            folder: the cohort's folder.
            seed: draws the splits of rows that have none; see `omnifm.data.splits`.

        Raises:
            DataError: the first structural problem; `omnifm.data.validate.validate` lists all of them.
        """
        folder = Path(folder)
        found = scan(folder)
        if found.problems or found.spec is None:
            more = f" (and {len(found.problems) - 1} more: see omnifm data check)" if len(found.problems) > 1 else ""
            raise DataError(f"cohort {folder}: {found.problems[0]}{more}")
        rows = [row for _, row in found.rows]
        splits = assign_splits([row.split for row in rows], units(rows), [row.label for row in rows], seed)
        default = found.spec.modality or ""
        filled = (replace(r, split=s, modality=r.modality or default) for r, s in zip(rows, splits, strict=True))
        return cls(folder, found.spec, tuple(filled))

    @classmethod
    def elsewhere(cls, spec: CohortSpec) -> "Cohort":
        """Return the cohort of another hospital, of which the spec is known."""
        return cls(Path(), spec, (), here=False)

    @property
    def name(self) -> str:
        """The cohort's name."""
        return self.spec.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; for segmentation the names of mask values 0, 1, 2, ...; empty for other tasks."""
        return self.spec.classes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what a run makes of the two text files: rows, splits, classes, and how masks and volumes are read."""
        spec = self.spec.model_dump(include={"name", "task", "classes", "mask_kind", "slice_axis"})
        return hashlib.sha256(json.dumps([spec, [vars(row) for row in self.rows]], sort_keys=True).encode()).hexdigest()

    def indices(self, split: str) -> list[int]:
        """Return the indices into `rows` of a split (`train`, `val` or `test`), in the manifest's order."""
        if split not in SPLITS:
            raise DataError(f"cohort {self.name}: '{split}' is not a split (train, val or test)")
        return [index for index, row in enumerate(self.rows) if row.split == split]

    def path(self, index: int, column: str = "image") -> Path:
        """Return the file that row `index` names in `column`.

        Raises:
            DataError: the row names none, or the path leaves the folder.
        """
        relative = self.rows[index].value(column)
        if not relative:
            raise DataError(f"cohort {self.name}: row '{self.rows[index].id}' has no {column}")
        return resolve_inside(self.folder, relative)


def scan(folder: Path) -> Scan:
    """Read both text files and find every problem that shows without opening an image. Never raises for bad content."""
    if not folder.is_dir():
        return Scan(None, (), (Problem(str(folder), None, "is not a folder"),))
    spec, problems = _read_spec(folder / SPEC_FILE)
    manifest = read_manifest(folder)
    problems += manifest.problems
    if spec is not None and manifest.columns:
        problems += _column_problems(spec, manifest.columns) or _cell_problems(spec, manifest.rows)
    problems += _clash_problems(manifest.rows)
    return Scan(spec, manifest.rows, tuple(sorted(problems, key=lambda p: (p.file, p.row or 0))))


def _read_spec(path: Path) -> tuple[CohortSpec | None, list[Problem]]:
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
        return CohortSpec.model_validate(keys), []
    except FileNotFoundError:
        messages = ["file is missing"]
    except OSError as error:
        messages = [f"cannot be read: {error.strerror}"]
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        messages = [f"is not UTF-8 (line {line})"]
    except tomllib.TOMLDecodeError as error:
        messages = [f"is not TOML: {error}"]
    except ValidationError as error:
        messages = [_key_message(kind=e["type"], key=".".join(map(str, e["loc"])), text=e["msg"]) for e in error.errors()]
    return None, [Problem(SPEC_FILE, None, message) for message in messages]


def _key_message(kind: str, key: str, text: str) -> str:
    if kind == "missing":
        return f"missing key '{key}'"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, CohortSpec.model_fields, n=1)
        return f"unknown key '{key}'" + (f" (did you mean '{near[0]}'?)" if near else "")
    text = text.removeprefix("Value error, ")
    return f"key '{key}': {text}" if key else text


def _column_problems(spec: CohortSpec, columns: Sequence[str]) -> list[Problem]:
    needed = list(_NEEDED[spec.task]) + ([] if spec.modality else ["modality"])
    return [Problem(MANIFEST_FILE, 1, f"missing column '{c}' ({_why(spec, c)})") for c in needed if c not in columns]


def _why(spec: CohortSpec, column: str) -> str:
    return f"{SPEC_FILE} names no modality" if column == "modality" else f"{spec.task} needs it"


def _cell_problems(spec: CohortSpec, rows: Iterable[tuple[int, Row]]) -> list[Problem]:
    needed = ("id", "image", *_NEEDED[spec.task])
    return [Problem(MANIFEST_FILE, number, text) for number, row in rows for text in _row_messages(spec, row, needed)]


def _row_messages(spec: CohortSpec, row: Row, needed: Sequence[str]) -> list[str]:
    messages = [f"empty {column}" for column in needed if not row.value(column)]
    if row.split and row.split not in SPLITS:
        messages.append(f"split '{row.split}' is not train, val or test")
    if spec.task == "classification" and row.label and row.label not in spec.classes:
        known = ", ".join(spec.classes[:8]) + (", ..." if len(spec.classes) > 8 else "")
        messages.append(f"unknown class '{row.label}' (classes in {SPEC_FILE}: {known})")
    if spec.task == "vqa" and row.answer_type and row.answer_type not in ("closed", "open"):
        messages.append(f"answer_type '{row.answer_type}' is not closed or open")
    if row.modality and not is_modality(row.modality, spec.task):
        messages.append(f"modality {modality_hint(row.modality, spec.task)}")
    elif not row.modality and not spec.modality:
        messages.append(f"empty modality ({SPEC_FILE} names none)")
    reasons = ((column, row.value(column), outside_reason(row.value(column))) for column in PATH_COLUMNS)
    return messages + [f"{column} '{path}': {reason}" for column, path, reason in reasons if reason]


def _clash_problems(rows: Iterable[tuple[int, Row]]) -> list[Problem]:
    ids: dict[str, int] = {}
    splits: dict[str, tuple[int, str]] = {}
    problems = []
    for number, row in rows:
        if row.id and ids.setdefault(row.id, number) != number:
            problems.append(Problem(MANIFEST_FILE, number, f"duplicate id '{row.id}' (first in row {ids[row.id]})"))
        if row.patient and row.split:
            first, split = splits.setdefault(row.patient, (number, row.split))
            if split != row.split:
                text = f"patient '{row.patient}' is in {row.split} here and in {split} in row {first}"
                problems.append(Problem(MANIFEST_FILE, number, text))
    return problems


def write_cohort(folder: Path, spec: CohortSpec, rows: Iterable[Row]) -> Path:
    """Write `cohort.toml` and `manifest.csv` into `folder` (made if need be) and return it.

    Each file appears whole or not at all, `cohort.toml` last. Image files are the caller's to write, before this.
    """
    import tomli_w

    folder.mkdir(parents=True, exist_ok=True)
    keys = {key: value for key, value in spec.model_dump(mode="json").items() if value not in (None, [])}
    for name, text in ((MANIFEST_FILE, manifest_text(rows)), (SPEC_FILE, tomli_w.dumps(keys))):
        partial = folder / f".{name}.{os.getpid()}.partial"
        partial.write_text(text, encoding="utf-8", newline="")
        os.replace(partial, folder / name)
    return folder
