"""Secure aggregation under the round loop: the mean of every strategy that may have it, and what the server gets to see."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("cryptography")

from omnifm import build
from omnifm.errors import ConfigError, FederationError
from omnifm.federation import secure
from omnifm.federation.messages import Reply, Request
from omnifm.federation.rounds import run_rounds
from omnifm.federation.secure import SecureEngine
from omnifm.federation.strategy import Strategy
from tests.support import HOSPITALS, Altered, Lab, Spy, Wire, make_lab, spy

SECURE = {"privacy__secure_aggregation": True}
CLASSES: dict[str, type[Strategy]] = {name: build.lookup(build.STRATEGIES, "strategy", name) for name in build.STRATEGIES}
MEAN = sorted(name for name, found in CLASSES.items() if found.mean_suffices)
OPTIONS: dict[str, dict[str, Any]] = {"omnifm": {"aggregation": "mean"}}
BUFFERS = {"fedbn": {"model__buffers": "local"}}
# A rule that divides by a root of squares makes more of a quantum than a mean does.
ADAPTIVE = {"fedadam": 1e-3, "fedyogi": 1e-3}


def lab_of(folder: Path, strategy: str = "fedavg", **changes: Any) -> Lab:
    return make_lab(folder, strategy, OPTIONS.get(strategy), **{**BUFFERS.get(strategy, {}), **changes})


def bound(lab: Lab) -> float:
    """Return by how much a round's mean may be off: m q / (2 sum_i p_i)."""
    shares = [h.train / max(other.train for other in lab.hospitals) for h in lab.hospitals]
    return secure.ring(lab.config.privacy, len(shares)).error(len(shares)) / sum(shares)


def require_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=2e-7)


def test_the_list_of_strategies_is_this_one() -> None:
    """A new strategy that inherits the declaration appears here, and must earn its place in the test below."""
    averaging = ["fedavg", "fedbn", "fedper", "fedprox", "fedrep", "moon", "ditto", "gpfl", "feddat", "omnifm"]
    assert sorted([*averaging, "fedadam", "fedavgm", "fedyogi"]) == MEAN


@pytest.mark.parametrize("strategy", MEAN)
def test_one_round_gives_the_same_mean_to_the_quantum(strategy: str, tmp_path: Path) -> None:
    plain = lab_of(tmp_path / "plain", strategy, federation__rounds=1)
    masked = lab_of(tmp_path / "masked", strategy, federation__rounds=1, **SECURE)
    expected, found = plain.run(), masked.run()
    atol = ADAPTIVE.get(strategy, bound(masked) * 1.01)
    require_close(found.shared, expected.shared, atol)
    assert found.extra.keys() == expected.extra.keys()
    loss = [[e["loss"] for e in lab.events if e["event"] == "client"] for lab in (plain, masked)]
    assert loss[0] == loss[1]


@pytest.mark.parametrize("engine", [Wire, Spy])
def test_several_rounds_run_over_bytes_and_without_any_clients_tensors(engine: Any, tmp_path: Path) -> None:
    masked = lab_of(tmp_path / "m", federation__rounds=3, engine=engine, **SECURE)
    expected = lab_of(tmp_path / "p", federation__rounds=3).run()
    require_close(masked.run().shared, expected.shared, 1e-4)
    scores = masked.evaluate(masked.start()).views["personal"]
    assert scores
    if engine is Spy:
        check_what_was_seen(masked)


def check_what_was_seen(lab: Lab) -> None:
    """No message up holds a shared tensor, nor a masked vector that looks like the numbers it hides."""
    trained = spy(lab).trained()
    assert len(trained) == 12 and all(not reply.tensors for reply in spy(lab).replies)
    for reply in trained:
        vector = reply.extra["secagg/masked"]
        assert vector.dtype is torch.int32 and float(vector.double().abs().median()) > 2**28
        assert set(reply.extra) == {"secagg/masked"}
    assert {r.metrics["out_of_range"] for r in trained} == {0}
    events = [e for e in lab.events if e["event"] == "client"]
    assert all(e["masked_bytes"] == sum(e["bytes_up"].values()) for e in events)  # 32 bits a number, as without


