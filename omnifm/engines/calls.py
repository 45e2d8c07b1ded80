"""What server and hospitals say to each other round a message: its kind, a JSON header, and the message as bytes.

Free of torch, as is all that the program imports which Flower starts for every message.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omnifm.errors import FederationError

MOST_BYTES = 4 * 2**30
"""Largest call that is taken."""
_MOST_HEADER = 64 * 2**20
_LENGTH = 4
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Call:
    """One call, or the answer to one.

    Attributes:
        kind: the server asks `introduce` and `answer`; a hospital says `introduction` and `reply`, or why it cannot: `mistake`
            (something a person can mend) and `crash`.
        header: plain values.
        body: an encoded `Request` or `Reply`.
    """

    kind: str
    header: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""


def pack(call: Call) -> bytes:
    """Return a call as bytes: length of the head, the head in JSON, the body, the SHA-256 of all that."""
    head = json.dumps({"kind": call.kind, "header": call.header}).encode()
    start = len(head).to_bytes(_LENGTH, "big") + head
    digest = hashlib.sha256(start)
    digest.update(call.body)
    return b"".join((start, call.body, digest.digest()))


def unpack(blob: bytes) -> Call:
    """Return the call in `blob`. Raises FederationError if it is none, or not as it was sent.

    The digest is no signature: it tells chance (a bad cable, bad memory, a cut file), not somebody who means harm.
    """
    length = int.from_bytes(blob[:_LENGTH], "big")
    if len(blob) < _LENGTH + length or length > _MOST_HEADER:
        raise FederationError("a call is cut short")
    try:
        head = json.loads(blob[_LENGTH : _LENGTH + length])
        kind, header = head["kind"], head["header"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FederationError("a call cannot be read") from None
    if not isinstance(kind, str) or not isinstance(header, dict):
        raise FederationError("a call cannot be read")
    end = max(_LENGTH + length, len(blob) - _DIGEST)
    if hashlib.sha256(memoryview(blob)[:end]).digest() != blob[end:]:
        raise FederationError("a call was cut short or changed on its way")
    return Call(kind, header, blob[_LENGTH + length : end])
