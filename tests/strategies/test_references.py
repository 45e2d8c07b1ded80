"""Every rule that a softmax regression can show, run through the real loop and written again in numpy from its paper."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omnifm import seeds
from omnifm.federation.client import STATE
from tests.strategies.references import LR, Array, Regression, assert_same, features, images, lab_of, matrix, order, slope


def fedavg(p: Regression) -> Array:
    theta = p.start
    for t, sampled in p.rounds():
        theta = p.mean(p.ends(theta, t, sampled))
    return theta


def fedprox(p: Regression, mu: float) -> Array:
    """Li et al. 2020, Algorithm 2: SGD on L_i(w) + mu / 2 ||w - w^t||^2."""
    theta = p.start
    for t, sampled in p.rounds():
        ends = {}
        for i in sampled:
            w = theta
            for x, y in p.batches(i, t):
                w = w - LR * (slope(w, x, y) + mu * (w - theta))
            ends[i] = w
        theta = p.mean(ends)
    return theta


def fedavgm(p: Regression, beta: float, server_step: float) -> Array:
    """Hsu et al. 2019, section 4.3: v <- beta v + dw, w <- w - v, dw = w - mean."""
    theta, v = p.start, np.zeros_like(p.start)
    for t, sampled in p.rounds():
        v = beta * v + (theta - p.mean(p.ends(theta, t, sampled)))
        theta = theta - server_step * v
    return theta


def fedopt(p: Regression, server_step: float, beta1: float, beta2: float, tau: float, yogi: bool = False) -> Array:
    """Reddi et al. 2021, Algorithm 2."""
    theta, m, v = p.start, np.zeros_like(p.start), np.full_like(p.start, tau**2)
    for t, sampled in p.rounds():
        delta = p.mean({i: w - theta for i, w in p.ends(theta, t, sampled).items()})
        m = beta1 * m + (1 - beta1) * delta
        v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2) if yogi else beta2 * v + (1 - beta2) * delta**2
        theta = theta + server_step * m / (np.sqrt(v) + tau)
    return theta


def fedyogi(p: Regression, **options: Any) -> Array:
    return fedopt(p, **options, yogi=True)


def scaffold(p: Regression, server_step: float) -> Array:
    """Karimireddy et al. 2020, Algorithm 1, option II as printed: from the distance travelled."""
    x, c = p.start, np.zeros_like(p.start)
    own = {i: np.zeros_like(c) for i in p.x}
    for t, sampled in p.rounds():
        dy, dc = [], []
        for i in sampled:
            y, steps = x, 0
            for features_, target in p.batches(i, t):
                y, steps = y - LR * (slope(y, features_, target) - own[i] + c), steps + 1
            new = own[i] - c + (x - y) / (steps * LR)
            dy.append(y - x)
            dc.append(new - own[i])
            own[i] = new
        x = x + server_step * np.mean(dy, axis=0)
        c = c + len(sampled) / len(p.x) * np.mean(dc, axis=0)
    return x


def feddyn(p: Regression, alpha: float, scored: str) -> Array:
    """Acar et al. 2021, Algorithm 1, local descent in place of the argmin. "mean": of the models of the last round."""
    theta, h = p.start, np.zeros_like(p.start)
    g = {i: np.zeros_like(h) for i in p.x}
    for t, sampled in p.rounds():
        ends = []
        for i in sampled:
            w = theta
            for x, y in p.batches(i, t):
                w = w - LR * (slope(w, x, y) - g[i] + alpha * (w - theta))
            g[i] = g[i] - alpha * (w - theta)
            ends.append(w)
        h = h - alpha / len(p.x) * sum(w - theta for w in ends)
        mean = np.mean(ends, axis=0)
        theta = mean - h / alpha
    return theta if scored == "server" else mean


def harmofl(p: Regression, window: float, perturbation: float) -> Array:
    """Jiang et al. 2022: all images get the mean amplitude; sharpness-aware steps; a plain mean."""
    raw = {i: np.fft.fft2(images(p.lab, i), norm="ortho") for i in p.x}
    amplitude = np.mean([np.abs(f).mean(axis=0) for f in raw.values()], axis=0)
    inside = inner_window(window)
    for i, f in raw.items():
        changed = np.where(inside, amplitude, np.abs(f)) * np.exp(1j * np.angle(f))
        p.x[i] = features(np.fft.ifft2(changed, norm="ortho").real)
    theta = p.start
    for t, sampled in p.rounds():
        ends = []
        for i in sampled:
            w = theta
            for x, y in p.batches(i, t):
                g = slope(w, x, y)
                w = w - LR * slope(w + perturbation * g / np.linalg.norm(g), x, y)
            ends.append(w)
        theta = np.mean(ends, axis=0)
    return theta


def feddg(p: Regression, window: float, bank_share: float, inner_lr: float, inner_clip: float) -> Array:
    """Liu et al. 2021: a step ahead, and there the gradient on images in the style of other clients' images."""
    inside = inner_window(window)
    raw = {i: np.fft.fft2(images(p.lab, i)) for i in p.x}
    bank = {}
    for i, f in raw.items():
        given = torch.randperm(len(f), generator=seeds.generator(p.lab.config.seed, "feddg", "bank", i))
        bank[i] = np.abs(f)[np.sort(given[: int(np.ceil(bank_share * len(f)))].numpy())]
    theta = p.start
    for t, sampled in p.rounds():
        ends = {}
        for i in sampled:
            w, others = theta, [bank[j] for j in sorted(bank) if j != i]
            for step, index in enumerate(order(p.lab, i, t)):
                x, y, f = p.x[i][index.numpy()], p.y[i][index.numpy()], raw[i][index.numpy()]
                g = seeds.generator(p.lab.config.seed, "feddg", t, i, step)
                owners = torch.randint(len(others), (len(x),), generator=g)
                style = np.stack([others[o][int(torch.randint(len(others[o]), (1,), generator=g))] for o in owners])
                changed = np.where(inside, style, np.abs(f)) * np.exp(1j * np.angle(f))
                ahead = w - inner_lr * np.clip(slope(w, x, y), -inner_clip, inner_clip)
                w = w - LR * (slope(w, x, y) + slope(ahead, features(np.fft.ifft2(changed).real.clip(0, 1)), y))
            ends[i] = w
        theta = p.mean(ends)
    return theta


