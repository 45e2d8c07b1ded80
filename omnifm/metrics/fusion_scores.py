"""Scores of a fused picture F against its two sources A and B, by definition; none needs a picture that is known to be right.

All of them take `(h, w)` luminance on the scale 0 to 255, in floating point; `entropy` and `mutual_information` round to 8 bits,
as the file would be. No score stretches a picture to its own range, and none pads it: windows stay inside. NaN is a score
that is undefined (0 / 0).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float64]
WHITE = 255.0
VIF_LEAST_SIDE = 41
"""The windows of the coarsest of four scales need this many pixels."""

_VIF_NOISE = 2.0
_TINY = 1e-10
_SSIM_TAPS, _SSIM_SIGMA = 11, 1.5
# Xydeas and Petrovic, 2000: strength of edges, then their direction.
_EDGE_G = (0.9994, -15.0, 0.5)
_EDGE_A = (0.9879, -22.0, 0.8)


def to_bytes(plane: Plane) -> npt.NDArray[np.uint8]:
    """Round to 8 bits; what is outside 0 to 255 is clipped, never wrapped around."""
    return np.clip(np.rint(plane), 0, WHITE).astype(np.uint8)


def entropy(fused: Plane) -> float:
    """EN = -sum_k h_k log2 h_k over the 256 grey levels, in bits; 0 to 8."""
    return _entropy_of(np.bincount(to_bytes(fused).ravel(), minlength=256))


def standard_deviation(fused: Plane) -> float:
    """SD = sqrt(mean((F - mean F)^2)), the population's (divided by the number of pixels), in grey levels."""
    return float(fused.std())


def spatial_frequency(fused: Plane) -> float:
    """SF = sqrt(mean(dx^2) + mean(dy^2)) of differences between neighbours, in grey levels (Eskicioglu and Fisher, 1995)."""
    return math.sqrt(np.square(np.diff(fused, axis=1)).mean() + np.square(np.diff(fused, axis=0)).mean())


def average_gradient(fused: Plane) -> float:
    """AG = mean sqrt((dx^2 + dy^2) / 2) of forward differences, where both exist: (h-1) (w-1) pixels; in grey levels."""
    dx, dy = np.diff(fused, axis=1)[:-1], np.diff(fused, axis=0)[:, :-1]
    return float(np.sqrt((dx**2 + dy**2) / 2).mean())


def mutual_information(source: Plane, fused: Plane) -> float:
    """I(A; F) = H(A) + H(F) - H(A, F) of 8-bit grey levels, in bits (log2). MI of a fusion adds both sources."""
    return _information(source, fused)[0]


def normalised_mutual_information(first: Plane, second: Plane, fused: Plane) -> float:
    """2 (I(A; F) / (H(A) + H(F)) + I(B; F) / (H(B) + H(F))), 0 to 2 (Hossny, Nahavandi and Creighton, 2008)."""
    parts = [_information(source, fused) for source in (first, second)]
    return sum(2 * shared / total if total else math.nan for shared, total in parts)


def _information(source: Plane, fused: Plane) -> tuple[float, float]:
    """Return I(A; F) and H(A) + H(F), bits."""
    joint = np.bincount(to_bytes(source).ravel().astype(np.int64) * 256 + to_bytes(fused).ravel(), minlength=256 * 256)
    table = joint.reshape(256, 256)
    single = _entropy_of(table.sum(axis=1)) + _entropy_of(table.sum(axis=0))
    # Rounding can put what is zero just below it.
    return max(0.0, single - _entropy_of(joint)), single


