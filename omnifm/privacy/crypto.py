"""The primitives of secure aggregation, as functions on bytes; all of them are the `cryptography` package's (extra `privacy`).

X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), ChaCha20 and ChaCha20-Poly1305 (RFC 8439). The package is imported when one of
them is first needed: omnifm without the extra must import.
"""

from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifm.errors import ConfigError, FederationError

KEY_BYTES = 32
TAG_BYTES = 16


def part(name: str) -> Any:
    """Return a module of the `cryptography` package. Raises ConfigError if the extra is not installed."""
    try:
        return import_module(f"cryptography.{name}")
    except ImportError:
        raise ConfigError("secure aggregation and secret noise need the extra: pip install 'omnifm[privacy]'") from None


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key (32 bytes) of a private key (32 bytes)."""
    public: bytes = (
        part("hazmat.primitives.asymmetric.x25519").X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    )
    return public


def agree(private: bytes, public: bytes) -> bytes:
    """Return the secret that X25519 gives two parties. Raises FederationError if the other's key is none, or of low order."""
    x25519 = part("hazmat.primitives.asymmetric.x25519")
    try:
        shared: bytes = x25519.X25519PrivateKey.from_private_bytes(private).exchange(
            x25519.X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        raise FederationError("a public key is none") from None
    return shared


def hkdf(secret: bytes, info: bytes, *, salt: bytes = b"", length: int = KEY_BYTES) -> bytes:
    """Return `length` bytes derived from a secret for the purpose `info` (HKDF-SHA256)."""
    derive = part("hazmat.primitives.kdf.hkdf").HKDF(
        algorithm=part("hazmat.primitives.hashes").SHA256(), length=length, salt=salt or None, info=info
    )
    key: bytes = derive.derive(secret)
    return key


def keystream(key: bytes, count: int, *, block: int = 0, nonce: bytes = bytes(12)) -> bytes:
    """Return `count` bytes of ChaCha20's key stream from block `block` on. A key serves one stream: the nonce may stay 0."""
    ciphers = part("hazmat.primitives.ciphers")
    cipher = ciphers.Cipher(ciphers.algorithms.ChaCha20(key, block.to_bytes(4, "little") + nonce), mode=None)
    stream: bytes = cipher.encryptor().update(bytes(count))
    return stream


def seal(key: bytes, plain: bytes, about: bytes) -> bytes:
    """Encrypt and authenticate (ChaCha20-Poly1305). A key seals one message, so the nonce is 0."""
    sealed: bytes = part("hazmat.primitives.ciphers.aead").ChaCha20Poly1305(key).encrypt(bytes(12), plain, about)
    return sealed


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """Undo `seal`. Raises FederationError if the message, `about` or the key is another."""
    try:
        plain: bytes = part("hazmat.primitives.ciphers.aead").ChaCha20Poly1305(key).decrypt(bytes(12), sealed, about)
    except part("exceptions").InvalidTag:
        raise FederationError("a sealed message was changed, or is for somebody else") from None
    return plain


def uniforms(key: bytes, count: int) -> npt.NDArray[np.float64]:
    """Return `count` draws from [0, 1), whole multiples of 2^-53, from a key's stream."""
    return (np.frombuffer(keystream(key, 8 * count), dtype="<u8") >> 11).astype(np.float64) * 2.0**-53


def normals(key: bytes, count: int) -> npt.NDArray[np.float64]:
    """Return `count` draws of N(0, 1) in float64 from a key's stream, by Box and Muller (1958) from uniform 53-bit numbers."""
    pairs = -(-count // 2)
    first, second = uniforms(key, 2 * pairs).reshape(2, pairs)
    radius = np.sqrt(-2.0 * np.log(1.0 - first))  # 1 - u is in (0, 1]: the logarithm of 0 never comes up
    return np.concatenate([radius * np.cos(2 * np.pi * second), radius * np.sin(2 * np.pi * second)])[:count]
