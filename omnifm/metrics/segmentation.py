"""Dice and HD95 of a segmentation, per case and structure.

    Dice = 2 |P n G| / (|P| + |G|),      HD95 = max( q95 of d(dP, G), q95 of d(dG, P) )      P: prediction, G: truth, d: surfaces

A case is a row of the manifest: a picture, or a volume put together from its slices and scored in three dimensions, in
millimetres. Pictures are scored in pixels of the network's grid. Scores are means over a case's structures, then over cases.

Policy for structures that are not there: absent from both, Dice 1 and HD95 0 (counted in `empty_cases`); in one alone, Dice 0
and HD95 the diagonal of the image (counted in `missed`; the BraTS challenge's 373.13 is the diagonal of its images). Nothing
is ever left out of a mean. A volume is scored whole: the mean of its slices' Dice, with 1 for every empty slice, would be
higher by many points.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omnifm.metrics.base import MOST, NOTHING, Metric, Scores

PERCENTILE = 95.0
_NOT_SCORED, _BOTH, _EMPTY, _MISSED = 0, 1, 2, 3
Mask = npt.NDArray[np.bool_]
Structures = Mapping[str, tuple[int, ...]]


class SegmentationMetric(Metric):
    """Keeps one line of scores per case, `(n, structures)`.

    Args:
        structures: by name, the class numbers that form it; structures may overlap.
        scored: names of those that this client's truth tells of; the others are neither right nor wrong.
    """

    counts = frozenset({"missed", "empty_cases"})
    by_row: ClassVar[bool] = True

    def __init__(self, structures: Structures, scored: Iterable[str] | None = None) -> None:
        self._structures = dict(structures)
        self._scored = set(structures if scored is None else scored)
        self._lines: list[tuple[Tensor, Tensor, Tensor]] = []
        self._open: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._closed: set[int] = set()

    def update(self, prediction: Tensor, target: Tensor, row: Tensor, side: Mapping[str, Tensor] = NOTHING) -> None:
        """Add logits `(b, classes, h, w)` and class numbers `(b, h, w)`; slices of a volume come one after the other.

        `side["spacing"]` `(b, 3)` holds millimetres between slices, rows and columns.

        Raises:
            ValueError: a slice belongs to a case that others have followed already.
        """
        labels = prediction.argmax(dim=1).to(torch.uint8)
        for place, number in enumerate(row.tolist()):
            if number in self._closed:
                raise ValueError(f"row {number}: its slices do not come one after the other")
            for earlier in [known for known in self._open if known != number]:
                self._close(earlier)
            part = (labels[place], target[place].to(torch.uint8).cpu(), side["spacing"][place].double().cpu())
            self._open.setdefault(number, []).append(part)

    def _close(self, row: int) -> None:
        guesses, truths, spacings = zip(*self._open.pop(row), strict=True)
        self._closed.add(row)
        flat = len(guesses) == 1
        guess, truth = (np.stack([t.numpy() for t in part])[0 if flat else slice(None)] for part in (guesses, truths))
        spacing = spacings[0].tolist()[1 if flat else 0 :]
        scores = [
            score_structure(np.isin(guess, classes), np.isin(truth, classes), spacing)
            if name in self._scored
            else (0.0, 0.0, _NOT_SCORED)
            for name, classes in self._structures.items()
        ]
        dice, distance, code = (list(column) for column in zip(*scores, strict=True))
        self._lines.append(
            (
                torch.tensor([dice], dtype=torch.float64),
                torch.tensor([distance], dtype=torch.float64),
                torch.tensor([code], dtype=torch.int64),
            )
        )

    def state(self) -> dict[str, Tensor]:
        """Return `dice`, `hd95` and `code` (0 not scored, 1 both there, 2 both empty, 3 one empty), a line per case."""
        for row in list(self._open):
            self._close(row)
        width = len(self._structures)
        empty = torch.zeros(0, width, dtype=torch.float64)
        columns = zip(*self._lines, strict=True) if self._lines else [(empty,), (empty,), (empty.to(torch.int64),)]
        return {name: torch.cat(column) for name, column in zip(("dice", "hd95", "code"), columns, strict=True)}

    def vet(self, state: Mapping[str, Tensor], rows: int) -> None:
        """Dice is a share, a distance not negative, a code one of the four."""
        super().vet(state, rows)
        self.require_within(state, "dice", 0, 1)
        self.require_within(state, "hd95", 0, MOST)
        self.require_within(state, "code", _NOT_SCORED, _MISSED)

    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> "SegmentationMetric":
        """Return the metric of all cases of `states`."""
        union = SegmentationMetric(self._structures, self._scored)
        union._lines = [(state["dice"], state["hd95"], state["code"]) for state in states]
        return union

    def compute(self) -> Scores:
        """Return dice, hd95, the counts missed and empty_cases, and dice/NAME and hd95/NAME of each structure."""
        state = self.state()
        scored = state["code"] != _NOT_SCORED
        cases = scored.any(dim=1)
        scores: Scores = {}
        for name in ("dice", "hd95"):
            per_case = (state[name] * scored).sum(1)[cases] / scored.sum(1)[cases]
            scores[name] = float(per_case.mean()) if len(per_case) else None
        for name, code in (("missed", _MISSED), ("empty_cases", _EMPTY)):
            scores[name] = float((state["code"] == code).sum()) if bool(cases.any()) else None
        for number, structure in enumerate(self._structures):
            known = scored[:, number]
            for name in ("dice", "hd95"):
                if structure in self._scored:
                    scores[f"{name}/{structure}"] = float(state[name][known, number].mean()) if bool(known.any()) else None
        return scores


def score_structure(guess: Mask, truth: Mask, spacing: Sequence[float]) -> tuple[float, float, int]:
    """Return Dice, HD95 and a code for one structure of one case.

    Args:
        guess: the prediction, `(h, w)` or `(slices, h, w)`.
        truth: of the same shape.
        spacing: millimetres along each axis.
    """
    sizes = int(guess.sum()), int(truth.sum())
    if not any(sizes):
        return 1.0, 0.0, _EMPTY
    if not all(sizes):
        return 0.0, float(np.linalg.norm(np.array(guess.shape) * np.array(spacing))), _MISSED
    return 2 * int((guess & truth).sum()) / sum(sizes), hd95(guess, truth, spacing), _BOTH


def hd95(guess: Mask, truth: Mask, spacing: Sequence[float]) -> float:
    """Return the larger of the two directed 95th percentiles of surface distances; neither mask is empty.

    A surface is what has a neighbour along an axis outside of the mask or of the image, as in MONAI and the BraTS tools.
    """
    from scipy.ndimage import binary_erosion, distance_transform_edt

    # All distances are between points of the two masks, so nothing outside of their common box matters.
    box = tuple(slice(int(axis.min()), int(axis.max()) + 1) for axis in np.nonzero(guess | truth))
    first, second = (mask[box] & ~binary_erosion(mask[box]) for mask in (guess, truth))
    to_first, to_second = (distance_transform_edt(~surface, sampling=spacing) for surface in (first, second))
    return float(max(np.percentile(to_second[first], PERCENTILE), np.percentile(to_first[second], PERCENTILE)))