def _entropy_of(counts: npt.NDArray[np.int64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # a single level gives -0.0


def sum_of_correlations(first: Plane, second: Plane, fused: Plane) -> float:
    """SCD = r(F - B, A) + r(F - A, B), -2 to 2; r is Pearson's (Aslantas and Bendes, 2015). Differences keep their sign.

    A correlation with a constant picture is undefined, and so is the score: F = B leaves nothing to correlate.
    """
    return _correlation(fused - second, first) + _correlation(fused - first, second)


def _correlation(x: Plane, y: Plane) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(np.square(x).sum() * np.square(y).sum())
    return float((x * y).sum() / scale) if scale > _TINY else math.nan


def visual_information(source: Plane, fused: Plane) -> float:
    """VIF in the pixel domain of F with A as the reference (Sheikh and Bovik, 2006; `vifp_mscale`).

        VIF = sum log10(1 + g^2 s_A^2 / (s_v^2 + 2)) / sum log10(1 + s_A^2 / 2)      over four scales and all windows

    g = s_AF / s_A^2 is the gain of F over A and s_v^2 = s_F^2 - g s_AF what it does not explain; s are moments under a Gaussian
    window of 17, 9, 5, 3 pixels with sigma a fifth of that, inside the picture only. A scale is the one before it, smoothed with
    its own window, every second pixel. The 2 is the variance of the eye's noise on the scale 0 to 255: on 0 to 1 the same formula
    gives another, larger number. More contrast than the source has (g > 1) is rewarded: the score can exceed 1.
    """
    gained = there = 0.0
    for scale, taps in enumerate((17, 9, 5, 3)):
        window = gaussian(taps, taps / 5)
        if scale:
            source, fused = (_filter(plane, window)[::2, ::2] for plane in (source, fused))
        if min(source.shape) < taps:
            return math.nan
        s_a, s_f, s_af = _moments(source, fused, window)[2:]
        gain, rest = _gain(np.maximum(s_a, 0), np.maximum(s_f, 0), s_af)
        s_a = np.where(s_a < _TINY, 0.0, s_a)
        gained += float(np.log10(1 + gain**2 * s_a / (rest + _VIF_NOISE)).sum())
        there += float(np.log10(1 + s_a / _VIF_NOISE).sum())
    return gained / there if there > 0 else math.nan


def _gain(s_a: Plane, s_f: Plane, s_af: Plane) -> tuple[Plane, Plane]:
    """Return g and s_v^2; flat windows and negative gains carry nothing, as in the reference."""
    gain = s_af / (s_a + _TINY)
    rest = s_f - gain * s_af
    flat = s_a < _TINY
    gain, rest = np.where(flat, 0.0, gain), np.where(flat, s_f, rest)
    blank = s_f < _TINY
    gain, rest = np.where(blank, 0.0, gain), np.where(blank, 0.0, rest)
    against = gain < 0
    return np.where(against, 0.0, gain), np.maximum(np.where(against, s_f, rest), _TINY)


def structural_similarity(source: Plane, fused: Plane) -> float:
    """SSIM (Wang et al., 2004), range 255: Gaussian 11 x 11, sigma 1.5, population moments, C1 = 2.55^2, C2 = 7.65^2, mean."""
    c1, c2 = (0.01 * WHITE) ** 2, (0.03 * WHITE) ** 2
    m_a, m_f, s_a, s_f, s_af = _moments(source, fused, gaussian(_SSIM_TAPS, _SSIM_SIGMA))
    value = (2 * m_a * m_f + c1) * (2 * s_af + c2) / ((m_a**2 + m_f**2 + c1) * (s_a + s_f + c2))
    return float(value.mean()) if value.size else math.nan


def edge_preservation(first: Plane, second: Plane, fused: Plane) -> float:
    """Qabf (Xydeas and Petrovic, 2000): how much of the sources' edges, in strength and direction, is in F; 0 to 1.

        Q^AF = Qg Qa,   Qg = .9994 / (1 + exp(-15 (G - .5))),   Qa = .9879 / (1 + exp(-22 (1 - |a_A - a_F| / (pi/2) - .8)))
        G = min(g_A, g_F) / max(g_A, g_F), 1 where they are equal
        Qabf = sum(Q^AF g_A + Q^BF g_B) / sum(g_A + g_B)

    g and a are length and angle (atan of the quotient, so a line has one direction) of the Sobel gradient, of inner pixels.
    Some published code gives equal gradients the value g_F in place of the ratio 1.
    """
    edges = [_edges(plane) for plane in (first, second, fused)]
    kept = sum(float((_kept(edge, edges[2]) * edge[0]).sum()) for edge in edges[:2])
    weight = sum(float(edge[0].sum()) for edge in edges[:2])
    return kept / weight if weight > 0 else math.nan


def _edges(plane: Plane) -> tuple[Plane, Plane]:
    """Return length and angle in (-pi/2, pi/2] of the Sobel gradient, `(h-2, w-2)`."""
    across = plane[:-2] + 2 * plane[1:-1] + plane[2:]
    down = plane[:, :-2] + 2 * plane[:, 1:-1] + plane[:, 2:]
    gx, gy = across[:, 2:] - across[:, :-2], down[2:] - down[:-2]
    with np.errstate(divide="ignore", invalid="ignore"):
        angle = np.where(gx == 0, math.pi / 2, np.arctan(gy / gx))
    return np.hypot(gx, gy), angle


def _kept(source: tuple[Plane, Plane], fused: tuple[Plane, Plane]) -> Plane:
    low, high = np.minimum(source[0], fused[0]), np.maximum(source[0], fused[0])
    strength = np.divide(low, high, out=np.ones_like(low), where=high > 0)
    direction = 1 - np.abs(source[1] - fused[1]) / (math.pi / 2)
    return _sigmoid(strength, _EDGE_G) * _sigmoid(direction, _EDGE_A)


def _sigmoid(value: Plane, constants: tuple[float, float, float]) -> Plane:
    top, slope, middle = constants
    answer: Plane = top / (1 + np.exp(slope * (value - middle)))
    return answer


def gaussian(taps: int, sigma: float) -> Plane:
    """Return a Gaussian window of `taps` weights around its centre, sum 1; the 2-D window is its outer product."""
    weights = np.exp(-((np.arange(taps) - (taps - 1) / 2) ** 2) / (2 * sigma**2))
    normalised: Plane = weights / weights.sum()
    return normalised


def _moments(a: Plane, f: Plane, window: Plane) -> Sequence[Plane]:
    """Return means of a and f, their variances and covariance under the window."""
    m_a, m_f, aa, ff, af = (_filter(plane, window) for plane in (a, f, a * a, f * f, a * f))
    return m_a, m_f, aa - m_a * m_a, ff - m_f * m_f, af - m_a * m_f


def _filter(plane: Plane, window: Plane) -> Plane:
    """Weigh a plane with the outer product of `window`, where the window is inside: `(h - taps + 1, w - taps + 1)`."""
    from scipy.ndimage import correlate1d

    if min(plane.shape) < len(window):
        return plane[:0, :0]
    edge, rest = len(window) // 2, (len(window) - 1) // 2
    inner: Plane = plane
    for axis in (0, 1):
        kept = [slice(None), slice(None)]
        kept[axis] = slice(edge, plane.shape[axis] - rest)
        inner = correlate1d(inner, window, axis=axis, mode="constant")[tuple(kept)]
    return inner
