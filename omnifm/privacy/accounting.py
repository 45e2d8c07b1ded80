"""What client-level noise is worth: epsilon for a delta, by Renyi accounting (the `dp-accounting` package, extra `privacy`).

    M(D) = sum_{i in S} clip(Delta_i, C) + N(0, (z C)^2 I),      S: m of n clients, drawn without replacement, T rounds

Neighbours: two federations of n clients of which one client's data differ (replace one). The sum then moves by at most
2 C (1 + slack), so the mechanism's noise is z / (2 (1 + slack)) sensitivities. Y.-X. Wang, B. Balle, S. Kasiviswanathan,
"Subsampled Renyi differential privacy and analytical moments accountant", AISTATS 2019, Theorem 27, for the sampling; I. Mironov,
"Renyi differential privacy", CSF 2017, for the composition. Example: H. B. McMahan et al., "Learning differentially private
recurrent language models", ICLR 2018, with sampling by coin instead.

What clients tell of their images' spectra is a Gaussian mechanism of its own (`Releases`). It and the weights are about the same
data, and each release may depend on those before it: adaptive composition, for which the Renyi divergences of all of them add up.

Sampling helps against whoever does not know who took part. Against the others a client's loss is that of its own rounds, and the
bound is that of the client with most of them: `participation_known`.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from omnifm.errors import ConfigError

SLACK = 1e-3
"""By how much a clipped update may be longer than C: rounding of weights to float32, of sums to a ring."""
LEAST_NOISE = 1e-3
"""Noise multiplier below which epsilon is infinite. With it one step is worth 500,000 already, a promise of nothing; far below it
1 / z^2 leaves what floating-point numbers hold, and of a divergence that is no number dp-accounting makes an epsilon of 0."""


@dataclass(frozen=True)
class Releases:
    """Gaussian releases besides the weights.

    Attributes:
        noise_multiplier: standard deviation of the noise, in sensitivities under the neighbours that are counted.
        count: how many.
    """

    noise_multiplier: float
    count: int


NO_RELEASES = Releases(math.inf, 0)


@dataclass(frozen=True)
class Spent:
    """Epsilon of a run.

    Attributes:
        epsilon: for whoever does not know who took part in which round.
        participation_known: for whoever does.
    """

    epsilon: float
    participation_known: float


def spent(noise_multiplier: float, delta: float, clients: int, schedule: Sequence[Sequence[str]]) -> Spent:
    """Return epsilon of a schedule whose rounds all have one size; infinite without noise.

    Args:
        noise_multiplier: z.
        delta: of the guarantee.
        clients: n, of the federation.
        schedule: who takes part, by round.

    Raises:
        ConfigError: the extra is not installed.
        ValueError: rounds differ in size.
    """
    sizes = {len(names) for names in schedule}
    if len(sizes) != 1:
        raise ValueError(f"rounds of {sorted(sizes)} clients")
    if not noise_multiplier:
        return Spent(math.inf, math.inf)
    most = max(Counter(name for names in schedule for name in names).values())
    known = epsilon(noise_multiplier, delta, most)
    size = sizes.pop()
    sampled = epsilon(noise_multiplier, delta, len(schedule), (size, clients)) if size < clients else known
    # Both hold for whoever does not know the schedule, so the smaller does.
    return Spent(min(sampled, known), known)


@dataclass(frozen=True)
class Steps:
    """Steps of DP-SGD.

    Attributes:
        noise_multiplier: standard deviation of the noise on a sum of gradients, in clips.
        rate: probability with which each example is drawn.
        count: how many.
    """

    noise_multiplier: float
    rate: float
    count: int


def epsilon_of_examples(
    noise_multiplier: float, delta: float, steps: int, rate: float, releases: Releases = NO_RELEASES
) -> float:
    """Return epsilon of so many steps of DP-SGD, each example drawn with probability `rate`, and of releases."""
    return epsilon_of_all(delta, [Steps(noise_multiplier, rate, steps)], [releases])


def epsilon_of_all(delta: float, steps: Iterable[Steps], releases: Iterable[Releases]) -> float:
    """Return epsilon of everything that one client's examples went into, of any noise.

    Infinite with a noise below LEAST_NOISE. Neighbours: one example more or less (the number of examples counts as known).
    I. Mironov, K. Talwar, L. Zhang, "Renyi differential privacy of the sampled Gaussian mechanism", arXiv 1908.10530, 2019.
    """
    trained, told = [s for s in steps if s.count], [r for r in releases if r.count]
    if not all(noise >= LEAST_NOISE for noise in (*(s.noise_multiplier for s in trained), *(r.noise_multiplier for r in told))):
        return math.inf
    if not trained and not told:
        return 0.0
    accounting = _library()
    accountant = accounting.rdp.RdpAccountant(neighboring_relation=accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for s in trained:
        accountant.compose(accounting.PoissonSampledDpEvent(s.rate, accounting.GaussianDpEvent(s.noise_multiplier)), s.count)
    for r in told:
        accountant.compose(accounting.GaussianDpEvent(r.noise_multiplier), r.count)
    return _read(accountant, delta)


def _read(accountant: Any, delta: float) -> float:
    """Return an accountant's epsilon; infinite where a divergence is no number, of which the library makes 0."""
    return math.inf if any(math.isnan(divergence) for divergence in accountant.rdp) else float(accountant.get_epsilon(delta))


def stated(found: float) -> float | None:
    """Return an epsilon as `metrics.json` has it: None where it is infinite."""
    return found if math.isfinite(found) else None


def _library() -> Any:
    try:
        found = import_module("dp_accounting")
    except ModuleNotFoundError:
        raise ConfigError("the accounting of privacy needs the extra: pip install 'omnifm[privacy]'") from None
    # It warns of every order whose series does not converge and goes on without it, which never makes epsilon smaller.
    logging.getLogger("absl").addFilter(_tells_more_than_orders)
    return found


def _tells_more_than_orders(record: logging.LogRecord) -> bool:
    return "Excluding this order" not in record.getMessage()


def epsilon(
    noise_multiplier: float,
    delta: float,
    rounds: int,
    sampling: tuple[int, int] | None = None,
    releases: Releases = NO_RELEASES,
) -> float:
    """Return epsilon of so many rounds, with a draw of m of n (`sampling`) or with the client in all of them, and of releases.

    Infinite with a noise below LEAST_NOISE.
    """
    noises = [noise_multiplier] * bool(rounds) + [releases.noise_multiplier] * bool(releases.count)
    if not all(noise >= LEAST_NOISE for noise in noises):
        return math.inf
    accounting = _library()
    accountant = accounting.rdp.RdpAccountant(neighboring_relation=accounting.NeighboringRelation.REPLACE_ONE)
    event = accounting.GaussianDpEvent(noise_multiplier / (2 * (1 + SLACK)))
    if sampling:
        event = accounting.SampledWithoutReplacementDpEvent(sampling[1], sampling[0], event)
    if rounds:
        accountant.compose(event, rounds)
    if releases.count:
        accountant.compose(accounting.GaussianDpEvent(releases.noise_multiplier), releases.count)
    return _read(accountant, delta) if rounds or releases.count else 0.0
