"""PSNR and SSIM against closed forms, a slow loop and scipy; one test for each way in which published numbers differ."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import uniform_filter
from scipy.signal import convolve2d

from omnifm.errors import DataError
from omnifm.metrics.super_resolution import (
    NAMES,
    Picture,
    SuperResolutionMetric,
    picture_scores,
    psnr,
    strict,
    uniform_ssim,
)
from omnifm.seeds import numpy_generator

STUDIO_GAIN = 20 * math.log10(255 / 219)


def pair(channels: int = 3, size: int = 40, stream: int = 0, noise: float = 0.05) -> tuple[Picture, Picture]:
    """Return a smooth 8-bit picture in [0, 1] and a noisy answer that leaves that range here and there."""
    rng = numpy_generator(0, "sr-metric", stream)
    rough = uniform_filter(rng.normal(size=(channels, size, size)), (0, 5, 5))
    true = np.rint(255 * np.clip(0.5 + 1.5 * rough, 0, 1)) / 255
    return true + noise * rng.normal(size=true.shape), true


def slow_ssim(x: Picture, y: Picture, window: Picture, data_range: float, sample: float) -> float:
    """SSIM of two planes by its definition, window after window."""
    k = len(window)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(x.shape[0] - k + 1):
        for j in range(x.shape[1] - k + 1):
            a, b = x[i : i + k, j : j + k], y[i : i + k, j : j + k]
            m_a, m_b = (window * a).sum(), (window * b).sum()
            s_a = sample * (window * (a - m_a) ** 2).sum()
            s_b = sample * (window * (b - m_b) ** 2).sum()
            s_ab = sample * (window * (a - m_a) * (b - m_b)).sum()
            values.append((2 * m_a * m_b + c1) * (2 * s_ab + c2) / ((m_a**2 + m_b**2 + c1) * (s_a + s_b + c2)))
    return float(np.mean(values))


def gaussian_window() -> Picture:
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    return np.outer(line, line) / line.sum() ** 2


def metric_of(picture: Picture, true: Picture, scale: int = 0) -> dict[str, float | None]:
    metric = SuperResolutionMetric()
    tensors = (torch.from_numpy(p)[None] for p in (picture, true))
    metric.update(*tensors, torch.tensor([0]), {"scale": torch.tensor([scale])})
    return metric.compute()


# PSNR


def test_psnr_by_hand() -> None:
    """Everywhere one grey level off: 20 log10 255 = 48.13 dB. Ten off: 28.13 dB."""
    true = np.full((1, 20, 20), 100 / 255)
    assert metric_of(true + 1 / 255, true)["psnr"] == pytest.approx(48.1308, abs=1e-4)
    assert metric_of(true + 10 / 255, true)["psnr"] == pytest.approx(28.1308, abs=1e-4)


def test_equal_pictures_have_100_dB_and_are_counted() -> None:
    picture, true = pair()
    assert (found := metric_of(true, true))["capped"] == 1
    assert found["psnr"] == found["psnr_rgb"] == found["psnr_studio"] == found["legacy_psnr"] == 100
    assert found["ssim"] == found["legacy_ssim"] == pytest.approx(1)
    assert metric_of(picture, true)["capped"] == 0
    assert psnr(np.full((1, 1, 1), 1e-9), 1.0) == 100


def test_values_outside_the_range_are_clipped_and_the_rest_is_rounded() -> None:
    levels = strict(np.array([[[-0.3, 0.4999 / 255, 0.5001 / 255, 2.0]]]), 0)
    assert levels.tolist() == [[[0, 0, 1, 255]]]
    true = np.zeros((1, 20, 20))
    assert metric_of(true - 0.2, true)["psnr"] == 100
    assert metric_of(true - 0.2, true)["legacy_psnr"] == pytest.approx(20 * math.log10(5))


def test_what_rounding_repairs_the_legacy_convention_counts() -> None:
    true = np.full((1, 20, 20), 100 / 255)
    found = metric_of(true + 0.4 / 255, true)
    assert found["psnr"] == 100
    assert found["legacy_psnr"] == pytest.approx(20 * math.log10(255 / 0.4))


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_errors_in_the_border_count_in_the_legacy_convention_alone(scale: int) -> None:
    _, true = pair(1, 48)
    wrong = true.copy()
    wrong[:, :scale] = wrong[:, -scale:] = 1 - wrong[:, -scale:]
    wrong[:, :, :scale] = wrong[:, :, -scale:] = 0
    assert metric_of(wrong, true, scale)["psnr"] == 100
    found = metric_of(wrong, true)["psnr"]
    assert found is not None and found < 40
    legacy = metric_of(wrong, true, scale)["legacy_psnr"]
    assert legacy is not None and legacy < 40
    wrong[0, scale, scale] += 0.5
    assert metric_of(wrong, true, scale)["capped"] == 0


def test_luma_rgb_and_studio_luma_are_three_numbers() -> None:
    """An error in blue alone weighs .114 in Y: 20 log10(1/.114) = 18.86 dB more, but a third of the squares of RGB: 4.77 dB."""
    _, true = pair()
    true = np.clip(true, 0.1, 0.9)
    true = np.rint(255 * true) / 255
    blue = true + np.array([0, 0, 8 / 255])[:, None, None]
    found = metric_of(blue, true)
    in_blue = 20 * math.log10(255 / 8)
    assert found["psnr"] == pytest.approx(in_blue - 20 * math.log10(0.114))
    assert found["psnr_rgb"] == pytest.approx(in_blue + 10 * math.log10(3))
    assert found["psnr_studio"] == pytest.approx(found["psnr"] + STUDIO_GAIN) and pytest.approx(1.3219, abs=1e-4) == STUDIO_GAIN


def test_studio_luma_is_that_of_matlab() -> None:
    """rgb2ycbcr: Y = 16 + 65.481 R + 128.553 G + 24.966 B of colours in [0, 1]."""
    picture, true = pair(noise=0.02)
    exact, levels = strict(picture, 0) / 255, strict(true, 0) / 255
    weights = np.array([65.481, 128.553, 24.966])
    y, true_y = (16 + np.tensordot(weights, p, axes=1) for p in (exact, levels))
    found = metric_of(picture, true)
    assert found["psnr_studio"] == pytest.approx(10 * math.log10(255**2 / np.mean((y - true_y) ** 2)))
    assert found["ssim_studio"] == pytest.approx(slow_ssim(y, true_y, gaussian_window(), 255, 1))


def test_grey_is_scored_the_same_in_one_channel_and_in_three() -> None:
    """Studio luma would give repeated grey 1.32 dB that the same picture in one channel does not have."""
    picture, true = pair(1)
    one, three = metric_of(picture, true, 2), metric_of(picture.repeat(3, 0), true.repeat(3, 0), 2)
    assert one == pytest.approx(three)
    assert one["psnr"] == one["psnr_rgb"] == one["psnr_studio"]
    # An answer whose channels differ a little is no colour picture either: what was asked for is grey.
    tinted = picture.repeat(3, 0) + np.array([0.002, -0.001, 0.0])[:, None, None]
    found = metric_of(tinted, true.repeat(3, 0), 2)
    assert found["psnr"] == found["psnr_studio"] == pytest.approx(one["psnr"], abs=0.1)


# SSIM


def test_strict_ssim_is_the_slow_loop() -> None:
    picture, true = pair(3, 20)
    exact, levels = strict(picture, 2), strict(true, 2)
    expected = np.mean([slow_ssim(x, y, gaussian_window(), 255, 1) for x, y in zip(exact, levels, strict=True)])
    assert metric_of(picture, true, 2)["ssim_rgb"] == pytest.approx(expected)


def test_legacy_ssim_is_the_slow_loop_with_a_flat_window_and_range_2() -> None:
    picture, true = pair(3, 16)
    flat = np.full((7, 7), 1 / 49)
    expected = np.mean([slow_ssim(x, y, flat, 2, 49 / 48) for x, y in zip(picture, true, strict=True)])
    assert metric_of(picture, true, 2)["legacy_ssim"] == pytest.approx(expected)


def test_the_assumed_range_decides_ssim() -> None:
    """The same floats in [0, 1]: range 1 is right, 2 is what old scikit-image took, 255 calls anything perfect."""
    picture, true = (0.5 + 0.4 * (p - 0.5) for p in pair(1, 64, noise=0.12))
    right, legacy, absurd = (uniform_ssim(true[0], picture[0], data_range) for data_range in (1.0, 2.0, 255.0))
    assert right < legacy - 0.01 < absurd
    assert absurd > 0.9999
    assert metric_of(picture, true)["legacy_ssim"] == pytest.approx(legacy)


def test_ssim_of_flat_pictures_by_hand() -> None:
    """No variance: SSIM is (2 x y + C1) / (x^2 + y^2 + C1)."""
    x, y = np.full((1, 20, 20), 100 / 255), np.full((1, 20, 20), 150 / 255)
    found = metric_of(x, y)
    assert found["ssim"] == pytest.approx((2 * 100 * 150 + 2.55**2) / (100**2 + 150**2 + 2.55**2))
    a, b, c1 = 100 / 255, 150 / 255, 0.02**2
    assert found["legacy_ssim"] == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_ssim_windows_stay_inside() -> None:
    """Padding would add windows; scipy's full convolution, cut to valid, has none."""
    picture, true = pair(1, 30)
    x, y = strict(picture, 0)[0], strict(true, 0)[0]

    def mean(plane: Picture) -> Picture:
        return convolve2d(plane, gaussian_window(), mode="valid")

    m_x, m_y = mean(x), mean(y)
    s_x, s_y, s_xy = mean(x * x) - m_x**2, mean(y * y) - m_y**2, mean(x * y) - m_x * m_y
    c1, c2 = 2.55**2, 7.65**2
    expected = ((2 * m_x * m_y + c1) * (2 * s_xy + c2) / ((m_x**2 + m_y**2 + c1) * (s_x + s_y + c2))).mean()
    assert metric_of(picture, true)["ssim"] == pytest.approx(expected)


