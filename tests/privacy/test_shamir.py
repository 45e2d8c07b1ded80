from contextlib import suppress
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnifm.errors import FederationError
from omnifm.privacy import shamir


def test_the_prime_is_one() -> None:
    """Lucas and Lehmer: 2^p - 1 is prime iff s_{p-2} = 0, s_0 = 4, s_{k+1} = s_k^2 - 2."""
    s = 4
    for _ in range(521 - 2):
        s = (s * s - 2) % shamir.PRIME
    assert s == 0


def test_shares_are_the_points_of_the_textbook_example() -> None:
    """1234 + 166 x + 94 x^2, as in Wikipedia's article; the field is so large that no point wraps."""
    points = [shamir.evaluate([1234, 166, 94], x) for x in range(1, 7)]
    assert points == [1494, 1942, 2578, 3402, 4414, 5614]
    shares = {x: value.to_bytes(66, "big") for x, value in enumerate(points)}
    for three in combinations(shares, 3):
        assert shamir.join({x: shares[x] for x in three}, 2) == (1234).to_bytes(2, "big")


@given(st.binary(min_size=1, max_size=64), st.integers(1, 9), st.data())
def test_any_threshold_of_the_shares_give_the_secret(secret: bytes, parties: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, parties))
    shares = shamir.split(secret, parties, threshold)
    chosen = data.draw(st.lists(st.sampled_from(range(parties)), min_size=threshold, unique=True))
    assert shamir.join({party: shares[party] for party in chosen}, len(secret)) == secret


@given(st.binary(min_size=32, max_size=32), st.integers(2, 9), st.data())
def test_fewer_shares_do_not(secret: bytes, parties: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(2, parties))
    shares = shamir.split(secret, parties, threshold)
    chosen = data.draw(st.lists(st.sampled_from(range(parties)), min_size=1, max_size=threshold - 1, unique=True))
    try:
        assert shamir.join({party: shares[party] for party in chosen}, 32) != secret
    except FederationError as error:
        assert "do not fit together" in str(error)


def test_one_share_too_few_fits_every_secret() -> None:
    """With t - 1 shares each secret has exactly one polynomial: they say nothing of it."""
    shares = shamir.split(b"\7", 5, 3)
    two = {x + 1: int.from_bytes(shares[x], "big") for x in (0, 3)}
    for secret in (0, 1, 255):
        points = {0: secret, **two}
        # The polynomial through them, at the places of the two shares: Lagrange, over the rationals mod p.
        for x, y in two.items():
            value = Fraction(0)
            for a, b in points.items():
                term = Fraction(b)
                for other in points.keys() - {a}:
                    term *= Fraction(x - other, a - other)
                value += term
            assert value % shamir.PRIME == y


@given(st.binary(min_size=32, max_size=32), st.integers(0, 3), st.integers(0, 65), st.integers(1, 255))
def test_a_bent_share_is_noticed(secret: bytes, party: int, place: int, change: int) -> None:
    """A wrong point moves the secret by a multiple of a constant: it stays below 2^256 once in 2^265."""
    shares = dict(enumerate(shamir.split(secret, 4, 3)))
    bent = bytearray(shares[party])
    bent[place] ^= change
    with suppress(FederationError):
        assert shamir.join({**shares, party: bytes(bent)}, 32) != secret


@pytest.mark.parametrize(("length", "parties", "threshold"), [(65, 3, 2), (32, 3, 4), (32, 3, 0)])
def test_what_cannot_be_shared_is_refused(length: int, parties: int, threshold: int) -> None:
    with pytest.raises(ValueError, match="cannot be shared"):
        shamir.split(bytes(length), parties, threshold)
