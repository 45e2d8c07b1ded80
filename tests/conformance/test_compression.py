"""Compression on the round loop: under every strategy, over the wire, through a kill; what is sent and what is held back."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnifm import build
from omnifm.build import STRATEGIES
from omnifm.errors import ConfigError, FederationError
from omnifm.federation.aggregation import update_norm
from omnifm.federation.client import RESIDUAL
from omnifm.federation.messages import Reply, decode, encode
from omnifm.tasks.base import Model
from tests.conformance.test_properties import kill_in_round
from tests.federation.test_compression import METHODS, NAME, NAN, PRIVATE, put, settings
from tests.support import HOSPITALS, NEIGHBOURS, Altered, Lab, MemoryTask, Spy, Wire, differing, make_lab, make_split, spy


def allowed(lab: Lab) -> bool:
    try:
        build.make_schedule(lab.config, lab.site, list(lab.num_train))
    except ConfigError as refusal:
        assert str(refusal).startswith("compression.upload: ") and "\n" not in str(refusal)
        return False
    return True


# All that it shares would be smaller than what is compressed.
LARGER = {"feddat": {"reduction": 1}}
NEVER = {"local", "centralised", "fedproto"}
WITHOUT = {("topk", True): {"median", "trimmed_mean", "fedgma", "and_mask", "f3ocus"}, ("int8", True): {"f3ocus"}}


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_is_refused_or_compressed_over_the_wire_and_through_a_kill(strategy: str, tmp_path: Path) -> None:
    """The residual is remembered, never sent, and the same bits whoever interrupts; the bytes are fewer."""
    for upload, feedback in (("topk", True), ("int8", True), ("int8", False)):
        changes = {**settings(upload, error_feedback=feedback), "federation__participation": 0.75}
        whole = make_lab(tmp_path / upload / str(feedback), strategy, LARGER.get(strategy), engine=Spy, **changes)
        if refused := not allowed(whole):
            assert strategy in NEVER | WITHOUT.get((upload, feedback), set())
        else:
            break
    assert refused == (strategy in NEVER)
    if refused:
        return
    cut = make_lab(tmp_path / "cut", strategy, LARGER.get(strategy), checkpoint=True, engine=Wire, **changes)
    kill_in_round(cut, 1)
    again = make_lab(tmp_path / "cut", strategy, LARGER.get(strategy), checkpoint=True, engine=Wire, **changes)
    assert again.checkpoint is not None
    first, second = whole.snapshot(whole.run()), again.snapshot(again.run(again.checkpoint.load()[0], 1))
    assert differing(first, second) == []
    residuals = {n: t for n, t in first.items() if RESIDUAL in n}
    assert any(t.any() for t in residuals.values()) == feedback
    values = {t.numpy().tobytes() for t in residuals.values()}
    for message in spy(whole).messages():
        carried = {**message.tensors, **message.extra}
        assert not any(RESIDUAL in n or t.contiguous().numpy().tobytes() in values for n, t in plain(carried).items())
    shared = sum(whole.untrained[n].nbytes for n in whole.site.sharing.shared)
    assert all(sum(t.nbytes for t in reply.tensors.values()) < shared for reply in spy(whole).trained())


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in types that numpy has."""
    return {n: t.view(torch.int16) if t.dtype is torch.bfloat16 else t for n, t in tensors.items()}


# ---------------------------------------------------------------------- on the round loop
@pytest.mark.parametrize(("strategy", "bytes_up"), [("fedavg", {"bf16": 256, "int8": 128 + 4, "topk": 13 * 8})])
def test_the_bytes_in_the_events_are_those_of_the_messages(strategy: str, bytes_up: dict[str, int], tmp_path: Path) -> None:
    plain = make_lab(tmp_path / "plain", strategy)
    plain.run()
    before = next(e for e in plain.events if e["event"] == "client")["bytes_up"]
    for upload, size in bytes_up.items():
        lab = make_lab(tmp_path / upload, strategy, engine=Spy, **settings(upload))
        lab.run()
        found = next(e for e in lab.events if e["event"] == "client")["bytes_up"]
        assert found == {"backbone": before["backbone"] - 128 * 4 + size, "head": before["head"]}
        # And on the wire: nothing but the tensors differs in length.
        reply = spy(lab).trained()[0]
        payload = sum(t.numel() * t.element_size() for t in reply.tensors.values())
        blob = encode(reply)
        assert len(blob) - 8 - int.from_bytes(blob[:8], "little") == payload == sum(found.values())
        assert isinstance(back := decode(blob), Reply) and differing(dict(back.tensors), dict(reply.tensors)) == []


