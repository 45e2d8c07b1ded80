"""Statistics of a comparison: mean and spread over seeds, and paired differences between two methods.

Two methods are compared on the seeds that both have, so that what a seed decides (partition, schedule, initial weights) cancels.
With seed means d_1..d_n of the differences, the interval is given twice: the percentile bootstrap over seeds, which is too
narrow for few seeds, and Student's  mean ± t_{.975, n-1} · s / sqrt(n),  which assumes normal differences.
Beside it stands the p of the same t-test, Holm-adjusted within a family of comparisons: with thirty methods some interval leaves
out 0 where nothing differs. Wilcoxon's signed-rank test runs over all (participation, seed) pairs and is adjusted alike
(S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979).
Where the difference is the same on every seed, s = 0 says nothing of the spread: an accuracy is a multiple of 1/n, so with two or
three seeds that is common by chance. There is neither an interval nor a t-test then.

A row is a line of `table.csv`: text by column. A method is named `strategy`, or `strategy:variant` where there is a variant.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from omnifm.errors import ConfigError

Rows = Sequence[Mapping[str, str]]
Interval = tuple[float, float]

BOOTSTRAP_RESAMPLES = 10_000
# With five pairs the smallest two-sided p is 2/2^5 = .0625: the test could not reject at 5 % whatever the data say.
WILCOXON_MIN_PAIRS = 6
NO_SPREAD = "the same difference on every seed: no spread to test against"
# The scores of a table are rounded to 6 decimals: differences that are equal may be 2e-6 apart in it.
_ROUNDING = 3e-6


@dataclass(frozen=True)
class Summary:
    """One method at one participation on one metric. `std` (n-1 in the denominator) needs two seeds; None = undefined."""

    method: str
    participation: float
    metric: str
    mean: float | None
    std: float | None
    count: int
    undefined: int


@dataclass(frozen=True)
class Paired:
    """Method `a` minus method `b` on one metric.

    `by_seed` has the difference of each seed, a mean where participations are pooled; `seeds` counts them, they are behind the
    mean and the intervals. `pairs` counts the (participation, seed) pairs behind the rank test, `undefined` the pairs that both
    methods ran but one has no score for. `ttest` is the p of the paired t-test over the seeds; `ttest_holm` and `holm` are
    adjusted, by `compare`. `note` says why a value is None.
    """

    a: str
    b: str
    metric: str
    participation: float | None
    seeds: int
    pairs: int
    undefined: int
    difference: float | None
    by_seed: Mapping[str, float]
    bootstrap: Interval | None
    student: Interval | None
    ttest: float | None
    ttest_holm: float | None
    wilcoxon: float | None
    holm: float | None
    note: str


def method_of(row: Mapping[str, str]) -> str:
    """Return the name of a row's method: its strategy, with the variant after a colon where there is one."""
    variant = row.get("variant", "")
    return f"{row['strategy']}:{variant}" if variant else row["strategy"]


def methods(rows: Rows) -> list[str]:
    """Return the methods in the order of the table."""
    return list(dict.fromkeys(method_of(row) for row in rows))


def participations(rows: Rows) -> list[float]:
    """Return the participations in rising order."""
    return sorted({float(row["participation"]) for row in rows})


def score(row: Mapping[str, str], metric: str) -> float | None:
    """Return a row's score, or None where it is undefined (empty, or not a finite number)."""
    text = row.get(metric, "")
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None


