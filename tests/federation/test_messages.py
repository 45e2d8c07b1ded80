from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from omnifm.errors import FederationError
from omnifm.federation.messages import Reply, Request, decode, encode, read, size_by_group, write

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
Tensors = dict[str, torch.Tensor]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.:/+-]{0,7}", fullmatch=True)
CLIENTS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,8}", fullmatch=True)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    found = {}
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
        found[name] = (torch.randn(shape, generator=generator) * 50).to(dtype)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@given(tensors(), tensors(), CLIENTS, st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_a_request_comes_back_bit_for_bit(shared: Tensors, extra: Tensors, client: str, settings: dict[str, Any]) -> None:
    back = decode(encode(Request("train", 3, client, shared, extra, settings)))
    assert isinstance(back, Request) and (back.kind, back.round, back.client) == ("train", 3, client)
    assert same(dict(back.tensors), shared) and same(dict(back.extra), extra) and back.settings == settings


@given(tensors(), tensors(), st.dictionaries(st.text(max_size=5), JSON, max_size=3), st.floats(0, 1e9))
def test_a_reply_comes_back_bit_for_bit(shared: Tensors, extra: Tensors, metrics: dict[str, Any], seconds: float) -> None:
    back = decode(encode(Reply("evaluate", 0, "c", 17, shared, extra, metrics, seconds)))
    assert isinstance(back, Reply) and (back.num_examples, back.seconds) == (17, seconds)
    assert same(dict(back.tensors), shared) and same(dict(back.extra), extra) and back.metrics == metrics


def test_bits_that_are_no_numbers_survive_too() -> None:
    odd = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45])
    back = decode(encode(Reply("train", 0, "c", 1, {"w": odd})))
    assert back.tensors["w"].view(torch.int32).tolist() == odd.view(torch.int32).tolist()


def test_views_and_turned_tensors_are_sent_as_they_look() -> None:
    base = torch.arange(12.0).view(3, 4)
    back = decode(encode(Reply("train", 0, "c", 1, {"t": base.T, "column": base[:, 1], "all": base.clone()})))
    assert torch.equal(back.tensors["t"], base.T) and torch.equal(back.tensors["column"], base[:, 1])


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"nonsense",
        encode(Request("train", 0, "c", {"w": torch.ones(3)}))[:-2],
        save({"w": torch.ones(1)}),
        save({"w": torch.ones(1)}, metadata={"type": "Rumour", "header": "{}"}),
        save({"w": torch.ones(1)}, metadata={"type": "Reply", "header": "{"}),
        save({"w": torch.ones(1)}, metadata={"type": "Reply", "header": '{"colour": 3}'}),
    ],
    ids=["empty", "nonsense", "cut short", "no header", "unknown type", "no JSON", "unknown field"],
)
def test_what_is_no_message_is_one_line(blob: bytes) -> None:
    with pytest.raises(FederationError, match="a message could not be read") as caught:
        decode(blob)
    assert "\n" not in str(caught.value)


def test_bytes_are_counted_by_part_and_type() -> None:
    shared = {
        "backbone.a": torch.ones(3),
        "backbone.b": torch.ones(2, dtype=torch.int64),
        "head.w": torch.ones(1, dtype=torch.bfloat16),
    }
    extra = {"bank/v": torch.ones(2, 2), "prototypes/w": torch.ones(1), "signature": torch.ones(4)}
    expected = {"backbone": 12 + 16, "head": 2, "bank": 16, "prototypes": 4, "signature": 16}
    assert size_by_group(shared, extra) == expected and size_by_group({}, {}) == {}


def test_a_message_survives_a_file(tmp_path: Path) -> None:
    message = Reply("train", 3, "ct-0", 17, {"a.w": torch.randn(3, 4)}, {"x/n": torch.arange(5)}, {"loss": 0.25}, 1.5)
    write(message, tmp_path / "m.safetensors")
    found = read(tmp_path / "m.safetensors")
    assert isinstance(found, Reply)
    assert torch.equal(found.tensors["a.w"], message.tensors["a.w"])
    assert torch.equal(found.extra["x/n"], message.extra["x/n"])
    assert (found.round, found.client, found.num_examples, found.metrics) == (3, "ct-0", 17, {"loss": 0.25})
    assert (tmp_path / "m.safetensors").stat().st_size == len(encode(message))


def test_a_file_that_is_no_message_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(Request("train", 0, "ct-0", {"w": torch.ones(100)}), path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FederationError, match="a message could not be read"):
        read(path)
