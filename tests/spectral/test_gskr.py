from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifm.spectral.gskr import retrieval_counts, retrieve
from omnifm.spectral.rows import BankRows
from tests.spectral.examples import ball, make_rows


def brute_force(query: list[float], rows: BankRows, k: int) -> list[int]:
    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5

    similarity = [cosine(query, row) for row in rows.vectors.tolist()]
    return sorted(range(len(rows)), key=lambda i: (-similarity[i], int(rows.row_id[i])))[:k]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 10_000))
def test_equals_brute_force(m: int, k: int, seed: int) -> None:
    rows, s = make_rows(m, seed=seed), ball(6, 8, seed + 1)
    found = retrieve(s, rows, k)
    assert found.index.shape == (6, min(k, m)) and found.vectors.shape == (6, min(k, m), 8)
    assert found.index.tolist() == [brute_force(q, rows, k) for q in s.tolist()]
    assert torch.equal(found.vectors, rows.vectors[found.index])


def test_cosine_ignores_length_and_keeps_the_rows_as_they_are() -> None:
    rows = replace(make_rows(2, dim=2), vectors=torch.tensor([[0.01, 0.0], [0.6, 0.6]]))
    found = retrieve(torch.tensor([[0.5, 0.0]]), rows, 1)
    assert found.index.tolist() == [[0]]
    assert found.vectors.tolist() == rows.vectors[:1][None].tolist()


def test_ties_go_to_the_lower_row_id() -> None:
    basis = torch.eye(4)[[1, 0, 1, 0, 1]]
    rows = replace(make_rows(5, dim=4), vectors=basis)
    assert retrieve(torch.eye(4)[:1], rows, 4).index.tolist() == [[1, 3, 0, 2]]
    # Sorts that are not stable show it on long inputs only.
    many = replace(make_rows(400, dim=4), vectors=torch.eye(4)[torch.arange(400) % 2])
    assert retrieve(torch.eye(4)[:1], many, 200).index.tolist() == [list(range(0, 400, 2))]


def test_no_gradient_passes() -> None:
    s = ball(2, 8).requires_grad_()
    assert not retrieve(s, make_rows(5), 3).vectors.requires_grad


def test_the_same_rows_under_autocast() -> None:
    s, rows = ball(20, 8, 1), make_rows(60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = retrieve(s, rows, 5)
    assert found.vectors.dtype == torch.float32
    assert torch.equal(found.index, retrieve(s, rows, 5).index)


def test_counts_are_per_row_integers_and_complete() -> None:
    rows = make_rows(6)
    found = retrieve(ball(10, 8, 3), rows, 4)
    row_ids, counts = retrieval_counts(found.index, rows)
    assert row_ids.tolist() == rows.row_id.tolist()
    assert counts.tolist() == [found.index.flatten().tolist().count(i) for i in range(6)]
    assert int(counts.sum()) == 40
    assert retrieval_counts(torch.tensor([[0, 2]]), rows)[1].tolist() == [1, 0, 1, 0, 0, 0]


def test_nothing_to_retrieve_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        retrieve(ball(1, 8), BankRows.empty(8), 3)
    with pytest.raises(ValueError, match="k = 0"):
        retrieve(ball(1, 8), make_rows(3), 0)
