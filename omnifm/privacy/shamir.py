"""Shamir's secret sharing: any `threshold` of the shares give the secret, fewer say nothing of it.

    f(x) = s + a_1 x + ... + a_{t-1} x^{t-1} mod p          share of party i: f(i + 1)
    s = sum_i f(x_i) prod_{j != i} x_j / (x_j - x_i)

A. Shamir, "How to share a secret", Communications of the ACM 22(11), 1979. p = 2^521 - 1, a Mersenne prime: secrets of 64 bytes
fit. Arithmetic is Python's on whole numbers; it takes a time that depends on them, which is visible to whoever measures this
process, not to the server.
"""

from collections.abc import Mapping

from omnifm import seeds
from omnifm.errors import FederationError

PRIME = 2**521 - 1
SHARE_BYTES = 66
SECRET_BYTES = 64


def split(secret: bytes, parties: int, threshold: int) -> list[bytes]:
    """Cut a secret of up to 64 bytes into shares of 66 bytes, one for each party, with fresh randomness.

    Raises:
        ValueError: the threshold is not in [1, parties], or the secret is too long.
    """
    if not 1 <= threshold <= parties or len(secret) > SECRET_BYTES:
        raise ValueError(f"{len(secret)} bytes cannot be shared among {parties} with threshold {threshold}")
    coefficients = [int.from_bytes(secret, "big"), *(_element() for _ in range(threshold - 1))]
    return [evaluate(coefficients, party + 1).to_bytes(SHARE_BYTES, "big") for party in range(parties)]


def evaluate(coefficients: list[int], x: int) -> int:
    """Return f(x) mod p, lowest coefficient first (Horner)."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def join(shares: Mapping[int, bytes], length: int) -> bytes:
    """Return the secret of `length` bytes from the shares by party; it takes as many as the threshold, and more do no harm.

    Raises:
        FederationError: no secret of that length has these shares: some are wrong, or too few.
    """
    points = {party + 1: int.from_bytes(share, "big") for party, share in shares.items()}
    total = 0
    for x, y in points.items():
        above = below = 1
        for other in points.keys() - {x}:
            above, below = above * other % PRIME, below * (other - x) % PRIME
        total = (total + y * above * pow(below, -1, PRIME)) % PRIME
    try:
        return total.to_bytes(length, "big")
    except OverflowError:
        raise FederationError("shares of a secret do not fit together") from None


def _element() -> int:
    """Draw a uniform element of the field; the one number too many is drawn again."""
    while (value := int.from_bytes(seeds.secret(SHARE_BYTES), "big") % 2**521) == PRIME:
        pass
    return value
