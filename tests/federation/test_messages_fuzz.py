"""Ten thousand messages that somebody bent: each is refused in one line or is a message, and none costs more than its length."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omnifm.errors import FederationError
from omnifm.federation import wire
from omnifm.federation.messages import Reply, Request, decode, encode

REPLY = encode(
    Reply(
        "train",
        3,
        "ct-0",
        17,
        {"a.w": torch.randn(3, 4), "a.b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)},
        {"prototypes/vectors": torch.zeros(2, 3), "flags": torch.tensor([True, False])},
        {"loss": 0.25, "retrieval": {"own": 0.0}},
        1.5,
    )
)
REQUEST = encode(Request("evaluate", 2, "mr-1", {"a.w": torch.ones(2, 2)}, {"bank/round": torch.arange(3)}, {"split": "test"}))
MANY = settings(max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)


def outcome(blob: bytes) -> str:
    """Decode; return the complaint, or nothing if it is a message. Whatever else happens fails the test."""
    try:
        message = decode(blob)
    except FederationError as error:
        text = str(error)
        assert text.startswith("a message could not be read: ") and text.isprintable() and len(text) < 400
        return text
    assert isinstance(message, Request | Reply) and wire.CLIENT.fullmatch(message.client)
    assert message.kind in ("describe", "train", "evaluate", "secagg") and message.round >= 0
    carried = sum(t.numel() * t.element_size() for t in (*message.tensors.values(), *message.extra.values()))
    assert carried <= len(blob)
    return ""


@MANY
@given(st.binary(max_size=400) | st.binary(max_size=200).map(lambda b: struct.pack("<Q", len(b) // 2) + b))
def test_random_bytes(blob: bytes) -> None:
    assert outcome(blob)


@MANY
@given(st.sampled_from([REPLY, REQUEST]), st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=6))
def test_messages_with_other_bytes(blob: bytes, changes: list[tuple[int, int]]) -> None:
    bent = bytearray(blob)
    for at, value in changes:
        bent[at % len(bent)] = value
    outcome(bytes(bent))


@MANY
@given(st.sampled_from([REPLY, REQUEST]), st.integers(0, 10**4), st.integers(0, 10**4), st.binary(max_size=20))
def test_messages_cut_and_spliced(blob: bytes, start: int, stop: int, inserted: bytes) -> None:
    start, stop = sorted((start % (len(blob) + 1), stop % (len(blob) + 1)))
    bent = blob[:start] + inserted + blob[stop:]
    assert outcome(bent) or len(bent) == len(blob)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(
        ["train", "Reply", "Request", "F32", "F8_E5M2", "../x", "t:a.w", 2**63, -1, [0, 8], [0, 2**62], [2**31, 2**31]]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def split(blob: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def join(header: Any, payload: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + payload


@MANY
@given(
    st.sampled_from([REPLY, REQUEST]),
    st.integers(0, 99),
    st.sampled_from(["change", "remove", "add", "inner"]),
    VALUES,
    st.text(max_size=6),
)
def test_messages_with_an_edited_header(blob: bytes, where: int, edit: str, value: Any, name: str) -> None:
    header, payload = split(blob)
    tables = [header, *(v for v in header.values() if isinstance(v, dict))]
    inner = json.loads(header["__metadata__"]["header"])
    table = inner if edit == "inner" else tables[where % len(tables)]
    key = sorted(table)[where % len(table)]
    if edit == "remove":
        table.pop(key)
    else:
        table[name if edit == "add" else key] = value
    if edit == "inner":
        header["__metadata__"]["header"] = json.dumps(inner)
    complaint = outcome(join(header, payload))
    assert complaint or edit in ("change", "inner")


def edited(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> bytes:
    """Return the reply with its header and inner header changed in place."""
    header, payload = split(REPLY)
    inner = json.loads(header["__metadata__"]["header"])
    change(header, inner)
    header["__metadata__"]["header"] = json.dumps(inner)
    return join(header, payload)


def rename(header: dict[str, Any], old: str, new: str) -> None:
    header[new] = header.pop(old)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "overlapping tensors": (edited(lambda h, i: h["t:n"].update(data_offsets=[4, 12])), r"tensor \S+ begins at byte \d+, where"),
    "the same bytes twice": (
        edited(lambda h, i: h.update({"t:twin": h["t:a.w"]})),
        r"tensor t:twin begins at byte \d+, where \d+ was due",
    ),
    "bytes that nobody owns": (REPLY + b"\0" * 8, r"the tensors have \d+ bytes, \d+ are there"),
    "out of range": (
        edited(lambda h, i: h["t:a.w"].update(shape=[2**20, 2**18], data_offsets=[0, 2**40])),
        "begins at byte|has shape",
    ),
    "a shape that overflows": (edited(lambda h, i: h["t:a.w"].update(shape=[0, 2**50, 2**50])), "has shape"),
    "a strange type": (edited(lambda h, i: h["t:a.w"].update(dtype="F8_E4M3")), "is of type 'F8_E4M3'"),
    "a name that is a path": (edited(lambda h, i: rename(h, "t:a.w", "t:../../etc/passwd")), "odd characters"),
    "a name that is a line": (edited(lambda h, i: rename(h, "t:a.w", "t:a\nb")), "odd characters"),
    "neither shared nor extra": (edited(lambda h, i: rename(h, "t:a.w", "a.w")), "neither shared nor extra"),
    "further keys": (edited(lambda h, i: h["t:a.w"].update(stride=[1])), "is not a dtype, a shape and data_offsets"),
    "another client's folder": (edited(lambda h, i: i.update(client="../ct-1")), "no client's name"),
    "an unknown field": (edited(lambda h, i: i.update(sender="ct-1")), "the field 'sender' is unknown"),
    "a missing field": (edited(lambda h, i: i.pop("round")), "the field 'round' is missing"),
    "an unknown kind": (edited(lambda h, i: i.update(kind="obey")), "kind is 'obey'"),
    "a negative round": (edited(lambda h, i: i.update(round=-1)), "round is -1, no count"),
    "a round that is no number": (edited(lambda h, i: i.update(round=True)), "round is True, no count"),
    "time that is no number": (edited(lambda h, i: i.update(seconds=float("nan"))), "seconds is nan"),
    "endless time": (edited(lambda h, i: i.update(seconds=1e308)), "seconds is 1e[+]308"),
    "metrics without end": (
        edited(lambda h, i: i.update(metrics={"a": json.loads("[" * 50 + "]" * 50)})),
        "metrics is no table, or one too deep",
    ),
    "a bottomless header": (join('{"a":' + "[" * 10**5, b""), "is no JSON"),
    "NaN as an offset": (join('{"__metadata__":{"type":"Reply","header":"{}"},"t:a":NaN}', b""), "the header holds NaN"),
    "a key twice": (join('{"t:a":1,"t:a":2}', b""), "the header says 't:a' twice"),
    "a number of many digits": (join('{"t:a":' + "9" * 5000 + "}", b""), "is no JSON"),
    "no text": (join("{", b"")[:8] + b"\xff\xfe", "a header of|is no JSON"),
    "a long header": (struct.pack("<Q", 2**62) + b"{}", "a header of 4611686018427387904 bytes"),
    "truth that is neither": (encode(Reply("train", 0, "c", 1, {"b": torch.tensor([True])}))[:-1] + b"\x07", "neither 0 nor 1"),
    "a long table": (
        join({f"t:{k}": 0 for k in range(wire.MAX_TENSORS + 3)}, b""),
        "a table of 16387 entries, at most 16386 are read",
    ),
    "many tensors": (
        join(
            {f"t:{k}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for k in range(wire.MAX_TENSORS + 1)}
            | {"__metadata__": {}},
            b"",
        ),
        "16385 tensors, at most 16384 are read",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_is_named(name: str) -> None:
    blob, complaint = HOSTILE[name]
    with pytest.raises(FederationError, match=complaint) as caught:
        decode(blob)
    assert "\n" not in str(caught.value)


def test_a_name_twice_is_found_in_one_pass() -> None:
    """Names are compared as often as there are names, not as the square of it: 4 MiB of them took minutes."""
    counted = 0

    class Name(str):
        def __eq__(self, other: object) -> bool:
            nonlocal counted
            counted += 1
            return str.__eq__(self, other)  # type: ignore[arg-type]

        __hash__ = str.__hash__

    names = [Name(f"t:{k}") for k in range(5000)]
    with pytest.raises(FederationError, match=r"the header says 't:4999' twice"):
        wire._no_duplicates([*((name, 0) for name in names), (Name("t:4999"), 0)])
    assert counted < 3 * len(names)


def test_an_oversized_message_is_refused_before_it_is_read() -> None:
    with pytest.raises(FederationError, match=f"{len(REPLY)} bytes, at most 100 are read"):
        decode(REPLY, limit=100)


def test_a_small_message_takes_little_memory() -> None:
    tracemalloc.start()
    try:
        for blob, _ in HOSTILE.values():
            if len(blob) < 10**4:
                with pytest.raises(FederationError):
                    decode(blob)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_metrics_may_be_no_numbers_and_nothing_else_may() -> None:
    back = decode(encode(Reply("train", 0, "c", 1, metrics={"loss": float("inf")})))
    assert isinstance(back, Reply) and back.metrics["loss"] == float("inf")


def test_what_could_not_be_read_is_not_sent() -> None:
    with pytest.raises(FederationError, match="odd characters"):
        encode(Reply("train", 0, "c", 1, {"a b": torch.ones(1)}))
