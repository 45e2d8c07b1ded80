"""A few small pictures in the layout of BreaKHis become a cohort that no split cuts through a patient."""

import logging
from pathlib import Path

import pytest

from omnifm.data.cohort import Cohort
from omnifm.data.importers.breakhis import SUBTYPES, import_breakhis
from omnifm.data.partition import partition
from omnifm.data.readers import read_image
from omnifm.data.validate import validate
from omnifm.errors import DataError
from tests.data.builders import noise, save_png

SLIDES = {
    "A": ["22549AB", "22549CD", "29960CD"],
    "TA": ["4659", "16184"],
    "DC": ["13412", "2523", "2985"],
    "LC": ["13412", "15570"],
}


def layout(root: Path, magnifications: tuple[int, ...] = (40, 400), count: int = 2) -> Path:
    """Write pictures where BreaKHis has them."""
    stream = 0
    for code, slides in SLIDES.items():
        letter, tumour = ("B", "benign") if code in ("A", "TA") else ("M", "malignant")
        for slide in slides:
            for magnification in magnifications:
                for k in range(count):
                    stem = f"SOB_{letter}_{code}-14-{slide}-{magnification}-{k + 1:03d}"
                    where = root / f"histology_slides/breast/{tumour}/SOB/{SUBTYPES[code]}/SOB_{letter}_{code}_14-{slide}"
                    save_png(where / f"{magnification}X" / f"{stem}.png", noise(12, 16, 3, stream=stream))
                    stream += 1
    return root


def test_pictures_arrive_with_what_their_names_say(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = layout(tmp_path / "src")
    cohort = Cohort.read(import_breakhis(source, tmp_path / "out", progress=lambda a, b: seen.append((a, b))))
    assert seen[-1] == (40, 40) == (len(cohort.rows), 40)
    assert cohort.classes == tuple(SUBTYPES.values()) and (cohort.spec.task, cohort.spec.modality) == ("classification", "HISTO")
    index, row = next((i, row) for i, row in enumerate(cohort.rows) if row.id == "SOB_B_TA-14-4659-400-002")
    assert (row.label, row.patient) == ("tubular_adenoma", "14-4659")
    assert row.extra == {"magnification": "400X", "subtype": "tubular_adenoma", "tumour": "benign", "slide": "14-4659"}
    (original,) = source.rglob("SOB_B_TA-14-4659-400-002.png")
    assert cohort.path(index).read_bytes() == original.read_bytes()
    assert read_image(cohort.path(index)).array.shape == (3, 12, 16)
    assert validate(tmp_path / "out") == []


def test_no_patient_is_in_two_splits(tmp_path: Path) -> None:
    """Not through letters (22549AB, 22549CD), not through subtypes (13412 is DC and LC), not through magnifications."""
    cohort = Cohort.read(import_breakhis(layout(tmp_path / "src"), tmp_path / "out"))
    splits: dict[str, set[str]] = {}
    for row in cohort.rows:
        splits.setdefault(row.extra["slide"].rstrip("ABCDEFG"), set()).add(row.split)
    assert len(splits) == 8 and all(len(found) == 1 for found in splits.values())
    assert {s for found in splits.values() for s in found} == {"train", "val", "test"}
    assert {row.patient for row in cohort.rows} == set(splits)


def test_the_split_is_written_down(tmp_path: Path) -> None:
    source = layout(tmp_path / "src")
    first, again = (Cohort.read(import_breakhis(source, tmp_path / name), seed=k) for k, name in enumerate(("a", "b")))
    assert [row.split for row in first.rows] == [row.split for row in again.rows]
    assert "" not in {row.split for row in first.rows}
    others = [[r.split for r in Cohort.read(import_breakhis(source, tmp_path / f"s{k}", seed=k)).rows] for k in (1, 2, 3)]
    assert any(other != [row.split for row in first.rows] for other in others)


def test_benign_or_malignant(tmp_path: Path) -> None:
    cohort = Cohort.read(import_breakhis(layout(tmp_path / "src"), tmp_path / "out", classes="tumours"))
    assert cohort.classes == ("benign", "malignant")
    assert all((row.label == "benign") == ("_B_" in row.id) for row in cohort.rows)


def test_super_resolution_with_magnifications_as_clients(tmp_path: Path) -> None:
    cohort = Cohort.read(import_breakhis(layout(tmp_path / "src"), tmp_path / "out", task="super_resolution"))
    assert cohort.spec.task == "super_resolution" and {row.label for row in cohort.rows} == {""} and cohort.classes == ()
    plans = partition(cohort, clients=1, kind="by_column", gamma=0.5, column="magnification", seed=0)
    assert [plan.id for plan in plans] == ["out-400X", "out-40X"]
    assert sum(len(plan.train) + len(plan.val) + len(plan.test) for plan in plans) == 40


def test_one_magnification_alone(tmp_path: Path) -> None:
    source = layout(tmp_path / "src")
    inner = next(source.rglob("SOB")).parents[1]
    cohort = Cohort.read(import_breakhis(inner, tmp_path / "out", magnifications=["40X"]))
    assert len(cohort.rows) == 20 and {row.extra["magnification"] for row in cohort.rows} == {"40X"}
    assert {row.extra["tumour"] for row in cohort.rows} == {"benign", "malignant"}


def test_other_files_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = layout(tmp_path / "src")
    save_png(source / "histology_slides" / "figure.png", noise(4, 4))
    with caplog.at_level(logging.WARNING):
        cohort = Cohort.read(import_breakhis(source, tmp_path / "out"))
    assert len(cohort.rows) == 40 and "1 pictures are not named as BreaKHis's" in caplog.text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("malignant/SOB_B_A-14-1-40-001.png", "lies in folder 'malignant', but its name says 40x, adenosis, benign"),
        ("benign/SOB/adenosis/x/100X/SOB_B_A-14-1-40-001.png", "lies in folder '100x'"),
        ("SOB_M_A-14-1-40-001.png", "'M_A' at 40X is nothing that BreaKHis has"),
        ("SOB_B_XX-14-1-40-001.png", "'B_XX'"),
        ("SOB_B_A-14-1-50-001.png", "at 50X is nothing"),
    ],
)
def test_contradictions_name_the_file(tmp_path: Path, path: str, text: str) -> None:
    save_png(tmp_path / "src" / path, noise(4, 4, 3))
    with pytest.raises(DataError, match=text) as error:
        import_breakhis(tmp_path / "src", tmp_path / "out")
    assert Path(path).name in str(error.value) and not (tmp_path / "out").exists()


def test_two_files_of_one_name_and_nothing_at_all(tmp_path: Path) -> None:
    for part in ("a", "b"):
        save_png(tmp_path / "src" / part / "SOB_B_A-14-1-40-001.png", noise(4, 4, 3))
    with pytest.raises(DataError, match="have the same name"):
        import_breakhis(tmp_path / "src", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no picture named like"):
        import_breakhis(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match="is not a folder"):
        import_breakhis(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("wrong", [{"task": "vqa"}, {"classes": "grades"}, {"magnifications": ["50X"]}])
def test_what_cannot_be_made(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"vqa|grades|50X"):
        import_breakhis(layout(tmp_path / "src", count=1), tmp_path / "out", **wrong)  # type: ignore[arg-type]
