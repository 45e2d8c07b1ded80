"""Questions whose answers are known, because the patient was made up: modality, sequence, lesion, kind, side and place."""

from dataclasses import dataclass

import numpy as np

from omnifm.data.atlas.lesion import KINDS, Lesion
from omnifm.data.atlas.scanner import Scanner

_MODALITIES = ("MRI", "CT", "PET")
_WORDINGS = {
    "modality": ("Which imaging modality is this?", "What modality was used to take this image?"),
    "sequence": ("Which MR sequence is shown?", "What is the MR weighting of this image?"),
    "is_modality": ("Is this a {} image?", "Was this image taken with {}?"),
    "presence": ("Is there a lesion?", "Does this image show a focal abnormality?"),
    "kind": ("What abnormality is shown?", "What kind of lesion is visible?"),
    "is_kind": ("Is there a {}?", "Does this image show a {}?"),
    "side": ("On which side of the patient is the lesion?", "Which hemisphere is affected?"),
    "is_side": ("Is the lesion in the {} hemisphere?", "Is the {} side of the brain affected?"),
    "region": ("In which part of the brain is the lesion?", "Where in the brain is the lesion?"),
}


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        text: the question.
        answer: lower-case words; `yes` or `no` for a closed question.
        answer_type: `closed` or `open`.
        question_type: what it asks for: `modality`, `sequence`, `presence`, `kind`, `side` or `region`.
    """

    text: str
    answer: str
    answer_type: str
    question_type: str


def ask(scanner: Scanner, lesion: Lesion | None, rng: np.random.Generator) -> list[Question]:
    """Return the questions about an image: 4 for a normal CT or PET image, 7 with a lesion, one more for MR.

    Closed questions that name something name the truth half of the time. `left` and `right` are the patient's.

    Args:
        scanner: what took the image.
        lesion: what the image shows; None for a normal patient.
        rng: draws wordings and what closed questions name.
    """
    kind = lesion.kind if lesion else "normal"
    questions = [
        _open("modality", scanner.modality.lower(), rng),
        _closed("is_modality", scanner.modality, _MODALITIES, rng),
        _yes_no("presence", "", lesion is not None, rng),
        _open("kind", kind, rng) if lesion else _closed("is_kind", kind, KINDS, rng),
    ]
    if scanner.sequence:
        questions.append(_open("sequence", scanner.sequence.lower(), rng))
    if lesion:
        questions.append(_closed("is_kind", kind, KINDS, rng))
        questions.append(_open("region", lesion.region, rng))
        by_side = rng.uniform() < 0.5
        questions.append(_open("side", lesion.side, rng) if by_side else _closed("is_side", lesion.side, ("left", "right"), rng))
    return questions


def _open(name: str, answer: str, rng: np.random.Generator) -> Question:
    return Question(str(rng.choice(_WORDINGS[name])), answer, "open", name)


def _closed(name: str, truth: str, choices: tuple[str, ...], rng: np.random.Generator) -> Question:
    """Ask whether `truth` is one of `choices`: the right one half of the time, if it is there at all, else a wrong one."""
    wrong = [choice for choice in choices if choice != truth]
    named = truth if truth in choices and rng.uniform() < 0.5 else str(rng.choice(wrong))
    return _yes_no(name, named, named == truth, rng)


def _yes_no(name: str, named: str, truth: bool, rng: np.random.Generator) -> Question:
    text = str(rng.choice(_WORDINGS[name])).format(named).replace(" a infarct", " an infarct").replace(" a MRI", " an MRI")
    return Question(text, "yes" if truth else "no", "closed", name.removeprefix("is_"))
