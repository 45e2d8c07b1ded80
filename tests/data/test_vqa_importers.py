"""SLAKE, VQA-RAD and VQA-Med in their published layouts become cohorts."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from omnifm.data.cohort import Cohort, Row
from omnifm.data.importers.vqa import import_slake, import_vqa_rad
from omnifm.data.importers.vqa_med import import_vqa_med
from omnifm.data.validate import validate
from omnifm.errors import DataError
from tests.data.builders import noise, save_png


def picture(path: Path, stream: int = 0) -> None:
    save_png(path, noise(6, 6, stream=stream))


def by_id(folder: Path) -> dict[str, Row]:
    assert validate(folder) == []
    return {row.id: row for row in Cohort.read(folder).rows}


# ------------------------------------------------------------------------------------------------------ SLAKE
def slake_entry(image: int, qid: int, **changes: Any) -> dict[str, Any]:
    entry = {
        "img_id": image,
        "img_name": f"xmlab{image}/source.jpg",
        "question": "What modality is used to take this image?",
        "answer": "MRI",
        "q_lang": "en",
        "location": "Abdomen",
        "modality": "MRI",
        "answer_type": "OPEN",
        "base_type": "vqa",
        "content_type": "Modality",
        "triple": ["vhead", "_", "_"],
        "qid": qid,
    }
    return entry | changes


def slake(root: Path, **files: list[dict[str, Any]]) -> Path:
    entries = {
        "train": [
            slake_entry(1, 0),
            slake_entry(1, 1, q_lang="zh", question="?", answer="?"),
            slake_entry(2, 2, modality="X-Ray", answer="No", answer_type="CLOSED", content_type="Abnormality"),
        ],
        "validate": [slake_entry(3, 3, modality="CT")],
        "test": [slake_entry(4, 4, location="Lung")],
    } | files
    for name, found in entries.items():
        root.mkdir(exist_ok=True)
        (root / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    for image in (1, 2, 3, 4):
        picture(root / f"imgs/xmlab{image}/source.jpg", image)
    return root


def test_slake_arrives_with_its_splits_types_and_modalities(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = slake(tmp_path / "s")
    out = import_slake(source, tmp_path / "o", progress=lambda a, b: seen.append((a, b)))
    rows = by_id(out)
    assert seen[-1] == (4, 4) and {i: r.split for i, r in rows.items()} == {
        "q0": "train",
        "q2": "train",
        "q3": "val",
        "q4": "test",
    }
    row = rows["q2"]
    assert (row.modality, row.answer, row.answer_type, row.question_type) == ("XR", "No", "closed", "Abnormality")
    assert (row.patient, row.image, row.organ) == ("xmlab2", "images/xmlab2.jpg", "Abdomen")
    assert (out / row.image).read_bytes() == (source / "imgs/xmlab2/source.jpg").read_bytes()
    assert rows["q4"].extra["image_disjoint"] == "1" and rows["q0"].extra["image_disjoint"] == "0"


def test_slake_has_questions_in_chinese(tmp_path: Path) -> None:
    assert list(by_id(import_slake(slake(tmp_path / "s"), tmp_path / "o", language="zh"))) == ["q1"]
    with pytest.raises(DataError, match="no questions in language 'de'"):
        import_slake(tmp_path / "s", tmp_path / "p", language="de")


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (slake_entry(9, 5), "image imgs/xmlab9/source.jpg is missing"),
        (slake_entry(1, 5, answer_type="MAYBE"), "entry 0: answer_type 'MAYBE'"),
        ({"qid": 5}, "entry 0: has no '"),
        (slake_entry(1, 0), "duplicate id 'q0'"),
    ],
)
def test_slake_of_another_layout(tmp_path: Path, entry: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        import_slake(slake(tmp_path / "s", validate=[entry]), tmp_path / "o")


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    source = slake(tmp_path / "s")
    (source / "test.json").write_text("{}")
    with pytest.raises(DataError, match=r"test.json: is no list"):
        import_slake(source, tmp_path / "o")
    (source / "test.json").write_text("[")
    with pytest.raises(DataError, match=r"test.json: is no JSON"):
        import_slake(source, tmp_path / "o")
    (source / "test.json").unlink()
    with pytest.raises(DataError, match=r"test.json: cannot be read"):
        import_slake(source, tmp_path / "o")


# ---------------------------------------------------------------------------------------------------- VQA-RAD
def rad_entry(image: int, qid: int, phrase: str = "freeform", **changes: Any) -> dict[str, Any]:
    entry = {
        "qid": qid,
        "phrase_type": phrase,
        "qid_linked_id": "x",
        "image_name": f"synpic{image}.jpg",
        "image_organ": "HEAD",
        "question": "Is this a brain?",
        "answer": "Yes",
        "question_type": "PRES",
        "answer_type": "CLOSED ",
    }
    return entry | changes


def rad(root: Path, entries: list[dict[str, Any]]) -> Path:
    for image in {e["image_name"] for e in entries}:
        picture(root / "VQA_RAD Image Folder" / image, int(image[6:-4]))
    (root / "VQA_RAD Dataset Public.json").write_text(json.dumps(entries), encoding="utf-8")
    return root


def test_vqa_rad_arrives_with_its_test_rows_and_a_val_split_by_image(tmp_path: Path) -> None:
    entries = [rad_entry(i, i) for i in range(20)] + [rad_entry(i, 100 + i) for i in range(20)]
    entries += [rad_entry(3, 200, "test_freeform"), rad_entry(77, 201, "test_para"), rad_entry(4, 202, "para")]
    rows = by_id(import_vqa_rad(rad(tmp_path / "s", entries), tmp_path / "o"))
    assert "q202" not in rows, "paraphrases are left out unless asked for"
    assert {rows["q200"].split, rows["q201"].split} == {"test"} and rows["q201"].extra["image_disjoint"] == "1"
    held_out = {r.extra["image_id"] for r in rows.values() if r.split == "val"}
    assert len(held_out) == 2 and not held_out & {r.extra["image_id"] for r in rows.values() if r.split == "train"}
    assert rows["q200"].patient == "", "one image is on both sides"
    assert "q202" in by_id(import_vqa_rad(tmp_path / "s", tmp_path / "p", paraphrases=True))


def test_vqa_rad_modality_is_told_by_organ_or_words(tmp_path: Path) -> None:
    entries = [
        rad_entry(1, 1, image_organ="CHEST"),
        rad_entry(2, 2, image_organ="ABD"),
        rad_entry(3, 3, question="Is this a T2 weighted MRI?"),
        rad_entry(4, 4, question="What is this?", answer="CT scan", answer_type="OPEN", question_type="ATRIB, PRSE"),
        rad_entry(5, 5),
        rad_entry(6, 6, answer=3),
    ]
    rows = by_id(import_vqa_rad(rad(tmp_path / "s", entries), tmp_path / "o"))
    assert [rows[f"q{i}"].modality for i in range(1, 6)] == ["XR", "CT", "MRI", "CT", "OTHER"]
    assert (rows["q4"].question_type, rows["q4"].answer_type, rows["q6"].answer) == ("ATTRIB, PRES", "open", "3")


def test_vqa_rad_of_another_layout(tmp_path: Path) -> None:
    source = rad(tmp_path / "s", [rad_entry(1, 1)])
    (source / "VQA_RAD Image Folder/synpic1.jpg").unlink()
    with pytest.raises(DataError, match=r"entry 0: image synpic1.jpg is not below"):
        import_vqa_rad(source, tmp_path / "o")
    (source / "second.json").write_text("[]")
    with pytest.raises(DataError, match=r"one .json file .* found 2"):
        import_vqa_rad(source, tmp_path / "o")


def test_two_pictures_of_one_name_are_refused_unless_they_are_the_same(tmp_path: Path) -> None:
    source = rad(tmp_path / "s", [rad_entry(1, 1)])
    again = source / "again/synpic1.jpg"
    again.parent.mkdir()
    again.write_bytes((source / "VQA_RAD Image Folder/synpic1.jpg").read_bytes())
    assert len(by_id(import_vqa_rad(source, tmp_path / "o"))) == 1
    picture(again, 99)
    with pytest.raises(DataError, match=r"synpic1\.jpg and .*synpic1\.jpg are two pictures of one name"):
        import_vqa_rad(source, tmp_path / "p")


# ---------------------------------------------------------------------------------------------------- VQA-Med
TRAIN = "ImageClef-2019-VQA-Med-Training"
VAL = "ImageClef-2019-VQA-Med-Validation"
TEST = "VQAMed2019Test"


def med(root: Path, files: dict[str, str], images: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    for k, (name, folder) in enumerate(images.items()):
        picture(root / folder / f"{name}.jpg", k)
    return root


def test_vqa_med_2019(tmp_path: Path) -> None:
    files = {
        f"{TRAIN}/All_QA_Pairs_train.txt": "synpic1|what modality is shown?|xr - plain film\nsynpic1|what is the plane?|pa\n",
        f"{TRAIN}/QAPairsByCategory/C1_Modality_train.txt": "synpic1|what modality is shown?|xr - plain film\n",
        f"{TRAIN}/readme.txt": "Thank you\n",
        f"{VAL}/All_QA_Pairs_val.txt": "synpic2|is this a ct scan?|no\nsynpic2|is this an mri?|Yes\n",
        f"{TEST}/VQAMed2019_Test_Questions_w_Ref_Answers.txt": "synpic3|organ|what organ is this?|breast\n"
        "synpic3|modality|what was used?|mammograph\n",
    }
    images = {"synpic1": f"{TRAIN}/Train_images", "synpic2": f"{VAL}/Val_images", "synpic3": f"{TEST}/images"}
    rows = by_id(import_vqa_med(med(tmp_path / "s", files, images), tmp_path / "o"))
    assert {i: r.split for i, r in rows.items()} == {
        "synpic1-modality": "train",
        "synpic1-plane": "train",
        "synpic2-modality": "val",
        "synpic2-modality-2": "val",
        "synpic3-organ": "test",
        "synpic3-modality": "test",
    }
    assert [rows[f"synpic{i}-modality"].modality for i in (1, 2, 3)] == ["XR", "MRI", "XR"], "no CT, said the answer"
    assert rows["synpic2-modality-2"].answer_type == "closed" and rows["synpic1-plane"].answer_type == "open"
    assert rows["synpic3-organ"].patient == "synpic3" and rows["synpic3-organ"].extra["image_disjoint"] == "1"


def test_vqa_med_2021_has_questions_and_answers_in_two_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "VQA-Med-2020-TrainVal/VQAMed2020-VQAnswering-TrainingSet/VQAnswering_2020_Train_QA_pairs.txt": (
            "synpic1|what is abnormal in the ct scan?|pulmonary embolism\n"
        ),
        "VQA-Med-2021-VQAnswering-Task1-New-ValidationSet.txt": "synpic2|is the mri normal?|no\n",
        "TestSet/Task1-VQA-2021-TestSet-Questions.txt": "synpic3|what is wrong?\nsynpic4|what is wrong?\n",
        "TestSet/Task1-VQA-2021-TestSet-ReferenceAnswers.txt": "synpic3|lipoma|fatty tumour\n",
    }
    images = {"synpic1": "a", "synpic2": "b", "synpic3": "c"}
    with caplog.at_level(logging.WARNING):
        rows = by_id(import_vqa_med(med(tmp_path / "s", files, images), tmp_path / "o"))
    assert {r.split: (r.answer, r.question_type) for r in rows.values()} == {
        "train": ("pulmonary embolism", "abnormality"),
        "val": ("no", "abnormality"),
        "test": ("lipoma", "abnormality"),
    }
    assert "1 test images have no question or no answer" in caplog.text


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"train.txt": "synpic1|what?|that\nsynpic9|what?|that\n"}, "image synpic9"),
        ({"pairs.txt": "synpic1|what?|that\n"}, "line 1: neither the file's name nor a folder says"),
        ({"train.txt": "synpic1|a|b|c|d\n"}, "line 1: 5 columns"),
        ({"train.txt": "no columns\n"}, "holds no text file of lines"),
    ],
)
def test_vqa_med_of_another_layout(tmp_path: Path, files: dict[str, str], text: str) -> None:
    with pytest.raises(DataError, match=text):
        import_vqa_med(med(tmp_path / "s", files, {"synpic1": "images"}), tmp_path / "o")


def test_questions_without_answer_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = med(tmp_path / "s", {"train.txt": "synpic1|what?|that\nsynpic1|why?|\n"}, {"synpic1": "images"})
    with caplog.at_level(logging.WARNING):
        assert len(by_id(import_vqa_med(source, tmp_path / "o"))) == 1
    assert "1 questions lack a question or an answer" in caplog.text
