"""Keys of the streams from which privacy draws: noise, and who is in a batch."""

from omnifm import seeds
from omnifm.config import PrivacyConfig
from omnifm.privacy import crypto


def stream_key(privacy: PrivacyConfig, seed: int, info: bytes, *purpose: str | int) -> bytes:
    """Return a key from the system's generator; with `noise = "seeded"` one that follows from the run's seed.

    Args:
        privacy: says which.
        seed: of the run.
        info: separates the kinds of streams.
        purpose: names the stream: what for, which round, whose.
    """
    if privacy.noise == "secret":
        return seeds.secret(crypto.KEY_BYTES)
    return crypto.hkdf(seeds.derive(seed, "privacy", *purpose).to_bytes(8, "big"), info)
