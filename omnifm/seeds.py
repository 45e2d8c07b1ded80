"""The one place where randomness comes from.

Every random draw names what it is for, so that two draws never share a stream and no draw depends on the order in which
clients, workers or strategies happen to run. A stream is a function of `(root, *names)` alone.
"""

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_SEED_BITS = 63


def derive(root: int, *names: str | int) -> int:
    """Return the seed of the stream called `names` under `root`: the first 63 bits of a SHA-256.

    Args:
        root: the run's seed.
        names: what the stream is for, e.g. `("batches", round_index, client_id)`.
    """
    # Lengths are part of the text, so that ("ab", "c") and ("a", "bc") are two streams.
    text = str(root) + "".join(f"|{type(n).__name__}:{len(str(n))}:{n}" for n in names)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


def generator(root: int, *names: str | int) -> torch.Generator:
    """Return a CPU torch generator for the stream `names`."""
    return torch.Generator().manual_seed(derive(root, *names))


def numpy_generator(root: int, *names: str | int) -> np.random.Generator:
    """Return a numpy generator for the stream `names` (partitions, simulated images, k-means)."""
    return np.random.default_rng(derive(root, *names))


def secret(count: int) -> bytes:
    """Return `count` bytes that nobody can know: keys, masks and nonces. They change no result that a seed promises."""
    return secrets.token_bytes(count)


@contextmanager
def scope(root: int, *names: str | int) -> Iterator[None]:
    """Run a block in which torch's global generators are the stream `names`; restore them afterwards.

    For code that cannot be handed a generator: parameter initialisers and dropout of libraries.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    seed = derive(root, *names)
    with torch.random.fork_rng(devices=devices):
        if devices or torch.backends.mps.is_available():
            torch.manual_seed(seed)
        else:
            # The same stream. `torch.manual_seed` also notes a stack trace for every absent accelerator, half a millisecond.
            torch.default_generator.manual_seed(seed)
        yield
