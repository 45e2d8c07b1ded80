"""PSNR and SSIM of enlarged pictures, one line of scores per picture, in two conventions side by side.

    name                     convention    on
    psnr, ssim               strict        luma Y = .299 R + .587 G + .114 B (BT.601, full range); grey pictures as they are
    psnr_rgb, ssim_rgb       strict        the three colours: one MSE over all of them, mean of their SSIM
    psnr_studio, ssim_studio strict        Y = 16 + 219/255 (.299 R + .587 G + .114 B), as MATLAB's rgb2ycbcr and BasicSR have it
    legacy_psnr, legacy_ssim legacy        the colours

strict: clip to [0, 1], round to 8 bits, leave out a border of s pixels (s: the scale), then

    PSNR = 10 log10(255^2 / MSE)
    SSIM = mean of (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2)),   C1 = 2.55^2, C2 = 7.65^2

with moments under a Gaussian window of 11 x 11, sigma 1.5, inside the picture (Wang et al., 2004). `psnr_studio` is `psnr` +
20 log10(255 / 219) = `psnr` + 1.32 dB: a table with the one must not stand beside a table with the other. True pictures of three
equal channels are grey: the answer's luma is then the picture, and `psnr_rgb` and `psnr_studio` equal `psnr`, so that
`data.channels` does not change what a score means.

legacy: floats in [0, 1] as they leave the network, neither clipped nor rounded, no border left out, SSIM as scikit-image
computed it for them when no `data_range` was given (newer versions refuse): a flat window of 7 x 7, sample covariance (divided by
48), and L = 2, since floats were taken to reach from -1 to 1. C1 and C2 grow by 4 with it and SSIM rises: published tables that
did so are not comparable with strict ones.

PSNR of equal pictures is infinite: every PSNR is cut off at 100 dB, and `capped` counts the pictures where the strict one was.
A row of a table is the mean over pictures; slices of a volume are pictures.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omnifm.errors import DataError
from omnifm.metrics.base import NOTHING, Metric, Scores
from omnifm.metrics.fusion_scores import structural_similarity

Picture = npt.NDArray[np.float64]
NAMES = ("psnr", "ssim", "psnr_rgb", "ssim_rgb", "psnr_studio", "ssim_studio", "legacy_psnr", "legacy_ssim")
MOST_DB = 100.0
SSIM_LEAST_SIDE = 11
"""Pixels that must be left of each side without the border."""

_WHITE = 255.0
_LUMA = np.array((0.299, 0.587, 0.114))  # ITU-R BT.601
_LEGACY_TAPS, _LEGACY_RANGE = 7, 2.0


def psnr(difference: Picture, peak: float) -> float:
    """Return 10 log10(peak^2 / mean(difference^2)) in dB, at most 100; NaN of a difference that is not finite."""
    error = float(np.square(difference).mean())
    if error == 0:
        return MOST_DB
    return min(MOST_DB, 10 * math.log10(peak**2 / error)) if math.isfinite(error) else math.nan


def strict(picture: Picture, border: int) -> Picture:
    """Return `(c, h, w)` in [0, 1] as whole grey levels 0..255 without its border, `(c, h - 2 border, w - 2 border)`."""
    levels: Picture = np.rint(np.clip(picture, 0, 1) * _WHITE)
    return levels[:, border : levels.shape[1] - border, border : levels.shape[2] - border]


def luma(colours: Picture) -> Picture:
    """Return Y of BT.601, full range, of `(3, h, w)`: `(h, w)`."""
    y: Picture = np.tensordot(_LUMA, colours, axes=1)
    return y


def uniform_ssim(reference: Picture, picture: Picture, data_range: float) -> float:
    """Return SSIM of `(h, w)` planes under a flat 7 x 7 window inside the picture, with sample covariances.

    Args:
        reference: one picture.
        picture: the other.
        data_range: L in C1 = (.01 L)^2 and C2 = (.03 L)^2.
    """
    from scipy.ndimage import uniform_filter

    edge, count = _LEGACY_TAPS // 2, _LEGACY_TAPS**2
    inside = (slice(edge, -edge), slice(edge, -edge))
    products = (reference, picture, reference**2, picture**2, reference * picture)
    m_x, m_y, xx, yy, xy = (uniform_filter(plane, _LEGACY_TAPS)[inside] for plane in products)
    sample = count / (count - 1)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    above = (2 * m_x * m_y + c1) * (2 * sample * (xy - m_x * m_y) + c2)
    below = (m_x**2 + m_y**2 + c1) * (sample * (xx - m_x**2 + yy - m_y**2) + c2)
    return float((above / below).mean())


def picture_scores(picture: Picture, reference: Picture, border: int) -> dict[str, float]:
    """Return the scores of one picture by name.

    Args:
        picture: `(c, h, w)`, c 1 or 3, on the scale 0 to 1.
        reference: the true picture, of the same shape.
        border: pixels left out on each side by the strict convention.
    """
    if len(reference) == 3 and all(np.array_equal(plane, reference[0]) for plane in reference[1:]):
        picture, reference = luma(picture)[None], reference[:1]
    exact, true = strict(picture, border), strict(reference, border)
    if len(exact) == 1:
        found = {"psnr": psnr(exact - true, _WHITE), "ssim": structural_similarity(true[0], exact[0])}
        found |= {f"{name}_{kind}": found[name] for kind in ("rgb", "studio") for name in ("psnr", "ssim")}
    else:
        found = _colour_scores(exact, true)
    found["legacy_psnr"] = psnr(picture - reference, 1.0)
    similar = [uniform_ssim(x, y, _LEGACY_RANGE) for x, y in zip(reference, picture, strict=True)]
    return {**found, "legacy_ssim": float(np.mean(similar))}


def _colour_scores(exact: Picture, true: Picture) -> dict[str, float]:
    """Return the strict scores of `(3, h, w)` grey levels."""
    y, true_y = luma(exact), luma(true)
    studio, true_studio = (16 + 219 / _WHITE * plane for plane in (y, true_y))
    return {
        "psnr": psnr(y - true_y, _WHITE),
        "ssim": structural_similarity(true_y, y),
        "psnr_rgb": psnr(exact - true, _WHITE),
        "ssim_rgb": float(np.mean([structural_similarity(x, y) for x, y in zip(true, exact, strict=True)])),
        "psnr_studio": psnr(studio - true_studio, _WHITE),
        "ssim_studio": structural_similarity(true_studio, studio),
    }


class SuperResolutionMetric(Metric):
    """Keeps one line of scores per picture, `(n, names)` float64."""

    counts = frozenset({"capped"})

    def __init__(self) -> None:
        self._lines: list[Tensor] = []

    def update(self, prediction: Tensor, target: Tensor, row: Tensor, side: Mapping[str, Tensor] = NOTHING) -> None:
        """Add enlarged pictures.

        Args:
            prediction: `(b, c, h, w)`, c 1 or 3, on the scale 0 to 1.
            target: the true pictures, of the same shape.
            row: not used: every slice of a volume is a picture.
            side: `scale` `(b,)`, the width of the border; without it none is left out.

        Raises:
            DataError: shapes differ, or nothing of SSIM's window fits between the borders.
        """
        if prediction.shape != target.shape or prediction.ndim != 4 or target.shape[1] not in (1, 3):
            raise DataError(f"enlarged pictures {tuple(prediction.shape)} do not fit the true ones {tuple(target.shape)}")
        borders = side["scale"].tolist() if "scale" in side else [0] * len(target)
        if min(target.shape[2:]) - 2 * max(borders, default=0) < SSIM_LEAST_SIDE:
            raise DataError(
                f"pictures of {target.shape[2]} x {target.shape[3]} without a border of {max(borders, default=0)} are too small: "
                f"SSIM needs {SSIM_LEAST_SIDE} pixels a side"
            )
        pairs = zip(prediction.double().cpu().numpy(), target.double().cpu().numpy(), borders, strict=True)
        found = [picture_scores(picture, reference, border) for picture, reference, border in pairs]
        self._lines.append(
            torch.tensor([[line[name] for name in NAMES] for line in found], dtype=torch.float64).view(-1, len(NAMES))
        )

    def state(self) -> dict[str, Tensor]:
        """Return `score`, `(n, names)`."""
        return {"score": torch.cat([torch.zeros(0, len(NAMES), dtype=torch.float64), *self._lines])}

    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> "SuperResolutionMetric":
        """Return the metric of all pictures of `states`."""
        union = SuperResolutionMetric()
        union._lines = [state["score"] for state in states]
        return union

    def compute(self) -> Scores:
        """Return the mean of each score, and `capped`, the number of pictures whose `psnr` was cut off."""
        lines = self.state()["score"]
        if not len(lines):
            return dict.fromkeys((*NAMES, "capped"))
        means = dict(zip(NAMES, lines.mean(dim=0).tolist(), strict=True))
        return {**means, "capped": float((lines[:, NAMES.index("psnr")] >= MOST_DB).sum())}
