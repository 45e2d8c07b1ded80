"""Scores of fused pictures against hand-computed values, slow loops, scipy and sklearn; one test per known trap."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.signal import convolve2d
from scipy.stats import entropy, pearsonr
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from omnifm.data.cohort import Cohort
from omnifm.errors import DataError
from omnifm.federation.evaluation import Scored, weighted_mean
from omnifm.metrics import fusion_scores as fs
from omnifm.metrics.fusion import NAMES, FusionMetric, pair_scores
from omnifm.seeds import numpy_generator

Plane = fs.Plane


def picture(stream: int, size: int = 64, smooth: int = 5) -> Plane:
    """Return whole grey levels with structure on several scales."""
    rng = numpy_generator(0, "fusion", stream)
    noise = rng.normal(size=(size, size))
    window = np.ones((smooth, smooth)) / smooth
    rough = convolve2d(noise, window, mode="same", boundary="symm")
    return np.rint(np.clip(128 + 50 * rough + 20 * rng.normal(size=(size, size)), 0, 255))


A, B = picture(1), picture(2)
MEAN, MAXIMUM = (A + B) / 2, np.maximum(A, B)


# One picture


def test_entropy_is_in_bits() -> None:
    """Four equally frequent levels are two bits; scipy agrees on a real histogram."""
    assert fs.entropy(np.array([[0.0, 50], [100, 255]])) == pytest.approx(2)
    assert fs.entropy(np.full((4, 4), 7.0)) == 0
    assert fs.entropy(A) == pytest.approx(entropy(np.bincount(A.astype(int).ravel()), base=2))


def test_levels_are_rounded_and_clipped_and_never_wrap_around() -> None:
    assert fs.to_bytes(np.array([-3.0, 0.4, 0.6, 254.6, 300])).tolist() == [0, 0, 1, 255, 255]


def test_white_keeps_its_own_grey_level() -> None:
    """Adding 1 in uint8 before counting, as one published script does, merges 254 with 255 where it saturates."""
    plane = np.array([[254.0, 255], [254, 255]])
    assert fs.entropy(plane) == pytest.approx(1)
    assert fs.mutual_information(plane, plane) == pytest.approx(1)


def test_standard_deviation_is_the_populations() -> None:
    assert fs.standard_deviation(np.array([[0.0, 10]])) == 5


def test_spatial_frequency_and_average_gradient_by_hand() -> None:
    """Rows 0 3 / 4 7: dx = 3, 3, dy = 4, 4; the one pixel with both has sqrt((9 + 16) / 2)."""
    plane = np.array([[0.0, 3], [4, 7]])
    assert fs.spatial_frequency(plane) == pytest.approx(5)
    assert fs.average_gradient(plane) == pytest.approx(math.sqrt(12.5))


def test_gradients_over_a_slow_loop() -> None:
    h, w = A.shape
    dx = [(A[i, j + 1] - A[i, j]) ** 2 for i in range(h) for j in range(w - 1)]
    dy = [(A[i + 1, j] - A[i, j]) ** 2 for i in range(h - 1) for j in range(w)]
    assert fs.spatial_frequency(A) == pytest.approx(math.sqrt(sum(dx) / len(dx) + sum(dy) / len(dy)))
    steps = [
        math.sqrt(((A[i, j + 1] - A[i, j]) ** 2 + (A[i + 1, j] - A[i, j]) ** 2) / 2) for i in range(h - 1) for j in range(w - 1)
    ]
    assert fs.average_gradient(A) == pytest.approx(sum(steps) / len(steps))


# Mutual information


def test_mutual_information_is_in_bits_and_not_in_nats() -> None:
    """sklearn's is in nats: 1 / ln 2 times less."""
    nats = mutual_info_score(A.astype(int).ravel(), MAXIMUM.astype(int).ravel())
    assert fs.mutual_information(A, MAXIMUM) == pytest.approx(nats / math.log(2))
    binary = np.array([[0.0, 255], [255, 0]])
    assert fs.mutual_information(binary, binary) == pytest.approx(1)


def test_mutual_information_takes_fractions_as_the_levels_they_round_to() -> None:
    """sklearn takes each fraction for a class of its own, and gets nearly the entropy of everything."""
    assert fs.mutual_information(A, B + 0.3) == pytest.approx(fs.mutual_information(A, B))


def test_normalised_mutual_information() -> None:
    labels = [plane.astype(int).ravel() for plane in (A, B, MAXIMUM)]
    expected = sum(normalized_mutual_info_score(labels[k], labels[2]) for k in (0, 1))
    assert fs.normalised_mutual_information(A, B, MAXIMUM) == pytest.approx(expected)
    assert fs.normalised_mutual_information(A, A, A) == pytest.approx(2)
    assert math.isnan(fs.normalised_mutual_information(A * 0, A * 0, A * 0))