# The metric


def test_scores_are_means_over_pictures_of_any_size_and_scale() -> None:
    pictures = [pair(3, 40, 1), pair(3, 32, 2), pair(1, 48, 3)]
    scales = [2, 4, 8]
    metric = SuperResolutionMetric()
    for (picture, true), scale in zip(pictures, scales, strict=True):
        metric.update(
            torch.from_numpy(picture)[None], torch.from_numpy(true)[None], torch.tensor([0]), {"scale": torch.tensor([scale])}
        )
    lines = [picture_scores(*p, s) for p, s in zip(pictures, scales, strict=True)]
    found = metric.compute()
    assert set(found) == {*NAMES, "capped"}
    for name in NAMES:
        assert found[name] == pytest.approx(np.mean([line[name] for line in lines]))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_merged_states_are_the_union(cuts: list[int]) -> None:
    """Pictures may be spread over sites in any way, some with none."""
    whole, states = SuperResolutionMetric(), []
    for site, count in enumerate(cuts):
        part = SuperResolutionMetric()
        for k in range(count):
            picture, true = (torch.from_numpy(p)[None].float() for p in pair(1, 16, 10 * site + k))
            for metric in (whole, part):
                metric.update(picture, true, torch.tensor([k]), {"scale": torch.tensor([2])})
        states.append(part.state())
    merged = SuperResolutionMetric().merge(states)
    assert merged.compute() == whole.compute()
    assert torch.equal(merged.state()["score"], whole.state()["score"]) and bool(whole.state()["score"].isfinite().all())


def test_nothing_has_no_score() -> None:
    empty = SuperResolutionMetric()
    assert set(empty.compute().values()) == {None}
    assert SuperResolutionMetric().merge([empty.state()]).compute() == empty.compute()


def test_pictures_that_do_not_fit() -> None:
    metric = SuperResolutionMetric()
    row = torch.tensor([0])
    with pytest.raises(DataError, match=r"\(1, 1, 16, 16\) do not fit the true ones \(1, 1, 32, 32\)"):
        metric.update(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 32, 32), row)
    with pytest.raises(DataError, match="16 x 16 without a border of 4 are too small"):
        metric.update(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), row, {"scale": torch.tensor([4])})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_no_perfect_picture(value: float) -> None:
    assert math.isnan(psnr(np.array([[0.0, value]]), 1.0))
    assert psnr(np.zeros((2, 2)), 1.0) == 100.0
