"""SLAKE and VQA-RAD as they are published, and what importers of questions have in common.

    SLAKE     SRC/{train,validate,test}.json, SRC/imgs/xmlab*/source.jpg
    VQA-RAD   SRC/VQA_RAD Dataset Public.json (any one .json), images anywhere below SRC

Several questions are asked about one image, so `patient` names the image, unless the published split itself has an image on both
sides, as VQA-RAD's has: then `patient` is empty and `image_id` tells. `image_disjoint` is 1 for test rows whose image no training
row shows.
"""

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from omnifm.data.importers import Progress, Provenance, finish, make_spec, new_folder
from omnifm.data.importers.folder import SUFFIXES
from omnifm.data.manifest import Row
from omnifm.errors import DataError

log = logging.getLogger(__name__)

VAL_SHARE = 0.12
"""Share of VQA-RAD's training images that become its val split, which the source does not have."""

_SLAKE_FILES = {"train.json": "train", "validate.json": "val", "test.json": "test"}
_SLAKE_MODALITIES = {"mri": "MRI", "ct": "CT", "x-ray": "XR"}
_RAD_ORGANS = {"CHEST": "XR", "ABD": "CT"}
_RAD_TYPES = {"ATRIB": "ATTRIB", "PRSE": "PRES", "OTHE": "OTHER", "MODALTIY": "MODALITY"}
_SLAKE = Provenance(
    title="SLAKE: knowledge-enhanced questions on radiology images",
    licence="CC-BY-4.0",
    redistribution="allowed",
    source="SLAKE 1.0",
    citation="B. Liu et al., SLAKE: a semantically-labeled knowledge-enhanced dataset for medical visual question answering, "
    "ISBI 2021",
)
_RAD = Provenance(
    title="VQA-RAD: questions on radiology images",
    licence="CC0-1.0",
    redistribution="allowed",
    source="VQA-RAD (OSF); images from MedPix",
    citation="J. J. Lau et al., A dataset of clinically generated visual questions and answers about radiology images, "
    "Scientific Data 5 (2018) 180251",
    notes="The official test rows share images with training; val is cut from the training rows by image. Modality: chest images "
    "are X-ray and abdominal images CT; head images are MRI or CT where a question or answer says so, else OTHER.",
)


@dataclass(frozen=True)
class Asked:
    """One published question.

    Attributes:
        id: unique in its set.
        split: `train`, `val` or `test`.
        image: file below the source folder.
        modality: as in the cohort format.
    """

    id: str
    split: str
    image: PurePosixPath
    image_id: str
    modality: str
    question: str
    answer: str
    answer_type: str
    question_type: str = ""
    organ: str = ""


def import_slake(source: Path, folder: Path, *, language: str = "en", progress: Progress | None = None) -> Path:
    """Copy SLAKE into a new cohort.

    Args:
        source: the unpacked folder.
        folder: the cohort's folder; it must be new or empty.
        language: `en` or `zh`; questions in the other one are left out.
        progress: called with images copied and images in all.

    Raises:
        DataError: a file is missing or of another layout, or `folder` is not empty.
    """
    asked = []
    for name, split in _SLAKE_FILES.items():
        for place, entry in enumerate(read_json(source / name)):
            where = f"{source / name} entry {place}"
            if entry.get("q_lang", "en") == language:
                asked.append(_slake(entry, split, where))
    if not asked:
        raise DataError(f"{source}: SLAKE has no questions in language {language!r}")
    return write_questions(source, folder, "slake", _SLAKE, asked, progress)


def _slake(entry: Mapping[str, Any], split: str, where: str) -> Asked:
    image = PurePosixPath("imgs") / text(entry, "img_name", where)
    modality = text(entry, "modality", where)
    return Asked(
        id=f"q{text(entry, 'qid', where)}",
        split=split,
        image=image,
        image_id=image.parent.name,
        modality=_SLAKE_MODALITIES.get(modality.lower(), "OTHER"),
        question=text(entry, "question", where),
        answer=text(entry, "answer", where),
        answer_type=kind(text(entry, "answer_type", where), where),
        question_type=text(entry, "content_type", where),
        organ=text(entry, "location", where),
    )


def import_vqa_rad(source: Path, folder: Path, *, paraphrases: bool = False, progress: Progress | None = None) -> Path:
    """Copy VQA-RAD into a new cohort.

    Args:
        source: the folder that holds the JSON file and, anywhere below, the images.
        folder: the cohort's folder; it must be new or empty.
        paraphrases: train on rephrased questions too (3064 instead of 1797 training rows in the official split).
        progress: called with images copied and images in all.

    Raises:
        DataError: a file is missing or of another layout, or `folder` is not empty.
    """
    files = sorted(source.glob("*.json"))
    if len(files) != 1:
        raise DataError(f"{source}: expected one .json file with VQA-RAD's questions, found {len(files)}")
    images = pictures(source)
    entries = [(entry, f"{files[0]} entry {place}") for place, entry in enumerate(read_json(files[0]))]
    hints = Counter[tuple[str, str]]()
    for entry, where in entries:
        said = f"{text(entry, 'question', where)} {text(entry, 'answer', where)}".lower()
        words = set(said.replace("-", " ").replace("?", " ").split())
        name = text(entry, "image_name", where)
        hints[name, "MRI"] += bool(words & {"mri", "mr", "t1", "t2", "flair", "dwi", "t1w", "t2w"})
        hints[name, "CT"] += "ct" in words
    asked = []
    for entry, where in entries:
        phrase = text(entry, "phrase_type", where)
        if phrase.startswith("test") or paraphrases or phrase == "freeform":
            asked.append(_rad(entry, where, images, hints))
    return write_questions(source, folder, "vqa_rad", _RAD, _with_val(asked), progress)


