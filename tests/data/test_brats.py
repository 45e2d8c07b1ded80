"""Small NIfTI files in the published layouts of FeTS2022 and BraTS."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from omnifm.data.cohort import Cohort
from omnifm.data.importers.brats import SEQUENCES, import_brats
from omnifm.data.partition import partition
from omnifm.errors import DataError

# A grid that is turned: what comes out must lie where what went in lay.
AFFINE = np.array([[-0.9, 0.1, 0, 10], [0.1, 0.9, 0.2, -20], [0, -0.2, 2.0, 5], [0, 0, 0, 1]])
NEW = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "seg": "seg"}


def write(folder: Path, subjects: int = 6, *, enhancing: int = 4, layout: str = "fets") -> Path:
    rng = np.random.default_rng(0)
    for i in range(subjects):
        name = f"FeTS2022_{i:05d}" if layout == "fets" else f"BraTS-GLI-{i:05d}-000"
        place = folder / name
        place.mkdir(parents=True)
        for kind in (*SEQUENCES, "seg"):
            array = rng.integers(0, 900, (6, 5, 4)).astype(np.int16)
            if kind == "seg":
                array = rng.choice([0, 1, 2, enhancing], (6, 5, 4)).astype(np.int16)
            file = f"{name}_{kind}.nii.gz" if layout == "fets" else f"{name}-{NEW[kind]}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(array, AFFINE), place / file)
    return folder


def table(folder: Path, number: int, sites: list[int]) -> None:
    lines = ["Partition_ID,Subject_ID", *(f"{site},FeTS2022_{i:05d}" for i, site in enumerate(sites))]
    (folder / f"partitioning_{number}.csv").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("layout", ["fets", "brats2023"])
@pytest.mark.parametrize("enhancing", [3, 4])
def test_every_sequence_becomes_a_cohort_with_the_same_labels(layout: str, enhancing: int, tmp_path: Path) -> None:
    source = write(tmp_path / "src", enhancing=enhancing, layout=layout)
    folders = import_brats(source, tmp_path / "out")
    assert [folder.name for folder in folders] == [f"brats_{name}" for name in SEQUENCES]
    subject = next(p for p in sorted(source.iterdir()) if p.is_dir())
    original = nibabel.load(next(subject.glob("*seg.nii.gz")))
    for folder in folders:
        cohort = Cohort.read(folder)
        assert cohort.classes == ("background", "NCR", "ED", "ET") and cohort.spec.slice_axis == 2
        mask = nibabel.load(folder / cohort.rows[0].mask)
        expected = np.asarray(original.dataobj)
        assert np.array_equal(np.asarray(mask.dataobj), np.where(expected == 4, 3, expected))
        np.testing.assert_allclose(mask.affine, AFFINE, atol=1e-5)
        image = nibabel.load(folder / cohort.rows[0].image)
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)


def test_a_subject_has_one_split_in_all_sequences(tmp_path: Path) -> None:
    folders = import_brats(write(tmp_path / "src", 12), tmp_path / "out")
    splits = [{row.patient: row.split for row in Cohort.read(folder, seed=3).rows} for folder in folders]
    assert all(split == splits[0] for split in splits) and set(splits[0].values()) == {"train", "val", "test"}


def test_all_time_points_of_a_patient_have_one_split(tmp_path: Path) -> None:
    for visit in range(2):
        write(tmp_path / f"{visit}", 12, layout="brats2023")
    for place in sorted((tmp_path / "1").iterdir()):
        later = tmp_path / "0" / f"{place.name.removesuffix('-000')}-100"
        place.rename(later)
        for file in sorted(later.iterdir()):
            file.rename(later / file.name.replace(place.name, later.name))
    (folder,) = import_brats(tmp_path / "0", tmp_path / "out", sequences=["flair"])
    splits = {row.id: row.split for row in Cohort.read(folder).rows}
    assert len(splits) == 24 and set(splits.values()) == {"train", "val", "test"}
    assert all(splits[f"BraTS-GLI-{i:05d}-000"] == splits[f"BraTS-GLI-{i:05d}-100"] for i in range(12))


def test_a_mask_on_another_grid_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "src", 1)
    path = source / "FeTS2022_00000/FeTS2022_00000_seg.nii.gz"
    elsewhere = AFFINE.copy()
    elsewhere[0, 3] += 8
    nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(path).dataobj), elsewhere), path)
    with pytest.raises(DataError, match=r"lies up to 8\.0 mm from where the image lies"):
        import_brats(source, tmp_path / "out")


def test_institutions_are_sites_and_so_clients(tmp_path: Path) -> None:
    source = write(tmp_path / "src", 12)
    table(source, 1, [1] * 6 + [18] * 6)
    table(source, 2, [1] * 4 + [2] * 4 + [3] * 4)
    for number, sites in ((1, {"1", "18"}), (2, {"1", "2", "3"})):
        (folder,) = import_brats(source, tmp_path / f"out{number}", sequences=["flair"], partition=number)
        cohort = Cohort.read(folder)
        assert {row.site for row in cohort.rows} == sites
        plans = partition(cohort, clients=1, kind="natural", gamma=0.0, seed=0)
        assert {plan.id for plan in plans} == {f"brats_flair-{site}" for site in sites}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "src", 2)
    with pytest.raises(DataError, match=r"partitioning_1.csv: No such file"):
        import_brats(source, tmp_path / "a", partition=1)
    table(source, 1, [1])
    with pytest.raises(DataError, match="FeTS2022_00001: is not in the table of institutions"):
        import_brats(source, tmp_path / "a", partition=1)
    with pytest.raises(DataError, match="sequence 'dwi': known are t1, t1ce, t2, flair"):
        import_brats(source, tmp_path / "a", sequences=["dwi"])
    (source / "FeTS2022_00001/FeTS2022_00001_t2.nii.gz").unlink()
    with pytest.raises(DataError, match="FeTS2022_00001: has no t2 file"):
        import_brats(source, tmp_path / "a")
    with pytest.raises(DataError, match="holds no subjects"):
        import_brats(tmp_path / "nowhere", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_labels_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "src", 1)
    path = source / "FeTS2022_00000/FeTS2022_00000_seg.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.full((6, 5, 4), 7, np.int16), AFFINE), path)
    with pytest.raises(DataError, match="labels 7; expected 0, 1, 2 and 4"):
        import_brats(source, tmp_path / "out")
    both = np.zeros((6, 5, 4), np.int16)
    both[0, 0, :2] = 3, 4
    nibabel.save(nibabel.Nifti1Image(both, AFFINE), path)
    with pytest.raises(DataError, match="labels 0, 3, 4"):
        import_brats(source, tmp_path / "out2")
