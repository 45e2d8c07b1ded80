"""Replies that must not count. With `security.refused = "skip"` the round goes on, and gives what the others alone give."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from omnifm import build
from omnifm.errors import FederationError
from omnifm.federation import guard
from omnifm.federation.aggregation import update_norm
from omnifm.federation.messages import Reply, Request
from tests.support import Altered, Lab, Spy, differing, make_lab, spy

SKIP = {"security__refused": "skip"}


def scaled(reply: Reply, factor: float) -> Reply:
    return replace(reply, tensors={n: t * factor for n, t in reply.tensors.items()})


def with_extra(reply: Reply, **extra: torch.Tensor) -> Reply:
    return replace(reply, extra={**reply.extra, **{n.replace("__", "/"): t for n, t in extra.items()}})


def with_metrics(reply: Reply, **metrics: Any) -> Reply:
    return replace(reply, metrics={**reply.metrics, **metrics})


def flooded(reply: Reply) -> Reply:
    vectors, weight = (reply.extra[f"prototypes/{name}"] for name in ("vectors", "weight"))
    return with_extra(reply, prototypes__vectors=vectors.repeat(50, 1), prototypes__weight=weight.repeat(50))


BAD: dict[str, tuple[str, Callable[[Reply], Reply], str]] = {
    "another client's name": ("fedavg", lambda r: replace(r, client="b", sender="d"), "the reply says that it is from client b"),
    "a stranger's name": ("fedavg", lambda r: replace(r, client="zoe", sender="d"), "the reply says that it is from client zoe"),
    "an old nonce": ("fedavg", lambda r: replace(r, nonce="00" * 16), "it is old, or of another run"),
    "no nonce": ("fedavg", lambda r: replace(r, nonce=""), "it is old, or of another run"),
    "an old round": ("fedavg", lambda r: replace(r, round=0), "the reply is for train in round 0"),
    "a long update": ("fedavg", lambda r: scaled(r, 1e4), r"an update of norm \S+e\+0\d, at most 50 are taken"),
    "NaN": ("fedavg", lambda r: scaled(r, float("nan")), "is not finite"),
    "shape": ("fedavg", lambda r: replace(r, tensors={n: t[None] for n, t in r.tensors.items()}), "has shape"),
    "a loss in words": ("fedavg", lambda r: replace(r, metrics={"loss": "low"}), "the loss is missing"),
    "a loss beyond floats": ("fedavg", lambda r: with_metrics(r, loss=10**400), "the loss is missing or not finite"),
    "a loss that overflows in a sum": ("fedavg", lambda r: with_metrics(r, loss=1.7e308), "the loss is missing or not finite"),
    "a metric in words": ("fedavg", lambda r: with_metrics(r, effective_rank="x"), "metric 'effective_rank' is no number"),
    "a truth for a number": ("fedavg", lambda r: with_metrics(r, penalty=True), "metric 'penalty' is no number"),
    "a metric that is no table": (
        "fedavg",
        lambda r: with_metrics(r, retrieval=[1]),
        "metric 'retrieval' is no table of numbers",
    ),
    "a table of words": (
        "fedavg",
        lambda r: with_metrics(r, retrieval={"own": "x"}),
        "metric 'retrieval' is no table of numbers",
    ),
    "a number beyond floats": ("fedavg", lambda r: with_metrics(r, own={"x": [-(10**400)]}), "metric 'own' is not finite"),
    "a forged event": ("fedavg", lambda r: replace(r, metrics={**r.metrics, "event": "round"}), "a metric is called event"),
    "a metric that is none": (
        "fedavg",
        lambda r: replace(r, metrics={**r.metrics, "x": {"y": [float("inf")]}}),
        "metric 'x' is not",
    ),
    "more than was asked": ("fedavg", lambda r: with_extra(r, stowaway=torch.ones(1)), "tensor stowaway is unknown"),
    "rows outside the ball": (
        "omnifm",
        lambda r: with_extra(r, prototypes__vectors=r.extra["prototypes/vectors"] * 9),
        "a prototype of norm .* is outside the ball of 1",
    ),
    "rows of another client": (
        "omnifm",
        lambda r: with_extra(r, prototypes__client=torch.zeros(3, dtype=torch.int64)),
        "tensor prototypes/client is unknown",
    ),
    "a flood of rows": ("omnifm", flooded, r"\d+ prototypes, at most 3 are taken"),
    "counts of strange rows": (
        "omnifm",
        lambda r: with_extra(r, retrievals__row_id=r.extra["retrievals/row_id"] + 10**6),
        "was never in the bank",
    ),
    "control variates": ("scaffold", lambda r: replace(r, extra={}), "tensor scaffold/change/.* is missing"),
}


def bend(reply: Reply, change: Callable[[Reply], Reply]) -> Reply:
    return change(reply) if (reply.kind, reply.round, reply.client) == ("train", 1, "d") else reply


def lab_of(folder: Path, strategy: str, **changes: Any) -> Lab:
    return make_lab(folder, strategy, security__max_update_norm=50, **changes)


@pytest.mark.parametrize("name", BAD)
def test_the_round_goes_on_without_whoever_is_refused(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strategy, change, complaint = BAD[name]
    lab = lab_of(tmp_path / "bad", strategy, **SKIP)
    lab.engine = Altered(lab.site, partial(bend, change=change))
    with caplog.at_level(logging.WARNING, "omnifm.federation.rounds"):
        server = lab.run()
    (line,) = (r.getMessage() for r in caplog.records)
    assert line.startswith("client d, round 1: ") and "\n" not in line
    assert [e["discarded"] for e in lab.events if e["event"] == "round"] == [0, 1]
    (event,) = (e for e in lab.events if e["event"] == "client" and "discarded" in e)
    assert (event["client"], event["round"], event["loss"]) == ("d", 1, None)
    assert re.search(complaint, line)
    # What the others alone give: in the second round nobody asked d.
    alone = lab_of(tmp_path / "alone", strategy, schedule=[("a", "b", "c", "d"), ("a", "b", "c")])
    expected = alone.run()
    assert differing(server.shared, expected.shared) == [] and differing(server.extra, expected.extra) == []


@pytest.mark.parametrize("name", BAD)
def test_by_default_the_run_ends_and_names_the_client(name: str, tmp_path: Path) -> None:
    strategy, change, complaint = BAD[name]
    lab = lab_of(tmp_path, strategy)
    lab.engine = Altered(lab.site, partial(bend, change=change))
    with pytest.raises(FederationError, match=rf"^client d, round 1: .*{complaint}"):
        lab.run()


def test_a_reply_of_the_last_run_does_not_count_in_this_one(tmp_path: Path) -> None:
    """Same seed, same round, same client: only the nonce tells them apart."""
    last = make_lab(tmp_path / "1", engine=Spy)
    last.run()
    kept = {(r.round, r.client): r for r in spy(last).trained()}
    lab = make_lab(tmp_path / "2")
    lab.engine = Altered(lab.site, lambda r: kept[r.round, r.client] if r.client == "b" else r)
    with pytest.raises(FederationError, match="client b, round 0: the reply answers another request"):
        lab.run()


def test_a_client_that_speaks_for_another_does_not_silence_it(tmp_path: Path) -> None:
    """What b says still counts; what d says in b's name does not, whoever comes first."""
    for first in (True, False):
        lab = make_lab(tmp_path / str(first), **SKIP)
        inner = lab.engine

        class Poser:
            def __init__(self, inner: Any, first: bool) -> None:
                self._inner, self._first = inner, first

            def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
                replies = {r.client: replace(r, sender=r.client) for r in self._inner.exchange(requests)}
                if "d" in replies and replies["d"].kind == "train":
                    replies["d"] = replace(scaled(replies["b"], 100.0), sender="d")
                yield from reversed(replies.values()) if self._first else replies.values()

        lab.engine = Poser(inner, first)
        server = lab.run()
        expected = make_lab(tmp_path / f"plain-{first}", schedule=[("a", "b", "c")] * 2).run()
        for name, tensor in expected.shared.items():
            torch.testing.assert_close(server.shared[name], tensor, rtol=0, atol=1e-6)
        assert [e["discarded"] for e in lab.events if e["event"] == "round"] == [1, 1]


