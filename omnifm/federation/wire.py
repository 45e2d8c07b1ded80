"""What bytes from outside must look like before anything is made of them: the safetensors layout, less than it allows.

    8 bytes: length of the header, little-endian | header: JSON | the tensors' bytes, end to end

The layout is that of https://huggingface.co/docs/safetensors, "Format". Here a header is short, its keys and types are known, its
tensors few, their names plain, and their bytes fill the rest of the message in order without gap or overlap. Everything is
decided by the header, which is read first and cannot be long: what a message costs in memory is in proportion to its length.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omnifm.errors import FederationError

MAX_BYTES = 4 * 2**30
"""Longest message; three times the largest network here."""
MAX_HEADER = 4 * 2**20
MAX_TENSORS = 2**14
_MAX_DIMS, _MAX_ELEMENTS, _MAX_NAME, _MAX_DEPTH, _MAX_COUNT = 8, 2**40, 200, 16, 2**53
_MAX_ENTRIES = MAX_TENSORS + 2  # one for what is no tensor, and one so that a tensor too many is called that
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of an element, by the name of its type; no other type crosses the wire."""

CLIENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""What a client may be called: also a folder's name."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/+-]*")
_NONCE = re.compile(r"[0-9a-f]{0,64}")
_KINDS = ("describe", "train", "evaluate", "secagg")
_FIELDS = {
    "Request": {"kind", "round", "client", "settings", "nonce"},
    "Reply": {"kind", "round", "client", "num_examples", "metrics", "seconds", "nonce"},
}


def shown(value: object) -> str:
    """Return what stands in a message as a few printable characters."""
    text = repr(value)[:60]
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)


def check_name(name: str) -> None:
    """Raise FederationError unless a tensor may be called `name` on the wire."""
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise FederationError(f"the tensor name {shown(name)} is longer than {_MAX_NAME} or has odd characters")


def header_length(first: bytes, size: int, limit: int = MAX_BYTES) -> int:
    """Return how long the header is.

    Args:
        first: the first 8 bytes.
        size: length of the whole message.
        limit: the longest message that is read.

    Raises:
        FederationError: the message is too long, or its header is, or does not fit into it.
    """
    if size > limit:
        raise FederationError(f"{size} bytes, at most {limit} are read")
    if size < 8:
        raise FederationError(f"{size} bytes are too few")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER:
        raise FederationError(f"a header of {length} bytes, at most {MAX_HEADER} are read")
    if length > size - 8:
        raise FederationError(f"a header of {length} bytes in a message of {size}")
    return length


def check_header(header: bytes, payload: int) -> tuple[str, dict[str, Any]]:
    """Return the type of a message (`Request` or `Reply`) and its plain fields, both known to be in order.

    Args:
        header: the safetensors header.
        payload: bytes that come after it.

    Raises:
        FederationError: one line that names what is wrong.
    """
    entries = _table(_parse(header, numbers=False), "the header")
    about = _table(entries.pop("__metadata__", None), "the header's __metadata__")
    _check_layout(entries, payload)
    if about.keys() != {"type", "header"} or not isinstance(about["header"], str):
        raise FederationError("__metadata__ is not a type and a header")
    kind = about["type"]
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise FederationError(f"the message is a {shown(kind)}, neither Request nor Reply")
    fields = _table(_parse(about["header"].encode("utf-8", "replace"), numbers=True), "the inner header")
    _check_fields(kind, fields)
    return kind, fields


def _parse(text: bytes, *, numbers: bool) -> object:
    """Parse JSON without duplicate keys; `numbers`: NaN and Infinity are taken (a metric may be either)."""

    def constant(name: str) -> float:
        if not numbers:
            raise FederationError(f"the header holds {name}")
        return float(name)

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise FederationError(f"the header is no JSON ({shown(str(error))})") from None


def _no_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    if len(pairs) > _MAX_ENTRIES:
        raise FederationError(f"a table of {len(pairs)} entries, at most {_MAX_ENTRIES} are read")
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise FederationError(f"the header says {shown(name)} twice")
        found[name] = value
    return found


def _table(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FederationError(f"{what} is missing or no table")
    return value


def _check_layout(entries: Mapping[str, Any], payload: int) -> None:
    if len(entries) > MAX_TENSORS:
        raise FederationError(f"{len(entries)} tensors, at most {MAX_TENSORS} are read")
    spans = sorted((*_check_tensor(name, entry), name) for name, entry in entries.items())
    at = 0
    for begin, end, name in spans:
        if begin != at:
            raise FederationError(f"tensor {name} begins at byte {begin}, where {at} was due")
        at = end
    if at != payload:
        raise FederationError(f"the tensors have {at} bytes, {payload} are there")


def _check_tensor(name: str, entry: object) -> tuple[int, int]:
    """Return where a tensor's bytes begin and end."""
    if name[:2] not in ("t:", "x:"):
        raise FederationError(f"tensor {shown(name)} is neither shared nor extra")
    check_name(name[2:])
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FederationError(f"tensor {name} is not a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise FederationError(f"tensor {name} is of type {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_count, shape)):
        raise FederationError(f"tensor {name} has shape {shown(shape)}")
    # Strides are products of sizes even where one of them is 0; torch must be able to compute them.
    if math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise FederationError(f"tensor {name} has shape {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise FederationError(f"tensor {name} has offsets {shown(offsets)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise FederationError(f"tensor {name} has shape {shown(shape)} of {dtype} in {end - begin} bytes")
    return begin, end


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT


def _check_fields(kind: str, fields: Mapping[str, Any]) -> None:
    if odd := fields.keys() ^ _FIELDS[kind]:
        name = min(odd)
        raise FederationError(f"the field {shown(name)} is {'unknown' if name in fields else 'missing'}")
    if fields["kind"] not in _KINDS:
        raise FederationError(f"kind is {shown(fields['kind'])}, not one of {', '.join(_KINDS)}")
    for name in {"round", "num_examples"} & fields.keys():
        if not _is_count(fields[name]):
            raise FederationError(f"{name} is {shown(fields[name])}, no count")
    if not isinstance(fields["client"], str) or not CLIENT.fullmatch(fields["client"]):
        raise FederationError(f"client is {shown(fields['client'])}, no client's name")
    if not isinstance(fields["nonce"], str) or not _NONCE.fullmatch(fields["nonce"]):
        raise FederationError(f"nonce is {shown(fields['nonce'])}")
    if "seconds" in fields and not _is_duration(fields["seconds"]):
        raise FederationError(f"seconds is {shown(fields['seconds'])}")
    table = "settings" if kind == "Request" else "metrics"
    if not isinstance(fields[table], dict) or not _is_shallow(fields[table]):
        raise FederationError(f"{table} is no table, or one too deep")


def _is_duration(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value < 1e12


def _is_shallow(value: object, depth: int = _MAX_DEPTH) -> bool:
    """Whether tables and lists are at most `depth` inside each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth >= 0 and all(_is_shallow(item, depth - 1) for item in inner)
