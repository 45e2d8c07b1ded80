"""Answers are compared by meaning of words, never by pieces of them; each trap that published scripts fell into has a test."""

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnifm.errors import DataError
from omnifm.federation.evaluation import Scored, weighted_mean
from omnifm.metrics.answers import bleu, normalise, overlap, tokens
from omnifm.metrics.vqa import VqaMetric, decode_texts, encode_texts

ANSWERS = ("yes", "no", "left lung", "hypodense", "right lower lobe of the lung", "normal")
TYPES = ("organ", "plane")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Left\tLung. ", "left lung"),
        ("X-ray", "x ray"),
        ("Two nodules, a cyst", "2 nodules cyst"),
        ("twenty", "20"),
        ("It isn't", "it is not"),
        ("It isnt", "it is not"),
        ("CAN\u2019T", "can not"),
        ("there's", "there is"),
        ("patient's left", "patients left"),
        ("1,200 ml; 3.5 cm.", "1200 ml 3.5 cm"),
        (".5 cm", "0.5 cm"),
        ("Is it .5 cm, -.25 or 5?", "is it 0.5 cm 0.25 or 5"),
        ("fig.5 ... 7", "fig 5 7"),
        ("A", "a"),
        ("the", "the"),
        ("Yes!", "yes"),
        ("\uff39\uff45\uff53", "yes"),
        ("its", "its"),
        ("?", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(alphabet="aeTHn'\u2019ot. -,12", max_size=20))
def test_normalising_twice_changes_nothing_near_the_rules(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


words = st.lists(st.sampled_from(["lung", "left", "no", "of", "mass"]), max_size=6)


@given(words, words)
def test_overlap_is_that_of_multisets(said: list[str], truth: list[str]) -> None:
    f1, recall, precision = overlap(said, truth)
    matches = sum(min(said.count(w), truth.count(w)) for w in set(said))
    if said and truth:
        assert recall == matches / len(truth) and precision == matches / len(said)
        assert f1 == pytest.approx(2 * matches / (len(said) + len(truth)))
    else:
        assert (f1, recall, precision) == ((1.0,) * 3 if said == truth else (0.0,) * 3)


def slow_bleu(said: list[str], truth: list[str], order: int) -> float:
    """By the definition, in exact fractions."""
    product = Fraction(1)
    for n in range(1, order + 1):
        grams, right = ([tuple(x[i : i + n]) for i in range(len(x) - n + 1)] for x in (said, truth))
        matches = sum(min(count, right.count(gram)) for gram, count in Counter(grams).items())
        product *= Fraction(matches, len(grams)) if n == 1 else Fraction(matches + 1, len(grams) + 1)
    return min(1.0, math.exp(1 - len(truth) / len(said))) * float(product) ** (1 / order)


@given(words.filter(bool), words.filter(bool))
def test_bleu_is_the_slow_one(said: list[str], truth: list[str]) -> None:
    assert bleu(said, truth) == pytest.approx([slow_bleu(said, truth, n) for n in range(1, 5)])


def test_bleu_by_hand() -> None:
    # p1 = 2/3, p2 = (1+1)/(2+1), p3 = (0+1)/(1+1), p4 = 1; no brevity penalty
    found = bleu(["left", "lung", "mass"], ["left", "lung"])
    assert found == pytest.approx([2 / 3, (4 / 9) ** (1 / 2), (4 / 18) ** (1 / 3), (4 / 18) ** (1 / 4)])
    assert bleu(["lung"], ["left", "lung"])[0] == pytest.approx(math.exp(-1))


def test_a_short_right_answer_has_full_bleu_and_a_wrong_one_none() -> None:
    assert bleu(["yes"], ["yes"]) == [1.0] * 4
    assert bleu(["no"], ["yes"]) == [0.0] * 4
    assert bleu([], ["yes"]) == [0.0] * 4


@given(st.lists(st.text(max_size=8), max_size=5))
def test_texts_survive_as_code_points(texts: list[str]) -> None:
    assert decode_texts(encode_texts(texts)) == texts


def side(closed: list[int], types: list[list[int]] | None = None, unseen: list[int] | None = None) -> dict[str, torch.Tensor]:
    count = len(closed)
    return {
        "closed": torch.tensor(closed),
        "disjoint": torch.tensor(unseen or [0] * count),
        "question_type": torch.tensor(types or [[0, 0]] * count),
    }


def fresh(*, forced: bool = False, disjoint: bool = False) -> VqaMetric:
    return VqaMetric(ANSWERS, TYPES, forced=forced, disjoint=disjoint)


def scored(said: list[str], truth: list[str], closed: list[int], **facts: list[list[int]]) -> dict[str, float | None]:
    metric = fresh()
    target = torch.tensor([ANSWERS.index(t) for t in truth])
    metric.update(encode_texts(said).unsqueeze(1), target, torch.arange(len(said)), side(closed, **facts))
    return metric.compute()


def test_no_is_not_part_of_normal() -> None:
    scores = scored(["normal", "there is a nodule, no doubt"], ["no", "no"], [1, 1])
    assert scores["closed_accuracy"] == 0.0


def test_a_closed_question_need_not_be_yes_or_no() -> None:
    scores = scored(["Hypodense.", "yes"], ["hypodense", "hypodense"], [1, 1])
    assert scores["closed_accuracy"] == 0.5


def test_exact_match_is_not_precision() -> None:
    scores = scored(["lung"], ["right lower lobe of the lung"], [0])
    assert scores["open_exact"] == 0.0 and scores["accuracy"] == 0.0
    assert scores["open_recall"] == pytest.approx(1 / 5), "the article is no word"


def test_the_first_letter_proves_nothing() -> None:
    assert scored(["nodule", "n"], ["no", "no"], [1, 1])["closed_accuracy"] == 0.0


def test_wrong_closed_answers_count() -> None:
    scores = scored(["yes", "gibberish", ""], ["yes", "no", "no"], [1, 1, 1])
    assert scores["closed_accuracy"] == pytest.approx(1 / 3)


def test_open_and_closed_are_not_swapped() -> None:
    scores = scored(["yes", "no", "left lung"], ["yes", "no", "hypodense"], [1, 1, 0])
    assert (scores["closed_accuracy"], scores["open_exact"], scores["accuracy"]) == (1.0, 0.0, pytest.approx(2 / 3))
    # What the others are over says the cohort, not the answer: an open `no` is open.
    assert scored(["no"], ["no"], [0])["open_exact"] == 1.0


def test_a_question_of_two_types_counts_in_both() -> None:
    scores = scored(["yes", "no"], ["yes", "yes"], [1, 1], types=[[1, 1], [0, 1]])
    assert (scores["accuracy/organ"], scores["accuracy/plane"]) == (1.0, 0.5)
    assert (scores["f1/organ"], scores["f1/plane"]) == (1.0, 0.5)


def test_without_questions_a_score_is_undefined() -> None:
    assert set(fresh(forced=True, disjoint=True).compute().values()) == {None}
    assert scored(["yes"], ["yes"], [1])["open_f1"] is None
    assert "disjoint_accuracy" not in scored(["yes"], ["yes"], [1])


def test_teacher_forced_answers_have_columns_of_their_own() -> None:
    metric = fresh(forced=True)
    prediction = encode_texts(["no", "yes"]).reshape(1, 2, -1)
    metric.update(prediction, torch.tensor([0]), torch.tensor([0]), side([1]))
    scores = metric.compute()
    assert (scores["accuracy"], scores["forced_accuracy"], scores["forced_closed_accuracy"]) == (0.0, 1.0, 1.0)
    free, told = fresh().compute().keys(), {k.removeprefix("forced_") for k in scores if k.startswith("forced_")}
    assert told <= free and {"open_f1", "bleu4"} <= told


def test_unseen_images_are_scored_apart() -> None:
    metric = fresh(disjoint=True)
    said = encode_texts(["yes", "yes", "no"]).unsqueeze(1)
    metric.update(said, torch.tensor([0, 0, 0]), torch.arange(3), side([1, 1, 1], unseen=[0, 1, 1]))
    assert metric.compute()["disjoint_accuracy"] == 0.5


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 1), st.integers(0, 3)), max_size=8), st.integers(0, 8)
)
def test_merged_states_are_the_union(cases: list[tuple[int, int, int, int]], cut: int) -> None:
    def metric(part: list[tuple[int, int, int, int]]) -> VqaMetric:
        found = fresh(forced=True, disjoint=True)
        if part:
            said = encode_texts([ANSWERS[c[0]] for c in part]).unsqueeze(1).expand(-1, 2, -1)
            facts = side([c[2] for c in part], [[c[3] & 1, c[3] >> 1] for c in part], [c[2] for c in part])
            found.update(said, torch.tensor([c[1] for c in part]), torch.arange(len(part)), facts)
        return found

    states = [metric(part).state() for part in (cases[:cut], cases[cut:])]
    assert all(bool(t.isfinite().all()) for state in states for t in state.values())
    assert fresh(forced=True, disjoint=True).merge(states).compute() == metric(cases).compute()


