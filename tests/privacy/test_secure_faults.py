"""Secure aggregation with a client that breaks the protocol: it is named, or the round is that of the others."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("cryptography")

from omnifm.errors import FederationError
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from tests.privacy.test_secure_rounds import BENT, SECURE, bound, lab_of, mean_of, require_close, round_of
from tests.support import Altered, Lab

SKIP = {**SECURE, "security__refused": "skip", "federation__rounds": 2}
Table = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
KEYS, SHARES, ANSWER = 64, 148, 66
"""Bytes of a line in what a client sends in steps 1, 2 and 4."""

BROKEN: dict[str, tuple[int, Table, str]] = {
    "short keys": (KEYS, lambda p, b: (p, b[:, :-1]), "a party's keys have 63 bytes"),
    "keys of low order": (KEYS, lambda p, b: (p, torch.zeros_like(b)), "a public key is none"),
    "one key of low order": (KEYS, lambda p, b: (p, b * (torch.arange(KEYS) < 32)), "a public key is none"),
    "another's number": (KEYS, lambda p, b: (p + 1, b), "it did not send its own keys and no others"),
    "two keys": (KEYS, lambda p, b: (torch.tensor([1, 2]), b.repeat(2, 1)), "it did not send its own keys and no others"),
    "a share too few": (SHARES, lambda p, b: (p[1:], b[1:]), "what party 1 sent is not a share for everybody"),
    "short shares": (SHARES, lambda p, b: (p, b[:, 1:]), "what party 1 sent is not a share for everybody"),
    "no table": (SHARES, lambda p, b: (p, b[0]), "a table of secure aggregation is malformed"),
    "an answer too few": (ANSWER, lambda p, b: (p[1:], b[1:]), "what party 1 sent is not one share of each"),
    "short answers": (ANSWER, lambda p, b: (p, b[:, 1:]), "what party 1 sent is not one share of each"),
}


def breaking(name: str) -> Callable[[Reply], Reply]:
    """Return what breaks what client b sends in round 0."""
    width, change, _ = BROKEN[name]

    def act(reply: Reply) -> Reply:
        if (reply.kind, reply.client, reply.round) != ("secagg", "b", 0) or reply.extra["secagg/bytes"].shape[1] != width:
            return reply
        party, rows = change(reply.extra["secagg/party"], reply.extra["secagg/bytes"])
        return replace(reply, extra={"secagg/party": party, "secagg/bytes": rows.contiguous()})

    return act


def skipping(folder: Path, change: Callable[[Reply], Reply]) -> tuple[Lab, ServerState]:
    """Run two rounds that go on without whoever breaks the protocol; return the lab, and the server after round 0."""
    lab, states = lab_of(folder, engine=lambda site: Altered(site, change), **SKIP), []
    lab.after_round = lambda lab, server, done: states.append(ServerState(dict(server.shared)))
    lab.run()
    return lab, states[0]


def stayed(lab: Lab) -> list[str]:
    return ["".join(e["client"] for e in lab.events if (e["event"], e["round"]) == ("client", r)) for r in (0, 1)]


@pytest.mark.parametrize("name", BROKEN)
def test_whoever_breaks_the_protocol_is_named(name: str, tmp_path: Path) -> None:
    lab = lab_of(tmp_path, **SECURE)
    with pytest.raises(FederationError, match=rf"^client b, round 0: .*{BROKEN[name][2]}") as caught:
        round_of(lab, Altered(lab.site, breaking(name)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_goes_on_without_whoever_breaks_the_protocol(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An update that is in the sum already is in the mean: of step 4 the others' shares are enough."""
    with caplog.at_level(logging.WARNING, "omnifm.federation.secure"):
        lab, server = skipping(tmp_path / "m", breaking(name))
    assert f"{BROKEN[name][2]}; it has dropped out" in caplog.text and "client b, round 0: " in caplog.text
    others = "abcd" if BROKEN[name][0] == ANSWER else "acd"
    assert stayed(lab) == [others, "abcd"]
    missing = [e.get("missing", []) for e in lab.events if e["event"] == "round"]
    assert missing == [[c for c in "abcd" if c not in others], []]
    require_close(dict(server.shared), mean_of(lab_of(tmp_path / "p"), others), 2 * bound(lab))


FALSE: dict[str, Callable[[Reply], Reply]] = {
    **{f"a vector: {name}": bent for name, bent in BENT.items() if name != "another's name"},
    "no loss": lambda r: replace(r, metrics={}),
    "a loss that is none": lambda r: replace(r, metrics={**r.metrics, "loss": float("nan")}),
    "no examples": lambda r: replace(r, num_examples=0),
    "a debt of examples": lambda r: replace(r, num_examples=-28),
    "examples that nobody knows of": lambda r: replace(r, num_examples=10**12),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_reply_that_is_refused_is_not_in_the_sum(name: str, tmp_path: Path) -> None:
    """What is wrong with a reply was found out once its vector was in the mean, which its examples had scaled."""

    def act(reply: Reply) -> Reply:
        return FALSE[name](reply) if (reply.kind, reply.client, reply.round) == ("train", "b", 0) else reply

    lab, server = skipping(tmp_path / "m", act)
    assert stayed(lab) == ["acd", "abcd"]
    require_close(dict(server.shared), mean_of(lab_of(tmp_path / "p"), "acd"), 2 * bound(lab))
    strict = lab_of(tmp_path / "s", **SECURE)
    with pytest.raises(FederationError, match=r"^client b, round 0: (?!client)"):
        round_of(strict, Altered(strict.site, act))


def test_two_clients_with_one_key_are_one(tmp_path: Path) -> None:
    """Every honest client refuses to share with such two."""
    first: dict[str, Any] = {}

    def act(reply: Reply) -> Reply:
        if (reply.kind, reply.round) != ("secagg", 0) or reply.extra["secagg/bytes"].shape[1] != KEYS:
            return reply
        first.setdefault("key", reply.extra["secagg/bytes"])
        return replace(reply, extra={**reply.extra, "secagg/bytes": first["key"]}) if reply.client == "b" else reply

    lab, _ = skipping(tmp_path, act)
    assert stayed(lab) == ["acd", "abcd"]


def test_shares_that_do_not_open_end_the_round_and_name_their_party(tmp_path: Path) -> None:
    """Only their receivers can see it."""
    lab = lab_of(tmp_path, **SECURE)

    def act(reply: Reply) -> Reply:
        if (reply.kind, reply.client) != ("secagg", "b") or reply.extra["secagg/bytes"].shape[1] != SHARES:
            return reply
        return replace(reply, extra={**reply.extra, "secagg/bytes": reply.extra["secagg/bytes"].flip(1)})

    with pytest.raises(FederationError, match=r"^client a, round 0: .*the shares from party 1: a sealed message was changed"):
        round_of(lab, Altered(lab.site, act), skip=True)


@pytest.mark.parametrize("skip", [False, True])
def test_a_round_that_fails_says_which_it_was(skip: bool, tmp_path: Path) -> None:
    lab = lab_of(tmp_path, **SECURE)

    def silent(reply: Reply) -> Reply:
        return replace(reply, nonce="") if reply.client in "bd" and reply.kind == "train" else reply

    line = r"^round 0: secure aggregation, step mask: 2 of 4 clients are left, 3 are needed$"
    with pytest.raises(FederationError, match=line if skip else "^client b, round 0: "):
        round_of(lab, Altered(lab.site, silent), skip=skip)
