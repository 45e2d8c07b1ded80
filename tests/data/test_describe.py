"""What `describe` counts and draws."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from omnifm.data.cohort import Cohort, Row, write_cohort
from omnifm.data.describe import CAPTION, TILE, boundary_columns, contact_sheet, counts, tables
from omnifm.errors import DataError
from tests.data.builders import classification, noise, save_png, spec


def text_of(cohort: Cohort) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    for table in tables(cohort):
        console.print(table)
    return console.export_text()


def test_counts_per_value_and_split(tmp_path: Path) -> None:
    cohort = Cohort.read(classification(tmp_path, 12))
    assert counts(cohort, "label") == {"a": {"train": 4, "val": 2}, "b": {"train": 4, "test": 2}}


def test_boundary_columns_are_those_that_group(tmp_path: Path) -> None:
    row = {"extra": {"dose": "hi", "serial": "0", "same": "x"}}
    cohort = Cohort.read(
        classification(tmp_path, 50, row=lambda i: {"extra": {**row["extra"], "serial": str(i), "dose": "hl"[i % 2]}})
    )
    assert boundary_columns(cohort) == ["label", "dose"]


def test_the_tables_show_rows_patients_sizes_and_odd_names(tmp_path: Path) -> None:
    odd = "[red]a"
    folder = classification(
        tmp_path, 6, classes=(odd, "b"), row=lambda i: {"label": (odd, "b")[i % 2], "patient": f"p{i // 2}" if i < 4 else ""}
    )
    text = text_of(Cohort.read(folder))
    for expected in (odd, "8 x 10", "grey"):
        assert expected in text
    lines = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["rows", "4", "1", "1", "6"] in lines
    assert ["patients", "2", "0", "0", "2"] in lines
    assert ["8", "x", "10", "grey", "8", "6"] in lines


def test_the_contact_sheet_shows_each_class_and_stays_out_of_the_cohort(tmp_path: Path) -> None:
    cohort = Cohort.read(classification(tmp_path / "c", 6))
    sheet = np.asarray(Image.open(contact_sheet(cohort, tmp_path / "s.png", per_group=3)))
    assert sheet.shape == (2 * (TILE + 2 * CAPTION + 6) + 4, 3 * (TILE + 4) + 4, 3)
    # The first tile is row 0, padded to a square with black bars above and below.
    tile = sheet[4 + CAPTION : 4 + CAPTION + TILE, 4 : 4 + TILE, 0]
    assert tile[0].max() == 0
    assert abs(tile[20:90].mean() - noise(8, 10).mean()) < 12
    with pytest.raises(DataError, match="never written into the cohort"):
        contact_sheet(cohort, tmp_path / "c" / "s.png")
    with pytest.raises(DataError, match="cannot be written"):
        contact_sheet(cohort, tmp_path / "no" / "s.png")


def test_both_images_of_a_pair_are_shown(tmp_path: Path) -> None:
    for name, value in (("a", 60), ("b", 200)):
        save_png(tmp_path / f"c/{name}.png", np.pad(np.full((20, 20), value, dtype=np.uint8), 1))
    fused = [Row("r", "train", image="a.png", image_b="b.png")]
    cohort = Cohort.read(write_cohort(tmp_path / "c", spec(task="fusion", modality="CT-MRI", classes=None), fused))
    sheet = np.asarray(Image.open(contact_sheet(cohort, tmp_path / "s.png", per_group=2)))
    middle = 4 + CAPTION + TILE // 2
    assert (sheet[middle, 4 + TILE // 2, 0], sheet[middle, 4 + TILE + 4 + TILE // 2, 0]) == (60, 200)
