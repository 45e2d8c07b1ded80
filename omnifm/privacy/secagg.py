"""Secure aggregation: the server learns the sum of the clients' vectors and no client's own, whoever drops out on the way.

    y_u = Q(x_u) + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)   mod 2^32
    sum_{u in U3} Q(x_u) = sum_{u in U3} y_u - sum_{u in U3} PRG(b_u) -+ sum_{u in U3, v in U2 - U3} PRG(s_uv)

K. Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017, Figure 4, without the
signatures and the consistency check that stand there against a server that lies: this one is followed by everybody and curious.
s_uv = HKDF(X25519(u, v)); b_u: a seed of u's own; both u's mask key and b_u are shared among all (`shamir.py`), each share sealed
for its receiver. Of every client the others give away one of the two: b_u of those whose vector came, the mask key of those whose
vector did not. Fewer than `threshold` clients together with the server learn nothing of a single vector.

    step           client sends                        server has, and needs at least `threshold` of
    1 advertise    two public keys                     U1
    2 share        a sealed share for everybody        U2, part of U1
    3 mask         y_u                                 U3, part of U2
    4 unmask       its shares of b_u or of keys        U4, part of U3

Objects here know nothing of messages: bytes and arrays in, bytes and arrays out, parties by number. One object serves one sum.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from omnifm import seeds
from omnifm.errors import FederationError
from omnifm.privacy import crypto, shamir
from omnifm.privacy.ring import Reals, Ring, Words, mask

_SHARES = 2 * shamir.SHARE_BYTES
_ANYBODY = bytes(range(crypto.KEY_BYTES))
"""A private key of no secret: every public key of low order gives 0 with it, as with any other."""


@dataclass(frozen=True)
class Plan:
    """What all parties agree on before they start.

    Attributes:
        session: bytes that no other sum has; keys are derived for it alone.
        parties: how many, numbered from 0.
        threshold: how many must stay to the end; more than half, so that no two answers can be had for one client.
        ring: the numbers.
    """

    session: bytes
    parties: int
    threshold: int
    ring: Ring

    def __post_init__(self) -> None:
        if not self.parties / 2 < self.threshold <= self.parties or self.ring.clients < self.parties:
            raise ValueError(f"threshold {self.threshold} of {self.parties} parties")

    def require(self, present: Collection[int], step: str, within: Collection[int] | None = None) -> None:
        """Raise FederationError if too few are left after a step, one that was not there before, or one that is named twice."""
        known = range(self.parties) if within is None else within
        if not all(type(party) is int for party in present):
            raise FederationError(f"secure aggregation, step {step}: a party is no number")
        if strangers := [party for party in present if party not in known]:
            raise FederationError(f"secure aggregation, step {step}: party {min(strangers)} is not expected")
        if len(set(present)) < len(present):
            raise FederationError(f"secure aggregation, step {step}: a party is named twice")
        if len(present) < self.threshold:
            raise FederationError(
                f"secure aggregation, step {step}: {len(present)} of {self.parties} clients are left, {self.threshold} are needed"
            )

    def mask_seed(self, own: int, private: bytes, other: int, public: bytes) -> bytes:
        """Return the seed that two parties have in common, the same for both."""
        low, high = sorted((own, other))
        return crypto.hkdf(crypto.agree(private, public), self._info(b"mask", low, high))

    def seal_key(self, own: int, private: bytes, other: int, public: bytes, sender: int) -> bytes:
        """Return the key under which `sender`, one of two parties, seals its shares for the other."""
        receiver = own + other - sender
        return crypto.hkdf(crypto.agree(private, public), self._info(b"seal", sender, receiver))

    def _info(self, purpose: bytes, first: int, second: int) -> bytes:
        return b"omnifm secagg 1 " + purpose + self.session + first.to_bytes(4, "big") + second.to_bytes(4, "big")


class Client:
    """One party. Each step is done once, in order; out of order is a FederationError, and nothing is given away."""

    def __init__(self, plan: Plan, number: int) -> None:
        self._plan, self._number, self._step = plan, number, 0
        self._seal, self._mask, self._seed = (seeds.secret(crypto.KEY_BYTES) for _ in range(3))
        self._keys: dict[int, tuple[bytes, bytes]] = {}
        self._received: dict[int, bytes] = {}

    def _enter(self, step: int, name: str) -> None:
        if step != self._step + 1:
            raise FederationError(f"secure aggregation, step {name}: it was done before, or comes too early")
        self._step = step

    def advertise(self) -> bytes:
        """Step 1: return two public keys, 64 bytes: for sealing, for masks."""
        self._enter(1, "advertise")
        return crypto.public_key(self._seal) + crypto.public_key(self._mask)

    def share(self, keys: Mapping[int, bytes]) -> dict[int, bytes]:
        """Step 2: return, for every other party with keys, its shares of this one's mask key and seed, sealed.

        Args:
            keys: what the parties advertised, this one included.
        """
        self._enter(2, "share")
        self._plan.require(keys, "share")
        if len(set(keys.values())) < len(keys) or self._number not in keys:
            raise FederationError("secure aggregation, step share: two parties have one key, or this one's is missing")
        self._keys = {party: _halves(key) for party, key in keys.items()}
        parts = [shamir.split(secret, self._plan.parties, self._plan.threshold) for secret in (self._mask, self._seed)]
        self._received[self._number] = parts[0][self._number] + parts[1][self._number]
        sealed = {}
        for party in self._keys.keys() - {self._number}:
            key = self._plan.seal_key(self._number, self._seal, party, self._keys[party][0], self._number)
            sealed[party] = crypto.seal(key, parts[0][party] + parts[1][party], self._plan.session)
        return sealed

    def mask(self, shares: Mapping[int, bytes], values: Reals) -> Words:
        """Step 3: return the masked vector.

        Args:
            shares: sealed shares by party, from all others that did step 2.
            values: (n,) finite.
        """
        self._enter(3, "mask")
        self._plan.require({*shares, self._number}, "mask", self._keys)
        if not np.isfinite(values).all():
            raise FederationError("secure aggregation, step mask: a number is not finite")
        masked = self._plan.ring.encode(values) + mask(self._seed, len(values))
        for party, sealed in shares.items():
            self._received[party] = self._unsealed(party, sealed)
            pad = mask(self._plan.mask_seed(self._number, self._mask, party, self._keys[party][1]), len(values))
            masked += pad if party > self._number else -pad
        return masked

    def _unsealed(self, party: int, sealed: bytes) -> bytes:
        key = self._plan.seal_key(self._number, self._seal, party, self._keys[party][0], party)
        try:
            return crypto.unseal(key, sealed, self._plan.session)
        except FederationError as error:
            raise FederationError(f"secure aggregation, step mask: the shares from party {party}: {error}") from None

    def unmask(self, survivors: Collection[int]) -> dict[int, bytes]:
        """Step 4: return a share of each party: of its seed if its vector came, of its mask key if not; never both."""
        self._enter(4, "unmask")
        self._plan.require(survivors, "unmask", self._received)
        size = shamir.SHARE_BYTES
        return {p: both[size:] if p in survivors else both[:size] for p, both in self._received.items()}


class Server:
    """The one who adds up. Each step takes what came; who is missing has dropped out."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._keys: dict[int, bytes] = {}
        self._sharing: frozenset[int] = frozenset()
        self._masked: set[int] = set()
        self._total: Words | None = None

    @staticmethod
    def check_key(key: bytes) -> None:
        """Raise FederationError unless a party advertised two public keys, neither of low order: no other party could use it."""
        for half in _halves(key):
            crypto.agree(_ANYBODY, half)

    def check_shares(self, party: int, parts: Mapping[int, bytes]) -> None:
        """Raise FederationError unless a party shared with all others of U1. Whether a share opens its receiver alone can see."""
        if parts.keys() != self._keys.keys() - {party} or any(len(p) != _SHARES + crypto.TAG_BYTES for p in parts.values()):
            raise FederationError(f"secure aggregation, step share: what party {party} sent is not a share for everybody")

    def check_answer(self, party: int, parts: Mapping[int, bytes]) -> None:
        """Raise FederationError unless a party of U3 answered with one share of each of U2."""
        if parts.keys() != self._sharing or any(len(p) != shamir.SHARE_BYTES for p in parts.values()):
            raise FederationError(f"secure aggregation, step unmask: what party {party} sent is not one share of each")

    def keys(self, advertised: Mapping[int, bytes]) -> dict[int, bytes]:
        """After step 1: return what every client of U1 is sent."""
        self._plan.require(advertised, "advertise")
        for key in advertised.values():
            self.check_key(key)
        self._keys = dict(advertised)
        return self._keys

    def shares(self, sealed: Mapping[int, Mapping[int, bytes]]) -> dict[int, dict[int, bytes]]:
        """After step 2: return, by receiver, the sealed shares of all other parties of U2."""
        self._plan.require(sealed, "share", self._keys)
        for party, parts in sealed.items():
            self.check_shares(party, parts)
        self._sharing = frozenset(sealed)
        return {receiver: {p: sealed[p][receiver] for p in sealed if p != receiver} for receiver in sealed}

    def add(self, party: int, masked: Words) -> None:
        """In step 3: take in one client's masked vector; the sum is all that is kept."""
        if party not in self._sharing or party in self._masked:
            raise FederationError(f"secure aggregation, step mask: party {party} is not expected")
        if masked.dtype != np.uint32 or (self._total is not None and masked.shape != self._total.shape) or masked.ndim != 1:
            raise FederationError(f"secure aggregation, step mask: the vector of party {party} has another length or type")
        self._total = masked.copy() if self._total is None else self._total + masked
        self._masked.add(party)

    def survivors(self) -> frozenset[int]:
        """After step 3: return U3, which every client of it is told."""
        self._plan.require(self._masked, "mask")
        return frozenset(self._masked)

    def total(self, answers: Mapping[int, Mapping[int, bytes]]) -> Reals:
        """After step 4: return the sum of the vectors of U3.

        Args:
            answers: by party that answered, what `Client.unmask` gave.

        Raises:
            FederationError: too few answered, or their shares do not fit.
        """
        self._plan.require(answers, "unmask", self._masked)
        assert self._total is not None  # U3 is not empty
        total = self._total.copy()
        for party in sorted(self._sharing):
            known = {
                helper: parts[party] for helper, parts in answers.items() if len(parts.get(party, b"")) == shamir.SHARE_BYTES
            }
            self._plan.require(known, "unmask")
            secret = shamir.join(known, crypto.KEY_BYTES)
            if party in self._masked:
                total -= mask(secret, len(total))
            else:
                self._cancel(total, party, secret)
        return self._plan.ring.decode(total)

    def _cancel(self, total: Words, lost: int, private: bytes) -> None:
        """Take out of the sum the masks that the others had in common with a party whose vector never came."""
        if crypto.public_key(private) != _halves(self._keys[lost])[1]:
            raise FederationError(f"secure aggregation, step unmask: the shares of party {lost}'s key are wrong")
        for party in self._masked:
            pad = mask(self._plan.mask_seed(lost, private, party, _halves(self._keys[party])[1]), len(total))
            total -= pad if lost > party else -pad


def _halves(key: bytes) -> tuple[bytes, bytes]:
    """Return the two public keys in what a party advertised."""
    if len(key) != 2 * crypto.KEY_BYTES:
        raise FederationError(f"secure aggregation, step advertise: a party's keys have {len(key)} bytes")
    return key[: crypto.KEY_BYTES], key[crypto.KEY_BYTES :]
