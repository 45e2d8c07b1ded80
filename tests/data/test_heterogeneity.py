"""The four numbers against closed forms and scipy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import mutual_info_score

from omnifm.data.cohort import Cohort, Row
from omnifm.data.heterogeneity import gini, heterogeneity
from omnifm.data.partition import ClientPlan
from omnifm.errors import DataError
from tests.data.builders import in_memory

Members = list[tuple[str, str]]


def federation(clients: list[Members], classes: tuple[str, ...] = ("a", "b", "c")) -> tuple[Cohort, list[ClientPlan]]:
    """One cohort whose clients hold the given (label, modality) rows, all for training."""
    rows: list[Row] = []
    plans = []
    for k, members in enumerate(clients):
        start = len(rows)
        rows += [Row(f"{k}-{i}", "train", label=label, modality=m) for i, (label, m) in enumerate(members)]
        plans.append(ClientPlan(f"c{k}", "tiny", "", tuple(range(start, len(rows))), (), ()))
    return in_memory(rows, classes=classes, modality=None), plans


def test_one_modality_and_disjoint_labels_per_client() -> None:
    cohort, plans = federation([[("a", "CT")] * 4, [("b", "MRI")] * 4])
    result = heterogeneity({"tiny": cohort}, plans)
    assert (result.h_mod, result.h_lab, result.h_size, result.h_ls) == (1.0, 1.0, 0.0, 1.0)


def test_equal_clients_are_all_zero() -> None:
    rows = [("a", "CT"), ("b", "MRI")] * 5
    cohort, plans = federation([rows, rows, rows])
    result = heterogeneity({"tiny": cohort}, plans)
    assert result.h_mod == pytest.approx(0, abs=1e-12)
    assert (result.h_lab, result.h_size, result.h_ls) == (0.0, 0.0, 0.0)


MEMBERS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["CT", "MRI"])), min_size=1, max_size=12)


@given(st.lists(MEMBERS, min_size=2, max_size=5))
def test_against_scipy_and_sklearn(clients: list[list[tuple[str, str]]]) -> None:
    cohort, plans = federation(clients)
    result = heterogeneity({"tiny": cohort}, plans)
    who = [k for k, members in enumerate(clients) for _ in members]
    what = [m for members in clients for _, m in members]
    entropy = mutual_info_score(what, what)
    assert result.h_mod == pytest.approx(mutual_info_score(who, what) / entropy if entropy > 1e-12 else 0, abs=1e-9)
    shares = [[sum(own == label for own, _ in members) / len(members) for label in "abc"] for members in clients]
    pairs = list(itertools.combinations(shares, 2))
    divergences = [np.nan_to_num(jensenshannon(p, q, base=2)) ** 2 for p, q in pairs]
    assert result.h_lab == pytest.approx(np.mean(divergences), abs=1e-7)
    sets = [{own for own, _ in members} for members in clients]
    assert result.h_ls == pytest.approx(1 - np.mean([len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_gini_by_the_sorted_formula(sizes: list[int]) -> None:
    n = len(sizes)
    ranked = sum((2 * (i + 1) - n - 1) * x for i, x in enumerate(sorted(sizes))) / (n * sum(sizes))
    assert gini(sizes) == pytest.approx(ranked, abs=1e-12)


def test_label_numbers_are_none_where_they_mean_nothing() -> None:
    one, plans = federation([[("a", "CT")], [("b", "CT")]])
    other = in_memory([Row("x", "train", label="a", modality="CT")], name="other", classes=("a", "z"))
    far = [*plans, ClientPlan("x", "other", "CT", (0,), (), ())]
    result = heterogeneity({"tiny": one, "other": other}, far)
    assert result.h_lab is None
    assert result.h_ls == pytest.approx(2 / 3)
    bare, plans = federation([[("", "CT")], [("", "CT")]])
    assert (heterogeneity({"tiny": bare}, plans).h_lab, heterogeneity({"tiny": bare}, plans).h_ls) == (None, None)
    assert heterogeneity({"tiny": bare}, plans, labels={"tiny": ["yes", "no"]}).h_lab == 1.0


def test_clients_that_cannot_be_measured() -> None:
    cohort, plans = federation([[("a", "CT")]])
    for bad in ([], [ClientPlan("c", "tiny", "CT", (), (), ())], [ClientPlan("c", "gone", "CT", (0,), (), ())]):
        with pytest.raises(DataError):
            heterogeneity({"tiny": cohort}, bad)
    assert heterogeneity({"tiny": cohort}, plans).h_lab is None