# Sum of correlations of differences


def test_scd_is_pearsons_with_signed_differences() -> None:
    fused = 0.7 * A + 0.2 * B
    expected = pearsonr((fused - B).ravel(), A.ravel())[0] + pearsonr((fused - A).ravel(), B.ravel())[0]
    assert fs.sum_of_correlations(A, B, fused) == pytest.approx(expected)
    # F = A + B: what is left without one source is the other.
    assert fs.sum_of_correlations(A, B, A + B) == pytest.approx(2)
    unsigned = pearsonr(np.abs(fused - B).ravel(), A.ravel())[0] + pearsonr(np.abs(fused - A).ravel(), B.ravel())[0]
    assert abs(unsigned - expected) > 0.05


def test_scd_is_undefined_where_the_fused_picture_is_a_source() -> None:
    assert math.isnan(fs.sum_of_correlations(A, B, B))


# Visual information fidelity


def slow_vif(source: Plane, fused: Plane) -> float:
    """The definition over 2-D windows, one window at a time, on the scale it is given."""
    num = den = 0.0
    for scale in range(1, 5):
        n = 2 ** (4 - scale + 1) + 1
        x = np.arange(n) - n // 2
        win = np.exp(-(x[:, None] ** 2 + x[None] ** 2) / (2 * (n / 5) ** 2))
        win /= win.sum()
        if scale > 1:
            source, fused = (convolve2d(p, win, mode="valid")[::2, ::2] for p in (source, fused))
        for i in range(source.shape[0] - n + 1):
            for j in range(source.shape[1] - n + 1):
                r, d = source[i : i + n, j : j + n], fused[i : i + n, j : j + n]
                mr, md = (win * r).sum(), (win * d).sum()
                vr, vd = max(0, (win * r * r).sum() - mr * mr), max(0, (win * d * d).sum() - md * md)
                cov = (win * r * d).sum() - mr * md
                g = cov / (vr + 1e-10)
                sv = vd - g * cov
                if vr < 1e-10:
                    g, sv, vr = 0, vd, 0
                if vd < 1e-10:
                    g, sv = 0, 0
                if g < 0:
                    g, sv = 0, vd
                num += math.log10(1 + g * g * vr / (max(sv, 1e-10) + 2))
                den += math.log10(1 + vr / 2)
    return num / den


@pytest.mark.parametrize("fused", [MEAN, MAXIMUM, 255 - A, np.where(np.arange(64) < 32, A, 0.0)])
def test_vif_is_that_of_a_slow_loop(fused: Plane) -> None:
    source = np.where(np.arange(64)[:, None] < 24, 0.0, A)  # with flat windows
    assert fs.visual_information(source, fused) == pytest.approx(slow_vif(source, fused), abs=1e-9)


def test_vif_of_a_picture_with_itself_is_one_and_more_contrast_gives_more() -> None:
    assert fs.visual_information(A, A) == pytest.approx(1)
    assert fs.visual_information(A, 2 * A) > 1.1
    assert fs.visual_information(A, np.full_like(A, 9.0)) == 0


def test_vif_on_the_scale_0_to_1_is_another_number() -> None:
    """The noise of the eye, 2, is a variance on 0..255; the metric takes pictures of 0..1 and brings them there."""
    right = fs.visual_information(A, MEAN)
    assert abs(fs.visual_information(A / 255, MEAN / 255) - right) > 0.02
    metric = FusionMetric()
    metric.update(tensor(MEAN), torch.cat([tensor(A), tensor(B)], dim=1), torch.zeros(1))
    assert metric.compute()["vif_sum"] == pytest.approx(right + fs.visual_information(B, MEAN), rel=1e-4)


def test_vif_windows_are_centred_and_stay_inside() -> None:
    """Mirroring all pictures changes nothing; an off-centre window (-9..8) or zeros around the picture would."""
    turned = fs.visual_information(A[:41, :41][::-1, ::-1], MEAN[:41, :41][::-1, ::-1])
    assert fs.visual_information(A[:41, :41], MEAN[:41, :41]) == pytest.approx(turned)
    # A frame that no window reaches past: zero padding would see an edge at the border of two constant pictures.
    assert math.isnan(fs.visual_information(np.full((64, 64), 200.0), A))


def test_vif_has_a_least_size() -> None:
    assert not math.isnan(fs.visual_information(A[:41, :41], B[:41, :41])) and fs.VIF_LEAST_SIDE == 41
    assert math.isnan(fs.visual_information(A[:40, :40], B[:40, :40]))


# Structural similarity


