"""`omnifm data ...` as a user types it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import omnifm.data.atlas
from omnifm.cli.data import app
from omnifm.data.cohort import Cohort
from omnifm.errors import DataError
from tests.data.builders import classification, noise, save_png

RUNNER = CliRunner()


def test_check_prints_every_problem_and_fails(tmp_path: Path) -> None:
    folder = classification(tmp_path)
    result = RUNNER.invoke(app, ["check", str(folder)])
    assert result.stdout == "tiny: fine; classification, 6 rows (4 train, 1 val, 1 test)\n"
    assert result.stderr == "note: 6 rows name no patient, so pictures of one person may be in both train and test\n"
    known = classification(tmp_path / "known", row=lambda i: {"patient": f"p{i}"})
    assert RUNNER.invoke(app, ["check", str(known)]).stderr == ""
    for k in (1, 4):
        (folder / f"images/{k}.png").unlink()
    result = RUNNER.invoke(app, ["check", str(folder)])
    assert result.exit_code == 1
    assert result.stdout == "".join(f"manifest.csv row {k + 2}: image 'images/{k}.png': file is missing\n" for k in (1, 4))
    assert result.stderr.strip().endswith("2 problems")


def test_describe_prints_and_draws_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = classification(tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.rglob("*"))
    result = RUNNER.invoke(app, ["describe", str(folder)])
    assert result.exit_code == 0, result.output
    assert "rows by label" in result.stdout
    with Image.open(tmp_path / "tiny-contact.png") as sheet:
        assert sheet.width > 100
    assert RUNNER.invoke(app, ["describe", str(folder), "--out", "own.png"]).exit_code == 0
    assert (tmp_path / "own.png").exists()
    inside = RUNNER.invoke(app, ["describe", str(folder), "--out", str(folder / "x.png")])
    assert isinstance(inside.exception, DataError)
    assert sorted(folder.rglob("*")) == before


def test_import_medmnist(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        arrays |= {f"{split}_images": noise(2, 28, 28), f"{split}_labels": np.array([[0], [1]])}
    np.savez(tmp_path / "breastmnist.npz", **arrays)
    result = RUNNER.invoke(app, ["import", "medmnist", str(tmp_path / "breastmnist.npz"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert Cohort.read(tmp_path / "out").classes == ("malignant", "normal, benign")


def test_import_folder_with_its_options(tmp_path: Path) -> None:
    for name in ("train/a/p1_1", "train/b/p2_1", "test/a/p3_1"):
        save_png(tmp_path / f"s/{name}.png", noise(5, 5))
    options = ["--modality", "US", "--patient", r"p\d", "--origin", "ward 3"]
    options += ["--licence", "CC0-1.0", "--redistribution", "allowed"]
    result = RUNNER.invoke(app, ["import", "folder", str(tmp_path / "s"), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    cohort = Cohort.read(tmp_path / "out")
    assert (cohort.spec.licence, cohort.spec.redistribution, cohort.spec.source) == ("CC0-1.0", "allowed", "ward 3")
    assert {row.patient for row in cohort.rows} == {"p1", "p2", "p3"}
    again = RUNNER.invoke(app, ["import", "folder", str(tmp_path / "s"), str(tmp_path / "out"), *options])
    assert isinstance(again.exception, DataError)


def test_make_atlas_passes_its_arguments_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def record(folder: Path, patients: int, seed: int, size: int, progress: Any) -> list[Path]:
        calls.append((folder, patients, seed, size))
        progress(1, 1)
        return [folder / "one"]

    monkeypatch.setattr(omnifm.data.atlas, "make_atlas", record)
    result = RUNNER.invoke(app, ["make", "atlas", str(tmp_path), "--patients", "12", "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert calls == [(tmp_path, 12, 3, 128)]
    assert str(tmp_path / "one") in result.stdout.replace("\n", "")


def test_help_needs_neither_torch_nor_images() -> None:
    code = "import sys, omnifm.cli.data; print([m for m in ('torch', 'numpy', 'pydantic', 'PIL', 'monai') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_check_does_not_load_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from omnifm.cli.data import app
try:
    app(["check", {str(classification(tmp_path))!r}])
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "0 False"
