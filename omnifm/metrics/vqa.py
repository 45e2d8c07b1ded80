"""Scores of answers in words, freely generated and, apart from them, under teacher forcing.

    name                what                                                                over
    accuracy            exact match after normalisation                                     all questions
    closed_accuracy     the same                                                            closed questions
    open_exact          the same                                                            open questions
    open_f1             F1 of the bags of words                                             open questions
    open_recall         share of the truth's words that were said                           open questions
    bleu1 .. bleu4      sentence BLEU with Lin and Och's smoothing                          open questions
    accuracy/TYPE       exact match                                                         questions of a type
    f1/TYPE             F1                                                                  questions of a type
    disjoint_accuracy   exact match                                                         questions called image-disjoint
    forced_NAME         the first nine, where each word was predicted after the true words before it

`disjoint_accuracy` knows only cohorts that say of their questions whether the image is unseen in training (VQA-RAD); the test
questions of others are left out of it, also where all of their images are unseen.

`closed` is what the cohort says, whether the answer is yes, no or another choice; nothing is restricted to the choices.
Scores under teacher forcing (the published numbers of FedVLMBench are such) are not comparable with the others: the model is told
all but the last word. A question of several types counts in each. A score without questions is None.

Text travels as code points, so that predictions, like everything else, are tensors.
"""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from omnifm.errors import DataError
from omnifm.metrics.answers import MAX_ORDER, bleu, overlap, tokens
from omnifm.metrics.base import NOTHING, Metric, Scores

_PAD = -1
_LINE = ("exact", "f1", "recall", *(f"bleu{n}" for n in range(1, MAX_ORDER + 1)))
_Mean = tuple[Tensor, Tensor]
"""A value per question, and which questions count, both `(n,)`."""
_OPEN = {"open_exact": "exact", "open_f1": "f1", "open_recall": "recall"} | {n: n for n in _LINE if n.startswith("bleu")}


def encode_texts(texts: Sequence[str]) -> Tensor:
    """Return texts as code points, `(len(texts), longest)` int64, -1 after the end."""
    longest = max(map(len, texts), default=0)
    rows = [[*map(ord, text), *[_PAD] * (longest - len(text))] for text in texts]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), longest)


def decode_texts(codes: Tensor) -> list[str]:
    """Return the texts that `encode_texts` made `codes` `(n, longest)` from."""
    return ["".join(map(chr, row[: row.index(_PAD)] if _PAD in row else row)) for row in codes.tolist()]


def line(predicted: str, truth: str) -> list[float]:
    """Return exact match, F1, recall and BLEU-1 to 4 of one answer."""
    said, right = tokens(predicted), tokens(truth)
    f1, recall, _ = overlap(said, right)
    return [float(said == right), f1, recall, *bleu(said, right)]


class VqaMetric(Metric):
    """Keeps one line of scores per question, and which kind of question it is.

    Args:
        answers: the text behind each target number.
        question_types: the name behind each column of `side["question_type"]`.
        forced: whether predictions come with answers under teacher forcing.
        disjoint: whether some cohort says which images are unseen.
    """

    def __init__(self, answers: Sequence[str], question_types: Sequence[str], *, forced: bool, disjoint: bool) -> None:
        self._answers, self._types = answers, question_types
        self._forced, self._disjoint = forced, disjoint
        self._parts: list[dict[str, Tensor]] = [self._empty()]

    def _empty(self) -> dict[str, Tensor]:
        lines = torch.zeros(0, 1 + self._forced, len(_LINE), dtype=torch.float64)
        flags = torch.zeros(0, dtype=torch.uint8)
        kinds = torch.zeros(0, len(self._types), dtype=torch.uint8)
        return {"line": lines, "closed": flags, "disjoint": flags, "question_type": kinds}

    def update(self, prediction: Tensor, target: Tensor, row: Tensor, side: Mapping[str, Tensor] = NOTHING) -> None:
        """Add a batch.

        Args:
            prediction: code points `(b, k, length)`: the free answer, then (k = 2) the one under teacher forcing.
            target: number `(b,)` of the true answer.
            row: not used: every question is a case of its own.
            side: `closed` `(b,)` and `disjoint` `(b,)`, 1 or 0; `question_type` `(b, types)`, 1 where of the type.

        Raises:
            DataError: the shapes are not those.
        """
        del row
        if prediction.ndim != 3 or prediction.shape[:2] != (len(target), 1 + self._forced):
            raise DataError(f"answers {tuple(prediction.shape)} do not fit {len(target)} questions")
        truths = [self._answers[number] for number in target.tolist()]
        columns = [decode_texts(prediction[:, k]) for k in range(prediction.shape[1])]
        lines = [[line(said, truth) for said in told] for truth, *told in zip(truths, *columns, strict=True)]
        flags = {name: side[name].cpu().to(torch.uint8) for name in ("closed", "disjoint", "question_type")}
        self._parts.append(
            {"line": torch.tensor(lines, dtype=torch.float64).reshape(-1, *self._parts[0]["line"].shape[1:])} | flags
        )

    def state(self) -> dict[str, Tensor]:
        """Return `line` `(n, k, 7)`, `closed` and `disjoint` `(n,)` and `question_type` `(n, types)`."""
        return {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}

    def vet(self, state: Mapping[str, Tensor], rows: int) -> None:
        """Scores of an answer are shares; kinds are yes or no."""
        super().vet(state, rows)
        for name in state:
            self.require_within(state, name, 0, 1 + 1e-6)

    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> "VqaMetric":
        """Return the metric of all questions of `states`."""
        union = VqaMetric(self._answers, self._types, forced=self._forced, disjoint=self._disjoint)
        union._parts += [dict(state) for state in states]
        return union

    def compute(self) -> Scores:
        """Return the scores in the order of the table above."""
        means = self._means()
        return {name: float(values[chosen].mean()) if bool(chosen.any()) else None for name, (values, chosen) in means.items()}

    def shares(self) -> dict[str, Fraction]:
        """Return the share of the questions that are closed, open, of a type, on unseen images, by score."""
        counts = {name: int(chosen.sum()) for name, (_, chosen) in self._means().items()}
        total = counts["accuracy"]
        return {name: Fraction(count, total) for name, count in counts.items() if count < total}

    def _means(self) -> dict[str, _Mean]:
        """Return what each score is the mean of, and over which questions."""
        state = self.state()
        columns = dict(zip(_LINE, state["line"][:, 0].T, strict=True))
        closed = state["closed"].bool()
        means = _main(columns, closed)
        for place, name in enumerate(self._types):
            chosen = state["question_type"][:, place].bool()
            means |= {f"accuracy/{name}": (columns["exact"], chosen), f"f1/{name}": (columns["f1"], chosen)}
        if self._disjoint:
            means["disjoint_accuracy"] = (columns["exact"], state["disjoint"].bool())
        if self._forced:
            forced = _main(dict(zip(_LINE, state["line"][:, 1].T, strict=True)), closed)
            means |= {f"forced_{name}": mean for name, mean in forced.items()}
        return means


def _main(columns: Mapping[str, Tensor], closed: Tensor) -> dict[str, _Mean]:
    means = {"accuracy": (columns["exact"], torch.ones_like(closed)), "closed_accuracy": (columns["exact"], closed)}
    return means | {name: (columns[column], ~closed) for name, column in _OPEN.items()}
