"""Dice and HD95 against slow references, the policy for what is not there, and the traps of published scores."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from omnifm.metrics.segmentation import SegmentationMetric, hd95, score_structure

ONE = {"lesion": (1,)}
BRATS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
MASKS = hnp.arrays(np.bool_, st.tuples(st.integers(2, 6), st.integers(2, 6)))


def logits(labels: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).float()


def fill(
    metric: SegmentationMetric, guess: Tensor, truth: Tensor, row: list[int], spacing: tuple[float, ...] = (1, 1, 1)
) -> None:
    classes = int(max(guess.max(), truth.max())) + 1
    side = {"spacing": torch.tensor(spacing).expand(len(row), 3)}
    metric.update(logits(guess, max(classes, 2)), truth, torch.tensor(row), side)


def surface(mask: np.ndarray) -> np.ndarray:
    """Indices of the pixels of `mask` with a neighbour, along an axis, that is outside of it or of the picture."""
    inside = []
    for place in np.argwhere(mask):
        around = [
            place + step
            for axis in range(mask.ndim)
            for step in (np.eye(mask.ndim, dtype=int)[axis], -np.eye(mask.ndim, dtype=int)[axis])
        ]
        if any((p < 0).any() or (p >= mask.shape).any() or not mask[tuple(p)] for p in around):
            inside.append(place)
    return np.array(inside)


def slow_hd95(guess: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> float:
    first, second = (surface(mask) * np.array(spacing) for mask in (guess, truth))
    distance = np.linalg.norm(first[:, None] - second[None], axis=2)
    return float(max(np.percentile(distance.min(1), 95), np.percentile(distance.min(0), 95)))


@settings(deadline=None)
@given(MASKS, st.data())
def test_dice_and_hd95_are_those_of_slow_loops(guess: np.ndarray, data: st.DataObject) -> None:
    truth = data.draw(hnp.arrays(np.bool_, guess.shape))
    if not guess.any() or not truth.any():
        return
    spacing = (0.5, 2.0)
    dice, distance, code = score_structure(guess, truth, spacing)
    both = sum(bool(a and b) for a, b in zip(guess.flat, truth.flat, strict=True))
    assert dice == 2 * both / (int(guess.sum()) + int(truth.sum())) and code == 1
    assert distance == pytest.approx(slow_hd95(guess, truth, spacing), rel=1e-5, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_hd95_is_monais() -> None:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    g = np.random.default_rng(0)
    for shape, spacing in (((20, 24), (1.0, 0.7)), ((6, 12, 10), (3.0, 1.0, 0.5))):
        guess, truth = (g.random(shape) > threshold for threshold in (0.6, 0.8))
        first, second = (torch.from_numpy(mask)[None, None] for mask in (guess, truth))
        expected = compute_hausdorff_distance(first, second, include_background=True, percentile=95, spacing=list(spacing))
        assert hd95(guess, truth, spacing) == pytest.approx(float(expected), rel=1e-5)


def test_distances_are_in_millimetres_in_three_dimensions() -> None:
    guess, truth = np.zeros((5, 8, 8), bool), np.zeros((5, 8, 8), bool)
    guess[0, 2:4, 2:4] = truth[3, 2:4, 2:4] = True
    assert hd95(guess, truth, (2.5, 1.0, 1.0)) == pytest.approx(7.5)


def test_a_structure_that_is_not_there_has_a_score_and_is_counted() -> None:
    nothing, something = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    assert score_structure(nothing, nothing, (1, 1)) == (1.0, 0.0, 2)
    diagonal = math.hypot(3 * 2.0, 4 * 0.5)
    assert score_structure(something, nothing, (2.0, 0.5)) == (0.0, pytest.approx(diagonal), 3)
    assert score_structure(nothing, something, (2.0, 0.5)) == (0.0, pytest.approx(diagonal), 3)


def test_the_brats_diagonal_is_the_challenges_penalty() -> None:
    missed = np.zeros((240, 240, 155), bool)
    found = missed.copy()
    found[0, 0, 0] = True
    assert score_structure(missed, found, (1, 1, 1))[1] == pytest.approx(373.13, abs=0.01)


def test_a_missed_lesion_lowers_the_mean_and_is_never_dropped() -> None:
    truth = torch.zeros(2, 8, 8, dtype=torch.int64)
    truth[:, 2:5, 2:5] = 1
    guess = truth.clone()
    guess[1] = 0
    metric = SegmentationMetric(ONE)
    fill(metric, guess, truth, [0, 1])
    scores = metric.compute()
    assert scores["dice"] == 0.5 and scores["missed"] == 1 and scores["empty_cases"] == 0
    assert scores["hd95"] == pytest.approx(math.hypot(8, 8) / 2)
    assert all(value is not None and math.isfinite(value) for value in scores.values())


def test_a_volume_is_one_case_and_not_the_mean_of_its_slices() -> None:
    """The trap: empty slices that count 1 lift the mean of slices far above the volume's Dice."""
    truth = torch.zeros(10, 8, 8, dtype=torch.int64)
    truth[4, 2:6, 2:6] = 1
    guess = torch.zeros_like(truth)
    guess[4, 2:6, 2:4] = 1
    metric = SegmentationMetric(ONE)
    fill(metric, guess, truth, [7] * 10, (3.0, 1.0, 1.0))
    assert metric.state()["dice"].shape == (1, 1)
    volume = metric.compute()["dice"]
    slices = SegmentationMetric(ONE)
    fill(slices, guess, truth, list(range(10)))
    by_slice = slices.compute()["dice"]
    assert volume == pytest.approx(2 * 8 / 24) and by_slice == pytest.approx((9 + 2 / 3) / 10)


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_volume_may_arrive_in_pieces(cut: int) -> None:
    g = torch.Generator().manual_seed(0)
    truth, guess = (torch.randint(0, 3, (8, 6, 6), generator=g) for _ in range(2))
    row = [0] * 5 + [1] * 3
    whole, pieces = SegmentationMetric({"a": (1,), "b": (2,)}), SegmentationMetric({"a": (1,), "b": (2,)})
    fill(whole, guess, truth, row, (2.0, 1.0, 0.5))
    for part in (slice(0, cut), slice(cut, 8)):
        fill(pieces, guess[part], truth[part], row[part], (2.0, 1.0, 0.5))
    assert whole.compute() == pieces.compute()


