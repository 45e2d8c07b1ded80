"""The atlas as written: sound by the validator, reproducible to the byte, and true to what it says about itself."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from omnifm.data.atlas import make_atlas
from omnifm.data.atlas.scanner import CONTRASTS
from omnifm.data.cohort import Cohort
from omnifm.data.validate import validate
from omnifm.errors import DataError

PATIENTS, SIZE = 20, 48
NAMES = [f"atlas_{key}_{c}" for c in CONTRASTS for key in ("cls", "seg_tissue", "seg_lesion", "sr", "vqa")]
NAMES += ["atlas_fusion_ct", "atlas_fusion_pet"]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("atlas")
    paths = make_atlas(folder, PATIENTS, seed=4, size=SIZE)
    assert [path.relative_to(folder).as_posix() for path in paths] == NAMES
    return folder


def pixels(path: Path) -> npt.NDArray[np.float64]:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.float64)


def digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    parts = (p.relative_to(folder).as_posix().encode() + p.read_bytes() for p in files)
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_the_validator_finds_nothing_and_the_cohort_says_it_is_simulated(atlas: Path, name: str) -> None:
    assert validate(atlas / name) == []
    spec = Cohort.read(atlas / name).spec
    assert all("simulated" in text.lower() for text in (spec.title, spec.notes, spec.source))
    assert "Fonov" in spec.citation
    assert "Louis Collins" in spec.notes  # the template's terms ask for its copyright notice


def test_same_arguments_same_bytes_another_seed_other_bytes_and_progress_counts_patients(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_atlas(tmp_path / "a", 10, seed=1, size=32, progress=lambda done, total: seen.append((done, total)))
    make_atlas(tmp_path / "b", 10, seed=1, size=32)
    make_atlas(tmp_path / "c", 10, seed=2, size=32)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a" / "atlas_cls_ct") != digest(tmp_path / "c" / "atlas_cls_ct")
    assert seen == [(k, 70) for k in range(1, 71)]


def test_splits_hold_per_site_and_patients_stay_together_over_all_cohorts(atlas: Path) -> None:
    split: dict[str, str] = {}
    place: dict[str, str] = {}
    for name in NAMES:
        cohort = Cohort.read(atlas / name)
        per_site: dict[str, dict[str, str]] = {}
        for row in cohort.rows:
            assert row.patient
            assert split.setdefault(row.patient, row.split) == row.split
            assert place.setdefault(row.patient, row.site) == row.site
            per_site.setdefault(row.site, {})[row.patient] = row.split
        assert len(per_site) == 2
        for patients in per_site.values():
            counts = Counter(patients.values())
            assert (counts["train"], counts["val"], counts["test"]) in {(7, 1, 2), (6, 1, 3)}
    assert len(split) == PATIENTS * (len(CONTRASTS) + 2)


def test_labels_are_balanced_and_a_patients_slices_share_theirs(atlas: Path) -> None:
    rows = Cohort.read(atlas / "atlas_cls_flair").rows
    labels = {(row.patient, row.label) for row in rows}
    assert len(labels) == PATIENTS
    assert len(rows) == 3 * PATIENTS
    assert set(Counter(label for _, label in labels).values()) <= {4, 5, 6}


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_masks_agree_with_labels(atlas: Path, contrast: str) -> None:
    labels = {row.id: row.label for row in Cohort.read(atlas / f"atlas_cls_{contrast}").rows}
    lesions, tissues = (Cohort.read(atlas / f"atlas_{key}_{contrast}") for key in ("seg_lesion", "seg_tissue"))
    for index, row in enumerate(lesions.rows):
        mask, tissue = pixels(lesions.path(index, "mask")), pixels(tissues.path(index, "mask"))
        assert (mask.sum() == 0) == (labels[row.id] == "normal")
        np.testing.assert_array_equal(tissue == 4, mask == 1)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_written_pictures_have_their_modalitys_contrast(atlas: Path, contrast: str) -> None:
    cohort = Cohort.read(atlas / f"atlas_seg_tissue_{contrast}")
    means: dict[str, list[npt.NDArray[np.float64]]] = {}
    for index, row in enumerate(cohort.rows):
        image, mask = pixels(cohort.path(index)), pixels(cohort.path(index, "mask"))
        means.setdefault(row.site, []).append(np.array([image[mask == value].mean() for value in (1, 2, 3)]))
    for values in means.values():
        csf, grey, white = np.mean(values, axis=0)
        if contrast == "t1":
            assert white > grey > csf
        elif contrast == "t2":
            assert csf > grey > white
        else:
            assert grey > white


def test_masks_belong_to_their_own_slice(atlas: Path) -> None:
    """On T2 fluid is bright: its outline fits the slice it was drawn for better than the patient's other slices."""
    cohort = Cohort.read(atlas / "atlas_seg_tissue_t2")
    images = [pixels(cohort.path(i)) for i in range(len(cohort.rows))]
    masks = [pixels(cohort.path(i, "mask")) for i in range(len(cohort.rows))]
    for first in range(0, len(images), 3):
        fits = np.array(
            [[im[m == 1].mean() - im[m > 1].mean() for m in masks[first : first + 3]] for im in images[first : first + 3]]
        )
        np.testing.assert_array_equal(fits.argmax(axis=1), [0, 1, 2])


