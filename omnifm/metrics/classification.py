"""Accuracy, AUC and macro-F1 of a classifier.

* accuracy: share of rows whose most probable class is right.
* auc: unweighted mean over classes of the one-against-rest ROC-AUC (medmnist/evaluator.py). A class without positives or
  without negatives has none: it is left out of the mean, and `auc_classes_skipped` says how many of the label union were.
* f1_present: macro-F1 over the labels in truth or prediction. f1_union: over the whole label union, an absent class
  counting 0 (the scale of the paper's table).

Slices of one volume share a row: their probabilities are averaged first, so scores are per row.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omnifm.metrics.base import NOTHING, Metric, Scores


class ClassificationMetric(Metric):
    """Keeps `(n, classes)` probabilities, `(n,)` labels and `(n,)` rows."""

    counts = frozenset({"auc_classes_skipped"})
    by_row: ClassVar[bool] = True

    def __init__(self, num_classes: int) -> None:
        self._classes = num_classes
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, prediction: Tensor, target: Tensor, row: Tensor, side: Mapping[str, Tensor] = NOTHING) -> None:
        """Add logits `(b, classes)`."""
        self._parts.append((prediction.double().softmax(dim=1), target.cpu(), row))

    def state(self) -> dict[str, Tensor]:
        """Return probabilities, labels and rows, one entry per row of the manifest."""
        if not self._parts:
            nothing = torch.zeros(0, dtype=torch.int64)
            return {"probability": torch.zeros(0, self._classes, dtype=torch.float64), "label": nothing}
        probability, label, row = (torch.cat(part) for part in zip(*self._parts, strict=True))
        rows, place = row.unique(return_inverse=True)
        total = torch.zeros(len(rows), self._classes, dtype=torch.float64).index_add_(0, place, probability)
        labels = torch.zeros(len(rows), dtype=torch.int64).scatter_(0, place, label)
        return {"probability": total / place.bincount().unsqueeze(1), "label": labels}

    def vet(self, state: Mapping[str, Tensor], rows: int) -> None:
        """Labels are classes, probabilities are such, up to rounding."""
        super().vet(state, rows)
        self.require_within(state, "label", 0, self._classes - 1)
        self.require_within(state, "probability", 0, 1 + 1e-6)

    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> "ClassificationMetric":
        """Return the metric of all `states` together. Rows of different clients are different rows."""
        union = ClassificationMetric(self._classes)
        start = 0
        for state in states:
            count = len(state["label"])
            union._parts.append((state["probability"], state["label"], torch.arange(start, start + count)))
            start += count
        return union

    def compute(self) -> Scores:
        """Return accuracy, auc, f1_union, f1_present and auc_classes_skipped."""
        state = self.state()
        probability, label = state["probability"].numpy(), state["label"].numpy()
        if not len(label):
            return dict.fromkeys(("accuracy", "auc", "f1_union", "f1_present", "auc_classes_skipped"))
        predicted = probability.argmax(axis=1)
        areas = _areas(probability, label)
        f1 = _f1(predicted, label, self._classes)
        present = np.union1d(predicted, label)
        return {
            "accuracy": float((predicted == label).mean()),
            "auc": float(np.mean(areas)) if areas else None,
            "f1_union": float(f1.mean()),
            "f1_present": float(f1[present].mean()),
            "auc_classes_skipped": float(self._classes - len(areas)),
        }


def _areas(probability: npt.NDArray[np.float64], label: npt.NDArray[np.int64]) -> list[float]:
    from sklearn.metrics import roc_auc_score

    truth = label[:, None] == np.arange(probability.shape[1])
    defined = truth.any(axis=0) & ~truth.all(axis=0)
    if not defined.any():  # where one class is defined, so is another
        return []
    return [float(area) for area in roc_auc_score(truth[:, defined], probability[:, defined], average=None)]


def _f1(predicted: npt.NDArray[np.int64], label: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float64]:
    from sklearn.metrics import f1_score

    return np.asarray(f1_score(label, predicted, labels=np.arange(classes), average=None, zero_division=0))
