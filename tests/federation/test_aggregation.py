import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from omnifm.federation.aggregation import RunningMean, step_towards

FLOATS = st.floats(-1e4, 1e4, width=32)
WEIGHTS = st.integers(1, 10**6)


@st.composite
def uploads(draw: st.DrawFn) -> list[tuple[np.ndarray, int]]:
    shape = draw(hnp.array_shapes(max_dims=3, max_side=4))
    count = draw(st.integers(1, 6))
    return [(draw(hnp.arrays(np.float32, shape, elements=FLOATS)), draw(WEIGHTS)) for _ in range(count)]


def mean_of(parts: list[tuple[Tensor, float]]) -> Tensor:
    mean = RunningMean()
    for tensor, weight in parts:
        mean.add({"w": tensor}, weight)
    return mean.value()["w"]


@given(uploads())
def test_the_mean_is_numpys_in_float64(parts: list[tuple[np.ndarray, int]]) -> None:
    found = mean_of([(torch.from_numpy(a), n) for a, n in parts])
    expected = np.average(np.stack([a.astype(np.float64) for a, _ in parts]), axis=0, weights=[n for _, n in parts])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)


@given(hnp.arrays(np.float32, 5, elements=FLOATS), st.lists(WEIGHTS | st.floats(1e-6, 1e6), min_size=1, max_size=7))
def test_equal_uploads_come_back_bit_for_bit(value: np.ndarray, weights: list[float]) -> None:
    tensor = torch.from_numpy(value)
    assert torch.equal(mean_of([(tensor, weight) for weight in weights]), tensor)


@given(uploads(), st.data())
def test_the_order_of_the_replies_changes_nothing_that_float32_can_show(
    parts: list[tuple[np.ndarray, int]], data: st.DataObject
) -> None:
    turned = data.draw(st.permutations(parts))
    first, second = (mean_of([(torch.from_numpy(a), n) for a, n in p]) for p in (parts, turned))
    torch.testing.assert_close(first, second, rtol=2e-7, atol=1e-12)


@given(uploads(), st.integers(2, 9))
def test_only_the_ratio_of_the_weights_counts(parts: list[tuple[np.ndarray, int]], factor: int) -> None:
    first = mean_of([(torch.from_numpy(a), n) for a, n in parts])
    second = mean_of([(torch.from_numpy(a), n * factor) for a, n in parts])
    torch.testing.assert_close(first, second, rtol=2e-7, atol=1e-12)


def test_uploads_are_not_changed_and_nothing_is_kept_of_them() -> None:
    tensors = {"w": torch.ones(3), "n": torch.tensor(4)}
    mean = RunningMean()
    mean.add(tensors, 2)
    mean.add({"w": torch.zeros(3), "n": torch.tensor(2)}, 2)
    tensors["w"] += 7
    tensors["n"] += 7
    assert mean.value()["w"].tolist() == [0.5] * 3 and int(mean.value()["n"]) == 4


def test_whole_numbers_take_the_maximum_and_keep_their_type() -> None:
    mean = RunningMean()
    for value, weight in ((3, 1), (9, 5), (4, 100)):
        mean.add({"n": torch.tensor([value, -value])}, weight)
    assert mean.value()["n"].tolist() == [9, -3] and mean.value()["n"].dtype == torch.int64


def test_half_precision_comes_back_in_half_precision() -> None:
    assert mean_of([(torch.ones(2, dtype=torch.bfloat16), 3)]).dtype == torch.bfloat16


def test_a_weight_of_zero_is_nobody() -> None:
    mean = RunningMean()
    mean.add({"w": torch.full((2,), 9.0)}, 0)
    assert mean.value() == {}
    mean.add({"w": torch.ones(2)}, 2)
    assert mean.value()["w"].tolist() == [1, 1]


@given(hnp.arrays(np.float32, 4, elements=FLOATS), hnp.arrays(np.float32, 4, elements=FLOATS), st.floats(0.01, 1.0))
def test_a_step_is_part_of_the_way(old: np.ndarray, mean: np.ndarray, step: float) -> None:
    found = step_towards({"w": torch.from_numpy(old)}, {"w": torch.from_numpy(mean)}, step)["w"].numpy()
    expected = old.astype(np.float64) + step * (mean.astype(np.float64) - old)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-2)


def test_a_whole_step_is_the_mean_and_counters_never_go_part_of_the_way() -> None:
    old = {"w": torch.tensor([0.1]), "n": torch.tensor(1), "kept": torch.tensor([5.0])}
    mean = {"w": torch.tensor([0.3]), "n": torch.tensor(9)}
    whole, part = step_towards(old, mean, 1.0), step_towards(old, mean, 0.5)
    assert torch.equal(whole["w"], mean["w"]) and int(whole["n"]) == int(part["n"]) == 9
    assert float(part["w"]) == pytest.approx(0.2)
    assert float(whole["kept"]) == float(part["kept"]) == 5.0
