import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor

from omnifm.metrics.classification import ClassificationMetric

CLASSES = 4
Examples = tuple[Tensor, Tensor]


@st.composite
def examples(draw: st.DrawFn, least: int = 0) -> Examples:
    count = draw(st.integers(least, 12))
    labels = draw(st.lists(st.integers(0, CLASSES - 1), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randn(count, CLASSES, generator=generator), torch.tensor(labels, dtype=torch.int64)


def score(logits: Tensor, labels: Tensor, rows: Tensor | None = None) -> ClassificationMetric:
    metric = ClassificationMetric(logits.shape[1])
    metric.update(logits, labels, torch.arange(len(labels)) if rows is None else rows)
    return metric


FEW = settings(max_examples=25)  # sklearn takes milliseconds a call


@FEW
@given(st.lists(examples(), min_size=1, max_size=5))
def test_merged_states_score_like_the_union(parts: list[Examples]) -> None:
    merged = ClassificationMetric(CLASSES).merge([score(*part).state() for part in parts]).compute()
    logits, labels = (torch.cat(field) for field in zip(*parts, strict=True))
    assert merged == pytest.approx(score(logits, labels).compute())


@FEW
@given(examples(least=2), st.integers(0, 12))
def test_batches_add_up(whole: Examples, cut: int) -> None:
    logits, labels = whole
    metric = ClassificationMetric(CLASSES)
    for part in (slice(None, cut), slice(cut, None)):
        metric.update(logits[part], labels[part], torch.arange(len(labels))[part])
    assert metric.compute() == pytest.approx(score(logits, labels).compute())


@FEW
@given(examples(least=1))
def test_scores_are_those_of_sklearn(whole: Examples) -> None:
    logits, labels = whole
    found = score(logits, labels).compute()
    probability, truth = logits.double().softmax(1).numpy(), labels.numpy()
    guess = probability.argmax(1)
    assert found["accuracy"] == pytest.approx((guess == truth).mean())
    assert found["f1_present"] == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))
    union = f1_score(truth, guess, average="macro", labels=range(CLASSES), zero_division=0)
    assert found["f1_union"] == pytest.approx(union)
    defined = [c for c in range(CLASSES) if len(np.unique(truth == c)) == 2]
    areas = [roc_auc_score(truth == c, probability[:, c]) for c in defined]
    assert found["auc"] == (pytest.approx(np.mean(areas)) if areas else None)
    assert found["auc_classes_skipped"] == CLASSES - len(defined)


def test_with_every_class_present_auc_is_medmnists() -> None:
    """medmnist/evaluator.py: mean over classes of the one-against-rest area; with all classes, sklearn's macro ovr."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, CLASSES, generator=generator), torch.arange(40) % CLASSES
    expected = roc_auc_score(labels.numpy(), logits.double().softmax(1).numpy(), multi_class="ovr", average="macro")
    assert score(logits, labels).compute()["auc"] == pytest.approx(expected)


def test_auc_by_hand() -> None:
    """Two classes; of 2 x 2 pairs of a positive and a negative, 3 are in order."""
    probability = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5], [0.2, 0.8]])
    found = score(probability.log(), torch.tensor([0, 0, 1, 1])).compute()
    assert found["auc"] == pytest.approx(0.75) and found["accuracy"] == 0.5
    assert found["auc_classes_skipped"] == 0


def test_an_absent_class_has_no_area_and_counts_zero_in_the_union_alone() -> None:
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 1])] * 9
    found = score(logits, torch.tensor([0, 0, 1, 1])).compute()
    assert (found["auc"], found["auc_classes_skipped"]) == (1.0, 1.0)
    assert found["f1_present"] == pytest.approx(1.0) and found["f1_union"] == pytest.approx(2 / 3)


def test_one_class_alone_has_no_area_at_all() -> None:
    found = score(torch.eye(3)[torch.tensor([0, 1])], torch.tensor([0, 0])).compute()
    assert found["auc"] is None and found["auc_classes_skipped"] == 3 and found["accuracy"] == 0.5


def test_slices_of_one_volume_are_averaged_before_they_are_scored() -> None:
    probability = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.4, 0.6], [0.2, 0.8]])
    rows, labels = torch.tensor([7, 7, 3, 7]), torch.tensor([1, 1, 0, 1])
    metric = score(probability.log(), labels, rows)
    state = metric.state()
    # In the order of the rows: 3, then 7 with the mean of its three slices.
    torch.testing.assert_close(
        state["probability"], torch.tensor([[0.4, 0.6], [1.4 / 3, 1.6 / 3]]).double(), atol=1e-6, rtol=1e-6
    )
    assert state["label"].tolist() == [0, 1] and metric.compute()["accuracy"] == 0.5


def test_equal_row_numbers_of_two_clients_are_two_rows() -> None:
    parts = [score(torch.eye(2) * 5, torch.tensor([0, 1])).state(), score(torch.eye(2) * 5, torch.tensor([1, 0])).state()]
    assert ClassificationMetric(2).merge(parts).compute()["accuracy"] == 0.5


def test_no_examples_have_no_scores() -> None:
    empty = ClassificationMetric(CLASSES)
    names = {"accuracy", "auc", "f1_union", "f1_present", "auc_classes_skipped"}
    assert empty.compute() == dict.fromkeys(names)
    merged = empty.merge([empty.state(), score(torch.eye(4), torch.arange(4)).state()]).compute()
    assert merged.keys() == names and merged["accuracy"] == 1.0
    assert ClassificationMetric(CLASSES).merge([]).compute()["accuracy"] is None


def test_the_state_travels_as_tensors() -> None:
    state = score(torch.eye(4), torch.arange(4)).state()
    assert {n: t.dtype for n, t in state.items()} == {"probability": torch.float64, "label": torch.int64}
