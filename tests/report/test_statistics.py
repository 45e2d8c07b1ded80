"""Oracles: scipy's one-sample t interval, closed testing for Holm, exact signed-rank counts, numpy."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_rel

from omnifm.errors import ConfigError
from omnifm.report import statistics

METRIC = "personal_accuracy"


def rows_of(scores: dict[str, dict[tuple[float, int], float | None]]) -> list[dict[str, str]]:
    """One row per method, participation and seed; None is an empty field."""
    return [
        {
            "strategy": method.partition(":")[0],
            "variant": method.partition(":")[2],
            "participation": str(share),
            "seed": str(seed),
            METRIC: "" if value is None else str(value),
        }
        for method, cells in scores.items()
        for (share, seed), value in cells.items()
    ]


def by_seed(values: list[float | None], share: float = 0.2) -> dict[tuple[float, int], float | None]:
    return {(share, seed): value for seed, value in enumerate(values)}


def test_summary_is_the_sample_mean_and_deviation() -> None:
    rows = rows_of({"a": by_seed([0.5, 0.7, 0.9]), "a:x": by_seed([0.25])})
    first, second = statistics.summarise(rows, [METRIC])
    assert (first.method, first.participation, first.count, first.undefined) == ("a", 0.2, 3, 0)
    assert first.mean == pytest.approx(0.7)
    assert first.std == pytest.approx(0.2)
    assert (second.method, second.mean, second.std) == ("a:x", 0.25, None)


def test_undefined_scores_are_counted_not_averaged() -> None:
    rows = rows_of({"a": by_seed([0.5, None, float("nan")])})
    (found,) = statistics.summarise(rows, [METRIC])
    assert (found.mean, found.std, found.count, found.undefined) == (0.5, None, 1, 2)


def test_paired_difference_pairs_by_seed_whatever_the_order() -> None:
    rows = rows_of({"a": by_seed([0.9, 0.5, 0.7]), "b": by_seed([0.8, 0.2, 0.5])})
    found = statistics.paired(rows[::-1], "a", "b", METRIC, 0.2)
    expected = ttest_1samp([0.1, 0.3, 0.2], 0.0).confidence_interval(0.95)
    assert found.difference == pytest.approx(0.2)
    assert found.student == pytest.approx((expected.low, expected.high))
    assert (found.seeds, found.pairs, found.wilcoxon) == (3, 3, None)
    assert "needs 6 pairs" in found.note


def test_only_seeds_that_both_methods_have_count() -> None:
    rows = rows_of({"a": by_seed([0.9, 0.5, None]), "b": {(0.2, 1): 0.1, (0.2, 2): 0.1, (1.0, 0): 0.0}})
    found = statistics.paired(rows, "a", "b", METRIC)
    assert (found.seeds, found.pairs, found.undefined) == (1, 1, 1)
    assert found.by_seed == {"1": pytest.approx(0.4)}
    assert found.difference == pytest.approx(0.4)
    assert found.student is None and found.bootstrap is None
    assert "one seed" in found.note


def test_bootstrap_interval_agrees_with_all_resamples() -> None:
    differences = np.array([0.1, 0.3, 0.25, 0.05, 0.12, 0.0])
    rows = rows_of({"a": by_seed(list(0.5 + differences)), "b": by_seed([0.5] * 6)})
    draws = np.array(np.meshgrid(*[differences] * 6)).reshape(6, -1).mean(axis=0)
    found = statistics.paired(rows, "a", "b", METRIC).bootstrap
    assert found is not None
    assert found == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.004)
    assert found == statistics.paired(rows, "a", "b", METRIC).bootstrap


def test_pooled_interval_has_one_value_per_seed() -> None:
    a = by_seed([0.6, 0.9]) | by_seed([0.8, 0.9], 1.0)
    b = by_seed([0.5, 0.5]) | by_seed([0.5, 0.5], 1.0)
    found = statistics.paired(rows_of({"a": a, "b": b}), "a", "b", METRIC)
    expected = ttest_1samp([0.2, 0.4], 0.0).confidence_interval(0.95)
    assert (found.seeds, found.pairs) == (2, 4)
    assert found.by_seed == {"0": pytest.approx(0.2), "1": pytest.approx(0.4)}
    assert found.student == pytest.approx((expected.low, expected.high))


def test_wilcoxon_is_exact_from_six_pairs_on() -> None:
    a = by_seed([0.51, 0.52, 0.53, 0.54, 0.55, 0.56])
    rows = rows_of({"a": a, "b": by_seed([0.5] * 6), "c": by_seed([0.5] * 6)})
    first, second = statistics.compare(rows, "a", METRIC)
    # All six ranks on one side: 2 of 2^6 equally likely sign patterns are as extreme.
    assert first.wilcoxon == pytest.approx(2 / 64)
    assert (first.b, first.holm, second.b, second.holm) == ("b", pytest.approx(4 / 64), "c", pytest.approx(4 / 64))


def test_the_t_test_is_scipys_and_is_adjusted_over_the_methods() -> None:
    """Holm by hand for three: the least p times 3, the next times 2, and none below the one before it."""
    scores = {"a": [0.9, 0.82, 0.87], "b": [0.7, 0.65, 0.66], "c": [0.8, 0.77, 0.76], "d": [0.89, 0.84, 0.85], "e": [0.5]}
    rows = rows_of({name: by_seed(list(values)) for name, values in scores.items()})
    found = {r.b: r for r in statistics.compare(rows, "a", METRIC, 0.2)}
    p = {name: float(ttest_rel(scores["a"], scores[name]).pvalue) for name in "bcd"}
    assert {name: found[name].ttest for name in "bcd"} == pytest.approx(p)
    assert p["b"] < p["c"] < p["d"]
    expected = [3 * p["b"], max(3 * p["b"], 2 * p["c"]), max(2 * p["c"], p["d"])]
    assert [found[name].ttest_holm for name in "bcd"] == pytest.approx(expected)
    assert p["c"] < 0.05 < expected[1], "its interval leaves out 0, and of three methods that is not enough"
    assert (found["e"].ttest, found["e"].ttest_holm) == (None, None), "one seed is no test, and no part of the family"


def test_the_same_difference_on_every_seed_has_no_spread_to_test_against() -> None:
    """No p, no interval and no part of the family: with two or three seeds it is often chance."""
    scores = {"a": [0.75, 0.5, 0.7], "b": [0.5, 0.25, 0.45], "c": [0.75, 0.5, 0.7], "d": [0.6, 0.4, 0.5]}
    found = {r.b: r for r in statistics.compare(rows_of({name: by_seed(list(v)) for name, v in scores.items()}), "a", METRIC)}
    for name, difference in (("b", 0.25), ("c", 0.0)):
        result = found[name]
        assert result.difference == pytest.approx(difference)
        assert (result.ttest, result.ttest_holm, result.student, result.bootstrap) == (None, None, None, None)
        assert result.note == "the same difference on every seed: no spread to test against; Wilcoxon needs 6 pairs, there are 3"
    assert found["d"].ttest == found["d"].ttest_holm == pytest.approx(float(ttest_rel(scores["a"], scores["d"]).pvalue))


@pytest.mark.parametrize(("last", "tested"), [(0.400002, False), (0.400010, True)])
def test_a_spread_within_the_tables_rounding_is_none(last: float, tested: bool) -> None:
    (found,) = statistics.compare(rows_of({"a": by_seed([0.6, 0.5]), "b": by_seed([0.5, last])}), "a", METRIC)
    assert (found.ttest is not None, found.student is not None, found.bootstrap is not None) == (tested,) * 3
    assert ("no spread" in found.note) is not tested


def test_equal_methods_have_no_difference() -> None:
    rows = rows_of({"a": by_seed([0.5] * 6), "b": by_seed([0.5] * 6)})
    (found,) = statistics.compare(rows, "a", METRIC)
    assert (found.difference, found.student, found.wilcoxon) == (0.0, None, 1.0)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_closed_testing_with_bonferroni(p_values: list[float]) -> None:
    indices = range(len(p_values))
    sets = [s for size in range(1, len(p_values) + 1) for s in combinations(indices, size)]
    expected = [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s) for i in indices]
    assert statistics.holm(p_values) == pytest.approx(expected)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ConfigError, match="'z' is not in the table; it has a"):
        statistics.paired(rows_of({"a": by_seed([0.5])}), "a", "z", METRIC)
