"""Where two methods must be one: special cases that have a known answer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnifm import seeds
from omnifm.federation.messages import Reply
from omnifm.tasks.base import Inputs
from tests.support import (
    HOSPITALS,
    NEIGHBOURS,
    Altered,
    Hospital,
    Lab,
    Spy,
    differing,
    make_lab,
    spy,
)

ALL_OFF = {"gskr": False, "eca": False, "psp": False, "spalign": False, "head": "shared", "aggregation": "mean"}
ONE = HOSPITALS[:1]


def final(lab: Lab) -> dict[str, Tensor]:
    return lab.snapshot(lab.run())


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a and a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"federation__participation": 0.5, "model__norm": "batch", "data__augment": "flip_shift"}]
)
def test_omnifm_with_everything_off_is_fedavg_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    ours = make_lab(tmp_path / "1", "omnifm", ALL_OFF, engine=Spy, **changes)
    plain = make_lab(tmp_path / "2", "fedavg", engine=Spy, **changes)
    assert differing(final(ours), final(plain)) == []
    assert [r.extra for r in spy(ours).replies] == [r.extra for r in spy(plain).replies]
    assert [e["loss"] for e in ours.events if "loss" in e] == [e["loss"] for e in plain.events if "loss" in e]


def test_omnifm_with_everything_off_and_a_private_head_is_fedper(tmp_path: Path) -> None:
    ours = make_lab(tmp_path / "1", "omnifm", {**ALL_OFF, "head": "private"})
    assert differing(final(ours), final(make_lab(tmp_path / "2", "fedper"))) == []


@pytest.mark.parametrize("strategy", ["fedavg", "fedper"])
def test_one_neighbourhood_is_the_mean_of_all(strategy: str, tmp_path: Path) -> None:
    near = make_lab(tmp_path / "1", strategy, {**NEIGHBOURS, "max_neighbourhoods": 1})
    plain = make_lab(tmp_path / "2", strategy)
    first, second = near.run(), plain.run()
    assert differing(first.shared, second.shared) == []
    for h in HOSPITALS:
        assert differing(dict(near.strategy.shared_for(first, h.id)), second.shared) == []


def test_fedprox_without_its_term_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    first = final(make_lab(tmp_path / "1", "fedprox", {"mu": 0.0}))
    assert differing(first, final(make_lab(tmp_path / "2", "fedavg"))) == []


def test_fedper_with_equal_data_is_fedavg_on_the_backbone(tmp_path: Path) -> None:
    """Equal heads and equal data in full batches leave nothing for personal heads to differ in but the order of a sum."""
    twins = (Hospital("a", "CT", 9), Hospital("b", "CT", 9), Hospital("c", "CT", 9))
    data = make_lab(tmp_path, hospitals=twins).task.client_data("a")
    changes: dict[str, Any] = {
        "hospitals": twins,
        "data": {h.id: data for h in twins},
        "optimiser__batch_size": 9,
        "federation__rounds": 3,
    }
    per = make_lab(tmp_path / "1", "fedper", **changes)
    average = make_lab(tmp_path / "2", "fedavg", **changes)
    phi, theta = per.run().shared, average.run().shared
    close(phi, {n: theta[n] for n in phi})
    close(per.private("a"), {n: t for n, t in theta.items() if n not in phi})
    # On other data it is not: the test above can tell.
    mixed = {k: v for k, v in changes.items() if k != "data"}
    other = make_lab(tmp_path / "3", "fedper", **mixed).run().shared
    with pytest.raises(AssertionError):
        close(phi, other)


@pytest.mark.parametrize("strategy", ["local", "fedper"])
def test_with_one_client_what_is_private_makes_no_difference(strategy: str, tmp_path: Path) -> None:
    lab, plain = (make_lab(tmp_path / s, s, hospitals=ONE, federation__rounds=3) for s in (strategy, "fedavg"))
    assert differing(lab.run().shared | lab.private("a"), plain.run().shared) == []


def test_centralised_with_one_client_is_fedavg_with_one_client(tmp_path: Path) -> None:
    """Its examples come in an order of their own; in full batches nothing but the order of a sum is left of that."""
    labs = [
        make_lab(tmp_path / s, s, hospitals=ONE, optimiser__batch_size=10, federation__rounds=3)
        for s in ("centralised", "fedavg")
    ]
    close(*(lab.run().shared for lab in labs))


def test_centralised_with_full_batches_is_gradient_descent_on_the_union(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "centralised", optimiser__batch_size=99, optimiser__momentum=0.0, federation__rounds=3)
    model = make_lab(tmp_path, "fedavg").site.model
    splits = [lab.task.client_data(h.id).train for h in HOSPITALS]
    batches = [s.batch(torch.arange(len(s))) for s in splits]
    images, labels = (torch.cat([getattr(b, f) for b in batches]) for f in ("image", "target"))
    for _ in range(3):
        parameters = list(model.parameters())
        loss = torch.nn.functional.cross_entropy(model(Inputs(images)).prediction, labels)
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= 0.1 * (g + 1e-4 * p.data)
    close(lab.run().shared, dict(model.state_dict()))


def test_local_sends_nothing_at_all(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "local", engine=Spy)
    lab.run()
    assert all(not m.tensors and not m.extra for m in spy(lab).messages())
    sent = [(e["bytes_up"], e["bytes_down"]) for e in lab.events if e["event"] == "client"]
    assert sent == [({}, {})] * 8


def test_local_is_each_client_alone(tmp_path: Path) -> None:
    together = make_lab(tmp_path / "all", "local")
    together.run()
    for h in HOSPITALS:
        alone = make_lab(tmp_path / h.id, "local", hospitals=(h,))
        alone.run()
        assert differing(alone.private(h.id), together.private(h.id)) == []


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedper", "omnifm"])
def test_a_server_step_moves_that_part_of_the_way(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, {"server_step": 0.3, "aggregation": "mean"}, engine=Spy, federation__rounds=1)
    old, new = lab.start().shared, lab.run().shared
    replies = spy(lab).trained()
    total = sum(r.num_examples for r in replies)
    for name, start in old.items():
        mean = sum(r.num_examples / total * r.tensors[name].double() for r in replies)
        torch.testing.assert_close(new[name].double(), start.double() + 0.3 * (mean - start.double()), atol=1e-6, rtol=1e-5)


def test_fedavg_is_the_mean_by_examples(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, engine=Spy, federation__rounds=1)
    new, replies = lab.run().shared, spy(lab).trained()
    assert [r.num_examples for r in replies] == [h.train for h in HOSPITALS]
    for name, tensor in new.items():
        mean = sum(r.num_examples * r.tensors[name].double() for r in replies) / 36
        torch.testing.assert_close(tensor.double(), mean, atol=1e-7, rtol=1e-6)


def test_equal_weighting_is_the_plain_mean(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, engine=Spy, federation__rounds=1, federation__weighting="equal")
    new, replies = lab.run().shared, spy(lab).trained()
    assert len({r.num_examples for r in replies}) > 1
    for name, tensor in new.items():
        mean = sum(r.tensors[name].double() for r in replies) / len(replies)
        torch.testing.assert_close(tensor.double(), mean, atol=1e-7, rtol=1e-6)


def test_a_client_counts_by_its_examples_and_not_by_its_batches(tmp_path: Path) -> None:
    """Thrice the weight is thrice the client."""

    def heavier(reply: Reply) -> Reply:
        return replace(reply, num_examples=3 * reply.num_examples) if reply.client == "a" else reply

    lab = make_lab(tmp_path / "1", engine=lambda site: Altered(site, heavier), federation__rounds=1)
    copies = (*HOSPITALS, Hospital("a2", "CT", 10), Hospital("a3", "CT", 10))
    plain = make_lab(tmp_path / "2", hospitals=copies, engine=Spy, federation__rounds=1)
    first = next(r for r in make_round(plain) if r.client == "a")
    plain.engine = Altered(plain.site, lambda r: replace(r, tensors=first.tensors) if r.client.startswith("a") else r)
    close(lab.run().shared, plain.run().shared)


def make_round(lab: Lab) -> list[Reply]:
    lab.run()
    return spy(lab).trained()


def test_one_round_of_one_step_everywhere_is_one_step_on_the_union(tmp_path: Path) -> None:
    """FedAvg with one full-batch step per client is gradient descent with the mean gradient."""
    changes: dict[str, Any] = {"optimiser__batch_size": 99, "federation__rounds": 2, "optimiser__momentum": 0.0}
    close(*(make_lab(tmp_path / s, s, **changes).run().shared for s in ("fedavg", "centralised")))


def test_the_batches_of_a_round_do_not_depend_on_who_else_takes_part(tmp_path: Path) -> None:
    few = make_lab(tmp_path / "1", engine=Spy, schedule=[["c"]], federation__rounds=1)
    many = make_lab(tmp_path / "2", engine=Spy, federation__rounds=1)
    few.run()
    many.run()
    alone, among = spy(few).trained()[0], spy(many).trained()[2]
    assert alone.client == among.client == "c"
    assert differing(dict(alone.tensors), dict(among.tensors)) == []
    assert seeds.derive(0, "batches", 0, "c", 0) != seeds.derive(0, "batches", 1, "c", 0)
