from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omnifm.backbones.resnet import ResNet18Trunk
from omnifm.errors import ConfigError
from omnifm.federation.sharing import split_state
from omnifm.federation.strategies.fedbn import FedBN
from omnifm.tasks.base import Backbone, Features, Head, Inputs, Model, Reading
from tests.support import HOSPITALS, Hospital, Spy, differing, make_lab, spy

BATCH_NORM = {f"backbone.norm.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


class Block(nn.Module):
    """Its second norm is called as torchvision's ResNet calls it: no `bn` in the name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.bn1(self.conv1(x)) + self.downsample(x)
        return found


class Network(Backbone):
    token_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.abnormal = nn.Conv2d(1, 4, 1)  # `bn` in its name, and no norm
        self.layer = Block()
        self.group = nn.GroupNorm(2, 8)

    def forward(self, inputs: Inputs) -> Features:
        return Features(self.group(self.layer(self.abnormal(inputs.image))).flatten(2).transpose(1, 2))


class Sequence(Head):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, reading: Reading) -> Tensor:
        found: Tensor = self.linear(self.norm(reading.tokens.mean(1)))
        return found


class Pictures(Backbone):
    token_dim = 64

    def __init__(self) -> None:
        super().__init__()
        self.trunk = ResNet18Trunk(1, 8, 1, "batch")


def test_layers_are_chosen_by_type_and_not_by_name(tmp_path: Path) -> None:
    model = Model(Network(), Sequence())
    lab = make_lab(tmp_path, "fedbn")
    private = FedBN(lab.strategy.options, lab.strategy.context).private(model)
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norms = ("backbone.layer.bn1", "backbone.layer.downsample.1", "head.norm")
    assert private == {f"{norm}.{part}" for norm in norms for part in parts}
    assert {"backbone.abnormal.weight", "backbone.group.weight"} <= set(split_state(model, private, "average").shared)


def test_a_resnet_keeps_the_norms_of_its_shortcuts_too(tmp_path: Path) -> None:
    """torchvision's layout: ResNet-18 has 20 BatchNorms, three of them in shortcuts. All its buffers are theirs."""
    lab = make_lab(tmp_path, "fedbn")
    model = Model(Pictures(), Sequence())
    private = FedBN(lab.strategy.options, lab.strategy.context).private(model)
    assert len({n.rpartition(".")[0] for n in private if n.startswith("backbone")}) == 20
    assert sum(".downsample." in n for n in private) == 3 * 5
    assert {n for n, _ in model.named_buffers()} <= private


def test_no_tensor_of_batch_norm_is_sent_and_every_other_is(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedbn", engine=Spy)
    everything = set(lab.site.model.state_dict())
    lab.evaluate(lab.run(), finetune=True)
    assert everything > BATCH_NORM
    for message in spy(lab).messages():
        assert not BATCH_NORM & (message.tensors.keys() | message.extra.keys())
    assert all(set(reply.tensors) == everything - BATCH_NORM for reply in spy(lab).trained())


def test_every_client_has_a_batch_norm_of_its_own_that_goes_on_from_round_to_round(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedbn", federation__rounds=3)
    lab.run()
    own = {h.id: lab.private(h.id) for h in HOSPITALS}
    assert all(set(tensors) == BATCH_NORM for tensors in own.values())
    for name in BATCH_NORM - {"backbone.norm.num_batches_tracked"}:
        assert len({tuple(tensors[name].tolist()) for tensors in own.values()}) == len(HOSPITALS)
    counts = {client: int(tensors["backbone.norm.num_batches_tracked"]) for client, tensors in own.items()}
    assert counts == {h.id: 3 * -(-h.train // 4) for h in HOSPITALS}


def test_the_rest_is_fedavgs_mean(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedbn", engine=Spy, federation__rounds=2)
    final, replies = lab.run().shared, spy(lab).trained(1)
    for name, tensor in final.items():
        mean = sum(r.num_examples / 36 * r.tensors[name].double() for r in replies)
        torch.testing.assert_close(tensor.double(), mean, atol=1e-7, rtol=1e-6)


def test_with_one_client_it_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    ours, plain = (make_lab(tmp_path / s, s, hospitals=HOSPITALS[:1], model__norm="batch") for s in ("fedbn", "fedavg"))
    assert differing(ours.run().shared | ours.private("a"), plain.run().shared) == []


def test_with_equal_clients_it_is_fedavg(tmp_path: Path) -> None:
    """Equal data in full batches leave norms nothing to differ in but the order of a sum; unequal data do not."""
    twins = (Hospital("a", "CT", 9), Hospital("b", "CT", 9))
    data = make_lab(tmp_path, hospitals=twins).task.client_data("a")
    found: dict[str, dict[str, Tensor]] = {}
    for name, strategy, equal in (("ours", "fedbn", True), ("plain", "fedavg", True), ("unequal", "fedbn", False)):
        lab = make_lab(
            tmp_path / name,
            strategy,
            hospitals=twins,
            data={h.id: data for h in twins} if equal else None,
            optimiser__batch_size=9,
            model__norm="batch",
        )
        found[name] = lab.run().shared | lab.private("a")
    for tensor, value in found["ours"].items():
        torch.testing.assert_close(value, found["plain"][tensor], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(found["ours"]["backbone.conv.weight"], found["unequal"]["backbone.conv.weight"], atol=1e-4)


def test_a_model_without_batch_norm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model has no BatchNorm") as caught:
        make_lab(tmp_path, "fedbn", model__norm="group")
    assert "\n" not in str(caught.value)
