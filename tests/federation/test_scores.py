"""States of a metric that must not count. With `security.refused = "skip"` a client is not scored, and the others are."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnifm.engines.inprocess import InProcessEngine
from omnifm.errors import FederationError
from omnifm.federation.messages import Reply, Request
from omnifm.metrics.base import Metric
from omnifm.metrics.classification import ClassificationMetric
from omnifm.metrics.fusion import FusionMetric
from omnifm.metrics.segmentation import SegmentationMetric
from omnifm.metrics.super_resolution import SuperResolutionMetric
from omnifm.metrics.vqa import VqaMetric
from omnifm.tasks.mixed import MixedMetric
from tests.support import HOSPITALS, Altered, make_lab

State = Mapping[str, Tensor]


def put(state: State, **changes: Tensor | None) -> State:
    return {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}


def filled(state: State, name: str, value: float) -> State:
    return put(state, **{name: torch.full_like(state[name], value)})


BAD: dict[str, tuple[Callable[[State], State], str]] = {
    "nothing": (lambda s: {}, "score label is missing"),
    "no probabilities": (lambda s: put(s, probability=None), "score probability is missing"),
    "more than is asked": (lambda s: put(s, more=s["label"]), "score more is unknown"),
    "NaN": (lambda s: filled(s, "probability", math.nan), "score probability is not finite"),
    "numbers that overflow in a mean": (lambda s: filled(s, "probability", 1e308), "score probability is not finite"),
    "no probability": (lambda s: filled(s, "probability", -0.5), "score probability has a value that is not within 0 to 1"),
    "a class too many": (
        lambda s: put(s, probability=s["probability"].repeat(1, 2)),
        "score probability is torch.float64 of shape",
    ),
    "another type": (lambda s: put(s, label=s["label"].double()), "score label is torch.float64"),
    "one number": (lambda s: put(s, label=torch.tensor(1)), r"score label is torch.int64 of shape \(\)"),
    "a label that is none": (lambda s: filled(s, "label", 99), "score label has a value that is not within 0 to"),
    "half of the rows": (lambda s: {n: t[: len(t) // 2] for n, t in s.items()}, r"scores of \d+ lines for \d+ rows"),
    "each row a thousand times": (
        lambda s: {n: t.repeat(1000, *[1] * (t.ndim - 1)) for n, t in s.items()},
        r"scores of \d+ lines for \d+ rows",
    ),
    "unequal numbers of rows": (lambda s: put(s, label=s["label"][1:]), r"scores of \d+, \d+ lines"),
}


def bent(name: str) -> Callable[[Reply], Reply]:
    def change(reply: Reply) -> Reply:
        hostile = reply.kind == "evaluate" and reply.client == "d"
        return replace(reply, extra=BAD[name][0](reply.extra)) if hostile else reply

    return change


@pytest.mark.parametrize("name", BAD)
def test_the_others_are_scored_without_whoever_is_refused(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lab = make_lab(tmp_path, federation__rounds=1, security__refused="skip")
    server = lab.run()
    honest = lab.evaluate(server, "test")
    lab.engine = Altered(lab.site, bent(name))
    with caplog.at_level(logging.WARNING, "omnifm.federation.guard"):
        found = lab.evaluate(server, "test")
    assert found.clients["d"] == {"personal": None, "global": None}
    assert {c: views for c, views in found.clients.items() if c != "d"} == {c: v for c, v in honest.clients.items() if c != "d"}
    for view in ("personal", "worst", "global"):
        assert found.views[view] == dict.fromkeys(honest.views[view] or {}), "the worst client would lift a mean by what it does"
    line = caplog.records[0].getMessage()
    assert line.startswith("client d, round 1: ") and "\n" not in line and len(caplog.records) == 2, "one for each view"


@pytest.mark.parametrize("name", BAD)
def test_by_default_the_run_ends_and_names_the_client(name: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, federation__rounds=1)
    server = lab.run()
    lab.engine = Altered(lab.site, bent(name))
    with pytest.raises(FederationError, match=rf"^client d, round 1: {BAD[name][1]}"):
        lab.evaluate(server, "val")


def test_a_client_that_does_not_answer_is_in_no_view(tmp_path: Path) -> None:
    """One that is late, or tells no scores, where `federation.min_replies` allows that: so it is for every method."""
    lab = make_lab(tmp_path, federation__rounds=1)
    server = lab.run()
    lab.engine = Silent(lab.site)
    found = lab.evaluate(server, "test")
    three = make_lab(tmp_path / "2", hospitals=HOSPITALS[:3], federation__rounds=1)
    assert found.clients["d"] == {"personal": None, "global": None}
    assert found.views == three.evaluate(server, "test").views


class Silent(InProcessEngine):
    """An engine whose client d never answers."""

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        return (reply for reply in super().exchange(requests) if reply.client != "d")


def test_a_score_in_another_s_name_does_not_end_the_run(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, federation__rounds=1, security__refused="skip")
    server = lab.run()
    lab.engine = Altered(lab.site, lambda r: replace(r, client="a", sender="d") if r.client == "d" else r)
    assert lab.evaluate(server, "val").clients["d"]["personal"] is None


def zeros(metric: Metric, rows: int) -> dict[str, Tensor]:
    return {name: torch.zeros(rows, *like.shape[1:], dtype=like.dtype) for name, like in metric.state().items()}


METRICS: dict[str, tuple[Callable[[], Metric], dict[str, float]]] = {
    # each metric, and for its values what no client can have
    "classification": (lambda: ClassificationMetric(3), {"label": 3, "probability": 1.1}),
    "segmentation": (lambda: SegmentationMetric({"a": (1,), "b": (2,)}), {"dice": 1.5, "hd95": -1, "code": 4}),
    "super-resolution": (SuperResolutionMetric, {"score": math.inf}),
    "fusion": (FusionMetric, {"score": math.nan, "defined": 2}),
    "vqa": (
        lambda: VqaMetric(["yes"], ["organ"], forced=True, disjoint=True),
        {"line": 1.5, "closed": 2, "disjoint": 2, "question_type": 3},
    ),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("mixed", [False, True])
def test_every_metric_judges_every_value(name: str, mixed: bool) -> None:
    make, bad = METRICS[name]
    metric: Any = MixedMetric({"task": make()}, {}) if mixed else make()
    prefix = "task/" if mixed else ""
    sound = zeros(metric, 4)
    metric.vet(sound, 4)
    assert bad.keys() == {key.removeprefix(prefix) for key in sound}, "a value that nobody judges"
    for key, value in bad.items():
        with pytest.raises(FederationError, match=rf"^score {key} (is not finite|has a value)"):
            metric.vet(filled(sound, prefix + key, value), 4)
    for wrong in (zeros(metric, 0), {}, {**sound, "other/x": torch.zeros(4)}):
        with pytest.raises(FederationError):
            metric.vet(wrong, 4)
