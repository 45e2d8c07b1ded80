"""MedMNIST files and trees of folders become cohorts."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnifm.data.cohort import Cohort
from omnifm.data.importers import Provenance
from omnifm.data.importers.folder import import_folder
from omnifm.data.importers.medmnist import KNOWN_SETS, import_medmnist
from omnifm.data.readers import read_image
from omnifm.data.validate import validate
from omnifm.errors import DataError
from tests.data.builders import noise, save_png
from tests.predict.files import series

ABOUT = Provenance("Pictures")


def npz(path: Path, *, colour: bool = False, labels: int = 1, high: int = 2, **changes: Any) -> Path:
    """Write a small file in MedMNIST's layout."""
    arrays: dict[str, Any] = {}
    for k, (split, count) in enumerate({"train": 6, "val": 2, "test": 4}.items()):
        arrays[f"{split}_images"] = noise(count, 28, 28, *((3,) if colour else ()), stream=k)
        arrays[f"{split}_labels"] = np.arange(count * labels).reshape(count, labels).astype(np.uint8) % high
    np.savez_compressed(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


@pytest.mark.parametrize("colour", [False, True])
def test_medmnist_pixels_labels_and_splits_arrive(tmp_path: Path, colour: bool) -> None:
    file = npz(tmp_path / "pneumoniamnist.npz", colour=colour)
    seen: list[tuple[int, int]] = []
    cohort = Cohort.read(import_medmnist(file, tmp_path / "out", progress=lambda a, b: seen.append((a, b))))
    assert seen[-1] == (12, 12)
    assert Counter(row.split for row in cohort.rows) == {"train": 6, "val": 2, "test": 4}
    assert (cohort.classes, cohort.spec.modality, cohort.spec.licence) == (("normal", "pneumonia"), "XR", "CC-BY-4.0")
    with np.load(file, allow_pickle=False) as source:
        for split in ("train", "val", "test"):
            for place, index in enumerate(cohort.indices(split)):
                pixels = source[f"{split}_images"][place]
                expected = np.moveaxis(pixels, -1, 0) if colour else pixels[None]
                np.testing.assert_array_equal(read_image(cohort.path(index)).array, expected)
                assert cohort.rows[index].label == cohort.classes[source[f"{split}_labels"][place, 0]]
    assert validate(tmp_path / "out") == []


def test_larger_and_unknown_files(tmp_path: Path) -> None:
    derma = Cohort.read(import_medmnist(npz(tmp_path / "dermamnist_64.npz", colour=True), tmp_path / "d"))
    assert (derma.name, len(derma.classes), derma.spec.redistribution) == ("dermamnist_64", 7, "non-commercial")
    own = Cohort.read(import_medmnist(npz(tmp_path / "my set.npz", high=4), tmp_path / "o", modality="US"))
    assert (own.name, own.classes, own.spec.modality) == ("my_set", ("class_0", "class_1", "class_2", "class_3"), "US")


def test_the_table_holds_the_twelve_sets_with_their_numbers_of_classes() -> None:
    assert [len(s.classes) for s in KNOWN_SETS.values()] == [9, 14, 7, 4, 2, 5, 2, 8, 8, 11, 11, 11]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"labels": 14}, r"multi-label \(14 labels per image\)"),
        ({"val_labels": None}, "no val_images and val_labels"),
        ({"train_images": np.zeros((6, 28, 28, 28), dtype=np.uint8)}, "train_images are uint8"),
        ({"train_images": np.zeros((6, 28, 28))}, "train_images are float64"),
        ({"test_labels": np.zeros((3, 1), dtype=np.uint8)}, "4 test_images, but 3 test_labels"),
        ({"high": 6}, "train_labels hold 0 to 5, the set has 2 classes"),
    ],
)
def test_files_of_another_layout(tmp_path: Path, arguments: dict[str, Any], text: str) -> None:
    file = npz(tmp_path / "pneumoniamnist.npz", **arguments)
    with pytest.raises(DataError, match=text):
        import_medmnist(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_npz_or_hold_objects(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK no")
    np.savez(tmp_path / "o.npz", train_images=np.array([{}], dtype=object))
    np.save(tmp_path / "a.npy", np.ones(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    for name in ("x.npz", "o.npz", "a.npz", "gone.npz"):
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            import_medmnist(tmp_path / name, tmp_path / "out")


def test_what_was_written_is_checked(tmp_path: Path) -> None:
    blank = noise(6, 28, 28)
    blank[3] = 9
    with pytest.raises(DataError, match=r"written, but with 1 problems.*constant"):
        import_medmnist(npz(tmp_path / "x.npz", train_images=blank), tmp_path / "out")


def tree(root: Path, *paths: str) -> Path:
    for k, path in enumerate(paths):
        save_png(root / path, noise(5, 5, stream=k))
    return root


def test_class_folders_without_splits(tmp_path: Path) -> None:
    source = tree(tmp_path / "s", *(f"{label}/{i:02d}_{i % 2}.png" for label in ("b", "a") for i in range(10)), ".cache/x.png")
    out = import_folder(source, tmp_path / "o", modality="MRI", provenance=ABOUT, patient_pattern=r"(\d\d)_")
    cohort = Cohort.read(out)
    assert (cohort.classes, len(cohort.rows), cohort.name) == (("a", "b"), 20, "o")
    row = next(r for r in cohort.rows if r.id == "b/03_1.png")
    assert (row.label, row.patient, row.image) == ("b", "03", "images/b/03_1.png")
    assert (out / row.image).read_bytes() == (source / "b/03_1.png").read_bytes()
    assert len({(r.patient, r.split) for r in cohort.rows}) == 10


def test_slices_of_a_scan_are_one_patients_and_the_rest_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for label in "ab":
        for scan in range(8):
            series(tmp_path / f"s/{label}/{scan}/ct", noise(3, 5, 5, stream=scan), (0, 1, 2))
    rows = Cohort.read(import_folder(tmp_path / "s", tmp_path / "o", modality="CT", provenance=ABOUT)).rows
    assert {row.patient for row in rows} == {f"{label}/{scan}" for label in "ab" for scan in range(8)}
    assert len({(row.patient, row.split) for row in rows}) == 16 and not caplog.messages
    tree(tmp_path / "s", "a/deep/1.png")
    import_folder(tmp_path / "s", tmp_path / "p", modality="CT", provenance=ABOUT)
    assert "1 pictures name no patient (--patient): one person's may be in both train and test" in caplog.text


def test_split_folders_by_any_of_their_names(tmp_path: Path) -> None:
    source = tree(tmp_path / "s", "Training/a/1.png", "Training/b/2.png", "valid/a/1.png", "Testing/b/deep/1.png")
    cohort = Cohort.read(import_folder(source, tmp_path / "o", modality="CT", provenance=ABOUT))
    assert [(r.split, r.label) for r in cohort.rows] == [("test", "b"), ("train", "a"), ("train", "b"), ("val", "a")]


def test_super_resolution_has_no_classes(tmp_path: Path) -> None:
    source = tree(tmp_path / "f", "1.png", "2.png")
    flat = import_folder(source, tmp_path / "1", modality="CT", provenance=ABOUT, task="super_resolution")
    assert {(r.label, r.image) for r in Cohort.read(flat).rows} == {("", "images/1.png"), ("", "images/2.png")}
    assert Cohort.read(flat).classes == ()
    source = tree(tmp_path / "g", "train/1.png", "test/2.png")
    cut = import_folder(source, tmp_path / "2", modality="CT", provenance=ABOUT, task="super_resolution")
    assert [r.split for r in Cohort.read(cut).rows] == ["test", "train"]


def test_other_files_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tree(tmp_path / "s", "a/1.png", "b/1.png")
    (source / "a/Thumbs.db").touch()
    with caplog.at_level(logging.WARNING):
        import_folder(source, tmp_path / "o", modality="CT", provenance=ABOUT)
    assert "1 files are no pictures and are left out, the first: a/Thumbs.db" in caplog.text


@pytest.mark.parametrize(
    ("paths", "options", "text"),
    [
        ((), {}, "holds no picture"),
        (("1.png", "a/1.png"), {}, "1.png: lies in no class folder"),
        (("train/1.png", "test/1.png"), {}, "lies in no class folder"),
        (("a/1.png",), {}, "classes"),
        (("a/1.png", "b/1.png"), {"patient_pattern": r"p(\d)"}, "finds no patient in this path"),
        (("a/1.png", "b/1.png"), {"patient_pattern": "("}, "not a regular expression"),
        (("a/1.png", "b/1.png"), {"modality": "OCT"}, "OCT"),
        (("a/1.png", "b/1.png"), {"task": "vqa"}, "need a manifest"),
        (("train/a/p1.png", "test/b/p1.png"), {"patient_pattern": "p1"}, "patient 'p1' is in"),
    ],
)
def test_trees_that_are_no_cohort(tmp_path: Path, paths: tuple[str, ...], options: dict[str, Any], text: str) -> None:
    source = tree(tmp_path / "s", *paths)
    source.mkdir(exist_ok=True)
    with pytest.raises(DataError, match=text) as caught:
        import_folder(source, tmp_path / "o", **{"modality": "CT", "provenance": ABOUT, **options})
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    tree(tmp_path / "s", "a/1.png", "b/2.png")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/new: cannot be made \(Not a directory\)"):
        import_folder(tmp_path / "s", tmp_path / "file/new", modality="CT", provenance=ABOUT)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o/keep").touch()
    with pytest.raises(DataError, match="is not empty"):
        import_folder(tree(tmp_path / "s", "a/1.png", "b/1.png"), tmp_path / "o", modality="CT", provenance=ABOUT)
    with pytest.raises(DataError, match="is not empty"):
        import_medmnist(npz(tmp_path / "x.npz"), tmp_path / "o")
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["keep"]
