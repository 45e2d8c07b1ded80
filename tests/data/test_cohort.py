"""The text files of a cohort: what is read, what is written, and each structural fault with its line."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnifm.data.cohort import Cohort, CohortSpec, Row, scan, write_cohort
from omnifm.data.manifest import manifest_text, outside_reason, read_manifest, resolve_inside
from omnifm.data.partition import partition
from omnifm.errors import DataError
from tests.data.builders import classification, spec

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=8).map(str.strip)


def lines(folder: Path) -> list[str]:
    return [str(problem) for problem in scan(folder).problems]


def edit(folder: Path, file: str, old: str, new: str) -> Path:
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = [
        Row("x", "train", "p1", label="a", image="i/x.png", site="s, north", extra={"dose": "5", "note": 'he said "no"\nthen'}),
        Row("y", "test", "p2", label="b", image="i/y.png", modality="MRI", extra={"dose": ""}),
    ]
    cohort = Cohort.read(write_cohort(tmp_path / "new", spec(slice_axis=1), rows))
    assert cohort.spec == spec(slice_axis=1)
    assert cohort.rows[0] == dataclasses.replace(rows[0], modality="CT")
    assert cohort.rows[1].modality == "MRI"
    assert cohort.rows[1].extra == {"dose": "5", "note": ""} | {"dose": ""}
    assert (cohort.name, cohort.classes, cohort.indices("test"), cohort.indices("val")) == ("tiny", ("a", "b"), [1], [])
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["cohort.toml", "manifest.csv"]


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5))
def test_any_text_survives_the_csv(tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str, str]]) -> None:
    folder = tmp_path_factory.mktemp("csv")
    rows = [Row(f"r{i}", question=q, answer=a, extra={"more": m}) for i, (q, a, m) in enumerate(cells)]
    (folder / "manifest.csv").write_text(manifest_text(rows), encoding="utf-8", newline="")
    manifest = read_manifest(folder)
    assert manifest.problems == ()
    assert [row for _, row in manifest.rows] == rows


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('task = "classification"', 'task = "detection"', "cohort.toml: key 'task': "),
        ("format = 1", "format = 2", "cohort.toml: key 'format': Input should be 1"),
        ('title = "Tiny"', "", "cohort.toml: missing key 'title'"),
        ("licence =", "license =", "cohort.toml: unknown key 'license' (did you mean 'licence'?)"),
        ('name = "tiny"', 'name = "a b"', "cohort.toml: key 'name': "),
        ('modality = "CT"', 'modality = "OCT"', "cohort.toml: key 'modality': 'OCT' is not one of MRI, CT"),
        ('"b",\n', '"a",\n', "cohort.toml: key 'classes': a name appears twice"),
        ('    "b",\n', "", "cohort.toml: key 'classes': classification needs at least two"),
        ("format = 1", "format = 1\nmask_kind = 'semantic'", "cohort.toml: key 'mask_kind': "),
        ("format = 1", "format = ", "cohort.toml: is not TOML: "),
    ],
)
def test_each_fault_of_cohort_toml_has_its_line(tmp_path: Path, old: str, new: str, line: str) -> None:
    folder = edit(classification(tmp_path), "cohort.toml", old, new)
    assert any(found.startswith(line) for found in lines(folder)), lines(folder)
    with pytest.raises(DataError, match=r"cohort\.toml"):
        Cohort.read(folder)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("images/2.png,a", "images/2.png,c", "manifest.csv row 4: unknown class 'c' (classes in cohort.toml: a, b)"),
        ("images/2.png,a", "images/2.png,", "manifest.csv row 4: empty label"),
        ("r2,", "r0,", "manifest.csv row 4: duplicate id 'r0' (first in row 2)"),
        ("r2,train,", "r2,Train,", "manifest.csv row 4: split 'Train' is not train, val or test"),
        ("images/2.png", "../2.png", "manifest.csv row 4: image '../2.png': the path leaves the cohort folder"),
        ("images/2.png", "/images/2.png", "manifest.csv row 4: image '/images/2.png': the path leaves the cohort folder"),
        ("images/2.png", "C:/2.png", "manifest.csv row 4: image 'C:/2.png': the path leaves the cohort folder"),
        ("images/2.png", "images\\2.png", "manifest.csv row 4: image 'images\\2.png': write paths with '/'"),
        ("images/2.png,a", "images/2.png,a,z", "manifest.csv row 4: has 6 cells where the header has 5"),
        ("images/2.png,a", 'images/2.png,"a', "manifest.csv: is not a comma-separated table"),
        (",label", ",klass", "manifest.csv row 1: missing column 'label' (classification needs it)"),
        (",label", ",split", "manifest.csv row 1: column 'split' appears twice"),
        (",label", ",", "manifest.csv row 1: a column has no name"),
        (",patient", ",person", "manifest.csv row 1: missing column 'patient'"),
        ("id,split,patient,image,label", "id;split;patient;image;label", "manifest.csv row 1: columns must be separated by"),
    ],
)
def test_each_fault_of_the_manifest_has_its_line(tmp_path: Path, old: str, new: str, line: str) -> None:
    folder = edit(classification(tmp_path), "manifest.csv", old, new)
    assert any(found.startswith(line) for found in lines(folder)), lines(folder)
    with pytest.raises(DataError, match=r"manifest\.csv"):
        Cohort.read(folder)


def test_one_patient_in_two_splits(tmp_path: Path) -> None:
    folder = classification(tmp_path, row=lambda i: {"patient": "p7"} if i in (0, 4) else {})
    assert lines(folder) == ["manifest.csv row 6: patient 'p7' is in val here and in train in row 2"]


def test_files_that_are_no_text_missing_or_empty(tmp_path: Path) -> None:
    folder = classification(tmp_path / "c")
    (folder / "manifest.csv").write_bytes(b"id,split,patient,image,label\nr\xe9,train,,x.png,a\n")
    assert lines(folder) == ["manifest.csv: is not UTF-8 (line 2): save it as 'CSV UTF-8'"]
    (folder / "manifest.csv").write_text("", encoding="utf-8")
    assert lines(folder) == ["manifest.csv: is empty: the first line must be the header"]
    (folder / "manifest.csv").write_text("id,split,patient,image,label\n", encoding="utf-8")
    assert lines(folder) == ["manifest.csv: no rows below the header"]
    (folder / "cohort.toml").write_bytes(b'name = "\xff"')
    (folder / "manifest.csv").unlink()
    assert lines(folder) == ["cohort.toml: is not UTF-8 (line 1)", "manifest.csv: file is missing"]
    assert lines(tmp_path / "gone")[0].endswith("is not a folder")


def test_a_manifest_saved_by_a_spreadsheet(tmp_path: Path) -> None:
    folder = classification(tmp_path)
    text = (folder / "manifest.csv").read_text(encoding="utf-8")
    (folder / "manifest.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n")
    assert len(Cohort.read(folder).rows) == 6


def test_modality_must_come_from_somewhere(tmp_path: Path) -> None:
    assert lines(classification(tmp_path / "1", modality=None)) == [
        "manifest.csv row 1: missing column 'modality' (cohort.toml names no modality)"
    ]
    folder = classification(tmp_path / "2", modality=None, row=lambda i: {"modality": "MRI" if i else ""})
    assert lines(folder) == ["manifest.csv row 2: empty modality (cohort.toml names none)"]


def test_fusion_takes_a_pair_and_vqa_a_closed_or_open_answer(tmp_path: Path) -> None:
    assert spec(task="fusion", modality="PET-MRI", classes=None).modality == "PET-MRI"
    with pytest.raises(ValueError, match="pair"):
        spec(task="fusion", modality="PET", classes=None)
    rows = [Row("q", "train", image="x.png", question="?", answer="yes", answer_type="maybe")]
    folder = write_cohort(tmp_path, spec(task="vqa", classes=None), rows)
    assert lines(folder) == ["manifest.csv row 2: answer_type 'maybe' is not closed or open"]


def test_empty_splits_are_filled_by_patient_whatever_the_order(tmp_path: Path) -> None:
    rows = [Row(f"r{i}", "", f"p{i // 3}", image=f"{i}.png", label="ab"[i % 2]) for i in range(90)]
    one = Cohort.read(write_cohort(tmp_path / "1", spec(), rows))
    two = Cohort.read(write_cohort(tmp_path / "2", spec(), rows[::-1]))
    assert {r.id: r.split for r in one.rows} == {r.id: r.split for r in two.rows}
    assert len({(r.patient, r.split) for r in one.rows}) == 30
    assert {r.id: r.split for r in Cohort.read(tmp_path / "1", seed=1).rows} != {r.id: r.split for r in one.rows}


def test_questions_about_one_image_are_in_one_split_though_no_patient_is_known(tmp_path: Path) -> None:
    rows = [Row(f"q{i:03d}", image=f"{i // 4}.png", question=f"{i}?", answer="yes", answer_type="closed") for i in range(160)]
    keys = spec(task="vqa", classes=None)
    one = Cohort.read(write_cohort(tmp_path / "1", keys, rows))
    assert {r.split for r in one.rows} == {"train", "val", "test"}
    assert len({(r.image, r.split) for r in one.rows}) == 40
    two = Cohort.read(write_cohort(tmp_path / "2", keys, rows[::-1]))
    assert {r.id: r.split for r in one.rows} == {r.id: r.split for r in two.rows}
    for plan in (plans := partition(one, clients=3, kind="iid", gamma=0.0, seed=0)):
        own = {one.rows[i].image for i in plan.train}
        assert not any(own & {one.rows[i].image for i in other.train} for other in plans if other is not plan)


def test_the_spec_is_frozen_and_knows_the_format() -> None:
    with pytest.raises(ValueError, match="frozen"):
        spec().name = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="format"):
        CohortSpec.model_validate({k: v for k, v in spec().model_dump().items() if k != "format"})


def test_paths_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "out.png").touch()
    inside = tmp_path / "c"
    inside.mkdir()
    (inside / "link.png").symlink_to(tmp_path / "out.png")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "real.png").touch()
    (inside / "alias.png").symlink_to("real.png")
    assert resolve_inside(inside, "alias.png") == (inside / "real.png").resolve()
    for path in ("link.png", "../out.png", str(tmp_path / "out.png"), "a\x00b"):
        with pytest.raises(DataError):
            resolve_inside(inside, path)
    assert outside_reason("a/b..c/d.png") is None
    cohort = Cohort(inside, spec(), (Row("r", "train", image="link.png"),))
    with pytest.raises(DataError, match="symbolic link"):
        cohort.path(0)
    with pytest.raises(DataError, match="row 'r' has no mask"):
        cohort.path(0, "mask")
    with pytest.raises(DataError, match="not a split"):
        cohort.indices("training")


def test_the_real_cohorts_read(shared_data: Path) -> None:
    folders = [path.parent for path in sorted(shared_data.glob("*/cohort.toml"))]
    assert len(folders) == 22
    assert sum(len(Cohort.read(folder).rows) for folder in folders) == 13395  # the sum of the README there
