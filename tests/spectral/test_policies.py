from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifm.spectral.policies import POLICIES, Limits, PolicyName, coreset, fifo, lfu, merge, quota
from omnifm.spectral.rows import BankRows
from tests.spectral.examples import ball, make_rows


def limits(capacity: int, modalities: int = 2, young_rounds: int = 3, delta: float = 0.1) -> Limits:
    return Limits(capacity, modalities, young_rounds, delta)


def rows_of(count: list[float], round_index: list[int] | None = None, modality: list[int] | None = None) -> BankRows:
    m = len(count)
    return replace(
        make_rows(m),
        count=torch.tensor(count, dtype=torch.float32),
        round=torch.tensor(round_index or [0] * m, dtype=torch.int64),
        modality=torch.tensor(modality or [0] * m, dtype=torch.int64),
    )


@pytest.mark.parametrize("policy", list(POLICIES))
@settings(max_examples=25, deadline=None)
@given(m=st.integers(0, 40), capacity=st.integers(6, 20), modalities=st.integers(1, 3), seed=st.integers(0, 1000))
def test_every_policy_is_bounded_sorted_and_independent_of_nothing_but_the_rows(
    policy: PolicyName, m: int, capacity: int, modalities: int, seed: int
) -> None:
    rows = make_rows(m, seed=seed, modalities=modalities)
    kept = POLICIES[policy](rows, limits(capacity, modalities), 6)
    assert len(kept) <= capacity
    assert kept.tolist() == sorted(set(kept.tolist())) and all(0 <= i < m for i in kept.tolist())
    assert torch.equal(kept, POLICIES[policy](rows, limits(capacity, modalities), 6))
    if policy not in ("lfu", "lfu_aging"):  # only the paper's threshold drops rows that would fit
        assert len(kept) == min(m, capacity)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 5)), max_size=60),
    st.integers(8, 24),
    st.integers(0, 5),
)
def test_quota_never_lets_a_modality_under_its_floor(table: list[tuple[int, int, int]], capacity: int, young: int) -> None:
    modality, count, rounds = ([t[i] for t in table] for i in range(3))
    rows = rows_of([float(c) for c in count], rounds, modality)
    kept = quota(rows, limits(capacity, 4, young), 5)
    floor = capacity // 8
    left = rows.select(kept).modality.tolist()
    for m in range(4):
        assert left.count(m) >= min(floor, modality.count(m))


def test_quota_prefers_young_rows_then_counts() -> None:
    rows = rows_of([9, 8, 7, 0, 0, 1], [0, 0, 0, 5, 4, 0])
    assert quota(rows, limits(4, modalities=1), 5).tolist() == [0, 1, 3, 4]
    assert quota(rows, limits(4, modalities=1, young_rounds=0), 5).tolist() == [0, 1, 2, 5]


def test_quota_keeps_a_rare_modality_where_lfu_drops_it() -> None:
    rows = rows_of([9.0] * 10 + [0.0, 0.0], [0] * 12, [0] * 10 + [1, 1])
    assert rows.select(lfu(rows, limits(8), 9)).modality.tolist() == [0] * 8
    assert rows.select(quota(rows, limits(8), 9)).modality.tolist() == [0] * 6 + [1, 1]


def test_fifo_keeps_the_latest() -> None:
    assert fifo(rows_of([9, 9, 0, 0], [0, 1, 2, 2]), limits(2), 2).tolist() == [2, 3]


def test_lfu_drops_what_is_under_delta_even_if_there_is_room() -> None:
    # The mean count of offered rows is 10; delta = .5 drops counts under 5. Row 3 is of this round and is not judged.
    rows = rows_of([20, 6, 4, 0], [0, 0, 0, 2])
    assert lfu(rows, limits(10, delta=0.5), 2).tolist() == [0, 1, 3]
    assert lfu(rows, limits(10, delta=0.0), 2).tolist() == [0, 1, 2, 3]


def test_lfu_then_prunes_to_capacity_by_count_and_ties_by_arrival() -> None:
    assert lfu(rows_of([5, 7, 5, 5, 9]), limits(3), 1).tolist() == [1, 3, 4]


def test_lfu_drops_nothing_while_nobody_retrieves() -> None:
    assert lfu(rows_of([0, 0, 0]), limits(5, delta=1.0), 4).tolist() == [0, 1, 2]


def test_coreset_covers_within_twice_the_best_radius() -> None:
    from itertools import combinations

    rows = replace(make_rows(9, dim=2), vectors=ball(9, 2, 4) * torch.rand(9, 1, generator=torch.Generator().manual_seed(0)))
    distance = torch.cdist(rows.vectors, rows.vectors)

    def radius(centres: list[int]) -> float:
        return float(distance[:, centres].min(dim=1).values.max())

    kept = coreset(rows, limits(3), 0).tolist()
    assert radius(kept) <= 2 * min(radius(list(c)) for c in combinations(range(9), 3)) + 1e-6
    assert int(rows.weight.argmax()) in kept


def test_coreset_fills_its_capacity_with_duplicates_too() -> None:
    rows = replace(make_rows(6), vectors=ball(1, 8).expand(6, 8))
    assert len(set(coreset(rows, limits(4), 0).tolist())) == 4


def one(client: int, vector: list[float], round_index: int, weight: float = 1.0, row_id: int = 99) -> BankRows:
    return BankRows(
        vectors=torch.tensor([vector]),
        client=torch.tensor([client]),
        modality=torch.tensor([0]),
        round=torch.tensor([round_index]),
        weight=torch.tensor([weight]),
        count=torch.tensor([0.0]),
        row_id=torch.tensor([row_id]),
    )


def test_ema_leaves_the_clients_rows_of_another_modality_alone() -> None:
    rows = one(0, [1.0, 0.0], 0, row_id=0)
    other = replace(one(0, [0.9, 0.0], 1, row_id=1), modality=torch.tensor([1]))
    assert merge(rows, other, per_client=1, alpha=0.5).row_id.tolist() == [0, 1]


def test_ema_merges_into_the_clients_own_nearest_row() -> None:
    rows = one(0, [1.0, 0.0], 0, 4.0, 0).append(one(0, [0.0, 1.0], 0, 4.0, 1)).append(one(1, [0.0, 0.8], 0, 4.0, 2))
    merged = merge(rows, one(0, [0.0, 0.6], 3, 8.0), per_client=2, alpha=0.25)
    assert merged.row_id.tolist() == [0, 1, 2]
    torch.testing.assert_close(merged.vectors, torch.tensor([[1.0, 0.0], [0.0, 0.9], [0.0, 0.8]]))
    assert merged.round.tolist() == [0, 3, 0] and merged.weight.tolist() == [4.0, 5.0, 4.0]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 100))
def test_ema_bounds_the_rows_of_a_client_and_stays_in_the_ball(per_client: int, uploads: int, seed: int) -> None:
    rows = BankRows.empty(8)
    for i in range(uploads):
        new = replace(make_rows(3, seed=seed + i, clients=1, modalities=1), row_id=torch.arange(3) + 3 * i)
        rows = merge(rows, new, per_client, 0.5)
    assert len(rows) == min(per_client, 3 * uploads)
    assert bool((rows.vectors.norm(dim=1) <= 1.0).all()) and len(set(rows.row_id.tolist())) == len(rows)