def test_if_everybody_is_refused_the_run_ends(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, security__max_update_norm=1e-9, **SKIP)
    with pytest.raises(FederationError, match="round 0: no client's reply counts"):
        lab.run()


@pytest.mark.parametrize("kind", ["describe", "evaluate"])
def test_descriptions_and_scores_must_be_from_whom_they_say(kind: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedavg", {"aggregation": "neighbours"})
    lab.engine = Altered(lab.site, lambda r: replace(r, client="b", sender="d") if (r.kind, r.client) == (kind, "d") else r)
    with pytest.raises(FederationError, match=r"client d, round .: the reply says that it is from client b"):
        lab.evaluate(lab.run())


def test_the_norm_of_an_update_is_that_of_all_its_numbers() -> None:
    sent = {"a": torch.ones(2, 2), "b": torch.zeros(1), "n": torch.tensor(3)}
    tensors = {"a": torch.ones(2, 2) + 1, "b": torch.tensor([2.0]), "n": torch.tensor(99)}
    assert update_norm(tensors, sent) == pytest.approx(8**0.5)


def test_nonces_differ_and_are_long() -> None:
    post = guard.Post()
    nonces = {post.send(Request("train", 0, "a")).nonce for _ in range(50)}
    assert len(nonces) == 50 and {len(n) for n in nonces} == {32}


def test_where_epsilon_rests_on_their_number_a_client_has_the_examples_that_are_known_of(tmp_path: Path) -> None:
    private = {"privacy__example_clip": 1.0, "privacy__example_noise": 1.0, "privacy__noise": "seeded"}
    pytest.importorskip("opacus")
    more = partial(bend, change=lambda r: replace(r, num_examples=r.num_examples + 1))
    lab = make_lab(tmp_path / "private", "fedavg", **private)
    lab.engine = Altered(lab.site, more)
    with pytest.raises(FederationError, match=r"^client d, round 1: trains on (\d+) examples, (\d+) are known of; epsilon would"):
        lab.run()
    open_run = make_lab(tmp_path / "open", "fedavg")
    open_run.engine = Altered(open_run.site, more)
    open_run.run()


@pytest.mark.parametrize("strategy", sorted(build.STRATEGIES))
def test_a_round_that_did_not_count_leaves_no_trace_at_its_client(strategy: str, tmp_path: Path) -> None:
    """Client and server remember the same rounds: all is as if the client had not been asked, through a kill too."""
    if build.lookup(build.STRATEGIES, "strategy", strategy).pooled:
        assert strategy == "centralised"
        return
    everybody = ("a", "b", "c", "d")
    bad = lab_of(tmp_path / "bad", strategy, checkpoint=True, schedule=[everybody] * 3, federation__rounds=3, **SKIP)
    bad.engine = Altered(bad.site, partial(bend, change=lambda r: replace(r, metrics={**r.metrics, "loss": True})))
    bad.schedule = bad.schedule[:2]
    half = bad.run()
    assert "loss is missing" in next(e["discarded"] for e in bad.events if e["event"] == "client" and "discarded" in e)
    assert half.meta["void"] == {"d": [1]}
    asked = lab_of(tmp_path / "alone", strategy, schedule=[everybody, everybody[:3], everybody], federation__rounds=3, **SKIP)
    asked.schedule = asked.schedule[:2]
    expected = asked.run()
    assert bad.evaluate(half) == asked.evaluate(expected), "what is scored has not seen the round either"
    assert bad.checkpoint is not None
    again = lab_of(tmp_path / "bad", strategy, checkpoint=True, schedule=[everybody] * 3, federation__rounds=3, **SKIP)
    asked.schedule = again.schedule
    found, expected = again.run(bad.checkpoint.load()[0], 2), asked.run(expected, 2)
    assert differing(again.snapshot(found), asked.snapshot(expected)) == [] and found.meta == expected.meta
