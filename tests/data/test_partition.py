"""Cohorts cut into clients."""

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from omnifm.data.cohort import Cohort, Row
from omnifm.data.manifest import SPLITS
from omnifm.data.partition import ClientPlan, partition, plans_digest, plans_from_json, plans_to_json
from omnifm.errors import DataError
from tests.data.builders import in_memory


def table(
    count: int, classes: str = "ab", modalities: tuple[str, ...] = ("CT",), patients: int = 0, sites: tuple[str, ...] = ("",)
) -> Cohort:
    rows = []
    for i in range(count):
        patient = f"p{i % patients}" if patients else ""
        split = ("train", "train", "val", "test")[(i % patients if patients else i) % 4]
        rows.append(
            Row(
                f"r{i}",
                split,
                patient,
                sites[i % len(sites)],
                modalities[i // 4 % len(modalities)],
                label=classes[i // 4 % len(classes)],
                extra={"dose": "lo" if i % 8 < 4 else "hi"},
            )
        )
    return in_memory(rows, modality=None, classes=tuple(classes))


def owners(plans: list[ClientPlan]) -> Counter[int]:
    return Counter(i for plan in plans for split in SPLITS for i in getattr(plan, split))


KINDS = st.sampled_from(["natural", "by_modality", "dirichlet", "iid", "by_column"])


@given(
    kind=KINDS,
    clients=st.integers(1, 4),
    gamma=st.floats(0.05, 10),
    patients=st.sampled_from([0, 0, 24, 40]),
    count=st.integers(60, 160),
    seed=st.integers(0, 10**6),
)
def test_no_row_is_lost_or_doubled_and_no_split_or_patient_is_mixed(
    kind: Any, clients: int, gamma: float, patients: int, count: int, seed: int
) -> None:
    cohort = table(count, "abc", ("CT", "MRI"), patients, ("north", "south"))
    try:
        plans = partition(cohort, clients=clients, kind=kind, gamma=gamma, min_examples=2, column="dose", seed=seed)
    except DataError:
        assume(False)
    assert owners(plans) == Counter(range(count))
    assert len({plan.id for plan in plans}) == len(plans)
    for plan in plans:
        assert plan.cohort == "tiny"
        assert plan.train
        for split in SPLITS:
            own = getattr(plan, split)
            assert list(own) == sorted(own)
            assert all(cohort.rows[i].split == split for i in own)
        assert plan.modality == "+".join(sorted({cohort.rows[i].modality for i in (*plan.train, *plan.val, *plan.test)}))
    if patients and kind in ("dirichlet", "iid"):
        held = [{cohort.rows[i].patient for split in SPLITS for i in getattr(p, split)} for p in plans]
        assert not any(a & b for a, b in itertools.combinations(held, 2))


def questions(images: int, per_image: int, asked: str) -> Cohort:
    """Every image in train and in `asked`, `per_image` questions each; as many further images in `asked` alone."""
    rows = [
        Row(f"{split}{image}q{q}", split, "", "", "CT", f"images/{image}.png", label="abc"[(image + q) % 3])
        for split, last in (("train", images), (asked, 2 * images))
        for image in range(last)
        for q in range(per_image)
    ]
    return in_memory(rows, modality=None, classes=tuple("abc"))


def images_of(cohort: Cohort, plan: ClientPlan) -> set[str]:
    return {cohort.rows[i].image for split in SPLITS for i in getattr(plan, split)}


@pytest.mark.parametrize(("kind", "gamma"), [("iid", 0.0), ("dirichlet", 0.5), ("by_modality", 0.5)])
@pytest.mark.parametrize("asked", ["val", "test"])
def test_an_image_in_two_splits_is_at_one_client(kind: Any, gamma: float, asked: str) -> None:
    cohort = questions(30, 2, asked)
    plans = partition(cohort, clients=3, kind=kind, gamma=gamma, min_examples=5, seed=1)
    assert owners(plans) == Counter(range(len(cohort.rows)))
    assert not any(a & b for a, b in itertools.combinations([images_of(cohort, plan) for plan in plans], 2))
    assert all(getattr(plan, asked) for plan in plans)
    alone = [sum(int(cohort.rows[i].image[7:-4]) >= 30 for i in getattr(plan, asked)) for plan in plans]
    assert sum(alone) == 60 and (kind != "iid" or alone == [20, 20, 20]), "the images of one split are drawn as ever"


def test_a_patient_in_val_and_test_is_at_one_client() -> None:
    rows = [Row(f"t{i}", "train", f"t{i}", label="a") for i in range(20)]
    rows += [Row(f"{s}{i}", s, f"p{i}", label="a") for s in ("test", "val") for i in range(12)]
    cohort = in_memory(rows)
    for plan in partition(cohort, clients=3, kind="iid", gamma=0.0, min_examples=2, seed=0):
        assert len(plan.val) == 4
        assert {cohort.rows[i].patient for i in plan.val} == {cohort.rows[i].patient for i in plan.test}


def test_bound_rows_that_cannot_reach_every_client_are_no_error() -> None:
    """Two rows to train on for each client are there only where both small patients are at one: the other has nothing to test."""
    rows = [Row(f"t{i}", "train", "large" if i < 20 else f"small{i}", label="a") for i in range(22)]
    rows += [Row(f"q{i}", "test", f"small{i}", label="a") for i in (20, 21)]
    plans = partition(in_memory(rows), clients=2, kind="iid", gamma=0.0, min_examples=2, seed=0)
    assert sorted((len(plan.train), len(plan.test)) for plan in plans) == [(2, 2), (20, 0)]


# Computed before units in two splits were bound to one client.
GOLDEN = {
    ("rows", "dirichlet"): "68708551448a2a9f",
    ("rows", "iid"): "ed3ad8675fe8df8c",
    ("rows", "by_modality"): "f1398893f7edde49",
    ("patients", "dirichlet"): "2b78fe622451d161",
    ("patients", "iid"): "901cd6ddccfbc12c",
    ("patients", "by_modality"): "82cfa75ab69e7fe1",
}


@pytest.mark.parametrize(("name", "kind"), GOLDEN)
def test_a_cohort_without_units_in_two_splits_is_cut_as_ever(name: str, kind: Any) -> None:
    cohort = table(240, "abc", ("CT", "MRI"), 40 if name == "patients" else 0)
    gamma = {"dirichlet": 0.3, "iid": 0.0, "by_modality": 0.5}[kind]
    plans = partition(cohort, clients=3, kind=kind, gamma=gamma, min_examples=5, seed=11)
    assert plans_digest(plans)[:16] == GOLDEN[name, kind]


def test_val_and_test_follow_the_proportions_of_train() -> None:
    cohort = table(8000, "abcd")
    plans = partition(cohort, clients=4, kind="dirichlet", gamma=0.5, seed=3)
    for label in "abcd":
        tally = [[sum(cohort.rows[i].label == label for i in getattr(p, s)) for p in plans] for s in SPLITS]
        shares = np.array(tally, dtype=float)
        shares /= shares.sum(axis=1, keepdims=True)
        assert np.abs(shares - shares[0]).max() < 0.003


@pytest.mark.parametrize("gamma", [0.3, 5.0])
def test_class_shares_have_the_dirichlet_moments(gamma: float) -> None:
    cohort = table(400, "a" * 1 + "b")
    shares = []
    for seed in range(300):
        plans = partition(cohort, clients=3, kind="dirichlet", gamma=gamma, min_examples=1, seed=seed)
        shares.append(sum(cohort.rows[i].label == "a" for i in plans[0].train) / 100)
    # Dir(g, g, g): mean 1/3, variance (1/3)(2/3)/(3g + 1). Draws that starve a client are rejected, which narrows it a little.
    variance = (2 / 9) / (3 * gamma + 1)
    assert abs(np.mean(shares) - 1 / 3) < 0.06
    assert 0.6 * variance < np.var(shares) < 1.25 * variance


def test_iid_parts_are_equal_to_within_one_row_per_split() -> None:
    plans = partition(table(200), clients=3, kind="iid", gamma=0.0, seed=0)
    for split in SPLITS:
        sizes = [len(getattr(p, split)) for p in plans]
        assert max(sizes) - min(sizes) <= 1


def test_every_client_gets_min_examples_and_a_row_to_validate_and_to_test_on() -> None:
    for seed in range(20):
        plans = partition(table(200, "abcde"), clients=5, kind="dirichlet", gamma=0.1, min_examples=10, seed=seed)
        assert all(len(p.train) >= 10 and p.val and p.test for p in plans)


def test_a_demand_nobody_can_meet_says_what_to_change() -> None:
    with pytest.raises(DataError, match=r"cohort tiny: no draw of .* 4 clients 60 train.*take fewer clients"):
        partition(table(200), clients=4, kind="dirichlet", gamma=0.5, min_examples=60, seed=0)


def test_the_seed_and_nothing_else_decides() -> None:
    a, b = (partition(table(200), clients=3, kind="dirichlet", gamma=0.5, seed=7) for _ in range(2))
    c = partition(table(200), clients=3, kind="dirichlet", gamma=0.5, seed=8)
    assert a == b
    assert plans_digest(a) == plans_digest(b) != plans_digest(c)


def test_plans_survive_json_and_the_digest_sees_every_field() -> None:
    plans = partition(table(200), clients=3, kind="iid", gamma=0.5, seed=7)
    assert plans_from_json(plans_to_json(plans)) == plans
    changed = [ClientPlan(plans[0].id, "tiny", "CT", plans[0].train, plans[0].test, plans[0].val), *plans[1:]]
    assert plans_digest(changed) != plans_digest(plans)
    for text in ("{", "[1]", json.dumps([{"id": "x"}])):
        with pytest.raises(DataError):
            plans_from_json(text)


def test_natural_boundaries() -> None:
    plans = partition(table(80, sites=("St. Mary/1", "st. mary 1", "b")), clients=1, kind="natural", gamma=0.0, seed=0)
    names = [p.id for p in plans]
    assert len({name.lower() for name in names}) == 3
    assert "tiny-b" in names
    assert not any(set(name) & set("/ ") for name in names)
    assert [p.id for p in partition(table(80), clients=9, kind="natural", gamma=0.0, seed=0)] == ["tiny-0"]


def test_boundaries_that_cannot_be() -> None:
    with pytest.raises(DataError, match="row 'r1' has no value in column 'site'"):
        partition(table(80, sites=("x", "")), clients=1, kind="natural", gamma=0.0, seed=0)
    with pytest.raises(DataError, match="row 'r0' has no value in column 'docter'"):
        partition(table(80), clients=1, kind="by_column", column="docter", gamma=0.0, seed=0)
    with pytest.raises(DataError, match="needs the name of a column"):
        partition(table(80), clients=1, kind="by_column", gamma=0.0, seed=0)
    with pytest.raises(DataError, match=r"client tiny-test: no training rows \(val 0, test 20\)"):
        partition(table(80), clients=1, kind="by_column", column="split", gamma=0.0, seed=0)
    with pytest.raises(DataError, match="at least 1"):
        partition(table(80), clients=0, kind="iid", gamma=0.0, seed=0)
    with pytest.raises(DataError, match="gamma"):
        partition(table(80), clients=2, kind="dirichlet", gamma=0.0, seed=0)


def test_by_modality_with_and_without_peers() -> None:
    cohort = table(320, "abc", ("CT", "MRI"))
    assert [(p.id, p.modality) for p in partition(cohort, clients=1, kind="by_modality", gamma=0.5, seed=0)] == [
        ("tiny-CT", "CT"),
        ("tiny-MRI", "MRI"),
    ]
    drawn = partition(cohort, clients=2, kind="by_modality", gamma=0.0, seed=0)
    assert [(p.id, p.modality) for p in drawn] == [(f"tiny-{m}-{k}", m) for m in ("CT", "MRI") for k in (0, 1)]
    assert max(len(p.train) for p in drawn) - min(len(p.train) for p in drawn) <= 1
    skewed = partition(cohort, clients=2, kind="by_modality", gamma=0.1, seed=0)
    assert max(len(p.train) for p in skewed) - min(len(p.train) for p in skewed) > 5
