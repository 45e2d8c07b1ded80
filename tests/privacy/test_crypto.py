"""Known answers of the RFCs, and what must fail."""

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("cryptography")

from omnifm.errors import FederationError
from omnifm.privacy import crypto

H = bytes.fromhex
ALICE = H("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = H("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
ALICE_PUBLIC = H("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB_PUBLIC = H("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
SUNSCREEN = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it."


def test_x25519_agrees_as_in_rfc_7748_section_6_1() -> None:
    assert (crypto.public_key(ALICE), crypto.public_key(BOB)) == (ALICE_PUBLIC, BOB_PUBLIC)
    expected = H("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert crypto.agree(ALICE, BOB_PUBLIC) == crypto.agree(BOB, ALICE_PUBLIC) == expected


def test_x25519_multiplies_as_in_rfc_7748_section_5_2() -> None:
    scalar = H("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = H("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert crypto.agree(scalar, point) == H("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552")


@pytest.mark.parametrize("public", [bytes(32), b"\1" + bytes(31), b"short"])
def test_a_point_of_low_order_is_refused(public: bytes) -> None:
    with pytest.raises(FederationError, match="a public key is none"):
        crypto.agree(ALICE, public)


@pytest.mark.parametrize(
    ("secret", "salt", "info", "length", "expected"),
    [
        (
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            42,
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(0x50)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            82,
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (b"\x0b" * 22, b"", b"", 42, "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"),
    ],
    ids=["case 1", "case 2", "case 3"],
)
def test_hkdf_derives_as_in_rfc_5869_appendix_a(secret: bytes, salt: bytes, info: bytes, length: int, expected: str) -> None:
    assert crypto.hkdf(secret, info, salt=salt, length=length).hex() == expected


def test_chacha20_streams_as_in_rfc_8439_appendix_a_1() -> None:
    first = (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    second = (
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert crypto.keystream(bytes(32), 128).hex() == first + second
    assert crypto.keystream(bytes(32), 64, block=1).hex() == second


def test_chacha20_encrypts_as_in_rfc_8439_section_2_4_2() -> None:
    stream = crypto.keystream(bytes(range(32)), len(SUNSCREEN), block=1, nonce=H("000000000000004a00000000"))
    assert bytes(a ^ b for a, b in zip(stream, SUNSCREEN, strict=True)).hex() == (
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b3571639d624e65152ab"
        "8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab77937365af90bbf74a35be6b40b8eedf2785e42874d"
    )


CHANGES: dict[str, Callable[[bytes, bytes, bytes], tuple[bytes, bytes, bytes]]] = {
    "key": lambda k, s, a: (k[::-1], s, a),
    "message": lambda k, s, a: (k, bytes([s[0] ^ 1]) + s[1:], a),
    "tag": lambda k, s, a: (k, s[:-1], a),
    "about": lambda k, s, a: (k, s, a + b"!"),
    "nothing": lambda k, s, a: (k, b"", a),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_sealed_opens_unchanged_or_not_at_all(name: str) -> None:
    key, about = bytes(range(32)), b"session"
    sealed = crypto.seal(key, b"a share", about)
    assert crypto.unseal(key, sealed, about) == b"a share" and len(sealed) == 7 + crypto.TAG_BYTES
    with pytest.raises(FederationError, match="a sealed message was changed"):
        crypto.unseal(*CHANGES[name](key, sealed, about))


def test_normal_draws_are_normal() -> None:
    from scipy import stats

    draws = crypto.normals(bytes(range(32)), 100_001)
    assert len(draws) == 100_001 and np.array_equal(draws[:10], crypto.normals(bytes(range(32)), 100_001)[:10])
    assert stats.kstest(draws, "norm").pvalue > 0.01
    assert abs(np.corrcoef(draws[:50_000], draws[50_001:])[0, 1]) < 0.02 and abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02
