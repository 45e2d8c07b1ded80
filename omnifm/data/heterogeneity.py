"""How different the clients of a federation are, in four numbers from 0 (alike) to 1."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omnifm.data.cohort import Cohort
from omnifm.data.partition import ClientPlan
from omnifm.errors import DataError


@dataclass(frozen=True)
class Heterogeneity:
    """Four measures over the clients' training rows.

    Attributes:
        h_mod: I(client; modality) / H(modality), 1 if the client tells the modality, 0 also where there is only one modality.
        h_lab: mean over pairs of clients of the Jensen-Shannon divergence (base 2) of their label shares; None unless there
            are two clients and all have one label space (the same `classes`).
        h_size: Gini coefficient of the numbers of training rows.
        h_ls: 1 - mean over pairs of clients of the Jaccard index of their label sets (the labels that occur); None unless every
            client has labels.
    """

    h_mod: float
    h_lab: float | None
    h_size: float
    h_ls: float | None


def heterogeneity(
    cohorts: Mapping[str, Cohort],
    plans: Sequence[ClientPlan],
    labels: Mapping[str, Sequence[str]] | None = None,
) -> Heterogeneity:
    """Measure the heterogeneity of a federation.

    Args:
        cohorts: by name, every cohort the plans name.
        plans: the clients.
        labels: for tasks without class labels, cohort name -> one label per row, whose values are then the label space; by
            default the rows' `label`.

    Raises:
        DataError: there is no client, a cohort is missing, or a client has no training rows.
    """
    if not plans:
        raise DataError("heterogeneity of no clients")
    for plan in plans:
        if plan.cohort not in cohorts or not plan.train:
            raise DataError(f"client {plan.id}: no training rows or unknown cohort '{plan.cohort}'")
    texts = labels or {name: [row.label for row in cohort.rows] for name, cohort in cohorts.items()}
    spaces = {frozenset(texts[p.cohort] if labels else cohorts[p.cohort].classes) for p in plans}
    modalities = [Counter(cohorts[p.cohort].rows[i].modality for i in p.train) for p in plans]
    counts = [Counter(texts[p.cohort][i] for i in p.train) for p in plans]
    labelled = all(label for count in counts for label in count)
    return Heterogeneity(
        h_mod=_shared_information(modalities),
        h_lab=_label_divergence(counts) if labelled and len(spaces) == 1 and len(plans) > 1 else None,
        h_size=gini([len(plan.train) for plan in plans]),
        h_ls=_label_set_distance(counts) if labelled else None,
    )


def _table(counts: Sequence[Counter[str]]) -> npt.NDArray[np.float64]:
    """Return counts as `(clients, values)`."""
    values = sorted(set().union(*counts))
    return np.array([[count[value] for value in values] for count in counts], dtype=np.float64)


def _entropy(shares: npt.NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())


def _shared_information(counts: Sequence[Counter[str]]) -> float:
    joint = _table(counts) / sum(count.total() for count in counts)
    whole = _entropy(joint.sum(axis=0))
    if whole == 0:
        return 0.0
    information = _entropy(joint.sum(axis=1)) + whole - _entropy(joint.ravel())
    return min(max(information / whole, 0.0), 1.0)


def _label_divergence(counts: Sequence[Counter[str]]) -> float:
    shares = _table(counts)
    shares /= shares.sum(axis=1, keepdims=True)
    pairs = itertools.combinations(shares, 2)
    return math.fsum(_jensen_shannon(p, q) for p, q in pairs) / math.comb(len(shares), 2)


def _jensen_shannon(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, in bits, so at most 1 (Lin 1991)."""
    return max(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2, 0.0)


def gini(sizes: Sequence[int]) -> float:
    """Return the Gini coefficient, sum_ij |x_i - x_j| / (2 n^2 mean(x)): 0 if all are equal, 1 - 1/n if one has all."""
    x = np.asarray(sizes, dtype=np.float64)
    return float(np.abs(x[:, None] - x[None, :]).sum() / (2 * len(x) ** 2 * x.mean()))


def _label_set_distance(counts: Sequence[Counter[str]]) -> float:
    if len(counts) < 2:
        return 0.0
    jaccard = [len(a.keys() & b.keys()) / len(a.keys() | b.keys()) for a, b in itertools.combinations(counts, 2)]
    return 1.0 - math.fsum(jaccard) / len(jaccard)
