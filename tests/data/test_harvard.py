"""The shared folders of Whole Brain Atlas pairs become one cohort per kind of pair."""

import logging
from pathlib import Path
from typing import Any

import pytest

from omnifm.data.cohort import Cohort
from omnifm.data.importers.harvard import import_harvard
from omnifm.data.validate import validate
from omnifm.errors import DataError
from tests.data.builders import noise, save_png


def pairs(root: Path, kind: str, *names: str, split: str = "{pair}") -> Path:
    """Write both pictures of each name; `split` says where the pair's folder lies, e.g. `train/{pair}` or `{pair}/train`."""
    other, anatomical = kind.split("-")
    for k, name in enumerate(names):
        for part, colour in ((other, kind != "CT-MRI"), (anatomical, False)):
            pixels = noise(8, 8, *((3,) if colour else ()), stream=hash_free(name, part) + k)
            save_png(root / split.format(pair=kind) / part / f"{name}.png", pixels)
    return root


def hash_free(*words: str) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate("".join(words))) % 1000


def read(source: Path, out: Path, **options: Any) -> dict[str, Cohort]:
    return {path.name: Cohort.read(path) for path in import_harvard(source, out, **options)}


def test_each_kind_of_pair_is_a_cohort(tmp_path: Path) -> None:
    source = pairs(tmp_path / "s", "CT-MRI", "16005", "16006", "2010", "20013")
    pairs(source, "SPECT-MRI", "3008", "10007", "10009")
    seen: list[tuple[int, int]] = []
    found = read(source, tmp_path / "o", progress=lambda a, b: seen.append((a, b)))
    assert set(found) == {"fusion_ct_mri", "fusion_spect_mri"} and seen[-1] == (7, 7)
    cohort = found["fusion_ct_mri"]
    assert (cohort.spec.task, cohort.spec.modality, cohort.spec.licence) == ("fusion", "CT-MRI", "unverified")
    row = next(r for r in cohort.rows if r.id == "16006")
    assert (row.image, row.image_b) == ("mri/16006.png", "ct/16006.png")
    for column, part in (("image", "MRI"), ("image_b", "CT")):
        assert cohort.path(cohort.rows.index(row), column).read_bytes() == (source / f"CT-MRI/{part}/16006.png").read_bytes()
    assert all(validate(tmp_path / "o" / name) == [] for name in found)


def test_names_of_four_and_five_digits_tell_the_case(tmp_path: Path) -> None:
    source = pairs(tmp_path / "s", "PET-MRI", "2006", "2012", "16003", "16020", "41003")
    rows = read(source, tmp_path / "o")["fusion_pet_mri"].rows
    assert {r.id: r.patient for r in rows} == {
        **{"2006": "case02", "2012": "case02"},
        **{"16003": "case16", "16020": "case16", "41003": "case41"},
    }


def test_names_with_a_case_tell_it_too(tmp_path: Path) -> None:
    source = pairs(tmp_path / "s", "CT-MRI", "case16_005", "case16_006", "case2_001")
    assert {r.patient for r in read(source, tmp_path / "o")["fusion_ct_mri"].rows} == {"case16", "case2"}


@pytest.mark.parametrize("prefix", ["", "slice_", "0"])
def test_plain_numbers_are_cut_into_blocks_of_neighbours(tmp_path: Path, prefix: str) -> None:
    names = [f"{prefix}{number}" for number in range(100, 140)]
    cohort = read(pairs(tmp_path / "s", "CT-MRI", *names), tmp_path / "o", block=10)["fusion_ct_mri"]
    blocks: dict[str, list[int]] = {}
    for row in cohort.rows:
        blocks.setdefault(row.patient, []).append(int(row.id.removeprefix("slice_")))
    assert sorted(blocks.values()) == [list(range(start, start + 10)) for start in (100, 110, 120, 130)]
    splits = {row.patient: row.split for row in cohort.rows}
    assert all(splits[row.patient] == row.split for row in cohort.rows) and "every 10 consecutive" in cohort.spec.notes