def summarise(rows: Rows, metrics: Sequence[str]) -> list[Summary]:
    """Return mean and standard deviation over the seeds, for each method, participation and metric, in table order.

    Undefined scores do not enter the mean; they are counted in `undefined`.
    """
    groups: dict[tuple[str, float], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        groups[method_of(row), float(row["participation"])].append(row)
    return [_summary(method, share, metric, group) for (method, share), group in groups.items() for metric in metrics]


def _summary(method: str, participation: float, metric: str, group: Rows) -> Summary:
    values = [value for row in group if (value := score(row, metric)) is not None]
    mean = float(np.mean(values)) if values else None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(method, participation, metric, mean, std, len(values), len(group) - len(values))


def paired(rows: Rows, a: str, b: str, metric: str, participation: float | None = None) -> Paired:
    """Return the paired difference `a` minus `b`; over all participations that both have, or over the given one.

    Raises:
        ConfigError: a method is not in the table.
    """
    known = methods(rows)
    for name in (a, b):
        if name not in known:
            raise ConfigError(f"method {name!r} is not in the table; it has {', '.join(known)}")
    left, right = (_scores(rows, name, metric, participation) for name in (a, b))
    shared = [key for key in left if key in right]
    differences: dict[str, list[float]] = defaultdict(list)
    for key in shared:
        first, second = left[key], right[key]
        if first is not None and second is not None:
            differences[key[1]].append(first - second)
    pairs = [d for group in differences.values() for d in group]
    by_seed = {seed: float(np.mean(group)) for seed, group in differences.items()}
    means = np.array(list(by_seed.values()))
    return Paired(
        a=a,
        b=b,
        metric=metric,
        participation=participation,
        seeds=len(means),
        pairs=len(pairs),
        undefined=len(shared) - len(pairs),
        difference=float(means.mean()) if len(means) else None,
        by_seed=by_seed,
        bootstrap=_bootstrap_interval(means, f"{a}|{b}|{metric}|{participation}"),
        student=_student_interval(means),
        ttest=_ttest(means),
        ttest_holm=None,
        wilcoxon=_wilcoxon(pairs),
        holm=None,
        note=_note(means, len(pairs)),
    )


def _scores(rows: Rows, method: str, metric: str, participation: float | None) -> dict[tuple[float, str], float | None]:
    chosen = [row for row in rows if method_of(row) == method and participation in (None, float(row["participation"]))]
    return {(float(row["participation"]), row["seed"]): score(row, metric) for row in chosen}


def _note(means: np.ndarray, pairs: int) -> str:
    if len(means) == 0:
        return "no seed that both methods have a score for"
    if len(means) == 1:
        return "one seed: no interval, no test"
    few = "" if pairs >= WILCOXON_MIN_PAIRS else f"Wilcoxon needs {WILCOXON_MIN_PAIRS} pairs, there are {pairs}"
    return "; ".join(filter(None, ("" if _spread(means) else NO_SPREAD, few)))


def _spread(means: np.ndarray) -> float:
    """Return the standard deviation of the seeds' differences; 0 where there is none, or no more than the table's rounding."""
    found = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    return found if found > _ROUNDING else 0.0


def compare(rows: Rows, reference: str, metric: str, participation: float | None = None) -> list[Paired]:
    """Compare `reference` with every other method, in table order; both tests are adjusted over these comparisons.

    Raises:
        ConfigError: the reference is not in the table.
    """
    results = [paired(rows, reference, name, metric, participation) for name in methods(rows) if name != reference]
    by_t, by_rank = (_adjusted(values) for values in ([r.ttest for r in results], [r.wilcoxon for r in results]))
    return [replace(result, ttest_holm=t, holm=rank) for result, t, rank in zip(results, by_t, by_rank, strict=True)]


def _adjusted(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p values; tests that could not be done are no part of the family."""
    found = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(found) for p in p_values]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the order given: p~_(i) = max_{j<=i} min(1, (n-j+1) p_(j)) for sorted p_(1..n)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _bootstrap_interval(means: np.ndarray, name: str) -> Interval | None:
    if not _spread(means):
        return None
    # torch comes with omnifm.seeds; a report of a single run must not pay for it.
    from omnifm.seeds import numpy_generator

    draws = numpy_generator(0, "report", "bootstrap", name).integers(len(means), size=(BOOTSTRAP_RESAMPLES, len(means)))
    low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _student_interval(means: np.ndarray) -> Interval | None:
    if not (spread := _spread(means)):
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(means) - 1) * spread / math.sqrt(len(means)))
    return float(means.mean()) - half, float(means.mean()) + half


def _ttest(means: np.ndarray) -> float | None:
    """Return the two-sided p of t = mean / (s / sqrt(n)) with n-1 degrees of freedom; None without a spread."""
    if not (spread := _spread(means)):
        return None
    from scipy.stats import t

    return 2 * float(t.sf(abs(float(means.mean())) / (spread / math.sqrt(len(means))), len(means) - 1))


def _wilcoxon(pairs: Sequence[float]) -> float | None:
    if len(pairs) < WILCOXON_MIN_PAIRS:
        return None
    if not any(pairs):
        return 1.0
    from scipy.stats import wilcoxon

    return float(wilcoxon(pairs).pvalue)
