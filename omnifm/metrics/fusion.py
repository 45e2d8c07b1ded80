"""Scores of fused pictures, one line of scores per pair; definitions are in `omnifm.metrics.fusion_scores`.

    name                what, on luminance 0..255                                     scale
    vif, vif_sum        visual information of A and of B kept in F                    mean and sum over the two sources
    vif_least           that of the source that comes off worse                       a copy of one source has almost none
    ssim, ssim_sum      structural similarity to A and to B                           mean and sum over the two sources
    mi, mi_sum          mutual information with A and with B, 8-bit levels            bits; mean and sum over the two sources
    nmi                 the same over the entropies involved                          0 to 2
    qabf                edges of A and B kept in F                                    0 to 1
    scd                 correlations of F - B with A and of F - A with B              -2 to 2
    en                  entropy of F, 8-bit levels                                    bits
    sd, sf, ag          standard deviation, spatial frequency, average gradient of F  grey levels

Published tables differ in these conventions by factors of 2 (sum or mean) and 1.44 (bits or nats), and in ways that no factor
mends (VIF on pictures of range 1). VIF does not mind a source that is dropped: a copy of A has 1 from A and so a mean above 1/2,
more than any fusion; `vif_least` and `scd` see it.

A row of a table is the mean over the pairs. A score that is undefined for a pair, such as SCD where F equals a source, is left
out of its mean; `undefined` counts the pairs with such a score, and a score that no pair has is None.
"""

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omnifm.errors import DataError
from omnifm.metrics import fusion_scores as scores
from omnifm.metrics.base import NOTHING, Metric, Scores

NAMES = ("vif", "vif_sum", "vif_least", "ssim", "ssim_sum", "mi", "mi_sum", "nmi", "qabf", "scd", "en", "sd", "sf", "ag")


def pair_scores(first: scores.Plane, second: scores.Plane, fused: scores.Plane) -> dict[str, float]:
    """Return all scores of one fused picture; NaN where one is undefined.

    Args:
        first: source A, `(h, w)`, 0 to 255.
        second: source B.
        fused: F; values outside 0 to 255 count as they are, except where they are rounded to 8 bits.
    """
    both = {
        name: np.array([score(source, fused) for source in (first, second)])
        for name, score in (
            ("vif", scores.visual_information),
            ("ssim", scores.structural_similarity),
            ("mi", scores.mutual_information),
        )
    }
    return {
        **{name: float(values.mean()) for name, values in both.items()},
        **{f"{name}_sum": float(values.sum()) for name, values in both.items()},
        "vif_least": float(both["vif"].min()),
        "nmi": scores.normalised_mutual_information(first, second, fused),
        "qabf": scores.edge_preservation(first, second, fused),
        "scd": scores.sum_of_correlations(first, second, fused),
        "en": scores.entropy(fused),
        "sd": scores.standard_deviation(fused),
        "sf": scores.spatial_frequency(fused),
        "ag": scores.average_gradient(fused),
    }


class FusionMetric(Metric):
    """Keeps one line of scores per pair."""

    counts = frozenset({"undefined"})

    def __init__(self) -> None:
        self._lines: list[Tensor] = []  # each (k, names) float64, NaN where undefined

    def update(self, prediction: Tensor, target: Tensor, row: Tensor, side: Mapping[str, Tensor] = NOTHING) -> None:
        """Add fused pictures.

        Args:
            prediction: `(b, 1, h, w)`, F on the scale 0 to 1.
            target: `(b, 2, h, w)`, A and B on the scale 0 to 1.
            row: not used: every slice of a registered pair of volumes is a pair.
            side: not used.

        Raises:
            DataError: the shapes are not those.
        """
        del row, side
        if prediction.shape[1:] != (1, *target.shape[2:]) or target.shape[1] != 2:
            raise DataError(f"fused pictures {tuple(prediction.shape)} do not fit their sources {tuple(target.shape)}")
        planes = torch.cat([target, prediction], dim=1).double().cpu().numpy() * scores.WHITE
        found = [[line[name] for name in NAMES] for line in (pair_scores(*pair) for pair in planes)]
        self._lines.append(torch.tensor(found, dtype=torch.float64).reshape(-1, len(NAMES)))

    def state(self) -> dict[str, Tensor]:
        """Return `score` `(n, names)`, 0 where undefined, and `defined` of the same shape, 1 or 0."""
        lines = torch.cat([torch.zeros(0, len(NAMES), dtype=torch.float64), *self._lines])
        return {"score": lines.nan_to_num(nan=0.0), "defined": (~lines.isnan()).to(torch.uint8)}

    def vet(self, state: Mapping[str, Tensor], rows: int) -> None:
        """What is defined is yes or no."""
        super().vet(state, rows)
        self.require_within(state, "defined", 0, 1)

    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> "FusionMetric":
        """Return the metric of all pairs of `states`."""
        union = FusionMetric()
        union._lines = [s["score"].masked_fill(s["defined"] == 0, math.nan) for s in states]
        return union

    def compute(self) -> Scores:
        """Return the mean of each score, and `undefined`."""
        lines, known = self._known()
        if not len(lines):
            return dict.fromkeys((*NAMES, "undefined"))
        means = [float(line[there].mean()) if there.any() else None for line, there in zip(lines.T, known.T, strict=True)]
        return {**dict(zip(NAMES, means, strict=True)), "undefined": float((~known).any(axis=1).sum())}

    def shares(self) -> dict[str, Fraction]:
        """Return the share of the pairs that have a score, where some have none."""
        lines, known = self._known()
        return {
            name: Fraction(int(there.sum()), len(lines)) for name, there in zip(NAMES, known.T, strict=True) if not there.all()
        }

    def _known(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Return the lines `(n, names)`, and where they are defined."""
        lines = torch.cat([torch.zeros(0, len(NAMES), dtype=torch.float64), *self._lines]).numpy()
        return lines, ~np.isnan(lines)
