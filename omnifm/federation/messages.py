"""All that crosses a boundary between server and clients: `Request` and `Reply`, safetensors on the wire.

A message is named tensors plus a JSON header. Nothing is ever unpickled; what bytes may look like is in `wire.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from omnifm.errors import FederationError
from omnifm.federation import wire

Kind = Literal["describe", "train", "evaluate", "secagg"]


@dataclass(frozen=True)
class Request:
    """What the server asks of one client.

    Attributes:
        kind: `describe` (say what your data look like), `train`, `evaluate`, or `secagg` (a step of secure aggregation).
        round: rounds completed so far; a client answers from its private state of that time.
        client: whom it is for.
        tensors: the shared tensors of the model, for this client.
        extra: what the strategy sends besides (the bank).
        settings: plain values (split, epochs, learning rate).
        nonce: hexadecimal digits that the reply must repeat: an old reply cannot know them.
    """

    kind: Kind
    round: int
    client: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    nonce: str = ""

    @property
    def label(self) -> str:
        """How a complaint begins."""
        return f"client {self.client}, round {self.round}"


@dataclass(frozen=True)
class Reply:
    """What a client answers.

    Attributes:
        kind: that of the request; so are `round`, `client` and `nonce`.
        round: see above.
        client: who answers, by its own word.
        num_examples: training examples it stands for, filled in one place (`client.py`).
        tensors: the shared tensors after training.
        extra: what the strategy sends besides.
        metrics: plain values; `loss` after training.
        seconds: time the client took.
        nonce: see above.
        sender: who the engine knows the sender to be, e.g. by its key; never on the wire. None: an engine without strangers.
    """

    kind: Kind
    round: int
    client: str
    num_examples: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    nonce: str = ""
    sender: str | None = None


def size_by_group(tensors: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> dict[str, int]:
    """Return bytes by tensor group: the part of the model (`backbone`, `path`, `head`), or the first word of an extra's name."""
    sizes: dict[str, int] = {}
    for source, separator in ((tensors, "."), (extra, "/")):
        for name, tensor in source.items():
            group = name.partition(separator)[0]
            sizes[group] = sizes.get(group, 0) + tensor.numel() * tensor.element_size()
    return sizes


def encode(message: Request | Reply) -> bytes:
    """Return `message` as one safetensors blob with a JSON header. Raises FederationError if a tensor's name cannot travel."""
    return save(*_pack(message))


def decode(blob: bytes, limit: int = wire.MAX_BYTES) -> Request | Reply:
    """Return the message in `blob`, which anybody may have sent.

    Args:
        blob: any bytes.
        limit: the longest message that is read, bytes.

    Raises:
        FederationError: it is not one of ours; one line says why. No other exception, and no memory beyond a small multiple of
            the message's length.
    """
    try:
        length = wire.header_length(blob[:8], len(blob), limit)
        kind, fields = wire.check_header(blob[8 : 8 + length], len(blob) - 8 - length)
        return _unpack(load(blob), kind, fields)
    except (FederationError, *_UNREADABLE) as error:
        raise _refusal(error) from None


def write(message: Request | Reply, path: Path) -> None:
    """Write `message` to a file: what `encode` gives, without a copy in memory."""
    named, metadata = _pack(message)
    save_file(named, path, metadata=metadata)


def read(path: Path) -> Request | Reply:
    """Return the message in a file of this machine, however long. Raises FederationError when it is not one of ours."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = wire.header_length(first := file.read(8), size, limit=size)
            kind, fields = wire.check_header(file.read(length), size - len(first) - length)
        return _unpack(load_file(path), kind, fields)
    except (FederationError, OSError, *_UNREADABLE) as error:
        raise _refusal(error) from None


# The header was checked; what is left is what safetensors and torch may still find, or run out of.
_UNREADABLE = (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError)


def _refusal(error: Exception) -> FederationError:
    reason = str(error) if isinstance(error, FederationError) else f"{type(error).__name__}: {wire.shown(str(error))}"
    return FederationError(f"a message could not be read: {reason}")


def _pack(message: Request | Reply) -> tuple[dict[str, Tensor], dict[str, str]]:
    for name in (*message.tensors, *message.extra):
        wire.check_name(name)
    named = {f"t:{k}": v.contiguous() for k, v in message.tensors.items()}
    named |= {f"x:{k}": v.contiguous() for k, v in message.extra.items()}
    plain = {k: v for k, v in vars(message).items() if k not in ("tensors", "extra", "sender")}
    return named, {"type": type(message).__name__, "header": json.dumps(plain)}


def _unpack(named: Mapping[str, Tensor], kind: str, fields: Mapping[str, Any]) -> Request | Reply:
    for name, tensor in named.items():
        # A truth value is 0 or 1; torch does not say what any other byte means.
        if tensor.dtype is torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise FederationError(f"tensor {name} has truth values that are neither 0 nor 1")
    made: type[Request] | type[Reply] = {"Request": Request, "Reply": Reply}[kind]
    tensors = {k[2:]: v for k, v in named.items() if k.startswith("t:")}
    extra = {k[2:]: v for k, v in named.items() if k.startswith("x:")}
    return made(**fields, tensors=tensors, extra=extra)
