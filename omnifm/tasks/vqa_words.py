"""Questions and answers across machines: what a hospital says of its own, and the table of answers that all say together.

An answer is told as it is spelt if so many training rows spell it so, or if it is in the hospital's list. Training rows whose
answer is not told have no class that others could know, and are left out of training: the counts that a hospital gives are then
those without them. Answers of rows to validate and test on are never told; they are numbered behind the told ones, at home.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from omnifm.data.cohort import Cohort
from omnifm.data.partition import ClientPlan
from omnifm.data.words import Discretion, Words, is_plain
from omnifm.errors import DataError
from omnifm.metrics.answers import normalise
from omnifm.tasks.vqa_text import AnswerTable, count_pieces, joined, ranked, spelt, types_of

log = logging.getLogger(__name__)


def words_of(cohort: Cohort, plan: ClientPlan, discretion: Discretion) -> tuple[ClientPlan, Words]:
    """Return a client's plan without training rows whose answer is not told, and what is told.

    Raises:
        DataError: nothing may be told.
    """
    rows = cohort.rows
    free = {normalise(text) for text in discretion.free}
    counts = Counter(spelt(rows[i]) for i in plan.train)
    frequent = {text: n for text, n in sorted(counts.items()) if n >= discretion.least or normalise(text) in free}
    told = {text: n for text, n in frequent.items() if is_plain(text)}
    if not told:
        raise DataError(
            f"client {plan.id}: no answer is in {discretion.least} training rows, so none is told (--answers-least, --answers)"
        )
    known = {normalise(text) for text in told}
    train = tuple(i for i in plan.train if normalise(rows[i].answer) in known)
    if gone := len(plan.train) - len(train):
        log.warning("client %s: %d of %d training rows are left out, their answers are too rare", plan.id, gone, len(plan.train))
    own = [rows[i] for part in (plan.train, plan.val, plan.test) for i in part]
    types = Counter(name for row in own for name in set(types_of(row)))
    words = Words(
        answers=told,
        types=tuple(sorted(name for name, n in types.items() if n >= discretion.least and is_plain(name))),
        pieces=count_pieces({row.question for row in own}),
        disjoint=any(row.value("image_disjoint") for row in own),
    )
    return replace(plan, train=train), words


def told_table(words: Sequence[Words], cohorts: Mapping[str, Cohort]) -> AnswerTable:
    """Return the answers that hospitals told, in the order of `answer_table`, and behind them those of the rows that are here."""
    trained = ranked((text, n) for one in words for text, n in one.answers.items())
    return joined(trained, ranked((spelt(row), 1) for cohort in cohorts.values() for row in cohort.rows))


def told_types(words: Iterable[Words]) -> tuple[str, ...]:
    """Return all question types that hospitals told, by the alphabet."""
    return tuple(sorted({name for one in words for name in one.types}))
