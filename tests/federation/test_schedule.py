from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnifm.federation.schedule import draw_schedule

CLIENTS = st.lists(st.text("abcd0123", min_size=1, max_size=4), min_size=1, max_size=12, unique=True)
PERCENT = st.integers(1, 100)
SEEDS = st.integers(0, 2**31)


@given(CLIENTS, PERCENT, st.integers(1, 6), SEEDS)
def test_every_round_has_the_same_number_of_distinct_known_clients(
    clients: list[str], percent: int, rounds: int, seed: int
) -> None:
    schedule = draw_schedule(clients, rounds, percent / 100, seed)
    size = max(1, ceil(Fraction(percent, 100) * len(clients)))
    assert [len(sampled) for sampled in schedule] == [size] * rounds
    for sampled in schedule:
        assert list(sampled) == sorted(set(sampled)) and set(sampled) <= set(clients)


@given(CLIENTS, PERCENT, SEEDS)
def test_a_longer_run_starts_like_a_shorter_one(clients: list[str], percent: int, seed: int) -> None:
    assert draw_schedule(clients, 5, percent / 100, seed)[:2] == draw_schedule(clients, 2, percent / 100, seed)


@given(CLIENTS, PERCENT, SEEDS, st.data())
def test_the_order_of_the_clients_does_not_matter(clients: list[str], percent: int, seed: int, data: st.DataObject) -> None:
    turned = data.draw(st.permutations(clients))
    assert draw_schedule(turned, 3, percent / 100, seed) == draw_schedule(clients, 3, percent / 100, seed)


@pytest.mark.parametrize(
    ("clients", "participation", "size"), [(10, 0.2, 2), (10, 0.3, 3), (7, 1.0, 7), (3, 0.01, 1), (5, 0.5, 3)]
)
def test_known_sizes(clients: int, participation: float, size: int) -> None:
    schedule = draw_schedule([f"c{i}" for i in range(clients)], 2, participation, 0)
    assert [len(sampled) for sampled in schedule] == [size, size]


def test_seeds_and_rounds_draw_anew_and_everybody_gets_a_turn() -> None:
    names = [f"c{i}" for i in range(10)]
    schedule = draw_schedule(names, 200, 0.2, 0)
    assert len(set(schedule)) > 30 and draw_schedule(names, 200, 0.2, 1) != schedule
    turns = {name: sum(name in sampled for sampled in schedule) for name in names}
    # 200 draws with chance .2: mean 40, standard deviation 5.7.
    assert all(15 <= count <= 65 for count in turns.values())
