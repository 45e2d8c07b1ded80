from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from omnifm.errors import ConfigError, FederationError
from omnifm.federation.messages import Reply
from omnifm.federation.strategies.fedproto import FedProto, FedProtoOptions
from omnifm.tasks.base import ClientData
from tests.support import CLASSES, HOSPITALS, Altered, Lab, MemorySplit, Spy, differing, make_lab, spy

PROTOTYPES, COUNTS, KNOWN = "fedproto/prototypes", "fedproto/counts", "fedproto/known"
NAN = float("nan")


def only(lab: Lab, client: str, *classes: int) -> ClientData:
    """A client's data without the training images of other classes."""
    data = lab.task.client_data(client)
    assert isinstance(data.train, MemorySplit)
    keep = torch.isin(data.train.labels, torch.tensor(classes))
    return replace(data, train=MemorySplit(data.train.images[keep], data.train.labels[keep]))


def test_two_rounds_agree_with_ones_written_by_hand(tmp_path: Path) -> None:
    """Plain torch, a lone client in full batches. Prototypes are of the model after training."""
    lam, lr, decay = 0.6, 0.1, 1e-4
    lab = make_lab(
        tmp_path / "1",
        "fedproto",
        {"lam": lam},
        hospitals=HOSPITALS[:1],
        optimiser__batch_size=10,
        optimiser__momentum=0.0,
        federation__local_epochs=2,
        federation__rounds=3,
    )
    model = make_lab(tmp_path / "2", "fedavg", hospitals=HOSPITALS[:1]).site.model
    parameters = dict(model.named_parameters())
    train = lab.task.client_data("a").train
    batch = train.batch(torch.arange(len(train)))
    prototypes: Tensor | None = None
    for _ in range(3):
        for _ in range(2):
            loss = functional.cross_entropy(model(batch.inputs).prediction, batch.target)
            if prototypes is not None:
                loss = loss + lam * functional.mse_loss(model.backbone(batch.inputs).tokens.mean(1), prototypes[batch.target])
            for p, g in zip(parameters.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
                p.data -= lr * (g + decay * p.data)
        f = model.backbone(batch.inputs).tokens.mean(1).detach()
        prototypes = torch.stack([f[batch.target == c].mean(0) for c in range(CLASSES)])
    server = lab.run()
    for name, p in parameters.items():
        torch.testing.assert_close(lab.private("a")[name], p.detach(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(server.extra[PROTOTYPES], prototypes, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_prototypes_are_means_by_class(weighting: str, tmp_path: Path) -> None:
    plain = make_lab(tmp_path / "0")
    data = {"a": only(plain, "a", 0), "b": only(plain, "b", 0, 1)}
    changes: dict[str, Any] = {"hospitals": HOSPITALS[:2], "data": data, "federation__weighting": weighting}
    lab = make_lab(tmp_path / "1", "fedproto", engine=Spy, federation__rounds=1, model__norm="batch", **changes)
    server = lab.run()
    first, second = (r.extra for r in spy(lab).trained())
    assert first[COUNTS].tolist() == [4, 0, 0] and second[COUNTS].tolist() == [2, 2, 0]
    parts = (4, 2) if weighting == "examples" else (1, 1)
    mean = (parts[0] * first[PROTOTYPES][0] + parts[1] * second[PROTOTYPES][0]) / sum(parts)
    torch.testing.assert_close(server.extra[PROTOTYPES][0], mean)
    torch.testing.assert_close(server.extra[PROTOTYPES][1], second[PROTOTYPES][1])
    assert server.extra[KNOWN].tolist() == [True, True, False] and not bool(server.extra[PROTOTYPES][2].any())
    # In evaluation mode: what the batch beside it looks like is no part of an image's feature.
    lab.site.model.load_state_dict(lab.private("b"))
    model, train = lab.site.model.eval(), data["b"].train
    alone = [model.backbone(train.batch(torch.tensor([i])).inputs).tokens.mean(1)[0].detach() for i in range(len(train))]
    ones = [f for f, label in zip(alone, train.batch(torch.arange(len(train))).target.tolist(), strict=True) if label == 1]
    torch.testing.assert_close(torch.stack(ones).mean(0), second[PROTOTYPES][1])


def test_a_class_that_a_rounds_clients_lack_keeps_its_prototype(tmp_path: Path) -> None:
    data = {"a": only(make_lab(tmp_path / "0"), "a", 0)}
    found: list[Tensor] = []
    lab = make_lab(tmp_path / "1", "fedproto", data=data, schedule=[["b"], ["a"]])
    lab.after_round = lambda lab, server, done: found.append(server.extra[PROTOTYPES].clone())
    assert bool(lab.run().extra[KNOWN].all())
    assert torch.equal(found[0][1:], found[1][1:]) and not torch.equal(found[0][0], found[1][0])


def test_a_class_without_prototype_adds_nothing(tmp_path: Path) -> None:
    """The first round knows class 0 alone; a client without it then trains as if alone."""
    plain = make_lab(tmp_path / "0")
    changes: dict[str, Any] = {
        "data": {"a": only(plain, "a", 0), "b": only(plain, "b", 1, 2)},
        "schedule": [["a"], ["b"]],
    }
    ours, local = (make_lab(tmp_path / s, s, **changes) for s in ("fedproto", "local"))
    ours.run()
    local.run()
    assert differing(ours.private("b"), local.private("b")) == []


@pytest.mark.parametrize("changes", [{}, {"federation__participation": 0.5, "model__norm": "batch"}])
def test_without_its_term_it_is_local_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    ours, local = make_lab(tmp_path / "1", "fedproto", {"lam": 0.0}, **changes), make_lab(tmp_path / "2", "local", **changes)
    ours.run()
    local.run()
    for h in HOSPITALS:
        assert differing(ours.private(h.id), local.private(h.id)) == []


def test_features_of_a_class_come_together(tmp_path: Path) -> None:
    def spread(lam: float) -> float:
        lab = make_lab(tmp_path / str(lam), "fedproto", {"lam": lam}, engine=Spy, federation__rounds=8)
        lab.run()
        means = torch.stack([r.extra[PROTOTYPES] for r in spy(lab).trained(7)])
        return float((means - means.mean(dim=0)).square().mean())

    assert spread(1.0) < 0.5 * spread(0.0)


def test_a_task_without_class_labels_is_refused(tmp_path: Path) -> None:
    context = make_lab(tmp_path).strategy.context
    with pytest.raises(ConfigError, match=r"^strategies\.fedproto: not defined for a task without class labels$"):
        FedProto(FedProtoOptions(), replace(context, label_count=0))


Extra = dict[str, Tensor]
BAD: dict[str, tuple[Callable[[Extra], Extra], str]] = {
    "nothing": (lambda x: {}, "are missing"),
    "no counts": (lambda x: {PROTOTYPES: x[PROTOTYPES]}, "are missing"),
    "another width": (lambda x: {**x, PROTOTYPES: x[PROTOTYPES][:, 1:]}, "have shape"),
    "too few classes": (lambda x: {**x, PROTOTYPES: x[PROTOTYPES][1:]}, "have shape"),
    "negative": (lambda x: {**x, COUNTS: x[COUNTS] - 100}, "one whole number for each class"),
    "no whole number": (lambda x: {**x, COUNTS: x[COUNTS] * 0.5}, "one whole number for each class"),
    "not finite": (lambda x: {**x, PROTOTYPES: x[PROTOTYPES] * NAN}, "is not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_prototypes_name_the_client(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    lab = make_lab(tmp_path, "fedproto")

    def alter(reply: Reply) -> Reply:
        return replace(reply, extra=change(dict(reply.extra))) if (reply.client, reply.round) == ("d", 1) else reply

    lab.engine = Altered(lab.site, alter)
    with pytest.raises(FederationError, match=f"client d, round 1: .*{message}"):
        lab.run()


def test_a_feature_that_is_not_finite_never_leaves(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedproto")
    forward = lab.site.model.backbone.forward

    def broken(inputs: Any) -> Any:
        features = forward(inputs)
        return features if lab.site.model.backbone.training else features._replace(tokens=features.tokens * NAN)

    lab.site.model.backbone.forward = broken  # type: ignore[method-assign]
    with pytest.raises(FederationError, match="client a, round 0: a feature is not finite"):
        lab.run()