def _rad(
    entry: Mapping[str, Any], where: str, images: Mapping[str, PurePosixPath], hints: Mapping[tuple[str, str], int]
) -> Asked:
    name, organ = text(entry, "image_name", where), text(entry, "image_organ", where).upper()
    if PurePosixPath(name).stem not in images:
        raise DataError(f"{where}: image {name} is not below the source folder")
    mri, ct = hints[name, "MRI"], hints[name, "CT"]
    seen = "OTHER" if mri == ct else "MRI" if mri > ct else "CT"
    types = [part.strip().upper() for part in text(entry, "question_type", where).split(",")]
    return Asked(
        id=f"q{text(entry, 'qid', where)}",
        split="test" if text(entry, "phrase_type", where).startswith("test") else "train",
        image=images[PurePosixPath(name).stem],
        image_id=PurePosixPath(name).stem,
        modality=_RAD_ORGANS.get(organ, seen),
        question=text(entry, "question", where),
        answer=text(entry, "answer", where),
        answer_type=kind(text(entry, "answer_type", where), where),
        question_type=", ".join(_RAD_TYPES.get(part, part) for part in types),
        organ=organ,
    )


def _with_val(asked: Sequence[Asked]) -> list[Asked]:
    """Move the training rows of some images to val, chosen in the order of the SHA-256 of their names."""
    images = sorted({a.image_id for a in asked if a.split == "train"}, key=lambda i: hashlib.sha256(i.encode()).digest())
    held_out = set(images[: round(VAL_SHARE * len(images))])
    return [replace(a, split="val") if a.split == "train" and a.image_id in held_out else a for a in asked]


def read_json(path: Path) -> list[Mapping[str, Any]]:
    """Return the entries of a JSON file. Raises DataError if it is missing or no list of objects."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: is no JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise DataError(f"{path}: is no list of questions")
    return found


def text(entry: Mapping[str, Any], key: str, where: str) -> str:
    """Return a value as one line of text. Raises DataError if the entry lacks it."""
    if key not in entry:
        raise DataError(f"{where}: has no '{key}'")
    return " ".join(str(entry[key]).split())


def kind(word: str, where: str) -> str:
    """Return `closed` or `open`."""
    if word.lower() not in ("closed", "open"):
        raise DataError(f"{where}: answer_type '{word}' is neither CLOSED nor OPEN")
    return word.lower()


def pictures(source: Path) -> dict[str, PurePosixPath]:
    """Return the pictures below a folder by the names of their files without suffix.

    Raises:
        DataError: it is no folder, or two different pictures have one name.
    """
    found: dict[str, PurePosixPath] = {}
    for path in _picture_files(source):
        known = found.setdefault(path.stem, path)
        if known != path and (source / known).read_bytes() != (source / path).read_bytes():
            raise DataError(f"{source}: {known} and {path} are two pictures of one name: which one do the questions mean?")
    return found


def _picture_files(source: Path) -> Iterator[PurePosixPath]:
    if not source.is_dir():
        raise DataError(f"{source}: is not a folder")
    for file in sorted(source.rglob("*")):
        path = PurePosixPath(file.relative_to(source).as_posix())
        if file.is_file() and path.name.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in path.parts):
            yield path


def write_questions(
    source: Path, folder: Path, name: str, provenance: Provenance, asked: Sequence[Asked], progress: Progress | None
) -> Path:
    """Copy each image once, write the cohort and check it. Questions without question or answer are left out, with a warning."""
    whole = [a for a in asked if a.question and a.answer]
    if len(whole) < len(asked):
        log.warning("%s: %d questions lack a question or an answer and are left out", source, len(asked) - len(whole))
    if not whole:
        raise DataError(f"{source}: holds no question with an answer")
    missing = next((a for a in whole if not (source / a.image).is_file()), None)
    if missing is not None:
        raise DataError(f"{source}: question {missing.id}: image {missing.image} is missing")
    new_folder(folder)
    places = {a.image_id: (a.image, f"images/{a.image_id}{a.image.suffix.lower()}") for a in whole}
    (folder / "images").mkdir()
    for done, (origin, place) in enumerate(places.values(), start=1):
        shutil.copyfile(source / origin, folder / place)
        if progress is not None:
            progress(done, len(places))
    splits: dict[str, set[str]] = {}
    for a in whole:
        splits.setdefault(a.image_id, set()).add(a.split)
    cut = any(len(found) > 1 for found in splits.values())
    rows = [_row(a, places[a.image_id][1], splits[a.image_id], cut) for a in whole]
    return finish(folder, make_spec({"name": name, "task": "vqa"}, provenance), rows)


def _row(asked: Asked, place: str, splits: set[str], cut: bool) -> Row:
    unseen = asked.split == "test" and "train" not in splits
    return Row(
        id=asked.id,
        split=asked.split,
        patient="" if cut else asked.image_id,
        modality=asked.modality,
        image=place,
        question=asked.question,
        answer=asked.answer,
        answer_type=asked.answer_type,
        question_type=asked.question_type,
        organ=asked.organ,
        extra={"image_id": asked.image_id, "image_disjoint": str(int(unseen))},
    )
