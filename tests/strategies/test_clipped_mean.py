from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import HOSPITALS, Spy, differing, make_lab, spy


@pytest.mark.parametrize("bound", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_a_round_is_the_weighted_mean_of_clipped_updates(bound: float, weighting: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"federation__rounds": 1, "federation__weighting": weighting, "model__norm": "batch"}
    lab = make_lab(tmp_path, "clipped_mean", {"bound": bound}, engine=Spy, **changes)
    start, new, replies = lab.start().shared, lab.run().shared, spy(lab).trained()
    names = [n for n, t in start.items() if t.is_floating_point() and n not in lab.strategy.buffers]
    old = np.concatenate([start[n].numpy().ravel() for n in names]).astype(float)
    updates = [np.concatenate([r.tensors[n].numpy().ravel() for n in names]) - old for r in replies]
    norms = [float(np.sqrt((u**2).sum())) for u in updates]
    limit = bound or float(np.median(norms))
    weights = [h.train if weighting == "examples" else 1 for h in HOSPITALS]
    mean = sum(w * u * min(1, limit / n) for w, u, n in zip(weights, updates, norms, strict=True)) / sum(weights)
    found = np.concatenate([new[n].numpy().ravel() for n in names])
    np.testing.assert_allclose(found, old + mean, atol=1e-6)
    (event,) = (e for e in lab.events if e["event"] == "round")
    assert event["bound"] == pytest.approx(limit)
    assert event["clipped"] == [r.client for r, n in zip(replies, norms, strict=True) if n > limit * (1 + 1e-12)]
    assert bound == 0.2 or event["clipped"]


def test_with_a_bound_that_nothing_reaches_it_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    ours, plain = make_lab(tmp_path / "1", "clipped_mean", {"bound": 1e9}), make_lab(tmp_path / "2", "fedavg")
    assert differing(ours.run().shared, plain.run().shared) == []