def test_ssim_is_that_of_a_slow_loop() -> None:
    x = np.arange(11) - 5
    win = np.exp(-(x[:, None] ** 2 + x[None] ** 2) / (2 * 1.5**2))
    win /= win.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for i in range(24 - 10):
        for j in range(24 - 10):
            r, d = A[i : i + 11, j : j + 11], MAXIMUM[i : i + 11, j : j + 11]
            mr, md = (win * r).sum(), (win * d).sum()
            vr, vd, cov = (win * (r - mr) ** 2).sum(), (win * (d - md) ** 2).sum(), (win * (r - mr) * (d - md)).sum()
            values.append((2 * mr * md + c1) * (2 * cov + c2) / ((mr**2 + md**2 + c1) * (vr + vd + c2)))
    assert fs.structural_similarity(A[:24, :24], MAXIMUM[:24, :24]) == pytest.approx(np.mean(values))


def test_ssim_has_the_range_255() -> None:
    """Without the range, some libraries guess: the same constants on pictures of 0..1 make everything alike."""
    assert fs.structural_similarity(A, A) == pytest.approx(1)
    assert fs.structural_similarity(A, B) < 0.2
    assert fs.structural_similarity(A / 255, B / 255) > 0.95
    assert math.isnan(fs.structural_similarity(A[:10], B[:10]))


# Edges


def slow_qabf(a: Plane, b: Plane, f: Plane) -> float:
    kx = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])

    def edge(p: Plane, i: int, j: int) -> tuple[float, float]:
        block = p[i - 1 : i + 2, j - 1 : j + 2]
        gx, gy = (kx * block).sum(), (kx.T * block).sum()
        return math.hypot(gx, gy), math.atan(gy / gx) if gx else math.pi / 2

    num = den = 0.0
    for i in range(1, a.shape[0] - 1):
        for j in range(1, a.shape[1] - 1):
            gf, af = edge(f, i, j)
            for p in (a, b):
                g, angle = edge(p, i, j)
                ratio = 1.0 if g == gf else min(g, gf) / max(g, gf)
                near = 1 - abs(angle - af) / (math.pi / 2)
                q = 0.9994 / (1 + math.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + math.exp(-22 * (near - 0.8)))
                num, den = num + q * g, den + g
    return num / den


@pytest.mark.parametrize("fused", [MEAN, MAXIMUM, A])
def test_qabf_is_that_of_a_slow_loop(fused: Plane) -> None:
    assert fs.edge_preservation(A, B, fused) == pytest.approx(slow_qabf(A, B, fused))


def test_qabf_of_equal_gradients_takes_the_ratio_one() -> None:
    """F = A = B: every ratio and direction is 1. Code that puts g_F there instead gets .9994 * .9879 / (1 + e^-4.4) = .9753."""
    best = 0.9994 / (1 + math.exp(-7.5)) * 0.9879 / (1 + math.exp(-4.4))
    faint = np.add.outer(np.arange(8.0), np.zeros(8)) / 64  # gradients of 1/8: as a ratio, far from 1
    for plane in (A, faint):
        assert fs.edge_preservation(plane, plane, plane) == pytest.approx(best, rel=1e-9)


def test_qabf_needs_an_edge_and_ignores_where_there_is_none() -> None:
    flat = np.full((16, 16), 3.0)
    assert math.isnan(fs.edge_preservation(flat, flat, A[:16, :16]))
    assert fs.edge_preservation(A, np.full_like(A, 5.0), A) == pytest.approx(fs.edge_preservation(A, A, A))


# The metric


def tensor(plane: Plane) -> torch.Tensor:
    return torch.from_numpy(plane / 255).float()[None, None]


def score(*pairs: tuple[Plane, Plane, Plane]) -> FusionMetric:
    metric = FusionMetric()
    for a, b, f in pairs:
        metric.update(tensor(f), torch.cat([tensor(a), tensor(b)], dim=1), torch.zeros(1, dtype=torch.int64))
    return metric


def test_sums_are_twice_the_means_over_the_sources() -> None:
    found = pair_scores(A, B, MAXIMUM)
    assert found.keys() == set(NAMES)
    for name, single in (("vif", fs.visual_information), ("ssim", fs.structural_similarity), ("mi", fs.mutual_information)):
        parts = [single(source, MAXIMUM) for source in (A, B)]
        assert found[f"{name}_sum"] == pytest.approx(sum(parts)) and found[name] == pytest.approx(np.mean(parts))


def test_a_copy_of_a_source_has_much_vif_and_no_least_vif() -> None:
    """A picture that drops B altogether beats maximum fusion in VIF: the mean over sources does not see it."""
    copy, maximum = pair_scores(A, B, A), pair_scores(A, B, MAXIMUM)
    assert copy["vif"] > 0.5 > maximum["vif"]
    assert copy["vif_least"] == pytest.approx(fs.visual_information(B, A)) and copy["vif_least"] < 0.05 < maximum["vif_least"]