def inner_window(share: float) -> Any:
    """Return where both frequencies are at most `share` of the side, as it stands in a whole transform."""
    near = np.abs(np.fft.fftfreq(16, 1 / 16)) <= int(share * 16)
    return near[:, None] & near[None]


def fedgma(p: Regression, tau: float, hard: bool = False) -> Array:
    """Tenison et al. 2023: the mask is 1 where signs agree, the agreement elsewhere. Hard: Parascandolo et al. 2021."""
    theta = p.start
    for t, sampled in p.rounds():
        ends = p.ends(theta, t, sampled)
        agreement = np.abs(np.mean([np.sign(w - theta) for w in ends.values()], axis=0))
        mask = np.where(agreement >= tau, 1.0, 0.0 if hard else agreement)
        if hard:
            for part in (mask[:, :16], mask[:, 16:]):  # weight and bias are two tensors
                part /= part.mean() or 1.0
        theta = theta + mask * (p.mean(ends) - theta)
    return theta


def and_mask(p: Regression, tau: float) -> Array:
    return fedgma(p, tau, hard=True)


def combined(p: Regression, rule: Callable[[Array, dict[str, Array]], Array]) -> Array:
    theta = p.start
    for t, sampled in p.rounds():
        theta = rule(theta, p.ends(theta, t, sampled))
    return theta


def median(p: Regression) -> Array:
    """Yin et al. 2018, Definition 1."""
    return combined(p, lambda theta, ends: np.median([*ends.values()], axis=0))


def trimmed_mean(p: Regression, beta: float) -> Array:
    """Yin et al. 2018, Definition 2: without the beta m largest and the beta m smallest."""
    cut = round(beta * 5)
    return combined(p, lambda theta, ends: np.sort([*ends.values()], axis=0)[cut : 5 - cut].mean(axis=0))


