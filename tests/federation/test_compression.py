"""Smaller uploads: what is sent against slow references, what is held back, and what of hostile clients is refused."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omnifm import build
from omnifm.config import CompressionConfig
from omnifm.errors import ConfigError, FederationError
from omnifm.federation import guard
from omnifm.federation.aggregation import update_norm
from omnifm.federation.compression import LEAST, Compression, largest
from omnifm.federation.messages import Reply
from tests.support import differing, make_lab

METHODS = ("bf16", "int8", "topk")
NAN, INF = float("nan"), float("inf")
NAME = "backbone.conv.weight"
"""The one tensor of the tiny model that is large enough."""


def compression(upload: str, share: float = 0.1, *, feedback: bool = True, buffers: tuple[str, ...] = ()) -> Compression:
    changes = {"topk_share": share} if upload == "topk" else {}
    return Compression(CompressionConfig.model_validate({"upload": upload, "error_feedback": feedback, **changes}), buffers)


def settings(upload: str, **more: Any) -> dict[str, Any]:
    return {"compression__upload": upload, **{f"compression__{key}": value for key, value in more.items()}}


def pair(seed: int, size: int = 200, scale: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what a client has after training, and what it received."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=g)
    return {"w": start + scale * torch.randn(size, generator=g) ** 3}, {"w": start}


SEEDS, SCALES = st.integers(0, 2**32), st.sampled_from([1e-30, 1e-6, 1.0, 1e6])


# ---------------------------------------------------------------------- one tensor
@given(SEEDS, SCALES)
def test_int8_is_off_by_half_a_scale_at_most(seed: int, scale: float) -> None:
    tensors, start = pair(seed, scale=scale)
    sent, _ = compression("int8").compress(tensors, start, {})
    change = tensors["w"].numpy().astype(np.float64) - start["w"].numpy().astype(np.float64)
    step = float(sent["w:scale"])
    assert sent["w"].dtype is torch.int8 and sent["w:scale"].dtype is torch.float32
    assert step == pytest.approx(np.abs(change).max() / 127, rel=1e-6) and step * 127 >= np.abs(change).max()
    assert sent["w"].tolist() == ([round(x / step) for x in change] if step else [0] * 200)
    assert np.abs(sent["w"].numpy() * step - change).max() <= step / 2 * (1 + 1e-12)
    restored = compression("int8").restore(sent, start)["w"]
    bound = step / 2 + np.spacing(np.abs(tensors["w"].numpy()) + np.float32(step))
    assert (np.abs(restored.double().numpy() - tensors["w"].double().numpy()) <= bound).all()


@given(SEEDS, SCALES)
def test_bf16_is_the_upper_half_of_the_bits_to_the_nearest_even(seed: int, scale: float) -> None:
    tensors, start = pair(seed, scale=scale)
    sent, _ = compression("bf16").compress(tensors, start, {})
    bits = (tensors["w"].double() - start["w"].double()).float().numpy().view(np.uint32)
    upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert sent["w"].dtype is torch.bfloat16 and (sent["w"].view(torch.uint16).numpy() == upper).all()
    expected = start["w"].double() + torch.from_numpy((upper.astype(np.uint32) << 16).view(np.float32)).double()
    assert torch.equal(compression("bf16").restore(sent, start)["w"], expected.float())


@given(st.lists(st.integers(-3, 3), min_size=LEAST, max_size=150), st.sampled_from([0.01, 0.07, 0.1, 0.5, 0.999, 1.0]))
def test_topk_sends_exactly_the_largest_and_of_equal_ones_the_first(change: list[int], share: float) -> None:
    start = {"w": torch.arange(len(change)).float()}
    tensors = {"w": start["w"] + torch.tensor(change).float()}
    count = math.ceil(Fraction(str(share)) * len(change))
    expected = sorted(sorted(range(len(change)), key=lambda i: (-abs(change[i]), i))[:count])
    sent, held = compression("topk", share).compress(tensors, start, {})
    assert sent["w:index"].dtype is torch.int32 and sent["w:index"].tolist() == expected
    assert sent["w:value"].tolist() == [tensors["w"][i].item() for i in expected]
    assert held["w"].tolist() == [0 if i in expected else x for i, x in enumerate(change)]
    restored = compression("topk", share).restore(sent, start)["w"]
    assert restored.tolist() == [float(i + x * (i in expected)) for i, x in enumerate(change)]


@pytest.mark.parametrize(
    ("share", "size", "count"), [(0.07, 100, 7), (0.29, 100, 29), (0.01, 64, 1), (1e-9, 64, 1), (1.0, 99, 99)]
)
def test_a_share_is_that_many_numbers_whatever_floating_point_makes_of_it(share: float, size: int, count: int) -> None:
    assert compression("topk", share).outline({"w": torch.zeros(size)})["w:index"].shape == (count,)


def test_what_is_no_number_is_the_largest() -> None:
    assert largest(torch.tensor([1.0, NAN, 3.0, INF, 2.0]), 2).tolist() == [1, 3]
    assert largest(torch.tensor([NAN, NAN, NAN]), 2).tolist() == [0, 1]


@pytest.mark.parametrize("upload", METHODS)
@pytest.mark.parametrize("shape", [(100,), (4, 25), (2, 5, 2, 5)])
def test_no_change_is_no_change_and_shapes_come_back(upload: str, shape: tuple[int, ...]) -> None:
    method, start = compression(upload), {"w": torch.randn(shape)}
    sent, held = method.compress(start, start, {})
    assert torch.equal(method.restore(sent, start)["w"], start["w"]) and not held["w"].any()
    far, _ = method.compress({"w": start["w"] + torch.randn(shape)}, start, {})
    restored = method.restore(far, start)["w"]
    assert restored.shape == shape and restored.dtype is torch.float32 and restored.is_contiguous()


@pytest.mark.parametrize("upload", METHODS)
def test_buffers_counters_other_types_and_small_tensors_are_left_alone(upload: str) -> None:
    start = {
        "norm.running_var": torch.rand(LEAST),
        "norm.num_batches_tracked": torch.tensor(3),
        "counts": torch.arange(100),
        "half": torch.randn(100).half(),
        "bias": torch.randn(LEAST - 1),
        "weight": torch.randn(LEAST),
    }
    tensors = {n: t + 1 for n, t in start.items()}
    method = compression(upload, buffers=("norm.running_var", "norm.num_batches_tracked"))
    sent, held = method.compress(tensors, start, {})
    assert held.keys() == {"weight"}
    assert {n for n in tensors if sent.get(n) is tensors[n]} == tensors.keys() - {"weight"}
    outline = method.outline(start)
    assert {n: (t.shape, t.dtype) for n, t in outline.items()} == {n: (t.shape, t.dtype) for n, t in sent.items()}
    restored = method.restore(sent, start)
    assert list(restored) == list(start) and all(restored[n] is tensors[n] for n in tensors.keys() - {"weight"})


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("upload", METHODS)
def test_what_is_not_finite_arrives_as_such_and_is_not_held_back(upload: str, value: float) -> None:
    tensors, start = pair(0)
    _, held = compression(upload).compress(tensors, start, {})
    sick = {"w": tensors["w"].clone()}
    sick["w"][17] = value
    sent, after = compression(upload).compress(sick, start, held)
    assert not compression(upload).restore(sent, start)["w"].isfinite().all()
    assert after is held and held["w"].isfinite().all() and held["w"].any()


# ---------------------------------------------------------------------- error feedback
@given(SEEDS, st.sampled_from(METHODS), st.integers(1, 6))
def test_what_was_sent_and_what_is_held_back_add_up_to_what_was_trained(seed: int, upload: str, rounds: int) -> None:
    """Whatever the client received in each round."""
    method, held = compression(upload), {}
    balance, size = torch.zeros(200, dtype=torch.float64), 0.0
    for index in range(rounds):
        tensors, start = pair(seed + index)
        sent, held = method.compress(tensors, start, held)
        restored = method.restore(sent, start)["w"].double()
        balance += (tensors["w"].double() - start["w"].double()) - (restored - start["w"].double())
        size += float(tensors["w"].abs().max() + start["w"].abs().max() + held["w"].abs().max())
    assert float((balance - held["w"].double()).abs().max()) <= 2 * 2**-24 * size
    assert upload != "topk" or held["w"].any()


@pytest.mark.parametrize("upload", METHODS)
def test_without_error_feedback_nothing_is_held_back_or_used(upload: str) -> None:
    tensors, start = pair(1)
    _, held = compression(upload).compress(tensors, start, {})
    fed = compression(upload).compress(tensors, start, held)[0]
    plain, nothing = compression(upload, feedback=False).compress(tensors, start, held)
    assert nothing == {} and differing(plain, compression(upload).compress(tensors, start, {})[0]) == []
    assert differing(fed, plain)


def descend(method: Compression, rounds: int = 1000) -> float:
    """Two clients with L_i = |x - b|^2 / 2 +- <c, x>; return how far from b their mean ends, where c is 0.

    c is large and cancels in the mean, but clients are looked at one by one: top-k chooses where c is, round after round.
    """
    c, b, x = torch.zeros(LEAST), torch.ones(LEAST), torch.zeros(LEAST)
    c[:8] = 20.0
    held: list[Mapping[str, Tensor]] = [{}, {}]
    for index in range(rounds):
        step, ends = 4 / (200 + index), []
        for client, sign in enumerate((1.0, -1.0)):
            sent, held[client] = method.compress({"x": x - step * (x - b + sign * c)}, {"x": x}, held[client])
            ends.append(method.restore(sent, {"x": x})["x"])
        x = (ends[0] + ends[1]) / 2
    return float((x - b)[8:].abs().max())


def test_on_a_quadratic_topk_converges_with_error_feedback_and_stands_still_without() -> None:
    exact = math.prod(1 - 4 / (200 + index) for index in range(1000))  # of gradient descent
    assert descend(compression("topk", 1.0)) == pytest.approx(exact, abs=1e-5)
    assert descend(compression("topk", 0.1, feedback=False)) == 1.0
    assert exact < 0.001 and descend(compression("topk", 0.1)) < 0.1


# ---------------------------------------------------------------------- hostile clients
START = {"w": torch.zeros(100), "b": torch.zeros(3)}
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def put(name: str, place: int, value: float) -> Change:
    def change(sent: dict[str, Tensor]) -> dict[str, Tensor]:
        tensor = sent[name].clone()
        tensor.view(-1)[place] = value
        return {**sent, name: tensor}

    return change


HOSTILE: list[tuple[str, Change, str]] = [
    ("topk", put("w:index", 0, -1), "tensor w has indices that do not increase within 0 to 99"),
    ("topk", put("w:index", -1, 100), "tensor w has indices that do not increase within 0 to 99"),
    ("topk", put("w:index", -1, 2**31 - 1), "tensor w has indices that do not increase within 0 to 99"),
    ("topk", put("w:index", 4, 93), "tensor w has indices that do not increase within 0 to 99"),
    ("topk", put("w:index", 4, 2), "tensor w has indices that do not increase within 0 to 99"),
    ("topk", lambda s: {**s, "w:index": s["w:index"].long()}, "tensor w:index is torch.int64, not torch.int32"),
    ("topk", lambda s: {n: t[1:] if n != "b" else t for n, t in s.items()}, r"tensor w:(index|value) has shape \(9,\), not"),
    ("topk", lambda s: {n: t for n, t in s.items() if n != "w:value"}, "tensor w:value is missing"),
    ("topk", lambda s: {**s, "w": START["w"]}, "tensor w is unknown"),
    ("topk", lambda s: START, "tensor w is unknown"),
    ("int8", put("w:scale", 0, -1.0), "tensor w has a negative scale"),
    ("int8", put("w:scale", 0, -INF), "tensor w has a negative scale"),
    ("int8", put("w", 7, -128), "tensor w has a number below -127"),
    ("int8", lambda s: {**s, "w:scale": torch.ones(100)}, r"tensor w:scale has shape \(100,\), not \(\)"),
    ("int8", lambda s: {**s, "w": s["w"][None]}, r"tensor w has shape \(1, 100\), not \(100,\)"),
    ("int8", lambda s: {n: t for n, t in s.items() if n != "w:scale"}, "tensor w:scale is missing"),
    ("int8", lambda s: {**s, "b:scale": torch.ones(())}, "tensor b:scale is unknown"),
    ("bf16", lambda s: {**s, "w": s["w"].float()}, "tensor w is torch.float32, not torch.bfloat16"),
    ("bf16", lambda s: {n: t for n, t in s.items() if n != "w"}, "tensor w is missing"),
]


@pytest.mark.parametrize(("upload", "change", "complaint"), HOSTILE)
def test_a_hostile_upload_is_one_line_that_names_client_round_and_tensor(upload: str, change: Change, complaint: str) -> None:
    method = compression(upload)
    sent, _ = method.compress({"w": torch.arange(1.0, 101.0), "b": torch.ones(3)}, START, {})
    reply = Reply("train", 4, "c", 9, sent, metrics={"loss": 1.0})
    assert guard.restored(reply, 4, START, method).tensors.keys() == START.keys()
    with pytest.raises(FederationError, match=rf"^client c, round 4: {complaint}") as caught:
        guard.restored(replace(reply, tensors=change(dict(sent))), 4, START, method)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["w:value", "w:scale", "w"])
def test_numbers_that_are_none_pass_on_to_the_guard(place: str) -> None:
    method = compression({"w:value": "topk", "w:scale": "int8", "w": "bf16"}[place])
    sent, _ = method.compress({"w": torch.arange(1.0, 101.0), "b": torch.ones(3)}, START, {})
    reply = Reply("train", 4, "c", 9, put(place, 0, NAN)(dict(sent)), metrics={"loss": 1.0})
    with pytest.raises(FederationError, match="client c, round 4: tensor w is not finite"):
        guard.check_upload(guard.restored(reply, 4, START, method), 4, START, 0.0)


# ---------------------------------------------------------------------- what cannot have it
PRIVATE = {"privacy__clip": 0.5, "federation__weighting": "equal"}
EXACT = {"strategies__lora__average": "exact"}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("fedavg", {**settings("int8"), "privacy__secure_aggregation": True}, "privacy.secure_aggregation adds up masked numbers"),
    ("fedavg", {**settings("int8", error_feedback=False), **PRIVATE}, "would be longer than privacy.clip again"),
    ("fedavg", {**settings("bf16", error_feedback=False), **PRIVATE}, "would be longer than privacy.clip again"),
    ("fedavg", {**settings("topk"), **PRIVATE}, "would be longer than privacy.clip again"),
    ("local", settings("bf16"), "with strategy local no client uploads a tensor"),
    ("fedproto", settings("bf16"), "with strategy fedproto no client uploads a tensor"),
    ("centralised", settings("bf16"), "with strategy centralised no client uploads a tensor"),
    ("median", settings("topk"), "strategy median judges clients number by number"),
    ("trimmed_mean", settings("topk"), "strategy trimmed_mean judges clients number by number"),
    ("fedgma", settings("topk"), "strategy fedgma judges clients number by number"),
    ("and_mask", settings("topk"), "strategy and_mask judges clients number by number"),
    ("f3ocus", settings("int8"), "leaves out a part of what a client sends; set compression.error_feedback = false"),
    ("lora", {**settings("topk"), **EXACT}, "factorises the mean anew .*; set compression.error_feedback = false"),
    ("lora", {**settings("bf16"), **EXACT}, "factorises the mean anew .*; set compression.error_feedback = false"),
]


@pytest.mark.parametrize(("strategy", "changes", "complaint"), REFUSED)
def test_what_cannot_be_compressed_is_refused_at_the_start(
    strategy: str, changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    pytest.importorskip("dp_accounting")
    lab = make_lab(tmp_path, strategy, **changes)
    with pytest.raises(ConfigError, match=rf"^compression\.upload: .*{complaint}") as caught:
        build.make_schedule(lab.config, lab.site, list(lab.num_train))
    assert "\n" not in str(caught.value)


def test_rounding_and_error_feedback_do_lengthen_one() -> None:
    """Why they are refused there."""
    start = {"w": torch.zeros(LEAST)}
    tensors = {"w": torch.tensor([1.27] + [0.0051] * (LEAST - 1))}
    for upload in ("int8", "bf16"):
        method = compression(upload)
        sent, _ = method.compress(tensors, start, {})
        assert update_norm(method.restore(sent, start), start) > update_norm(tensors, start)
    method, held = compression("topk", 0.01), {}
    for _ in range(3):
        sent, held = method.compress({"w": torch.ones(LEAST)}, start, held)
    assert update_norm(method.restore(sent, start), start) > math.sqrt(3)