def test_slices_that_do_not_follow_each_other_are_refused() -> None:
    metric = SegmentationMetric(ONE)
    blank = torch.zeros(3, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="row 0: its slices do not come one after the other"):
        fill(metric, blank, blank, [0, 1, 0])


def test_overlapping_regions_come_from_labels() -> None:
    truth = torch.tensor([[[0, 1, 2, 3]]])
    guess = torch.tensor([[[0, 2, 2, 1]]])
    metric = SegmentationMetric(BRATS)
    fill(metric, guess, truth, [0])
    scores = metric.compute()
    assert scores["dice/WT"] == 1.0
    assert scores["dice/TC"] == pytest.approx(2 * 1 / 3)
    assert scores["dice/ET"] == 0.0 and scores["missed"] == 1


def test_structures_of_other_clients_are_neither_right_nor_wrong() -> None:
    names = {"lung": (1,), "vessel": (2,)}
    truth = torch.zeros(1, 6, 6, dtype=torch.int64)
    truth[0, :3] = 1
    mine = SegmentationMetric(names, ["lung"])
    fill(mine, truth, truth, [0])
    assert mine.compute()["dice"] == 1.0 and "dice/vessel" not in mine.compute()
    strict = SegmentationMetric(names)
    fill(strict, truth, truth, [0])
    assert strict.compute()["empty_cases"] == 1
    assert mine.compute()["empty_cases"] == 0


def test_merging_states_is_scoring_the_union() -> None:
    g = torch.Generator().manual_seed(1)
    parts = [tuple(torch.randint(0, 2, (n, 6, 6), generator=g) for _ in range(2)) for n in (1, 4)]
    union, states = SegmentationMetric(ONE), []
    for start, (guess, truth) in zip((0, 10), parts, strict=True):
        rows = list(range(start, start + len(truth)))
        fill(union, guess, truth, rows)
        own = SegmentationMetric(ONE)
        fill(own, guess, truth, rows)
        states.append(own.state())
    assert SegmentationMetric(ONE).merge(states).compute() == pytest.approx(union.compute())
    assert all(bool(torch.isfinite(t.double()).all()) for state in states for t in state.values())


def test_no_case_has_no_score() -> None:
    metric = SegmentationMetric(ONE)
    assert set(metric.compute().values()) == {None}
    assert set(SegmentationMetric(ONE).merge([metric.state()]).compute().values()) == {None}


def test_the_scores_of_a_case_are_averaged_before_the_cases() -> None:
    """One case with two structures, one with... all have the same; the mean of means equals it only then."""
    names = {"a": (1,), "b": (2,)}
    truth = torch.tensor([[[1, 1, 2, 2]], [[1, 1, 2, 2]]])
    guess = torch.tensor([[[1, 1, 2, 2]], [[1, 1, 0, 0]]])
    metric = SegmentationMetric(names)
    fill(metric, guess, truth, [0, 1])
    assert metric.compute()["dice"] == pytest.approx((1.0 + 0.5) / 2)
    assert [metric.compute()[f"dice/{n}"] for n in names] == [1.0, 0.5]
    assert list(itertools.islice(metric.compute(), 4)) == ["dice", "hd95", "missed", "empty_cases"]
