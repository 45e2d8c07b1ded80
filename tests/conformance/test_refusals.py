"""What every strategy must refuse, in one line that names the client and the round, with nothing lost."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from omnifm.build import STRATEGIES
from omnifm.errors import FederationError, OmnifmError
from omnifm.federation.client import POOLED
from omnifm.federation.messages import Reply
from tests.support import HOSPITALS, Altered, Hospital, Lab, Spy, differing, make_lab, make_split, spy

ALL = pytest.mark.parametrize("strategy", sorted(STRATEGIES))
NAN = float("nan")


def holed(reply: Reply, value: float) -> Reply:
    """Put one bad number into the middle of the largest tensor."""
    name = max(reply.tensors, key=lambda n: reply.tensors[n].numel())
    tensor = reply.tensors[name].clone()
    tensor.view(-1)[tensor.numel() // 2] = value
    return replace(reply, tensors={**reply.tensors, name: tensor})


def reshaped(reply: Reply) -> Reply:
    return replace(reply, tensors={n: t[None] for n, t in reply.tensors.items()})


def without_one(reply: Reply) -> Reply:
    return replace(reply, tensors=dict(list(reply.tensors.items())[1:]))


def with_another(reply: Reply) -> Reply:
    return replace(reply, tensors={**reply.tensors, "zz": torch.zeros(1)})


def doubled(reply: Reply) -> Reply:
    return replace(reply, tensors={n: t.double() for n, t in reply.tensors.items()})


Change = Callable[[Reply], Reply]
ON_TENSORS: dict[str, tuple[Change, str]] = {
    "not finite": (lambda r: holed(r, NAN), "is not finite"),
    "infinite": (lambda r: holed(r, float("inf")), "is not finite"),
    "shape": (reshaped, "has shape"),
    "missing": (without_one, "is missing"),
    "dtype": (doubled, "float64, not torch.float32"),
}
ON_ANY: dict[str, tuple[Change, str]] = {
    "unknown": (with_another, "tensor zz is unknown"),
    "stale": (lambda r: replace(r, round=0), "in round 0"),
    "other kind": (lambda r: replace(r, kind="evaluate"), "for evaluate"),
    "no examples": (lambda r: replace(r, num_examples=0), "stands for 0 examples"),
    "loss": (lambda r: replace(r, metrics={**r.metrics, "loss": NAN}), "the loss is missing or not finite"),
    "no loss": (lambda r: replace(r, metrics={}), "the loss is missing or not finite"),
}
CHANGES = ON_TENSORS | ON_ANY
NOT_FINITE = {"not finite", "infinite", "loss"}


def last_client(lab: Lab) -> str:
    return POOLED if lab.strategy.pooled else "d"


def alter(reply: Reply, change: Change, client: str) -> Reply:
    """Change the reply of one client in round 1."""
    return change(reply) if (reply.kind, reply.round, reply.client) == ("train", 1, client) else reply


@ALL
@pytest.mark.parametrize("name", CHANGES)
def test_a_reply_that_does_not_fit_is_refused_by_name(strategy: str, name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    lab = make_lab(tmp_path, strategy, checkpoint=True)
    if name in ON_TENSORS and not lab.site.sharing.shared:
        assert strategy in ("local", "fedproto")  # it sends no tensor that could be wrong
        return
    client = last_client(lab)
    lab.engine = Altered(lab.site, lambda reply: alter(reply, change, client))
    if lab.strategy.tolerates_nonfinite and name in NOT_FINITE:
        check_discarded(lab, client, message)
        return
    with pytest.raises(FederationError, match=message) as caught:
        lab.run()
    assert str(caught.value).startswith(f"client {client}, round 1: ")
    assert "\n" not in str(caught.value)
    assert lab.checkpoint is not None
    server, record = lab.checkpoint.load()
    assert record["rounds_completed"] == 1 and all(bool(t.isfinite().all()) for t in server.shared.values())


def check_discarded(lab: Lab, client: str, message: str) -> None:
    """The round goes on without the reply, and says so."""
    server = lab.run()
    assert all(bool(t.isfinite().all()) for t in server.shared.values())
    assert [e["discarded"] for e in lab.events if e["event"] == "round"] == [0, 1]
    (event,) = (e for e in lab.events if e["event"] == "client" and "discarded" in e)
    assert (event["client"], event["round"], event["loss"]) == (client, 1, None) and message in event["discarded"]
    assert event["bytes_up"] and len([e for e in lab.events if e["event"] == "client"]) == 8


@ALL
def test_a_lost_reply_names_who_is_missing(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy)
    inner, client = lab.engine, last_client(lab)

    class Losing:
        def exchange(self, requests: Any) -> Any:
            return (r for r in inner.exchange(requests) if (r.kind, r.client) != ("train", client))

    lab.engine = Losing()
    with pytest.raises(FederationError, match=f"round 0: no reply from client {client}"):
        lab.run()


@ALL
def test_a_reply_that_comes_twice_or_from_a_stranger_is_refused(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, federation__participation=0.5)
    inner = lab.engine

    class Twice:
        def exchange(self, requests: Any) -> Any:
            for reply in inner.exchange(requests):
                yield reply
                if reply.kind == "train":
                    yield reply

    lab.engine = Twice()
    with pytest.raises(FederationError, match=r"client \w+, round 0: a reply that nobody waits for"):
        lab.run()


@ALL
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_client_whose_loss_is_not_finite_is_named(strategy: str, value: float, tmp_path: Path) -> None:
    """NaN in the images of one client. It is found by whoever reads them first, and said in one line."""
    sick = make_split(8, "US", "sick")
    sick.images[3, 0, 5, 5] = value
    healthy = make_lab(tmp_path / "0", strategy).task.client_data("d")
    lab = make_lab(tmp_path / "1", strategy, data={"d": replace(healthy, train=sick)})
    if lab.strategy.tolerates_nonfinite:
        lab.run()
        assert [e["discarded"] for e in lab.events if e["event"] == "round"] == [1, 1]
        return
    with pytest.raises(OmnifmError, match="finite") as caught:
        lab.run()
    text = str(caught.value)
    assert "\n" not in text and f"client {last_client(lab)}" in text
    assert "round 0" in text or "spectral signature" in text  # a description belongs to no round


@ALL
def test_a_client_without_training_images_is_named(strategy: str, tmp_path: Path) -> None:
    hospitals = (Hospital("a", "CT", 8), Hospital("b", "US", 0))
    lab = make_lab(tmp_path, strategy, hospitals=hospitals)
    if lab.strategy.pooled:
        lab.run()  # the pool has images; who brings none changes nothing
        return
    with pytest.raises(OmnifmError, match="client b") as caught:
        lab.run()
    assert "\n" not in str(caught.value)


@ALL
def test_a_request_that_lacks_a_tensor_is_refused_by_the_client(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, engine=Spy)
    if not lab.site.sharing.shared:
        return
    lab.run()
    request = next(r for r in spy(lab).requests if r.kind == "train")
    name = min(request.tensors)
    less = {n: t for n, t in request.tensors.items() if n != name}
    with pytest.raises(FederationError, match=rf"client {request.client}: the request lacks tensor {name}"):
        lab.site.handle(replace(request, tensors=less))
    wrong = {**request.tensors, name: torch.zeros(1, 2, 3, 4, 5)}
    with pytest.raises(FederationError, match=rf"client {request.client}: tensor {name} has shape"):
        lab.site.handle(replace(request, tensors=wrong))


@ALL
def test_a_refused_round_can_be_run_again(strategy: str, tmp_path: Path) -> None:
    """A client that failed once does no harm: the round, asked for again, gives what it would have given."""
    lab = make_lab(tmp_path / "1", strategy, checkpoint=True)
    client = last_client(lab)
    lab.engine = Altered(lab.site, partial(alter, change=lambda r: replace(r, num_examples=0), client=client))
    with pytest.raises(FederationError):
        lab.run()
    assert lab.checkpoint is not None
    lab.engine = make_lab(tmp_path / "1", strategy).engine
    server = lab.run(lab.checkpoint.load()[0], 1)
    plain = make_lab(tmp_path / "2", strategy)
    assert differing(lab.snapshot(server), plain.snapshot(plain.run())) == []


EXTRA: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "prototype": (lambda x: {**x, "prototypes/vectors": x["prototypes/vectors"] * NAN}, "not finite"),
    "outside": (lambda x: {**x, "prototypes/vectors": x["prototypes/vectors"] * 9}, "outside the ball"),
    "weights": (lambda x: {**x, "prototypes/weight": -x["prototypes/weight"]}, "positive"),
    "shape": (lambda x: {**x, "prototypes/vectors": x["prototypes/vectors"][:, 1:]}, "must be"),
    "no weights": (lambda x: {n: t for n, t in x.items() if n != "prototypes/weight"}, "prototypes/weight is missing"),
    "no upload": (lambda x: {}, "is missing"),
    "strange row": (lambda x: {**x, "retrievals/row_id": x["retrievals/row_id"] + 10**6}, "was never in the bank"),
    "counts": (lambda x: {**x, "retrievals/count": -1 - x["retrievals/count"]}, "negative"),
    "no counts": (lambda x: {n: t for n, t in x.items() if n != "retrievals/count"}, "retrievals/count is missing"),
}


@pytest.mark.parametrize("name", EXTRA)
def test_a_bad_upload_to_the_bank_names_client_and_round(name: str, tmp_path: Path) -> None:
    change, message = EXTRA[name]
    lab = make_lab(tmp_path, "omnifm")
    lab.engine = Altered(lab.site, partial(alter, change=lambda r: replace(r, extra=change(dict(r.extra))), client="d"))
    with pytest.raises(FederationError, match=rf"client d, round 1: .*{message}"):
        lab.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {}, "client b: its mean spectrum is missing"),
        (lambda x: {"signature": x["signature"][1:]}, "client b: its mean spectrum is of another length"),
        (lambda x: {"signature": x["signature"] * NAN}, "client b: its mean spectrum is not finite"),
    ],
)
def test_a_bad_description_names_the_client(change: Callable[..., dict[str, Any]], message: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedavg", {"aggregation": "neighbours"})
    who = HOSPITALS[1].id
    lab.engine = Altered(lab.site, lambda r: replace(r, extra=change(r.extra)) if r.client == who else r)
    with pytest.raises(FederationError, match=message):
        lab.run()
