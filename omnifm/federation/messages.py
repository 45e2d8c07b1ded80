"""All that crosses a boundary between server and clients: `Request` and `Reply`, safetensors on the wire.

A message is named tensors plus a JSON header. Nothing is ever unpickled.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from omnifm.errors import FederationError

Kind = Literal["describe", "train", "evaluate"]


@dataclass(frozen=True)
class Request:
    """What the server asks of one client.

    Attributes:
        kind: `describe` (say what your data look like), `train` or `evaluate`.
        round: rounds completed so far; a client answers from its private state of that time.
        client: whom it is for.
        tensors: the shared tensors of the model, for this client.
        extra: what the strategy sends besides (the bank).
        settings: plain values (split, epochs, learning rate).
    """

    kind: Kind
    round: int
    client: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What a client answers. `num_examples` is the number of training examples, filled in one place (`client.py`)."""

    kind: Kind
    round: int
    client: str
    num_examples: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def size_by_group(tensors: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> dict[str, int]:
    """Return bytes by tensor group: the part of the model (`backbone`, `path`, `head`), or the first word of an extra's name."""
    sizes: dict[str, int] = {}
    for source, separator in ((tensors, "."), (extra, "/")):
        for name, tensor in source.items():
            group = name.partition(separator)[0]
            sizes[group] = sizes.get(group, 0) + tensor.numel() * tensor.element_size()
    return sizes


def encode(message: Request | Reply) -> bytes:
    """Return `message` as one safetensors blob with a JSON header."""
    return save(*_pack(message))


def decode(blob: bytes) -> Request | Reply:
    """Return the message in `blob`. Raises FederationError when it is not one of ours."""
    try:
        named = load(blob)
        length = int.from_bytes(blob[:8], "little")
        return _unpack(named, json.loads(blob[8 : 8 + length])["__metadata__"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise FederationError(f"a message could not be read: {type(error).__name__}: {error}") from None


def write(message: Request | Reply, path: Path) -> None:
    """Write `message` to a file: what `encode` gives, without a copy in memory."""
    named, metadata = _pack(message)
    save_file(named, path, metadata=metadata)


def read(path: Path) -> Request | Reply:
    """Return the message in a file. Raises FederationError when it is not one of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        return _unpack(load_file(path), metadata)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise FederationError(f"a message could not be read: {type(error).__name__}: {error}") from None


def _pack(message: Request | Reply) -> tuple[dict[str, Tensor], dict[str, str]]:
    named = {f"t:{k}": v.contiguous() for k, v in message.tensors.items()}
    named |= {f"x:{k}": v.contiguous() for k, v in message.extra.items()}
    plain = {k: v for k, v in vars(message).items() if k not in ("tensors", "extra")}
    return named, {"type": type(message).__name__, "header": json.dumps(plain)}


def _unpack(named: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Request | Reply:
    kind: type[Request] | type[Reply] = {"Request": Request, "Reply": Reply}[metadata["type"]]
    tensors = {k[2:]: v for k, v in named.items() if k.startswith("t:")}
    extra = {k[2:]: v for k, v in named.items() if k.startswith("x:")}
    return kind(**json.loads(metadata["header"]), tensors=tensors, extra=extra)
