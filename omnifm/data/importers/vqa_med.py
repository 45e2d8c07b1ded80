"""VQA-Med 2019, 2020 and 2021 (ImageCLEF) as they are published: text files of questions, folders of images.

    image|question|answer                  All_QA_Pairs_train.txt, C1_Modality_train.txt, VQAnswering_2020_Train_QA_pairs.txt
    image|category|question|answer         VQAMed2019_Test_Questions_w_Ref_Answers.txt
    image|question   and   image|answer    two files, for the test sets of 2020 and 2021; of several answers the first counts

Files and images may lie anywhere below the source. The split is told by `train`, `val` or `test` in a file's name, else in that
of the nearest folder that has one. A category is taken from the line, the file's name, or the words of the question.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from omnifm.data.importers import Progress, Provenance
from omnifm.data.importers.vqa import Asked, pictures, write_questions
from omnifm.errors import DataError

log = logging.getLogger(__name__)

CATEGORIES = ("modality", "plane", "organ", "abnormality")
_BY_WORDS = (
    ("plane", r"\bplane\b|\bview\b|projection"),
    ("organ", r"\borgan\b|part of the (body|human body)|anatom"),
    ("abnormality", r"abnormal|wrong|alarming|unusual|pathology|diagnos|normal"),
    ("modality", r"modality|contrast|weighted|weighting|\bimag(e|ing)\b|\bmri?\b|\bct\b|\bscan\b|ultrasound|x-?ray|taken|gi\b"),
)
# In this order: what an angiogram or a nuclear scan was made with is not told by the later words.
_MODALITIES = (
    ("OTHER", r"angio|nuclear|\bpet\b|\bspect\b|scintigra|\bcta\b|\bmra\b|venogram"),
    ("US", r"\bus\b|ultraso|doppler|sonogra|echocardio"),
    ("MRI", r"\bmri?\b|\bt1\b|\bt2\b|flair|\bdwi\b|diffusion|gadolinium|\badc\b"),
    ("CT", r"\bct\b|\bcat\b|comput\w* tomogra"),
    ("XR", r"\bxr\b|x-?ray|plain film|mammogra|barium|\bbe\b|\bugi\b|radiograph|pyelogra|cystogra|fluoro"),
)
_NEGATIVE = re.compile(r"^(no|not sure)\b", re.IGNORECASE)
_SPLIT = re.compile(r"(train|val|test)", re.IGNORECASE)
_PROVENANCE = Provenance(
    title="VQA-Med: questions of ImageCLEF on radiology images",
    licence="unverified",
    redistribution="testing-only",
    source="VQA-Med (github.com/abachaa); images from MedPix",
    citation="A. Ben Abacha et al., VQA-Med: overview of the medical visual question answering task at ImageCLEF, CLEF working "
    "notes, 2019 to 2021",
    notes="closed means that the answer is yes or no. modality is derived from questions and answers by rule: plain film, "
    "mammography and contrast fluoroscopy are XR; angiograms, nuclear medicine and all unclear ones OTHER. image_disjoint is 1 "
    "for test rows whose image no training row shows.",
)
Line = tuple[str, str, str]  # image, question, answer


def import_vqa_med(source: Path, folder: Path, *, progress: Progress | None = None) -> Path:
    """Copy the questions of one year into a new cohort.

    Args:
        source: the folder with all unpacked archives.
        folder: the cohort's folder; it must be new or empty.
        progress: called with images copied and images in all.

    Raises:
        DataError: no such files are there, a line or an image does not fit, or `folder` is not empty.
    """
    images = pictures(source)
    found: dict[tuple[str, str, str], tuple[str, str]] = {}  # split, image, question: answer and category
    halves: dict[str, dict[str, dict[str, str]]] = {}  # split: question or answer: by image
    for path in _files(source):
        for number, cells in _lines(path):
            where = f"{path} line {number}"
            split, only = _split(path.relative_to(source), where), _half(path.name)
            if only:
                told = halves.setdefault(split, {"question": {}, "answer": {}})[only]
                if told.setdefault(cells[0], cells[1]) != cells[1]:
                    raise DataError(f"{where}: a second {only} about image {cells[0]}: which answer belongs to which question?")
                continue
            if len(cells) not in (3, 4):
                raise DataError(
                    f"{where}: {len(cells)} columns; image|question|answer or image|category|question|answer expected"
                )
            category = cells[1].lower() if len(cells) == 4 else _category_of(path.name)
            key = (split, cells[0], cells[-2])
            # The same question stands in a file of all categories and in that of its own.
            found[key] = (cells[-1], category or found.get(key, ("", ""))[1])
    for split, half in halves.items():
        if lonely := sorted(half["question"].keys() ^ half["answer"].keys()):
            log.warning("%s: %d test images have no question or no answer and are left out", source, len(lonely))
        found |= {(split, i, q): (half["answer"][i], "") for i, q in half["question"].items() if i in half["answer"]}
    if not found:
        raise DataError(f"{source}: holds no text file of lines image|question|answer")
    return write_questions(source, folder, "vqa_med", _PROVENANCE, _asked(found, images, source), progress)


def _asked(
    found: Mapping[tuple[str, str, str], tuple[str, str]], images: Mapping[str, PurePosixPath], source: Path
) -> list[Asked]:
    told: dict[str, list[str]] = {}
    for (_, image, question), (answer, _) in found.items():
        # "Is this a CT?" "No" tells nothing.
        told.setdefault(image, []).extend([] if _NEGATIVE.match(answer) else [question, answer])
    count: dict[tuple[str, str], int] = {}
    asked = []
    for (split, image, question), (answer, category) in found.items():
        stem = PurePosixPath(image).stem if image.lower().endswith((".jpg", ".png")) else image
        if stem not in images:
            raise DataError(f"{source}: image {image} ({split}) is not below the source folder")
        kind = category or _by_words(question, _BY_WORDS)
        number = count[stem, kind] = count.get((stem, kind), 0) + 1
        asked.append(
            Asked(
                id="-".join(filter(None, (stem, kind, str(number) if number > 1 else ""))),
                split=split,
                image=images[stem],
                image_id=stem,
                modality=_by_words(" | ".join(told[image]), _MODALITIES) or "OTHER",
                question=question,
                answer=answer,
                answer_type="closed" if answer.lower().strip(" .") in ("yes", "no") else "open",
                question_type=kind,
            )
        )
    return asked


def _files(source: Path) -> Iterable[Path]:
    """Return the text files whose first line has columns; read-me files have none."""
    for path in sorted(source.rglob("*.txt")):
        first = next(iter(_lines(path)), None)
        if first is not None and len(first[1]) > 1:
            yield path


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        content = path.read_text(encoding="latin-1")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    lines = enumerate(content.splitlines(), start=1)
    return [(number, [" ".join(cell.split()) for cell in line.split("|")]) for number, line in lines if line.strip()]


def _split(path: Path, where: str) -> str:
    for name in (path.name, *reversed(path.parts[:-1])):
        if marks := _SPLIT.findall(name):
            return str(marks[-1]).lower()
    raise DataError(f"{where}: neither the file's name nor a folder says train, val or test")


def _half(name: str) -> str:
    """Return `question` or `answer` for a file that holds the one alone, else nothing."""
    low = name.lower()
    asks, answers, pairs = "question" in low, "answer" in low.replace("answering", ""), "qa" in re.split(r"[_\W]", low)
    return "" if pairs or asks == answers else "question" if asks else "answer"


def _category_of(name: str) -> str:
    return next((category for category in CATEGORIES if category in name.lower()), "")


def _by_words(words: str, rules: Iterable[tuple[str, str]]) -> str:
    return next((name for name, pattern in rules if re.search(pattern, words.lower())), "")