@pytest.mark.parametrize(("contrast", "brighter"), [("ct", True), ("pet", False), ("t2", False)])
def test_haemorrhage_is_bright_on_ct_and_dark_on_pet_and_t2(atlas: Path, contrast: str, brighter: bool) -> None:
    cohort = Cohort.read(atlas / f"atlas_seg_tissue_{contrast}")
    differences = []
    for index, row in enumerate(cohort.rows):
        if row.value("lesion") == "haemorrhage":
            image, mask = pixels(cohort.path(index)), pixels(cohort.path(index, "mask"))
            # The clot is the middle of the lesion; the oedema around it has the other sign.
            clot = np.percentile(image[mask == 4], 80 if brighter else 20)
            differences.append(clot - image[mask == 2].mean())
    assert len(differences) >= 12
    assert (np.mean(differences) > 0) == brighter


def test_super_resolution_is_sixteen_bits_and_finer_than_the_clinical_image(atlas: Path) -> None:
    fine, plain = (Cohort.read(atlas / f"atlas_{key}_flair") for key in ("sr", "cls"))
    with Image.open(fine.path(0)) as sharp, Image.open(plain.path(0)) as clinical:
        assert (sharp.mode, clinical.mode) == ("I;16", "L")
        assert sharp.size == clinical.size == (SIZE, SIZE)
        assert len(np.unique(np.asarray(sharp))) > 256
        # Noise of the receive channels shows where there is nothing else: in the corner, in air.
        assert np.asarray(sharp)[:6, :6].std() / 65535 < 0.6 * np.asarray(clinical)[:6, :6].std() / 255


def test_questions_fit_the_patient_they_are_asked_about(atlas: Path) -> None:
    for contrast in CONTRASTS:
        modality = {"ct": "ct", "pet": "pet"}.get(contrast, "mri")
        rows = Cohort.read(atlas / f"atlas_vqa_{contrast}").rows
        assert {row.patient for row in rows} == {row.patient for row in Cohort.read(atlas / f"atlas_cls_{contrast}").rows}
        for row in rows:
            lesion = row.value("lesion")
            if row.question_type == "presence":
                assert row.answer == ("no" if lesion == "normal" else "yes")
            if row.question_type == "modality" and row.answer_type == "open":
                assert row.answer == modality
            if row.question_type == "kind" and row.answer_type == "open":
                assert row.answer == lesion


def test_the_side_that_is_answered_is_where_the_mask_lies(atlas: Path) -> None:
    """Radiological display: a lesion of the patient's right lies in the left half of the picture."""
    masks = Cohort.read(atlas / "atlas_seg_lesion_t2")
    column = {row.id: pixels(masks.path(i, "mask")).nonzero()[1] for i, row in enumerate(masks.rows)}
    asked = [row for row in Cohort.read(atlas / "atlas_vqa_t2").rows if row.question_type == "side" and row.answer_type == "open"]
    assert asked
    for row in asked:
        in_left_half = column[row.id.rsplit("-", 1)[0]].mean() < (SIZE - 1) / 2
        assert row.answer == ("right" if in_left_half else "left")


def mutual_information(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    joint = np.histogram2d(a.ravel(), b.ravel(), bins=16)[0] / a.size
    expected = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    full = joint > 0
    return float((joint[full] * np.log(joint[full] / expected[full])).sum())


@pytest.mark.parametrize("other", ["ct", "pet"])
def test_pairs_share_their_anatomy(atlas: Path, other: str) -> None:
    """Mutual information of a pair beats that of every wrong pairing on average, and of a shifted one always."""
    cohort = Cohort.read(atlas / f"atlas_fusion_{other}")
    assert cohort.spec.modality == f"{other.upper()}-MRI"
    chosen = range(1, 30, 3)
    first = [pixels(cohort.path(i)) for i in chosen]
    second = [pixels(cohort.path(i, "image_b")) for i in chosen]
    paired = [mutual_information(a, b) for a, b in zip(first, second, strict=True)]
    crossed = [mutual_information(first[i], second[j]) for i, j in itertools.permutations(range(len(first)), 2)]
    assert min(paired) > np.mean(crossed)
    for a, b, whole in zip(first, second, paired, strict=True):
        assert mutual_information(a, np.roll(b, 3, axis=1)) < whole


def test_impossible_requests_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="9 patients are too few: at least 10"):
        make_atlas(tmp_path, 9, seed=0)
    with pytest.raises(DataError, match="slices of 16 pixels are too small"):
        make_atlas(tmp_path, 10, seed=0, size=16)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot make the folder"):
        make_atlas(tmp_path / "file", 10, seed=0)
