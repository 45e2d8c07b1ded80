"""Real numbers as whole ones mod 2^32, so that masks cancel exactly and a sum of all clients is a sum of whole numbers.

    L = floor((2^31 - 1) / n)      q = c / L      Q(x) = round(clip(x, -c, c) / q) mod 2^32      sum_i x_i ~ q sum_i Q(x_i)

c: the range, beyond which numbers are clipped; n: clients at most; q: the quantum. No sum leaves the ring, since n L < 2^31.
For numbers inside the range the sum of m clients is off by at most m q / 2, plus float64's rounding.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omnifm.errors import ConfigError
from omnifm.privacy.crypto import keystream

Words = npt.NDArray[np.uint32]
Reals = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ring:
    """Whole numbers mod 2^32, and how real ones become such.

    Attributes:
        clip: c.
        clients: n.

    Raises:
        ConfigError: the range is not positive, or there are so many clients that fewer than 2^8 levels are left.
    """

    clip: float
    clients: int

    def __post_init__(self) -> None:
        if not self.clip > 0 or self.clients < 1 or self.levels < 2**8:
            raise ConfigError(f"secure aggregation: no ring for {self.clients} clients and numbers up to {self.clip}")

    @property
    def levels(self) -> int:
        """L, the largest whole number of one client."""
        return (2**31 - 1) // self.clients

    @property
    def quantum(self) -> float:
        """Q, the step between two numbers that a client can send."""
        return self.clip / self.levels

    def error(self, clients: int) -> float:
        """Return how far a sum of so many clients may be from that of their real numbers, if none is clipped."""
        return clients * self.quantum / 2

    def encode(self, values: Reals) -> Words:
        """Return Q(values); all must be finite."""
        whole = np.rint(np.clip(values, -self.clip, self.clip) / self.quantum)
        return whole.astype(np.int64).astype(np.uint32)  # the second step wraps: -1 is 2^32 - 1

    def decode(self, total: Words) -> Reals:
        """Return the real numbers that a sum stands for."""
        return total.view(np.int32).astype(np.float64) * self.quantum


def mask(seed: bytes, length: int) -> Words:
    """Return `length` uniform elements of the ring, from a seed of 32 bytes (ChaCha20's key stream)."""
    return np.frombuffer(keystream(seed, 4 * length), dtype="<u4").astype(np.uint32)