def test_the_output_is_not_stretched_to_its_own_range() -> None:
    """U2Fusion's script divides by the largest value when it saves, which changes every score of a darker picture."""
    dim, bright = (score((A, B, plane)).compute() for plane in (MEAN * 0.5, MEAN))
    assert dim["sd"] == pytest.approx(0.5 * MEAN.std(), rel=1e-5)
    assert dim["sd"] != pytest.approx(bright["sd"], rel=0.1) and dim["en"] != pytest.approx(bright["en"], rel=0.01)


FEW = settings(max_examples=10)
TRIPLES = st.lists(st.integers(0, 5), min_size=0, max_size=4)


@FEW
@given(st.lists(TRIPLES, min_size=1, max_size=3))
def test_merged_states_score_like_the_union(parts: list[list[int]]) -> None:
    small = [picture(10 + k, 41) for k in range(6)]

    def triple(k: int) -> tuple[Plane, Plane, Plane]:
        return small[k], small[(k + 1) % 6], small[(k + 1) % 6] if k == 3 else small[(k + 2) % 6]

    merged = FusionMetric().merge([score(*(triple(k) for k in part)).state() for part in parts]).compute()
    union = score(*(triple(k) for part in parts for k in part)).compute()
    assert merged == union


def test_undefined_scores_are_counted_and_never_numbers() -> None:
    whole, with_copy = score((A, B, MEAN)), score((A, B, MEAN), (A, B, B))
    found = with_copy.compute()
    assert found["scd"] == whole.compute()["scd"] and found["undefined"] == 1
    alone = score((A, B, B)).compute()
    assert alone["scd"] is None and alone["vif"] is not None
    assert all(t.isfinite().all() for t in with_copy.state().values())


def test_a_score_that_some_pairs_lack_weighs_as_many_as_have_it() -> None:
    a, b = picture(1), picture(2)
    some, all_of_them = score((a, b, a), (a, b, (a + b) / 2), (a, b, b)), score((a, b, (a + b) / 2))
    assert some.shares() == {"scd": Fraction(1, 3)} and all_of_them.shares() == score().shares() == {}
    pooled = score().merge([some.state(), all_of_them.state()]).compute()
    rows = [Scored(some.compute(), 3, some.shares()), Scored(all_of_them.compute(), 1, all_of_them.shares())]
    assert weighted_mean(rows, some.counts) == {name: pytest.approx(value) for name, value in pooled.items()}
    assert pooled["undefined"] == 2.0


def test_no_pairs_have_no_scores() -> None:
    assert FusionMetric().compute() == dict.fromkeys((*NAMES, "undefined"))
    assert FusionMetric().merge([FusionMetric().state(), score((A, B, MEAN)).state()]).compute()["undefined"] == 0


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="do not fit their sources"):
        FusionMetric().update(torch.zeros(1, 2, 64, 64), torch.zeros(1, 2, 64, 64), torch.zeros(1))
    with pytest.raises(DataError, match="do not fit their sources"):
        FusionMetric().update(torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1))


# Known figures


@pytest.mark.parametrize(
    ("cohort", "mean", "maximum"),
    [("fusion_ct_mri", 0.218, 0.298), ("fusion_pet_mri", 0.354, 0.418), ("fusion_spect_mri", 0.278, 0.355)],
)
def test_simple_fusion_of_atlas_pairs_scores_near_known_figures(
    shared_data: Path, cohort: str, mean: float, maximum: float
) -> None:
    """Mean-VIF of eight public test pairs of each kind; these are other subjects, so a quarter more or less is near.

    On pictures of range 1 maximum fusion would get about twice as much: known for CT-MRI, .60 to 1.30 as a sum over the sources.
    """
    found = Cohort.read(shared_data / cohort)
    places = found.indices("test")[::5]
    pairs = [[luminance(found.path(k, column)) for column in ("image", "image_b")] for k in places]
    scored = {
        name: np.mean([np.mean([fs.visual_information(s, fuse(*pair)) for s in pair]) for pair in pairs])
        for name, fuse in (("mean", lambda a, b: (a + b) / 2), ("maximum", np.maximum))
    }
    assert scored["mean"] == pytest.approx(mean, rel=0.25)
    assert scored["maximum"] == pytest.approx(maximum, rel=0.25)
    assert scored["maximum"] > scored["mean"]
    inflated = np.mean([fs.visual_information(s / 255, np.maximum(*pair) / 255) for pair in pairs for s in pair])
    assert inflated > 1.4 * scored["maximum"]


def luminance(path: Path) -> Plane:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"), dtype=np.float64) @ [0.299, 0.587, 0.114]
