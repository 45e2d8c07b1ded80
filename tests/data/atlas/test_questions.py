"""Answers against the truth they are asked about."""

import re
from collections import Counter

import pytest

from omnifm.data.atlas.lesion import KINDS, Lesion, draw_lesion
from omnifm.data.atlas.questions import Question, ask
from omnifm.data.atlas.scanner import SCANNERS, Scanner
from omnifm.seeds import numpy_generator


def truth(question: Question, scanner: Scanner, lesion: Lesion | None) -> str:
    """Work the answer out again from the words of the question."""
    text = question.text.lower()
    if question.question_type == "presence":
        return "yes" if lesion else "no"
    facts = {
        "modality": scanner.modality.lower(),
        "sequence": scanner.sequence.lower(),
        "kind": lesion.kind if lesion else "",
        "side": lesion.side if lesion else "",
        "region": lesion.region if lesion else "",
    }
    fact = facts[question.question_type]
    if question.answer_type == "open":
        return fact
    named = re.findall(r"\b(mri|ct|pet|tumour|infarct|haemorrhage|left|right)\b", text)
    assert len(named) == 1, text
    return "yes" if named[0] == fact else "no"


@pytest.mark.parametrize("scanner", SCANNERS[::2], ids=lambda s: s.contrast)
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_answers_are_true(scanner: Scanner, kind: str | None) -> None:
    for seed in range(25):
        lesion = draw_lesion(kind, numpy_generator(seed, "lesion")) if kind else None
        questions = ask(scanner, lesion, numpy_generator(seed, "questions"))
        assert len(questions) == 4 + 3 * (lesion is not None) + (scanner.modality == "MRI")
        for question in questions:
            assert question.answer == truth(question, scanner, lesion), question
            assert (question.answer in ("yes", "no")) == (question.answer_type == "closed")
            assert not re.search(r"\ba (infarct|mri)\b|[{}]", question.text.lower())


def test_closed_questions_are_not_answered_by_their_type_alone() -> None:
    counts: dict[str, Counter[str]] = {}
    for seed in range(200):
        lesion = draw_lesion(KINDS[seed % 3], numpy_generator(seed, "lesion"))
        for question in ask(SCANNERS[seed % len(SCANNERS)], lesion, numpy_generator(seed, "questions")):
            if question.answer_type == "closed" and question.question_type != "presence":
                counts.setdefault(question.question_type, Counter())[question.answer] += 1
    assert set(counts) == {"modality", "kind", "side"}
    for answers in counts.values():
        assert 0.35 < answers["yes"] / answers.total() < 0.65
