"""Turning is a bookkeeping of axes: what is at a place in the patient stays at that place."""

import itertools

import numpy as np
import pytest

from omnifm.data.readers import Image
from omnifm.predict.orient import turned, turned_back
from omnifm.tasks.base import Answer
from tests.predict.files import rotated_affine

SHAPE = (2, 3, 4)
ORDERS = list(itertools.permutations(range(3)))


def image(affine: np.ndarray) -> Image:
    array = np.arange(24, dtype=np.float32).reshape(1, *SHAPE)
    return Image(np.concatenate([array, array + 100, array + 200]), tuple(np.linalg.norm(affine[:3, :3], axis=0)), affine, 16)


def other(order: tuple[int, ...], sign: int) -> np.ndarray:
    """Return the affine of a grid whose axes are those of `rotated_affine`, in another order, and perhaps backwards."""
    affine = np.eye(4)
    affine[:3, :3] = rotated_affine()[:3, list(order)] * (sign, 1, -sign)
    return affine


def placed(one: Image) -> dict[tuple[float, ...], tuple[float, ...]]:
    """Return the colours at each place, RAS mm."""
    assert one.affine is not None
    return {
        tuple(np.round(one.affine @ [*index, 1], 4)[:3].tolist()): tuple(one.array[:, *index].tolist())
        for index in np.ndindex(one.array.shape[1:])
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_turned_volume_lies_as_asked_and_nothing_moves(order: tuple[int, ...], sign: int) -> None:
    start, like = image(rotated_affine()), other(order, sign)
    found = turned(start, like)
    assert found.affine is not None and placed(found) == placed(start)
    steps = found.affine[:3, :3]
    cosines = (steps * like[:3, :3]).sum(0) / (np.linalg.norm(steps, axis=0) * np.linalg.norm(like[:3, :3], axis=0))
    np.testing.assert_allclose(cosines, 1)
    np.testing.assert_allclose(found.spacing, np.linalg.norm(steps, axis=0))
    answer = turned_back(Answer({}, found.array[0].astype(np.uint8), (), found.array), start, like)
    np.testing.assert_array_equal(answer.mask, start.array[0])
    np.testing.assert_array_equal(answer.image, start.array)


def test_without_directions_nothing_is_turned() -> None:
    start = image(rotated_affine())
    flat = rotated_affine()
    flat[:3, 1] = 0  # an axis that leads nowhere
    for like in (None, flat, rotated_affine()):
        assert turned(start, like) is start
    lost = Image(start.array, start.spacing, None, 16)
    assert turned(lost, other(ORDERS[3], 1)) is lost
    answer = Answer({})
    assert turned_back(answer, lost, other(ORDERS[3], 1)) is answer
