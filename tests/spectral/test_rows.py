from dataclasses import fields, replace

import pytest
import torch

from omnifm.errors import FederationError
from omnifm.spectral.rows import BankRows
from tests.spectral.examples import make_rows


def same(a: BankRows, b: BankRows) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(BankRows))


def test_tensors_round_trip_beside_other_tensors() -> None:
    rows = make_rows(5)
    tensors = {"model.weight": torch.zeros(2), **rows.to_tensors("bank")}
    assert len(tensors) == 8
    assert same(BankRows.from_tensors(tensors, "bank"), rows)
    assert same(BankRows.from_tensors(BankRows.empty(4).to_tensors("x"), "x"), BankRows.empty(4))


def test_no_client_sees_its_own_rows_and_sees_all_others() -> None:
    rows = make_rows(30)
    for client in range(4):
        foreign = rows.foreign(client)
        assert client not in foreign.client.tolist()
        assert foreign.row_id.tolist() == [
            r for r, c in zip(rows.row_id.tolist(), rows.client.tolist(), strict=True) if c != client
        ]


def test_append_and_select_are_inverse() -> None:
    rows = make_rows(6)
    assert same(rows.select(torch.arange(4)).append(rows.select(torch.tensor([4, 5]))), rows)


def test_a_missing_column_is_named() -> None:
    tensors = make_rows(3).to_tensors("bank")
    del tensors["bank.round"]
    with pytest.raises(FederationError, match=r"bank\.round is missing"):
        BankRows.from_tensors(tensors, "bank")


def test_malformed_columns_are_named() -> None:
    rows = make_rows(3)
    with pytest.raises(FederationError, match=r"count must be torch\.float32"):
        replace(rows, count=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(FederationError, match=r"client must have shape \(3,\)"):
        replace(rows, client=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(FederationError, match=r"vectors must be \(m, d\)"):
        replace(rows, vectors=torch.zeros(3))
