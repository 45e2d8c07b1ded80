import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifm.errors import CheckpointError, ConfigError, FederationError
from omnifm.spectral.bank import KnowledgeBank
from omnifm.spectral.policies import POLICIES, PolicyName
from tests.spectral.examples import ball


def build(policy: PolicyName = "quota", capacity: int = 12) -> KnowledgeBank:
    return KnowledgeBank(modalities=3, capacity=capacity, policy=policy, dim=8, per_client=2)


def upload(bank: KnowledgeBank, client: int, round_index: int, n: int = 3) -> None:
    bank.add(ball(n, 8, 100 * round_index + client), client, client % 3, round_index, torch.ones(n))


@pytest.mark.parametrize("policy", list(POLICIES))
@settings(max_examples=12, deadline=None)
@given(plan=st.lists(st.lists(st.integers(0, 5), max_size=4, unique=True), max_size=8))
def test_capacity_is_bounded_and_ids_are_unique_whatever_happens(policy: PolicyName, plan: list[list[int]]) -> None:
    bank = build(policy)
    for round_index, clients in enumerate(plan):
        for client in clients:
            upload(bank, client, round_index)
        bank.count(bank.rows.row_id, torch.arange(len(bank.rows)))
        before = len(bank.rows)
        assert bank.end_round(round_index) == before - len(bank.rows)
        ids = bank.rows.row_id.tolist()
        assert len(ids) <= 12 and ids == sorted(set(ids))


def test_rows_carry_what_was_uploaded() -> None:
    bank = build()
    vectors = ball(2, 8)
    bank.add(vectors, client=4, modality=2, round_index=7, weight=torch.tensor([3.0, 5.0]))
    rows = bank.rows
    assert torch.equal(rows.vectors, vectors)
    assert (rows.client.tolist(), rows.modality.tolist(), rows.round.tolist()) == ([4, 4], [2, 2], [7, 7])
    assert (rows.weight.tolist(), rows.count.tolist(), rows.row_id.tolist()) == ([3.0, 5.0], [0.0, 0.0], [0, 1])


def test_counts_add_up_over_clients() -> None:
    bank = build()
    upload(bank, 0, 0)
    bank.count(torch.tensor([2, 0]), torch.tensor([5, 1]))
    bank.count(torch.tensor([2]), torch.tensor([4]))
    assert bank.rows.count.tolist() == [1.0, 0.0, 9.0]


@pytest.mark.parametrize(("policy", "expected"), [("quota", 2.0), ("lfu_aging", 2.0), ("lfu", 8.0), ("fifo", 8.0)])
def test_only_ageing_policies_age(policy: PolicyName, expected: float) -> None:
    bank = build(policy)
    upload(bank, 0, 0, n=1)
    bank.count(torch.tensor([0]), torch.tensor([8]))
    bank.end_round(0)
    bank.end_round(1)
    assert bank.rows.count.tolist() == [expected]


def test_counts_for_a_pruned_row_have_no_effect_but_an_unknown_row_is_an_error() -> None:
    bank = build("fifo", capacity=2)
    upload(bank, 0, 0, n=3)
    bank.end_round(0)
    bank.count(torch.tensor([0, 1]), torch.tensor([5, 5]))
    assert bank.rows.row_id.tolist() == [1, 2] and bank.rows.count.tolist() == [5.0, 0.0]
    with pytest.raises(FederationError, match="row 3 was never in the bank"):
        bank.count(torch.tensor([3]), torch.tensor([1]))


@pytest.mark.parametrize("bad", [torch.tensor([-1.0]), torch.tensor([float("nan")]), torch.tensor([1.0, 2.0])])
def test_malformed_counts_are_errors(bad: torch.Tensor) -> None:
    bank = build()
    upload(bank, 0, 0)
    with pytest.raises(FederationError, match="retrieval counts"):
        bank.count(torch.tensor([0]), bad)


@pytest.mark.parametrize("policy", ["quota", "ema"])
def test_state_round_trip_then_the_same_future(policy: PolicyName) -> None:
    first, second = build(policy), build(policy)
    for client in range(5):
        upload(first, client, 0)
    first.end_round(0)
    second.load(first.state())
    for bank in (first, second):
        upload(bank, 1, 1)
        bank.count(bank.rows.row_id, torch.arange(len(bank.rows)))
        bank.end_round(1)
    a, b = first.state(), second.state()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert int(a["next_row_id"]) == 18


def test_a_broken_state_is_named() -> None:
    state = build().state()
    missing = {name: tensor for name, tensor in state.items() if name != "next_row_id"}
    with pytest.raises(CheckpointError, match="next_row_id"):
        build().load(missing)
    with pytest.raises(CheckpointError, match="length 8, expected 4"):
        KnowledgeBank(modalities=1, dim=4).load(state)
    with pytest.raises(CheckpointError, match=r"rows\.vectors is missing"):
        build().load({"next_row_id": torch.tensor(0)})


NAN = torch.full((1, 8), float("nan"))


@pytest.mark.parametrize(
    ("vectors", "modality", "weight", "message"),
    [
        (NAN, 0, torch.ones(1), "client 7: a prototype is not finite"),
        (2 * torch.eye(8)[:1], 0, torch.ones(1), "client 7: a prototype of norm 2 is outside the ball of 1"),
        (ball(1, 8), 3, torch.ones(1), "client 7: modality 3"),
        (ball(1, 8), 0, torch.zeros(1), "client 7: a prototype's weight"),
        (ball(1, 8), 0, torch.ones(2), "client 7: prototypes must be"),
        (ball(1, 9), 0, torch.ones(1), "client 7: prototypes must be"),
    ],
)
def test_a_malformed_upload_names_the_client_and_changes_nothing(
    vectors: torch.Tensor, modality: int, weight: torch.Tensor, message: str
) -> None:
    bank = build()
    with pytest.raises(FederationError, match=message):
        bank.add(vectors, 7, modality, 0, weight)
    assert len(bank.rows) == 0 and int(bank.state()["next_row_id"]) == 0


def test_an_upload_without_rows_is_fine_and_rounding_is_not_outside() -> None:
    bank = build()
    bank.add(torch.empty(0, 8), 0, 0, 0, torch.empty(0))
    bank.add(torch.eye(8)[:1] * 1.0001, 0, 0, 0, torch.ones(1))
    assert len(bank.rows) == 1


def test_impossible_banks_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="quota needs capacity >= 2"):
        KnowledgeBank(modalities=3, capacity=5)
    with pytest.raises(ConfigError, match="unknown policy 'lru'"):
        KnowledgeBank(modalities=3, policy="lru")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="delta"):
        KnowledgeBank(modalities=3, delta=2.0)
    with pytest.raises(ConfigError, match="at least 1"):
        KnowledgeBank(modalities=0)
