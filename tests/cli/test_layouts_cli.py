"""`omnifm data import LAYOUT ...` as a user types it; what the importers write is tested in tests/data."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import omnifm.cli.layouts  # noqa: F401  # its commands register themselves
from omnifm.cli.data import app
from omnifm.data.cohort import Cohort
from omnifm.errors import DataError
from tests.data.builders import noise, save_png
from tests.data.test_brats import table, write

RUNNER = CliRunner()


@pytest.mark.parametrize("command", ["brats", "fets"])
def test_import_brats_and_fets(command: str, tmp_path: Path) -> None:
    source = write(tmp_path / "src", 4)
    table(source, 1, [1, 1, 7, 7])
    result = RUNNER.invoke(app, ["import", command, str(source), str(tmp_path / "out"), "--sequences", "t1, flair"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"cohort written: {tmp_path / 'out' / name}" for name in ("brats_t1", "brats_flair")]
    assert {row.site for row in Cohort.read(tmp_path / "out/brats_t1").rows} == ({"1", "7"} if command == "fets" else {""})


def test_import_harvard(tmp_path: Path) -> None:
    for i in range(3):
        for kind in ("CT", "MRI"):
            save_png(tmp_path / f"src/CT-MRI/{kind}/{2000 + i}.png", noise(16, 16, stream=i))
    result = RUNNER.invoke(app, ["import", "harvard", str(tmp_path / "src"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert Cohort.read(tmp_path / "out/fusion_ct_mri").spec.modality == "CT-MRI"


def test_a_layout_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for command in ("brats", "harvard", "breakhis"):
        result = RUNNER.invoke(app, ["import", command, str(tmp_path / "none"), str(tmp_path / command)])
        assert isinstance(result.exception, DataError) and len(str(result.exception).splitlines()) == 1