def test_means_over_clients_weighted_by_what_is_behind_them_are_the_pooled_scores() -> None:
    """Three clients with unlike numbers of closed questions, types and unseen images; one of them has no closed question."""
    told = ["yes", "normal", "no", "left lung", "yes", "no", "no", "hypodense", "normal"]
    truth = ["yes", "no", "no", "hypodense", "no", "no", "no", "left lung", "normal"]
    closed, unseen = [1, 0, 1, 0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1, 0, 0, 1]
    types = [[1, 0], [0, 1], [1, 1], [0, 1], [1, 0], [1, 0], [0, 0], [1, 0], [1, 1]]
    states, rows = [], []
    for part in (slice(0, 2), slice(2, 7), slice(7, 9)):
        metric = fresh(forced=True, disjoint=True)
        said = torch.stack([encode_texts(told), encode_texts(told[::-1])], dim=1)[part]
        target = torch.tensor([ANSWERS.index(t) for t in truth[part]])
        metric.update(said, target, torch.arange(len(target)), side(closed[part], types[part], unseen[part]))
        states.append(metric.state())
        rows.append(Scored(metric.compute(), len(target), metric.shares()))
    pooled = fresh(forced=True, disjoint=True).merge(states).compute()
    assert weighted_mean(rows) == {name: pytest.approx(value) for name, value in pooled.items()}
    assert rows[1].shares["closed_accuracy"] == Fraction(4, 5) and "accuracy" not in rows[1].shares
    assert fresh().shares() == {}


def test_answers_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match="do not fit 1 questions"):
        fresh(forced=True).update(encode_texts(["yes"]).unsqueeze(1), torch.tensor([0]), torch.tensor([0]), side([1]))


def test_words_not_letters_are_compared() -> None:
    assert tokens("no") == ["no"] and overlap(tokens("no"), tokens("normal"))[0] == 0.0