@pytest.mark.parametrize("layout", ["{split}/{{pair}}", "{{pair}}/{split}"])
def test_splits_above_or_below_are_kept_where_they_cut_no_subject(tmp_path: Path, layout: str) -> None:
    source = pairs(tmp_path / "s", "CT-MRI", "1001", "1002", "2001", split=layout.format(split="train"))
    pairs(source, "CT-MRI", "3001", split=layout.format(split="Test"))
    rows = read(source, tmp_path / "o")["fusion_ct_mri"].rows
    assert {r.id: r.split for r in rows} == {"1001": "train", "1002": "train", "2001": "train", "3001": "test"}


def test_a_split_that_cuts_a_subject_is_not_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The shared folders do: 16008 is in train, 16009 in test."""
    source = pairs(tmp_path / "s", "CT-MRI", "16008", "20007", "21004", "33001", split="{pair}/train")
    pairs(source, "CT-MRI", "16009", "2010", split="{pair}/test")
    with caplog.at_level(logging.WARNING):
        cohort = read(source, tmp_path / "o")["fusion_ct_mri"]
    assert "cut subject case16 (and 0 more)" in caplog.text and "was not taken over" in cohort.spec.notes
    assert len({row.split for row in cohort.rows if row.patient == "case16"}) == 1


def test_splits_that_number_their_own_pictures(tmp_path: Path) -> None:
    source = pairs(tmp_path / "s", "CT-MRI", "1", "2", "3", split="train/{pair}")
    pairs(source, "CT-MRI", "1", "2", split="test/{pair}")
    rows = read(source, tmp_path / "o")["fusion_ct_mri"].rows
    assert {(r.id, r.split) for r in rows} == {
        ("train_1", "train"), ("train_2", "train"), ("3", "train"), ("test_1", "test"), ("test_2", "test")
    }  # fmt: skip


def test_the_folder_of_one_kind_alone(tmp_path: Path) -> None:
    source = pairs(tmp_path / "s", "CT-MRI", "1001", "2001")
    assert set(read(source / "CT-MRI", tmp_path / "o")) == {"fusion_ct_mri"}


def test_pictures_without_a_partner_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = pairs(tmp_path / "s", "CT-MRI", "1001", "2001")
    save_png(source / "CT-MRI/CT/9001.png", noise(8, 8))
    with caplog.at_level(logging.WARNING):
        assert len(read(source, tmp_path / "o")["fusion_ct_mri"].rows) == 2
    assert "1 files of CT-MRI have no partner and are left out, the first: 9001" in caplog.text


def test_folders_that_are_no_such_layout(tmp_path: Path) -> None:
    save_png(tmp_path / "s/CT/1.png", noise(8, 8))
    for source, text in ((tmp_path / "s", "holds no pairs in the layout"), (tmp_path / "gone", "is not a folder")):
        with pytest.raises(DataError, match=text):
            import_harvard(source, tmp_path / "o")
    both = pairs(tmp_path / "b", "CT-MRI", "1001", "2001")
    with pytest.raises(DataError, match="block = 0"):
        import_harvard(both, tmp_path / "o", block=0)
    pairs(both, "CT-MRI", "2001", split="{pair}/train")
    with pytest.raises(DataError, match="pair 2001 is there with and without a split"):
        import_harvard(both, tmp_path / "o")
    twice = pairs(tmp_path / "t", "CT-MRI", "1001")
    save_png(twice / "more/CT-MRI/CT/1001.png", noise(8, 8))
    with pytest.raises(DataError, match="both stand for CT of pair 1001"):
        import_harvard(twice, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o/keep").touch()
    with pytest.raises(DataError, match="is not empty"):
        import_harvard(pairs(tmp_path / "s", "CT-MRI", "1001", "2001"), tmp_path / "o")