@pytest.mark.parametrize("strategy", ["fedavg", "omnifm", "scaffold", "fedadam", "multikrum"])
def test_with_a_share_of_one_topk_is_no_compression_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    plain = make_lab(tmp_path / "1", strategy, federation__rounds=3)
    lab = make_lab(tmp_path / "2", strategy, federation__rounds=3, **settings("topk", topk_share=1.0))
    found = lab.snapshot(lab.run())
    residuals = {n for n in found if RESIDUAL in n}
    assert residuals and not any(found[n].any() for n in residuals)
    assert differing({n: t for n, t in found.items() if n not in residuals}, plain.snapshot(plain.run())) == []


@pytest.mark.parametrize("upload", METHODS)
def test_error_feedback_is_at_work_from_the_second_round_on(upload: str, tmp_path: Path) -> None:
    labs = [make_lab(tmp_path / str(on), engine=Spy, **settings(upload, error_feedback=on)) for on in (True, False)]
    for lab in labs:
        lab.run()
    first, second = ([[dict(r.tensors) for r in spy(lab).trained(index)] for lab in labs] for index in (0, 1))
    assert all(differing(a, b) == [] for a, b in zip(*first, strict=True))
    assert any(differing(a, b) for a, b in zip(*second, strict=True))
    assert labs[0].private("a").keys() == {RESIDUAL + NAME} and labs[1].private("a") == {}


def listen(lab: Lab) -> list[tuple[dict[str, Tensor], dict[str, Tensor], Mapping[str, Tensor]]]:
    """Collect what is compressed: tensors after training, those received, and what is sent."""
    found: list[tuple[dict[str, Tensor], dict[str, Tensor], Mapping[str, Tensor]]] = []
    inner = lab.site._compression.compress

    def compress(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], residual: Mapping[str, Tensor]) -> Any:
        result = inner(tensors, start, residual)
        found.append((dict(tensors), dict(start), result[0]))
        return result

    lab.site._compression.compress = compress  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("strategy", ["fedavg", "omnifm"])