class Leaving:
    """An engine whose clients leave: `left` says, by client, the first step that it does not answer any more."""

    def __init__(self, inner: Any, left: dict[str, str]) -> None:
        self._inner, self._left = inner, left
        self._gone: set[str] = set()

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        for request in requests:
            step = request.settings.get("secagg", {}).get("step", "")
            if self._left.get(request.client) == step:
                self._gone.add(request.client)
            if request.client not in self._gone:
                yield from self._inner.exchange([request])


def round_of(lab: Lab, engine: Any, **changes: Any) -> list[Reply]:
    """Send one round's training requests through the protocol."""
    through = SecureEngine(engine, lab.config.privacy, lab.strategy.context.weight, lab.num_train, **changes)
    settings = {"epochs": 1, "steps": 0, "keep": []}
    return list(through.exchange(Request("train", 0, h.id, lab.untrained, {}, settings, h.id) for h in lab.hospitals))


def mean_of(lab: Lab, clients: str) -> dict[str, Tensor]:
    """Return the mean without the protocol, by a loop."""
    settings = {"epochs": 1, "steps": 0, "keep": []}
    replies = [lab.site.handle(Request("train", 0, client, lab.untrained, {}, settings)) for client in clients]
    total = sum(reply.num_examples for reply in replies)
    return {
        n: sum((r.tensors[n].double() * (r.num_examples / total) for r in replies), torch.zeros(())).float()
        for n in lab.untrained
    }


@pytest.mark.parametrize("step", ["advertise", "share", "mask", "unmask"])
def test_whoever_leaves_the_mean_is_that_of_the_others(step: str, tmp_path: Path) -> None:
    lab = lab_of(tmp_path / "m", **SECURE)
    replies = round_of(lab, Leaving(lab.engine, {"b": step}))
    stayed = "abcd" if step == "unmask" else "acd"
    assert [r.client for r in replies] == [r.nonce for r in replies] == list(stayed)
    for reply in replies:
        require_close(dict(reply.tensors), mean_of(lab_of(tmp_path / "p"), stayed), 2 * bound(lab))


@pytest.mark.parametrize("step", ["advertise", "share", "mask", "unmask"])
def test_below_the_threshold_the_round_fails_in_one_line(step: str, tmp_path: Path) -> None:
    lab = lab_of(tmp_path, **SECURE)
    with pytest.raises(FederationError, match=f"secure aggregation, step {step}: 2 of 4 clients are left, 3 are needed"):
        round_of(lab, Leaving(lab.engine, {"b": step, "d": step}))


def test_no_sum_of_two_clients_is_released_whatever_the_threshold(tmp_path: Path) -> None:
    """With .51 two of three were enough, and each of the two had the other's update."""
    low = {"privacy__secure_threshold": 0.51, **SECURE}
    assert [secure.threshold(make_lab(tmp_path, **low).config.privacy, n) for n in (3, 4, 5, 7, 8)] == [3, 3, 3, 4, 5]
    for step in ("advertise", "share", "mask", "unmask"):
        lab = lab_of(tmp_path / step, hospitals=HOSPITALS[:3], **low)
        with pytest.raises(FederationError, match=f"secure aggregation, step {step}: 2 of 3 clients are left, 3 are needed"):
            round_of(lab, Leaving(lab.engine, {"b": step}))


BENT: dict[str, Callable[[Reply], Reply]] = {
    "plain tensors": lambda r: replace(r, tensors={"w": torch.ones(1)}),
    "no vector": lambda r: replace(r, extra={}),
    "a short vector": lambda r: replace(r, extra={"secagg/masked": r.extra["secagg/masked"][1:]}),
    "floats": lambda r: replace(r, extra={"secagg/masked": r.extra["secagg/masked"].float()}),
    "another's name": lambda r: replace(r, client="a", sender="b"),
}


