"""What server and hospitals say to each other round a message: its kind, a JSON header, and the message as bytes.

Free of torch, as is all that the program imports which Flower starts for every message.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omnifm.errors import FederationError

MOST_BYTES = 4 * 2**30
"""Largest call that is taken."""
_MOST_HEADER = 64 * 2**20
_LENGTH = 4


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
    """Return a call as bytes: length of the head, the head in JSON, the body."""
    head = json.dumps({"kind": call.kind, "header": call.header}).encode()
    return len(head).to_bytes(_LENGTH, "big") + head + call.body


def unpack(blob: bytes) -> Call:
    """Return the call in `blob`. Raises FederationError if it is none."""
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
    return Call(kind, header, blob[_LENGTH + length :])