def test_a_residual_waits_until_its_client_takes_part_again(strategy: str, tmp_path: Path) -> None:
    """Neighbourhoods send each client its own tensors; the change is that against what it was sent."""
    options = {"aggregation": "neighbours", "neighbourhood_threshold": 0.2, "neighbourhood_band": 8}
    turns = [["a", "b"], ["b", "c"], ["a", "c"], ["b", "c"], ["a", "b"]]
    lab = make_lab(tmp_path, strategy, options, schedule=turns, federation__rounds=5, **settings("topk"))
    found, kept = listen(lab), []
    lab.after_round = lambda lab, server, done: kept.append({h.id: lab.private(h.id) for h in HOSPITALS})
    lab.run()
    assert lab.private("d") == {}, "d never took part"
    assert differing(kept[1]["a"], kept[0]["a"]) == [] and differing(kept[2]["a"], kept[1]["a"])
    own = [record for record, client in zip(found, chain.from_iterable(turns), strict=True) if client == "a"]
    assert len(own) == 3 and differing(own[1][1], own[0][1])
    balance = torch.zeros(128, dtype=torch.float64)
    for tensors, start, sent in own:
        index = sent[f"{NAME}:index"].long()
        moved = torch.zeros(128, dtype=torch.float64)
        moved[index] = sent[f"{NAME}:value"].double() - start[NAME].double().flatten()[index]
        balance += (tensors[NAME].double() - start[NAME].double()).flatten() - moved
    torch.testing.assert_close(balance, lab.private("a")[RESIDUAL + NAME].double().flatten(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("upload", METHODS)
def test_what_the_server_reads_is_what_each_client_wrote_against_what_it_was_sent(upload: str, tmp_path: Path) -> None:
    """In neighbourhoods clients are sent different tensors from the second round on."""
    lab = make_lab(tmp_path, "fedavg", NEIGHBOURS, **settings(upload))
    found, seen = listen(lab), []
    receive = lab.strategy.receive
    lab.strategy.receive = lambda server, reply: (seen.append(reply), receive(server, reply))[1]  # type: ignore[method-assign]
    lab.run()
    assert len({start[NAME].numpy().tobytes() for _, start, _ in found}) > 2
    for reply, (_, start, sent) in zip(seen, found, strict=True):
        assert differing(dict(reply.tensors), lab.site._compression.restore(sent, start)) == []


@pytest.mark.parametrize("upload", METHODS)
def test_clients_that_hold_different_tensors_send_what_they_hold(
    upload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def holds(task: MemoryTask, model: Model, client: str) -> frozenset[str] | None:
        return frozenset(model.state_dict()) - {NAME} if client == "a" else None

    monkeypatch.setattr(MemoryTask, "holds", holds)
    lab = make_lab(tmp_path, engine=Spy, **settings(upload))
    lab.run()
    kept = {r.client: {n for n in r.tensors if n.startswith(NAME)} for r in spy(lab).trained(0)}
    assert not kept["a"] and kept["b"] and kept["b"] == kept["d"]
    assert lab.private("a") == {} and lab.private("b").keys() == {RESIDUAL + NAME}


def test_running_statistics_are_sent_as_they_are_whatever_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnifm.federation.compression.LEAST", 1)
    lab = make_lab(tmp_path, engine=Spy, model__norm="batch", **settings("int8"))
    lab.run()
    types = {n: t.dtype for n, t in spy(lab).trained()[0].tensors.items() if not n.endswith(":scale")}
    left = {n for n, dtype in types.items() if dtype is not torch.int8}
    assert left == {f"backbone.norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")} and len(types) == 9


@pytest.mark.parametrize("upload", METHODS)
def test_the_strategy_sees_full_tensors_near_those_that_were_trained(upload: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, federation__rounds=1, **settings(upload))
    found, seen = listen(lab), []
    receive = lab.strategy.receive
    lab.strategy.receive = lambda server, reply: (seen.append(reply), receive(server, reply))[1]  # type: ignore[method-assign]
    lab.run()
    for reply, (tensors, start, sent) in zip(seen, found, strict=True):
        assert {n: (t.shape, t.dtype) for n, t in reply.tensors.items()} == {n: (t.shape, t.dtype) for n, t in tensors.items()}
        assert differing(dict(reply.tensors), tensors) == [NAME] and differing(dict(sent), tensors)
        moved, error = (tensors[NAME] - start[NAME]).norm(), (reply.tensors[NAME] - tensors[NAME]).norm()
        assert 0 < error < moved


@pytest.mark.parametrize("upload", METHODS)
def test_a_client_that_sends_no_numbers_is_refused_and_keeps_its_residual(upload: str, tmp_path: Path) -> None:
    for refused in ("end", "skip"):
        lab = make_lab(tmp_path / refused, security__refused=refused, federation__rounds=3, **settings(upload))
        inner, calls = lab.site._compression.compress, []

        def compress(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> Any:
            calls.append(1)  # noqa: B023
            hole = torch.full_like(tensors[NAME], NAN)
            return inner({**tensors, NAME: hole} if len(calls) == 8 else tensors, start, held)  # noqa: B023

        lab.site._compression.compress = compress  # type: ignore[method-assign, assignment]
        kept: list[dict[str, Tensor]] = []
        lab.after_round = lambda lab, server, done: kept.append(lab.private("d"))  # noqa: B023
        if refused == "end":
            with pytest.raises(FederationError, match=rf"^client d, round 1: tensor {NAME} is not finite$"):
                lab.run()
            continue
        server = lab.run()
        assert [e["discarded"] for e in lab.events if e["event"] == "round"] == [0, 1, 0]
        assert differing(kept[0], kept[1]) == [] and differing(kept[1], kept[2])
        assert all(bool(t.isfinite().all()) for t in server.shared.values())


@pytest.mark.parametrize("upload", ["bf16", "int8"])
def test_where_a_failed_client_is_tolerated_it_is(upload: str, tmp_path: Path) -> None:
    sick = make_split(8, "US", "sick")
    sick.images[3, 0, 5, 5] = NAN
    healthy = make_lab(tmp_path / "0").task.client_data("d")
    lab = make_lab(tmp_path / "1", "median", data={"d": replace(healthy, train=sick)}, **settings(upload))
    lab.run()
    assert [e["discarded"] for e in lab.events if e["event"] == "round"] == [1, 1] and lab.private("d") == {}


def test_the_run_ends_or_goes_on_without_a_hostile_client(tmp_path: Path) -> None:
    def bend(reply: Reply) -> Reply:
        if (reply.kind, reply.round, reply.client) != ("train", 1, "d"):
            return reply
        return replace(reply, tensors=put(f"{NAME}:index", 0, -5)(dict(reply.tensors)))

    lab = make_lab(tmp_path / "end", **settings("topk"))
    lab.engine = Altered(lab.site, bend)
    with pytest.raises(FederationError, match=f"^client d, round 1: tensor {NAME} has indices"):
        lab.run()
    lab = make_lab(tmp_path / "skip", security__refused="skip", **settings("topk"))
    lab.engine = Altered(lab.site, bend)
    alone = make_lab(tmp_path / "alone", schedule=[("a", "b", "c", "d"), ("a", "b", "c")], **settings("topk"))
    assert differing(lab.run().shared, alone.run().shared) == []
    (event,) = (e for e in lab.events if "discarded" in e and e["event"] == "client")
    assert event["client"] == "d" and event["discarded"].startswith(f"tensor {NAME} has indices")


def test_the_bound_on_an_update_is_of_what_it_is_in_full(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, security__max_update_norm=50, **settings("int8"))
    far = put(f"{NAME}:scale", 0, 1e3)
    lab.engine = Altered(lab.site, lambda r: replace(r, tensors=far(dict(r.tensors))) if r.client == "b" else r)
    with pytest.raises(FederationError, match=r"client b, round 0: an update of norm \S+e\+\d+, at most 50 are taken"):
        lab.run()


def test_topk_without_error_feedback_never_lengthens_an_update(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    changes = {**settings("topk", error_feedback=False), **PRIVATE, "privacy__clip": 0.05, "privacy__noise": "seeded"}
    lab = make_lab(tmp_path, engine=Spy, **changes)
    build.make_schedule(lab.config, lab.site, list(lab.num_train))
    found = listen(lab)
    lab.run()
    for tensors, start, sent in found:
        restored = lab.site._compression.restore(sent, start)
        assert update_norm(restored, start) < update_norm(tensors, start) == pytest.approx(0.05, rel=1e-4)


def test_what_a_client_remembers_of_its_change_is_what_the_server_adds_up(tmp_path: Path) -> None:
    """FedDyn's two sums would part for good where `topk` drops for good."""
    lab = make_lab(tmp_path, "feddyn", **settings("topk", error_feedback=False))
    with pytest.raises(ConfigError, match=r"^compression.upload: .*remembers its whole change.*error_feedback = true"):
        build.make_schedule(lab.config, lab.site, list(lab.num_train))
    assert allowed(make_lab(tmp_path, "feddyn", **settings("topk", error_feedback=True)))
    assert allowed(make_lab(tmp_path, "fedavg", **settings("topk", error_feedback=False)))
