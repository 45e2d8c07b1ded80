"""Everything that is wrong with a cohort, one line each."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from omnifm.data.cohort import Cohort, CohortSpec, scan
from omnifm.data.manifest import MANIFEST_FILE, Problem, Row, outside_reason, resolve_inside
from omnifm.data.orient import Stored, lying_as, stored_otherwise, without_pixels
from omnifm.data.readers import Image, read_image, read_mask_image
from omnifm.errors import DataError

__all__ = ["Problem", "require_valid", "validate"]

_BATCH = 64
Progress = Callable[[int, int], None]


def validate(folder: Path | str, progress: Progress | None = None) -> list[Problem]:
    """Return every problem of a cohort in the order of its files and rows; an empty list if it is sound.

    Every image and mask is decoded. Images that several rows share are checked, and reported, once.

    Args:
        folder: the cohort's folder. That it is missing or empty is a problem like others, not an exception.
        progress: called with rows looked at and rows in all.
    """
    folder = Path(folder)
    found = scan(folder)
    problems = list(found.problems)
    if found.spec is not None:
        problems += _pixel_problems(folder, found.spec, found.rows, progress)
    return sorted(problems, key=lambda problem: (problem.file, problem.row or 0))


def require_valid(cohorts: Iterable[Cohort], progress: Progress | None = None) -> None:
    """Refuse cohorts with problems.

    Raises:
        DataError: one line that counts the problems of the first such cohort and shows its first one.
    """
    for cohort in cohorts:
        problems = validate(cohort.folder, progress)
        if problems:
            count = f"{len(problems)} problems, the first: " if len(problems) > 1 else ""
            raise DataError(f"cohort {cohort.name}: {count}{problems[0]} (omnifm data check {cohort.folder} lists all)")


def _pixel_problems(
    folder: Path, spec: CohortSpec, rows: tuple[tuple[int, Row], ...], progress: Progress | None
) -> Iterator[Problem]:
    once: dict[tuple[str, ...], tuple[int, Row]] = {}
    for number, row in rows:
        once.setdefault((row.image, row.image_b, row.mask, row.mask_b), (number, row))
    items = list(once.values())
    silent = bool(items) and _silent(folder, items[0][1].image)
    first: Stored | None = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            looked = pool.map(lambda item: _row_messages(folder, spec, item[1], silent), batch)
            for (number, row), (texts, image) in zip(batch, looked, strict=True):
                if image is not None and (wrong := stored_otherwise(image, first)):
                    texts.append(f"image '{row.image}': {wrong}")
                if first is None and image is not None and image.array.ndim == 3:
                    first = (row.id, image.by_columns)
                yield from (Problem(MANIFEST_FILE, number, text) for text in texts)
            if progress is not None:
                progress(start + len(batch), len(items))


def _silent(folder: Path, relative: str) -> bool:
    """Whether a path is a volume that does not say how it lies."""
    image = _image(folder, "image", relative, None, [])
    return image is not None and image.array.ndim == 4 and image.affine is None


def _row_messages(folder: Path, spec: CohortSpec, row: Row, silent: bool) -> tuple[list[str], Image | None]:
    """Return what is wrong with the files one row names, and its image without pixels.

    `silent`: the first volume does not say how it lies.
    """
    messages: list[str] = []
    image = _image(folder, "image", row.image, spec, messages)
    if silent and image is not None and image.affine is not None:
        messages.append(f"image '{row.image}': says how it lies, and the first row's does not: put one that does first")
    if spec.task == "fusion":
        other = _image(folder, "image_b", row.image_b, spec, messages)
        messages += _grid_messages("image_b", row.image_b, other, image)
    if spec.task == "segmentation":
        for column in ("mask", "mask_b"):
            messages += _mask_messages(folder, column, row.value(column), spec, image)
    return messages, image and without_pixels(image)


def _image(folder: Path, column: str, relative: str, spec: CohortSpec | None, messages: list[str]) -> Image | None:
    # Empty paths and paths whose text leaves the folder are among the structural problems already.
    if not relative or outside_reason(relative):
        return None
    try:
        image = read_image(resolve_inside(folder, relative))
    except DataError as error:
        messages.append(_about(column, relative, error))
        return None
    if not np.isfinite(image.array).all():
        messages.append(f"{column} '{relative}': holds NaN or infinite values")
    elif image.array.min() == image.array.max():
        messages.append(f"{column} '{relative}': constant, every value is {image.array.flat[0]:g}")
    if image.array.ndim == 4 and spec is not None and spec.slice_axis is None:
        messages.append(f"{column} '{relative}': is a volume, and cohort.toml has no slice_axis")
    return image


def _about(column: str, relative: str, error: DataError) -> str:
    """Say what is wrong with a path once: the reader's message opens with the file's name, which the path ends in."""
    text = str(error).removeprefix(f"{relative!r}: ").removeprefix(f"{Path(relative).name}: ")
    return f"{column} '{relative}': {text}"


def _mask_messages(folder: Path, column: str, relative: str, spec: CohortSpec, image: Image | None) -> list[str]:
    if not relative or outside_reason(relative):
        return []
    try:
        mask = read_mask_image(resolve_inside(folder, relative))
    except DataError as error:
        return [_about(column, relative, error)]
    values = mask.array[0].astype(np.int64)
    return _grid_messages(column, relative, mask, image) + _value_messages(column, relative, values, spec)


def _grid_messages(column: str, relative: str, other: Image | None, image: Image | None) -> list[str]:
    """Return why a mask or second image does not lie on the grid of the image; nothing where one could not be read."""
    if other is None or image is None:
        return []
    try:
        lying_as(other, image)
    except DataError as error:
        return [_about(column, relative, error)]
    return []


def _value_messages(column: str, relative: str, mask: npt.NDArray[np.int64], spec: CohortSpec) -> list[str]:
    values = np.unique(mask)
    highest = len(spec.classes) - 1 if spec.mask_kind == "semantic" else values.max()
    wrong = values[(values < 0) | (values > highest)]
    if len(wrong) == 0:
        return []
    shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
    allowed = f"the classes are 0 to {highest}" if spec.mask_kind == "semantic" else "objects are numbered from 1"
    return [f"{column} '{relative}': value outside classes: {shown} ({allowed})"]