def multikrum(p: Regression, hostile: float, chosen: int) -> Array:
    """Blanchard et al. 2017, section 4: the sum of squared distances to the n - f - 2 closest others."""

    def rule(theta: Array, ends: dict[str, Array]) -> Array:
        f, scores = round(hostile * 5), {}
        for i, w in ends.items():
            others = sorted(float(((w - other) ** 2).sum()) for j, other in ends.items() if j != i)
            scores[i] = sum(others[: 5 - f - 2])
        return np.mean([ends[i] for i in sorted(scores, key=scores.__getitem__)[: chosen or 5 - f]], axis=0)

    return combined(p, rule)


def clipped_mean(p: Regression, bound: float) -> Array:
    """Sun et al. 2019: no update is longer than M."""

    def rule(theta: Array, ends: dict[str, Array]) -> Array:
        return theta + p.mean({i: (w - theta) * min(1.0, bound / float(np.linalg.norm(w - theta))) for i, w in ends.items()})

    return combined(p, rule)


ADAPTIVE = {"server_step": 0.05, "beta1": 0.8, "beta2": 0.7, "tau": 0.02}
REFERENCES: dict[str, tuple[str, dict[str, Any], Callable[..., Array]]] = {
    "fedavg": ("fedavg", {}, fedavg),
    "fedprox": ("fedprox", {"mu": 0.8}, fedprox),
    "fedavgm": ("fedavgm", {"beta": 0.7, "server_step": 1.3}, fedavgm),
    "fedadam": ("fedadam", ADAPTIVE, fedopt),
    "fedyogi": ("fedyogi", ADAPTIVE, fedyogi),
    "scaffold": ("scaffold", {"server_step": 0.8}, scaffold),
    "feddyn": ("feddyn", {"alpha": 0.3, "scored": "server"}, feddyn),
    "feddyn, mean": ("feddyn", {"alpha": 0.3, "scored": "mean"}, feddyn),
    "harmofl": ("harmofl", {"window": 0.07, "perturbation": 0.3}, harmofl),
    "harmofl, brightness": ("harmofl", {"window": 0.0, "perturbation": 0.05}, harmofl),
    "feddg": ("feddg", {"window": 0.07, "bank_share": 0.5, "inner_lr": 0.5, "inner_clip": 0.03}, feddg),
    "fedgma": ("fedgma", {"tau": 0.6}, fedgma),
    "and_mask": ("and_mask", {"tau": 0.5}, and_mask),
    "median": ("median", {}, median),
    "trimmed_mean": ("trimmed_mean", {"beta": 0.2}, trimmed_mean),
    "multikrum": ("multikrum", {"hostile": 0.2, "chosen": 0}, multikrum),
    "krum": ("multikrum", {"hostile": 0.2, "chosen": 1}, multikrum),
    "clipped_mean": ("clipped_mean", {"bound": 0.2}, clipped_mean),
}
ROBUST = {"median", "trimmed_mean", "multikrum", "clipped_mean"}


@pytest.mark.parametrize("case", REFERENCES)
def test_three_rounds_are_the_papers(case: str, tmp_path: Path) -> None:
    strategy, options, reference = REFERENCES[case]
    lab = lab_of(tmp_path / "1", strategy, options, everybody=strategy in ROBUST)
    expected = reference(Regression(lab), **options)
    assert_same(matrix(lab.run().shared), expected)
    if strategy != "fedavg":
        away = np.abs(expected - fedavg(Regression(lab))).max()
        assert away > 1e-3, f"FedAvg would pass as well: {away}"


def test_dittos_own_models_are_the_papers(tmp_path: Path) -> None:
    """Li et al. 2021, Algorithm 1: v_i <- v_i - eta (grad L_i(v_i) + lambda (v_i - w^t)), from the first model received."""
    lab = lab_of(tmp_path, "ditto", {"personal_pull": 0.8})
    p = Regression(lab)
    theta: Array = p.start
    own: dict[str, Array] = {}
    for t, sampled in p.rounds():
        for i in sampled:
            v = own.get(i, theta)
            for x, y in p.batches(i, t, phase=1):
                v = v - LR * (slope(v, x, y) + 0.8 * (v - theta))
            own[i] = v
        theta = p.mean(p.ends(theta, t, sampled))
    assert_same(matrix(lab.run().shared), theta)
    for i, v in own.items():
        assert_same(matrix(lab.private(i), STATE + "ditto/"), v)
        assert np.abs(v - theta).max() > 1e-2
