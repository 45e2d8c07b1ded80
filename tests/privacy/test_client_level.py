"""Client-level privacy: what is clipped, how much noise there is, what it is worth, and what cannot have it."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

pytest.importorskip("cryptography")
pytest.importorskip("dp_accounting")

from omnifm import build
from omnifm.config import PrivacyConfig, SecurityConfig
from omnifm.errors import ConfigError, FederationError
from omnifm.federation.aggregation import shortened, update_norm
from omnifm.federation.private import Noise, longest_update, statement
from omnifm.privacy.accounting import SLACK, epsilon, spent
from tests.support import Altered, Lab, Spy, differing, make_lab, spy

EQUAL = {"federation__weighting": "equal"}


def private(folder: Path, strategy: str = "fedavg", clip: float = 0.05, noise: float = 0.0, **changes: Any) -> Lab:
    settings = {"privacy__clip": clip, "privacy__noise_multiplier": noise, "privacy__noise": "seeded"}
    return make_lab(folder, strategy, **{**EQUAL, **settings, **changes})


# ---------------------------------------------------------------------- clipping
@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedadam", "fedper"])
def test_a_bound_that_nobody_reaches_and_no_noise_change_no_bit(strategy: str, tmp_path: Path) -> None:
    plain = make_lab(tmp_path / "plain", strategy, **EQUAL)
    lab = private(tmp_path / "private", strategy, clip=1e30)
    assert differing(lab.snapshot(lab.run()), plain.snapshot(plain.run())) == []


def test_a_long_update_is_shortened_to_the_bound_and_keeps_its_direction() -> None:
    start = {"a": torch.randn(40, 50), "b": torch.randn(7)}
    far = {n: t + torch.randn_like(t) for n, t in start.items()}
    for bound in (0.01, 1.0, 20.0):
        near = shortened(far, start, bound)
        assert update_norm(near, start) == pytest.approx(bound, rel=1e-4 if bound < 1 else 1e-6)
        factor = bound / update_norm(far, start)
        for name in start:
            torch.testing.assert_close(near[name], start[name] + factor * (far[name] - start[name]), atol=1e-6, rtol=1e-6)
    assert shortened(far, start, 1e3) is far


def test_no_update_that_leaves_a_client_is_longer_than_the_bound(tmp_path: Path) -> None:
    free, bound = make_lab(tmp_path / "free", engine=Spy), private(tmp_path / "bound", clip=0.05, engine=Spy)
    for lab in (free, bound):
        lab.run()
    lengths = [[update_norm(r.tensors, lab.untrained) for r in spy(lab).trained(0)] for lab in (free, bound)]
    assert min(lengths[0]) > 0.05 and lengths[1] == pytest.approx([0.05] * 4, rel=1e-4)
    assert max(lengths[1]) <= 0.05 * (1 + SLACK)


def test_the_mean_is_that_of_the_shortened_updates(tmp_path: Path) -> None:
    free, bound = make_lab(tmp_path / "1", engine=Spy, federation__rounds=1), private(tmp_path / "2", federation__rounds=1)
    free.run()
    start = free.untrained
    expected = {n: t.double() for n, t in start.items()}
    for reply in spy(free).trained():
        length = math.sqrt(sum(float((t.double() - start[n].double()).square().sum()) for n, t in reply.tensors.items()))
        for n, t in reply.tensors.items():
            expected[n] += (t.double() - start[n].double()) * min(1, 0.05 / length) / 4
    for name, tensor in bound.run().shared.items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-7, rtol=1e-6)


def test_a_client_that_does_not_clip_is_refused(tmp_path: Path) -> None:
    lab = private(tmp_path, clip=0.05)
    bent = {n: t * 2 for n, t in lab.untrained.items()}
    lab.engine = Altered(lab.site, lambda r: replace(r, tensors=bent) if r.client == "c" else r)
    with pytest.raises(FederationError, match=r"client c, round 0: an update of norm \S+, at most 0.05005 are taken"):
        lab.run()


@pytest.mark.parametrize(("norm", "clip", "longest"), [(0, 0, 0), (2, 0, 2), (0, 1, 1 + SLACK), (2, 1, 1 + SLACK), (0.5, 1, 0.5)])
def test_the_tighter_bound_counts(norm: float, clip: float, longest: float) -> None:
    assert longest_update(SecurityConfig(max_update_norm=norm), PrivacyConfig(clip=clip)) == pytest.approx(longest)


# ---------------------------------------------------------------------- noise
SHAPES = {"a": torch.zeros(300, 400), "b": torch.zeros(1000)}


def draws(found: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in found.values()])


@pytest.mark.parametrize(("multiplier", "clip", "clients"), [(1.0, 0.5, 1), (0.3, 2.0, 4), (5.0, 1.0, 10)])
def test_noise_is_normal_with_the_stated_deviation(multiplier: float, clip: float, clients: int) -> None:
    noise = Noise(PrivacyConfig(noise_multiplier=multiplier, clip=clip, noise="seeded"), 3)
    values = draws(noise.offsets(SHAPES, 2, clients))
    sigma, count = multiplier * clip / clients, len(values)
    assert values.dtype is torch.float64 and count == 121_000
    # sum (x / sigma)^2 is chi-square of so many degrees of freedom.
    assert 1e-3 < stats.chi2.cdf(float((values / sigma).square().sum()), count) < 1 - 1e-3
    assert stats.kstest(values.numpy() / sigma, "norm").pvalue > 1e-3
    assert abs(float(values.mean())) < 4 * sigma / math.sqrt(count)


def test_noise_is_of_its_round_and_seed_or_of_nothing() -> None:
    seeded = PrivacyConfig(noise_multiplier=1.0, clip=1.0, noise="seeded")
    found = [draws(Noise(seeded, seed).offsets(SHAPES, index, 4)) for seed, index in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(found[0], found[1])
    assert all(not torch.equal(found[0], other) for other in found[2:])
    secret = PrivacyConfig(noise_multiplier=1.0, clip=1.0)
    twice = [draws(Noise(secret, 0).offsets(SHAPES, 0, 4)) for _ in range(2)]
    assert not torch.equal(*twice) and not torch.equal(found[0], twice[0])
    assert Noise(PrivacyConfig(clip=1.0), 0).offsets(SHAPES, 0, 4) == {}


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_added_to_the_mean_once_a_round(secure: bool, tmp_path: Path) -> None:
    more = {"federation__rounds": 1, "privacy__secure_aggregation": secure, "privacy__secure_range": 0.1}
    quiet, loud = (private(tmp_path / str(z), clip=0.05, noise=z, **more) for z in (0.0, 2.0))
    expected = Noise(loud.config.privacy, 0).offsets(loud.untrained, 0, 4)
    before, after = quiet.run().shared, loud.run().shared
    for name, offset in expected.items():
        torch.testing.assert_close(after[name].double() - before[name].double(), offset, atol=1e-6, rtol=0)
    moved = torch.cat([o.flatten() for o in expected.values()])
    assert float(moved.std()) == pytest.approx(2.0 * 0.05 / 4, rel=0.1)


def test_an_optimiser_at_the_server_sees_the_noise(tmp_path: Path) -> None:
    """FedAvgM's first step is the mean itself times eta: its noise is the mean's."""
    quiet, loud = (private(tmp_path / str(z), "fedavgm", clip=0.05, noise=z, federation__rounds=1) for z in (0.0, 2.0))
    expected = Noise(loud.config.privacy, 0).offsets(loud.untrained, 0, 4)
    before, after = quiet.run().shared, loud.run().shared
    ratio = [float((after[n] - before[n]).norm() / o.norm()) for n, o in expected.items()]
    assert max(ratio) == pytest.approx(min(ratio), rel=1e-3) and min(ratio) > 0


# ---------------------------------------------------------------------- what it is worth
def exact(sigma: float, rounds: int, delta: float) -> float:
    """Return epsilon of `rounds` Gaussian releases, exactly: Balle and Wang, ICML 2018, Theorem 8, with mu = sqrt(T) / sigma."""
    mu = math.sqrt(rounds) / sigma

    def excess(e: float) -> float:
        return float(stats.norm.cdf(mu / 2 - e / mu) - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu)) - delta

    return float(optimize.brentq(excess, 0, 500))


def renyi(sigma: float, rounds: int, delta: float) -> float:
    """Return epsilon by Renyi divergence alpha T / (2 sigma^2): Canonne, Kamath, Steinke, 2020, Proposition 12."""

    def at(alpha: float) -> float:
        loss = rounds * alpha / (2 * sigma**2)
        return loss + math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1)

    return float(optimize.minimize_scalar(at, bounds=(1.01, 2000), method="bounded").fun)


@pytest.mark.parametrize(("z", "rounds", "delta"), [(2.0, 1, 1e-5), (4.0, 20, 1e-5), (10.0, 100, 1e-6), (1.0, 5, 1e-3)])
def test_epsilon_with_everybody_is_that_of_the_closed_forms(z: float, rounds: int, delta: float) -> None:
    sigma = z / (2 * (1 + SLACK))
    found = epsilon(z, delta, rounds)
    assert found == pytest.approx(renyi(sigma, rounds, delta), rel=5e-3)
    assert exact(sigma, rounds, delta) < found < 1.35 * exact(sigma, rounds, delta)


def theorem_27(sigma: float, gamma: float, alpha: int) -> float:
    """Return the bound of Wang, Balle and Kasiviswanathan; B(l) = sum_i (-1)^i C(l, i) e^{(i - 1) eps(i)} in 60 digits."""
    with mpmath.workdps(60):
        cgf = [mpmath.mpf(i * (i - 1)) / (2 * mpmath.mpf(sigma) ** 2) for i in range(alpha + 3)]

        def b(order: int) -> Any:
            return abs(mpmath.fsum((-1) ** i * mpmath.binomial(order, i) * mpmath.e ** cgf[i] for i in range(order + 1)))

        total = mpmath.mpf(1)
        for j in range(2, alpha + 1):
            if j == 2:
                term = min(4 * (mpmath.e ** cgf[2] - 1), 2 * mpmath.e ** cgf[2])
            else:
                term = min(4 * mpmath.sqrt(b(2 * (j // 2)) * b(2 * -(-j // 2))), 2 * mpmath.e ** cgf[j])
            total += mpmath.mpf(gamma) ** j * mpmath.binomial(alpha, j) * term
        return float(mpmath.log(total) / (alpha - 1))


@pytest.mark.parametrize(("z", "clients", "size", "rounds"), [(2.0, 100, 10, 50), (4.0, 20, 4, 20), (3.0, 10, 9, 5)])
def test_epsilon_of_a_sample_is_that_of_the_theorem(z: float, clients: int, size: int, rounds: int) -> None:
    sigma, delta = z / (2 * (1 + SLACK)), 1e-5
    orders = [2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32]
    by_order = {a: rounds * theorem_27(sigma, size / clients, a) for a in orders}
    expected = min(loss + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a, loss in by_order.items())
    found = epsilon(z, delta, rounds, (size, clients))
    assert found <= expected * (1 + 1e-9) and found == pytest.approx(expected, rel=0.05)


def rounds_of(count: int, size: int, clients: str = "abcdefgh") -> list[Sequence[str]]:
    return list(itertools.islice(itertools.cycle(itertools.combinations(clients, size)), count))


def test_a_sample_is_worth_something_to_whoever_does_not_know_it() -> None:
    everybody = spent(4.0, 1e-5, 8, rounds_of(20, 8))
    assert everybody.epsilon == everybody.participation_known == epsilon(4.0, 1e-5, 20)
    few = spent(4.0, 1e-5, 8, rounds_of(28, 2))
    assert few.epsilon == few.participation_known == epsilon(4.0, 1e-5, 7)  # each of 8 is in 7 of the 28 pairs
    turns = [tuple(str(i % 100) for i in range(first, first + 2)) for first in range(0, 400, 2)]
    many = spent(4.0, 1e-5, 100, turns)
    assert many.epsilon == epsilon(4.0, 1e-5, 200, (2, 100)) < many.participation_known == epsilon(4.0, 1e-5, 4)
    assert spent(0.0, 1e-5, 8, rounds_of(3, 2)).epsilon == math.inf
    with pytest.raises(ValueError, match="rounds of"):
        spent(1.0, 1e-5, 8, [("a",), ("a", "b")])


# ---------------------------------------------------------------------- what cannot have it
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "scaffold": ("scaffold", {}, "the server of strategy scaffold needs more of the clients' tensors than their mean"),
    "local": ("local", {}, "needs more of the clients' tensors"),
    "neighbourhoods": ("omnifm", {}, "needs more of the clients' tensors"),
    "prototypes": ("omnifm", {"strategies__omnifm__aggregation": "mean"}, "a client also sends prototypes of its images"),
    "running statistics": ("fedavg", {"model__norm": "batch"}, "is a statistic of images"),
    "unequal weights": ("fedavg", {"federation__weighting": "examples"}, "set federation.weighting = 'equal'"),
    "rounds without some": ("fedavg", {"security__refused": "skip"}, "leave security.refused at 'end'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_private_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    strategy, changes, complaint = REFUSED[name]
    lab = private(tmp_path, strategy, **changes)
    with pytest.raises(ConfigError, match=f"^privacy.clip: .*{complaint}") as caught:
        build.make_schedule(lab.config, lab.site, list(lab.num_train))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", ["fedavg", "fedper", "fedadam", "moon"])
def test_what_can_be_private_is_not(strategy: str, tmp_path: Path) -> None:
    lab = private(tmp_path, strategy, noise=1.0)
    assert build.make_schedule(lab.config, lab.site, list(lab.num_train)) == tuple(lab.schedule)


def test_noise_needs_a_scale() -> None:
    with pytest.raises(ConfigError, match=r"in units of privacy\.clip"):
        make_lab(Path("nowhere"), privacy__noise_multiplier=1.0)


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("omnifm.privacy.accounting.import_module", missing)
    lab = private(tmp_path, noise=1.0)
    with pytest.raises(ConfigError, match=r"pip install 'omnifm\[privacy\]'"):
        build.make_schedule(lab.config, lab.site, list(lab.num_train))


def test_the_statement_gives_every_number_that_epsilon_depends_on(tmp_path: Path) -> None:
    lab = private(tmp_path, noise=2.0, clip=0.5, federation__rounds=3, privacy__secure_aggregation=True)
    found = statement(lab.config, lab.num_train, lab.schedule)
    assert found is not None
    expected = {"delta": 1e-5, "clip": 0.5, "noise_multiplier": 2.0, "noise": "seeded", "rounds": 3, "clients": 4}
    assert expected.items() <= found["client_level"].items() and found["client_level"]["clients_per_round"] == 4
    assert found["client_level"]["epsilon"] == epsilon(2.0, 1e-5, 3)
    assert found["secure_aggregation"]["threshold"] == 3
    assert statement(make_lab(tmp_path).config, lab.num_train, lab.schedule) is None
    quiet = statement(private(tmp_path, noise=0.0).config, lab.num_train, lab.schedule)
    assert quiet is not None and quiet["client_level"]["epsilon"] is None
