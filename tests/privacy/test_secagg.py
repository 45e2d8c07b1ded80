"""The sum of whoever stays, to the quantum, whoever leaves at whichever step; an error where too few stay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography")

from omnifm.errors import ConfigError, FederationError
from omnifm.privacy import shamir
from omnifm.privacy.ring import Ring, mask
from omnifm.privacy.secagg import Client, Plan, Server


@dataclass
class Sitting:
    """One sum, message by message; `left` says after which step a party is gone (0: never came)."""

    values: Sequence[np.ndarray[Any, np.dtype[np.float64]]]
    threshold: int
    left: dict[int, int] = field(default_factory=dict)
    ring: Ring | None = None

    def __post_init__(self) -> None:
        count = len(self.values)
        self.ring = self.ring or Ring(4.0, count)
        self.plan = Plan(b"s" * 16, count, self.threshold, self.ring)
        self.clients = {i: Client(self.plan, i) for i in range(count)}
        self.server = Server(self.plan)
        self.masked: dict[int, Any] = {}

    def there(self, step: int) -> list[int]:
        return [i for i in self.clients if self.left.get(i, 9) >= step]

    def masks(self) -> None:
        keys = self.server.keys({i: self.clients[i].advertise() for i in self.there(1)})
        shares = self.server.shares({i: self.clients[i].share(keys) for i in self.there(2)})
        for i in self.there(3):
            self.masked[i] = self.clients[i].mask(shares[i], self.values[i])
            self.server.add(i, self.masked[i])

    def run(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        self.masks()
        survivors = self.server.survivors()
        return self.server.total({i: self.clients[i].unmask(survivors) for i in self.there(4)})


def vectors(count: int, length: int = 50, seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    rng = np.random.default_rng(seed)
    return list(rng.normal(0, 1, (count, length)).clip(-4, 4))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7), st.data())
def test_the_sum_is_that_of_whoever_stays(count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(count // 2 + 1, count))
    goers = data.draw(st.lists(st.integers(0, count - 1), max_size=count - threshold, unique=True))
    left = {i: data.draw(st.integers(0, 3)) for i in goers}
    sitting = Sitting(vectors(count), threshold, left)
    total = sitting.run()
    stayed = sitting.there(3)
    assert np.abs(total - sum(sitting.values[i] for i in stayed)).max() <= sitting.plan.ring.error(len(stayed)) * (1 + 1e-9)
    exact = sum(np.rint(sitting.values[i] / sitting.plan.ring.quantum) for i in stayed)
    assert np.array_equal(np.rint(total / sitting.plan.ring.quantum), exact)  # not one unit off


@pytest.mark.parametrize(
    ("survivors", "line"),
    [
        ([0, 0, 0, 0], "a party is named twice"),
        ([0, 1, 2, 3, 3], "a party is named twice"),
        ([0, 1, 2, True], "a party is no number"),
        ([0, 1, 2, 3.0], "a party is no number"),
        ([0, 1, 2, "3"], "a party is no number"),
        ([0], "1 of 5 clients are left, 4 are needed"),
    ],
)
def test_a_server_that_names_one_client_for_all_learns_nothing(survivors: list[Any], line: str) -> None:
    """With party 0 named as often as the threshold asks, all but 0's mask keys came out, and with them 0's own update."""
    sitting = Sitting(vectors(5), 4)
    sitting.masks()
    for client in sitting.clients.values():
        with pytest.raises(FederationError, match=f"secure aggregation, step unmask: {line}"):
            client.unmask(survivors)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_below_the_threshold_there_is_no_sum(step: int) -> None:
    name = ("advertise", "share", "mask", "unmask")[step]
    with pytest.raises(FederationError, match=rf"secure aggregation, step {name}: 3 of 5 clients are left, 4 are needed"):
        Sitting(vectors(5), 4, {1: step, 3: step}).run()


def test_what_the_server_sees_of_one_client_is_uniform() -> None:
    from scipy import stats

    sitting = Sitting([np.zeros(20_000), *vectors(2, 20_000)], 2)
    sitting.masks()
    seen = sitting.masked[0]
    assert stats.kstest(seen / 2.0**32, "uniform").pvalue > 1e-3
    assert not np.array_equal(seen, sitting.masked[1]) and len(np.unique(seen)) > 19_900


def test_masks_of_all_clients_cancel_but_for_their_own() -> None:
    """Without step 4 the sum is still under every survivor's own mask."""
    sitting = Sitting([np.zeros(100)] * 3, 2)
    sitting.masks()
    total = sum(sitting.masked.values())
    own = sum(mask(client._seed, 100) for client in sitting.clients.values())
    assert np.array_equal(total, own) and total.any()


def test_a_client_gives_away_one_secret_of_each_and_only_once() -> None:
    sitting = Sitting(vectors(4), 3, {2: 2})
    sitting.masks()
    client = sitting.clients[0]
    answer = client.unmask(sitting.server.survivors())
    assert answer.keys() == {0, 1, 2, 3} and {len(share) for share in answer.values()} == {shamir.SHARE_BYTES}
    with pytest.raises(FederationError, match="step unmask: it was done before, or comes too early"):
        client.unmask({0, 1, 2})  # the server would now have both of party 2


