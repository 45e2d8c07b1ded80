"""Splits drawn where the manifest has none."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from omnifm.data.splits import SHARES, assign_splits, crossing, main_label

ROWS = st.lists(st.tuples(st.integers(0, 15), st.sampled_from("abc"), st.sampled_from(["", "", "train", "test"])), max_size=60)


@given(ROWS, st.integers(0, 3))
def test_units_stay_whole_and_given_splits_stay(rows: list[tuple[int, str, str]], seed: int) -> None:
    given_of = {unit: split for unit, _, split in rows}
    given_splits = [given_of[unit] for unit, _, _ in rows]
    units = [str(unit) for unit, _, _ in rows]
    splits = assign_splits(given_splits, units, [label for _, label, _ in rows], seed)
    assert len(set(zip(units, splits, strict=True))) == len(set(units))
    assert all(split == old for split, old in zip(splits, given_splits, strict=True) if old)
    free = Counter(dict(zip(units, splits, strict=True))[u] for u in set(units) if not given_of[int(u)])
    assert all(abs(free[name] - share * free.total()) <= 1.01 for name, share in SHARES.items())


def test_shares_hold_within_each_class() -> None:
    units = [f"u{i}" for i in range(400)]
    labels = ["rare" if i % 10 == 0 else "common" for i in range(400)]
    splits = assign_splits([""] * 400, units, labels)
    for label, size in (("rare", 40), ("common", 360)):
        tally = Counter(s for s, own in zip(splits, labels, strict=True) if own == label)
        assert all(abs(tally[name] - share * size) <= 2 for name, share in SHARES.items())


def test_a_row_without_split_follows_its_patient() -> None:
    assert assign_splits(["test", "", ""], ["p", "p", "q"], ["", "", ""]) == ["test", "test", "train"]


def test_patients_in_train_here_and_in_test_there_are_told_of() -> None:
    ct = {"train": {"p1", "p2"}, "test": {"p3"}}
    assert crossing({"ct": ct}) == "" and crossing({"ct": ct, "mr": {"train": {"p1", "p9"}, "val": {"p3"}, "test": {"p8"}}}) == ""
    told = crossing({"ct": ct, "mr": {"train": {"p9"}, "val": {"p1"}, "test": {"p2"}}})
    assert told.startswith("cohort ct trains on 2 patient ids that cohort mr validates or tests on") and "p1" not in told
    assert crossing({"ct": ct, "mr": {"train": {"p3"}}}).startswith("cohort mr trains on 1 patient ids that cohort ct")


def test_the_most_frequent_label_counts_and_ties_go_by_the_alphabet() -> None:
    assert main_label(Counter("bbab")) == "b"
    assert main_label(Counter("bbaa")) == "a"
