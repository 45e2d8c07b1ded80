"""Other layouts to cohorts. Each importer writes a new folder, checks what it wrote and leaves its source alone."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from omnifm.data.cohort import CohortSpec, write_cohort
from omnifm.data.manifest import Row
from omnifm.data.validate import validate
from omnifm.errors import DataError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Provenance:
    """Where data come from and what may be done with them: keys of `cohort.toml` that no importer can know."""

    title: str
    licence: str = "unverified"
    redistribution: str = "testing-only"
    source: str = ""
    citation: str = ""
    notes: str = ""


def new_folder(folder: Path) -> Path:
    """Make the folder of a new cohort.

    Raises:
        DataError: it holds something already, is a file, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: is not empty; an import writes into a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror})") from error
    return folder


def make_spec(keys: Mapping[str, object], provenance: Provenance) -> CohortSpec:
    """Return the spec of a new cohort.

    Raises:
        DataError: a key does not fit; the message names it.
    """
    try:
        return CohortSpec.model_validate({"format": 1, **keys, **vars(provenance)})
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"cannot make a cohort: {'.'.join(map(str, first['loc']))} {first['msg']}".replace("\n", " ")) from error


def finish(folder: Path, spec: CohortSpec, rows: Iterable[Row]) -> Path:
    """Write the two text files of a cohort whose images are in place, and check all of it.

    Raises:
        DataError: what was written is not a sound cohort; the folder stays, for a look.
    """
    write_cohort(folder, spec, rows)
    problems = validate(folder)
    if problems:
        raise DataError(f"{folder}: written, but with {len(problems)} problems, the first: {problems[0]}")
    return folder
