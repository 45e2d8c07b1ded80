"""What a cohort holds: tables for the terminal and a contact sheet."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omnifm.data.cache import unit_range
from omnifm.data.cohort import Cohort
from omnifm.data.manifest import SPLITS
from omnifm.data.orient import Rows
from omnifm.data.readers import read_image
from omnifm.errors import DataError

if TYPE_CHECKING:
    from PIL import Image as Pillow
    from rich.table import Table

Progress = Callable[[int, int], None]

TILE = 112
CAPTION = 16
_GROUPS = ("label", "modality", "site", "organ", "question_type", "answer_type")
# A column with more values than this identifies rows rather than grouping them.
_MOST_VALUES = 40


def counts(cohort: Cohort, column: str) -> dict[str, Counter[str]]:
    """Return value -> split -> number of rows, for a column of the format or a further one; values in order."""
    found: dict[str, Counter[str]] = {}
    for row in cohort.rows:
        found.setdefault(row.value(column), Counter())[row.split] += 1
    return dict(sorted(found.items()))


def boundary_columns(cohort: Cohort) -> list[str]:
    """Return the columns with two to forty different values: those that a partition `by_column` may cut along."""
    extra = dict.fromkeys(name for row in cohort.rows for name in row.extra)
    return [c for c in (*_GROUPS, *extra) if 2 <= len({row.value(c) for row in cohort.rows}) <= _MOST_VALUES]


def tables(cohort: Cohort, progress: Progress | None = None) -> list["Table"]:
    """Return the tables that `omnifm data describe` prints: rows and patients, image sizes, one per boundary column.

    Raises:
        DataError: an image cannot be read.
    """
    overview = _table("rows and patients", ["", *SPLITS, "all"])
    _add(overview, "rows", Counter(row.split for row in cohort.rows))
    patients = {(row.split, row.patient) for row in cohort.rows if row.patient}
    _add(overview, "patients" if patients else "patients (unknown)", Counter(split for split, _ in patients))
    found = [overview, _size_table(cohort, progress)]
    for column in boundary_columns(cohort):
        table = _table(f"rows by {column}", [column, *SPLITS, "all"])
        for value, tally in counts(cohort, column).items():
            _add(table, value or "(empty)", tally)
        found.append(table)
    return found


def _table(title: str, columns: Iterable[str]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if position else "left")
    return table


def _add(table: "Table", name: str, tally: Mapping[str, int]) -> None:
    from rich.text import Text

    cells = [tally.get(split, 0) for split in SPLITS]
    table.add_row(Text(name), *map(str, (*cells, sum(cells))))


def _size_table(cohort: Cohort, progress: Progress | None) -> "Table":
    from rich.text import Text

    paths = list(dict.fromkeys((row.image, index) for index, row in enumerate(cohort.rows)))
    first = {path: index for path, index in reversed(paths)}
    tally: Counter[tuple[str, str, str]] = Counter()
    for done, index in enumerate(first.values(), start=1):
        image = read_image(cohort.path(index))
        channels = "colour" if image.array.shape[0] == 3 else "grey"
        tally[(" x ".join(map(str, image.array.shape[1:])), channels, str(image.bits))] += 1
        if progress is not None:
            progress(done, len(first))
    table = _table("sizes of images", ["size", "channels", "bits", "images"])
    common = tally.most_common(8)
    for cells, number in common:
        table.add_row(*map(Text, cells), str(number))
    if len(tally) > len(common):
        table.add_row(f"{len(tally) - len(common)} other sizes", "", "", str(tally.total() - sum(n for _, n in common)))
    return table


def contact_sheet(cohort: Cohort, out: Path, per_group: int = 8) -> Path:
    """Draw a few images of each class (of each modality where there are no classes), captioned with split and id, as a PNG.

    Images are spread evenly over the class's rows; of a volume the middle slice is shown; fusion shows both images.

    Raises:
        DataError: `out` lies in the cohort's folder, cannot be written, or an image cannot be read.
    """
    from PIL import Image as Pillow

    if out.resolve().is_relative_to(cohort.folder.resolve()):
        raise DataError(f"{out}: a contact sheet is never written into the cohort")
    column = "label" if cohort.spec.task == "classification" else "modality"
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(cohort.rows):
        groups.setdefault(row.value(column), []).append(index)
    height = CAPTION + TILE + CAPTION
    reader = Rows(cohort)
    sheet = Pillow.new("RGB", (per_group * (TILE + 4) + 4, len(groups) * (height + 6) + 4), "white")
    for line, (name, members) in enumerate(sorted(groups.items())):
        _draw_group(sheet, reader, f"{name} ({len(members)} rows)", members, per_group, 4 + line * (height + 6))
    try:
        sheet.save(out, format="PNG")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error
    return out


def _draw_group(sheet: "Pillow.Image", rows: Rows, title: str, members: list[int], per_group: int, top: int) -> None:
    from PIL import ImageDraw, ImageFont

    cohort = rows.cohort
    font = ImageFont.load_default(11)
    draw = ImageDraw.Draw(sheet)
    draw.text((4, top), title, fill="black", font=font)
    columns = ("image", "image_b") if cohort.spec.task == "fusion" else ("image",)
    chosen = np.unique(np.linspace(0, len(members) - 1, max(per_group // len(columns), 1)).astype(int))
    for place, (index, column) in enumerate((members[i], column) for i in chosen for column in columns):
        left = 4 + place * (TILE + 4)
        sheet.paste(_tile(rows, index, column), (left, top + CAPTION))
        row = cohort.rows[index]
        # Ids of one cohort mostly differ at their end, so it is the beginning that goes.
        caption, end = f"{row.split} {row.id}", row.id
        while draw.textlength(caption, font=font) > TILE and end:
            end = end[1:]
            caption = f"{row.split} ..{end}"
        draw.text((left, top + CAPTION + TILE + 1), caption, fill="black", font=font)


def _tile(rows: Rows, index: int, column: str) -> "Pillow.Image":
    from PIL import Image as Pillow
    from PIL import ImageOps

    cohort = rows.cohort
    try:
        array = unit_range(rows.image(index, column))
    except DataError as error:
        raise DataError(f"cohort {cohort.name}: row '{cohort.rows[index].id}': {column} {error}") from error
    if array.ndim == 4:
        axis = 1 + (cohort.spec.slice_axis or 0)
        array = np.take(array, array.shape[axis] // 2, axis=axis)
    pixels = np.moveaxis(np.rint(array * 255).astype(np.uint8), 0, -1)
    picture = Pillow.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    return ImageOps.pad(picture, (TILE, TILE), color="black")