@pytest.mark.parametrize("name", BENT)
def test_a_bent_vector_ends_the_run_or_drops_its_client(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lab = lab_of(tmp_path / "m", **SECURE)
    bent = Altered(lab.site, lambda r: BENT[name](r) if (r.kind, r.client) == ("train", "b") else r)
    with pytest.raises(FederationError, match=r"^client b, round 0: "):
        round_of(lab, bent)
    lab = lab_of(tmp_path / "n", **SECURE)
    bent = Altered(lab.site, lambda r: BENT[name](r) if (r.kind, r.client) == ("train", "b") else r)
    with caplog.at_level(logging.WARNING, "omnifm.federation.secure"):
        replies = round_of(lab, bent, skip=True)
    assert [r.client for r in replies] == ["a", "c", "d"] and "it has dropped out" in caplog.text
    require_close(dict(replies[0].tensors), mean_of(lab_of(tmp_path / "p"), "acd"), 2 * bound(lab))


def test_a_client_shows_its_tensors_to_no_server_that_leaves_the_protocol_out(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, **SECURE)
    request = Request("train", 0, "a", lab.untrained, {}, {"epochs": 1, "steps": 0, "keep": []})
    with pytest.raises(FederationError, match="client a, round 0: no masked sum was agreed on"):
        lab.site.handle(request)
    for settings in ({}, {"secagg": {"step": "unmask", "survivors": [0, 1, 2]}}, {"secagg": {"step": "tell all"}}):
        with pytest.raises(FederationError, match="client a, round 0: "):
            lab.site.handle(Request("secagg", 0, "a", settings=settings))
    two = {"secagg": {"step": "advertise", "session": "00", "parties": 2, "number": 0, "scale": 1.0}}
    with pytest.raises(FederationError, match="client a, round 0: secure aggregation of 2 clients"):
        lab.site.handle(Request("secagg", 0, "a", settings=two))


def test_what_leaves_the_range_is_cut_and_counted(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, privacy__secure_range=1e-3, **SECURE)
    lab.run()
    assert all(e["out_of_range"] > 0 for e in lab.events if e["event"] == "client")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    name: (name, {}, f"the server of strategy {name} needs more of the clients' tensors than their mean")
    for name in sorted(CLASSES.keys() - MEAN)
} | {
    "neighbourhoods": ("omnifm", {"strategies__omnifm__aggregation": "neighbours"}, "needs more of the clients' tensors"),
    "running statistics": ("fedavg", {"model__norm": "batch"}, "is a statistic of images, no parameter"),
    "two clients": ("fedavg", {"federation__participation": 0.5}, "a round has 2 clients, it takes at least 3"),
    "workers": ("fedavg", {"engine__workers": 2}, "set engine.workers = 1"),
    "simulation": ("fedavg", {"engine__kind": "flower-simulation"}, "engine.kind = 'local'"),
    "norms": ("fedavg", {"security__max_update_norm": 1.0}, "security.max_update_norm cannot hold"),
    "a coarse ring": (
        "fedavg",
        {"privacy__clip": 1e-6, "federation__weighting": "equal"},
        r"rounding moves an update by up to \S+, too much for privacy.clip",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_hidden_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    strategy, changes, complaint = REFUSED[name]
    lab = make_lab(tmp_path, strategy, **{**changes, **SECURE})
    with pytest.raises(ConfigError, match=f"^privacy.secure_aggregation: .*{complaint}") as caught:
        build.make_schedule(lab.config, lab.site, list(lab.num_train))
    assert "\n" not in str(caught.value)


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("omnifm.privacy.crypto.import_module", missing)
    lab = make_lab(tmp_path, **SECURE)
    with pytest.raises(ConfigError, match=r"pip install 'omnifm\[privacy\]'"):
        build.make_schedule(lab.config, lab.site, list(lab.num_train))


def test_tables_of_bytes_survive_and_others_are_refused() -> None:
    table = {3: b"abc", 0: b"xyz"}
    packed = secure.pack(table)
    assert secure.unpack(packed) == table and secure.unpack({}) == {} and secure.pack({}) == {}
    bad = [
        {"secagg/party": packed["secagg/party"]},
        {**packed, "secagg/party": torch.tensor([3, 3])},
        {**packed, "secagg/party": torch.tensor([3.0, 0.0])},
        {**packed, "secagg/bytes": packed["secagg/bytes"][:1]},
    ]
    for extra in bad:
        with pytest.raises(FederationError, match="a table of secure aggregation is malformed"):
            secure.unpack(extra)


def test_a_client_with_more_examples_than_the_server_knows_of_says_so(tmp_path: Path) -> None:
    """Its share would be above 1, and be cut off where the range ends."""
    lab = lab_of(tmp_path / "few", **SECURE)
    few = dict.fromkeys(lab.num_train, 2)
    federation = build.make_federation(lab.config, lab.strategy, lab.engine, lab.schedule, few, lambda state, done: None)
    with pytest.raises(FederationError, match=r"more training examples than the server knows of; set federation.weighting"):
        run_rounds(federation, lab.start(), 0, lab)
    lab_of(tmp_path / "equal", federation__weighting="equal", **SECURE).run()
