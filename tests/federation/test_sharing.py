from functools import partial

import pytest
import torch
from torch import nn

from omnifm.backbones.resnet import ResNet18Trunk
from omnifm.errors import ConfigError, FederationError
from omnifm.federation.sharing import (
    BATCH_NORMS,
    NORMS,
    names_of_type,
    names_under,
    read,
    settle,
    split_state,
    still_statistics,
    write,
)


def resnet(norm: str = "batch") -> ResNet18Trunk:
    return ResNet18Trunk(channels=1, width=8, stem_stride=2, norm=norm)


class Net(nn.Module):
    """Norms under names that say nothing, a frozen part and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_like = nn.Conv2d(2, 2, 1)
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Linear(2, 3).requires_grad_(False)
        self.register_buffer("amplitude", torch.ones(2))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)


def test_every_batch_norm_of_resnet_18_is_found_downsampling_too() -> None:
    net = resnet()
    found = names_of_type(net, BATCH_NORMS, "BatchNorm")
    # 20 layers (stem, 8 blocks of 2, 3 in the shortcuts), 5 tensors each.
    assert len(found) == 100
    expected = {n.rpartition(".")[0] for n in net.state_dict() if n.endswith("running_mean")}
    assert {n.rpartition(".")[0] for n in found} == expected and len(expected) == 20
    assert sum("downsample" in n for n in found) == 15
    # What choosing by a piece of the name finds is fewer.
    assert len([n for n in net.state_dict() if "bn" in n]) < 100


def test_names_are_whole_from_the_model_that_is_asked() -> None:
    outer = nn.ModuleDict({"a": nn.ModuleDict({"b": resnet()})})
    found = names_of_type(outer, BATCH_NORMS, "BatchNorm")
    assert len(found) == 100 and found <= outer.state_dict().keys() and all(n.startswith("a.b.") for n in found)


def test_types_count_and_names_do_not() -> None:
    assert names_of_type(Net(), BATCH_NORMS, "BatchNorm") == {f"inner.1.{n}" for n in nn.BatchNorm1d(2).state_dict()}
    both = names_of_type(Net(), NORMS, "norms")
    assert {n.partition(".")[0] for n in both} == {"inner", "norm"}


def test_a_rule_that_selects_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="a sharing rule selects nothing: the model has no BatchNorm"):
        names_of_type(resnet("group"), BATCH_NORMS, "BatchNorm")
    net = Net()
    with pytest.raises(ConfigError, match="selects nothing"):
        names_under(net, nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="selects nothing"):
        names_under(nn.Sequential(nn.ReLU()), nn.ReLU())


def test_norms_without_tensors_are_passed_over() -> None:
    net = nn.Sequential(nn.LayerNorm(2, elementwise_affine=False), nn.LayerNorm(2))
    assert names_of_type(net, NORMS, "norms") == {"1.weight", "1.bias"}


def test_names_under_a_part_are_that_part() -> None:
    net = Net()
    assert names_under(net, net.inner[0]) == {"inner.0.weight", "inner.0.bias"}
    assert names_under(net, net) == net.state_dict().keys()


BUFFERS = {"inner.1.running_mean", "inner.1.running_var", "inner.1.num_batches_tracked", "amplitude"}


@pytest.mark.parametrize(("policy", "place"), [("average", "shared"), ("local", "private"), ("drop", "dropped")])
def test_the_state_is_split_without_rest(policy: str, place: str) -> None:
    net = Net()
    split = split_state(net, {"inner.0.weight"}, policy)
    parts = {"shared": split.shared, "private": split.private, "frozen": split.frozen, "dropped": split.dropped}
    assert sorted(n for names in parts.values() for n in names) == sorted(net.state_dict())
    assert set(split.frozen) == {"frozen.weight", "frozen.bias"} and set(parts[place]) >= BUFFERS
    assert set(split.private) == {"inner.0.weight"} | (BUFFERS if policy == "local" else set())
    assert "unsaved" not in [n for names in parts.values() for n in names]


@pytest.mark.parametrize("policy", ["average", "local", "drop"])
def test_what_is_private_stays_so_whatever_the_policy(policy: str) -> None:
    assert {"amplitude", "frozen.bias"} <= set(split_state(Net(), {"amplitude", "frozen.bias"}, policy).private)


def test_a_private_name_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"private tensors that the model does not have: inner\.9"):
        split_state(Net(), {"inner.9"}, "average")


def test_tensors_are_copied_in_and_out() -> None:
    net = Net()
    found = read(net, ["inner.0.weight", "amplitude"])
    found["inner.0.weight"] += 1
    assert not torch.equal(found["inner.0.weight"], net.state_dict()["inner.0.weight"])
    write(net, found)
    assert torch.equal(found["inner.0.weight"], net.state_dict()["inner.0.weight"])
    found["inner.0.weight"] += 1
    assert not torch.equal(found["inner.0.weight"], net.state_dict()["inner.0.weight"])
    assert net.inner[0].weight.requires_grad


def test_channels_last_weights_are_read_in_the_usual_layout() -> None:
    net = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    weight = read(net, ["weight"])["weight"]
    assert weight.is_contiguous() and torch.equal(weight, net.weight)


def test_tensors_that_do_not_fit_are_named() -> None:
    with pytest.raises(FederationError, match="tensor zz is not in the model"):
        write(Net(), {"zz": torch.ones(1)})
    with pytest.raises(FederationError, match=r"tensor amplitude has shape \(3,\), the model wants \(2,\)"):
        write(Net(), {"amplitude": torch.ones(3)})


def test_dropped_statistics_are_the_mean_over_what_passes_and_all_else_stays() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Dropout()).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batches = [torch.randn(4, 2, 3, 3) + shift for shift in (0, 1, 5)]
    dropped = {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    settle(model, dropped, "c", (partial(model, batch) for batch in batches))
    state = model.state_dict()
    torch.testing.assert_close(state["0.running_mean"], torch.stack([b.mean(dim=(0, 2, 3)) for b in batches]).mean(0))
    torch.testing.assert_close(state["0.running_var"], torch.stack([b.var(dim=(0, 2, 3)) for b in batches]).mean(0))
    assert all(torch.equal(before[n], t) for n, t in state.items() if n not in dropped)
    assert not any(module.training for module in model.modules())
    assert [module.momentum for module in model if isinstance(module, nn.BatchNorm2d)] == [0.1, 0.1]


def test_where_nothing_was_dropped_nothing_passes() -> None:
    settle(nn.BatchNorm2d(2), (), "c", (pytest.fail for _ in range(1)))
    with pytest.raises(FederationError, match=r"client c: .*two training images"):
        settle(nn.Sequential(nn.BatchNorm2d(2)), {"0.running_mean"}, "c", ())


@pytest.mark.parametrize("training", [True, False])
def test_still_statistics_stay_and_the_answer_is_what_it_would_be(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.InstanceNorm2d(3)).train(training)
    x = torch.randn(4, 1, 8, 8)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with still_statistics(model):
        found = model(x)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    torch.testing.assert_close(found, model(x))
    assert any(not torch.equal(before[n], t) for n, t in model.state_dict().items()) == training, "afterwards they move again"