def test_no_step_is_done_early_or_twice() -> None:
    plan = Plan(b"s", 3, 2, Ring(1.0, 3))
    for act in (lambda c: c.share({}), lambda c: c.mask({}, np.zeros(1)), lambda c: c.unmask({0, 1})):
        with pytest.raises(FederationError, match="comes too early"):
            act(Client(plan, 0))
    client = Client(plan, 0)
    client.advertise()
    with pytest.raises(FederationError, match="it was done before"):
        client.advertise()


def test_a_client_does_not_answer_for_too_few_or_for_strangers() -> None:
    for survivors, complaint in (({0, 1}, "2 of 4 clients are left"), ({0, 1, 2, 9}, "party 9 is not expected")):
        sitting = Sitting(vectors(4), 3)
        sitting.masks()
        with pytest.raises(FederationError, match=complaint):
            sitting.clients[0].unmask(survivors)


def swap(sealed: dict[int, bytes]) -> dict[int, bytes]:
    a, b = sorted(sealed)[:2]
    return {**sealed, a: sealed[b], b: sealed[a]}


def test_a_share_that_goes_to_somebody_else_does_not_open() -> None:
    sitting = Sitting(vectors(4), 3)
    keys = sitting.server.keys({i: c.advertise() for i, c in sitting.clients.items()})
    sealed = {i: c.share(keys) for i, c in sitting.clients.items()}
    shares = sitting.server.shares({**sealed, 0: swap(sealed[0])})
    with pytest.raises(FederationError, match="for somebody else"):
        sitting.clients[1].mask(shares[1], sitting.values[1])


def test_a_key_that_comes_twice_is_refused() -> None:
    clients = [Client(Plan(b"s", 3, 2, Ring(1.0, 3)), i) for i in range(3)]
    key = [c.advertise() for c in clients]
    with pytest.raises(FederationError, match="two parties have one key"):
        clients[0].share({0: key[0], 1: key[1], 2: key[1]})


BENT: dict[str, tuple[Callable[[Server], object], str]] = {
    "short keys": (lambda s: s.keys(dict.fromkeys(range(3), b"key")), "a party's keys have 3 bytes"),
    "a stranger": (lambda s: s.keys({0: b"", 1: b"", 7: b""}), "party 7 is not expected"),
    "a vector before its shares": (lambda s: s.add(0, np.zeros(3, np.uint32)), "party 0 is not expected"),
}


@pytest.mark.parametrize("name", BENT)
def test_the_server_refuses_what_does_not_fit(name: str) -> None:
    act, complaint = BENT[name]
    with pytest.raises(FederationError, match=complaint):
        act(Server(Plan(b"s", 3, 2, Ring(1.0, 3))))


def test_the_server_refuses_vectors_and_shares_that_do_not_fit() -> None:
    sitting = Sitting(vectors(3), 2, {2: 2})
    sitting.masks()
    for vector in (np.zeros(49, np.uint32), np.zeros(50), np.zeros((50, 1), np.uint32)):
        sitting.server._masked.discard(1)
        with pytest.raises(FederationError, match="the vector of party 1 has another length or type"):
            sitting.server.add(1, vector)
    sitting.server._masked.add(1)
    with pytest.raises(FederationError, match="party 0 is not expected"):
        sitting.server.add(0, np.zeros(50, np.uint32))
    answers = {i: sitting.clients[i].unmask({0, 1}) for i in (0, 1)}
    with pytest.raises(FederationError, match="step unmask: 1 of 3 clients are left"):
        sitting.server.total({0: answers[0], 1: {**answers[1], 0: b"short"}})
    with pytest.raises(FederationError, match=r"the shares of party 2's key are wrong|do not fit together"):
        sitting.server.total({0: answers[0], 1: {**answers[1], 2: bytes(66)}})


@given(st.floats(1e-3, 1e3), st.integers(1, 500), st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_the_ring_keeps_numbers_to_half_a_quantum(clip: float, clients: int, shares: list[float]) -> None:
    ring = Ring(clip, clients)
    values = np.array(shares) * clip
    assert np.abs(ring.decode(ring.encode(values)) - values).max() <= ring.error(1) * (1 + 1e-6)
    assert ring.quantum == pytest.approx(clip * clients / 2**31, rel=1e-6)
    assert ring.quantum * ring.levels * ring.clients <= clip * clients * (1 + 1e-12)


def test_the_ring_clips_and_never_wraps() -> None:
    ring = Ring(2.0, 3)
    assert ring.decode(ring.encode(np.array([5.0, -5.0, 2.0]))) == pytest.approx([2.0, -2.0, 2.0])
    full = sum(ring.encode(np.array([9.0, -9.0])) for _ in range(3))
    assert ring.decode(full) == pytest.approx([6.0, -6.0])


@pytest.mark.parametrize(("clip", "clients"), [(0.0, 3), (float("nan"), 3), (1.0, 0), (1.0, 2**24)])
def test_a_ring_without_room_is_refused(clip: float, clients: int) -> None:
    with pytest.raises(ConfigError, match="secure aggregation: no ring"):
        Ring(clip, clients)


@pytest.mark.parametrize("threshold", [0, 2, 5])
def test_a_threshold_is_more_than_half(threshold: int) -> None:
    with pytest.raises(ValueError, match="threshold"):
        Plan(b"s", 4, threshold, Ring(1.0, 4))
