import pytest
import torch
from torch import Tensor, nn

from omnifm.tasks.base import Backbone, Batch, ClientData, Features, Head, Inputs, Model, Reading
from tests.support import MemorySplit


def make_split(start: int, count: int) -> MemorySplit:
    numbers = torch.arange(start, start + count)
    return MemorySplit(numbers[:, None, None, None].float(), numbers)


def test_a_client_has_three_splits_by_name() -> None:
    data = ClientData(make_split(0, 3), make_split(0, 2), make_split(0, 1))
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [3, 2, 1]
    with pytest.raises(KeyError):
        data.split("validation")


def test_a_batch_takes_the_layout_it_is_asked_for() -> None:
    batch = Batch(torch.rand(2, 3, 4, 4), torch.zeros(2), torch.zeros(2)).to(torch.device("cpu"), torch.channels_last)
    assert batch.image.is_contiguous(memory_format=torch.channels_last) and not batch.image.is_contiguous()


class Echo(Backbone):
    token_dim = 2

    def forward(self, inputs: Inputs) -> Features:
        return Features(inputs.image.flatten(2).transpose(1, 2), context="skip")


class Sum(Head):
    def forward(self, reading: Reading) -> Tensor:
        assert reading.features.context == "skip" and reading.inputs.route == "here"
        assert torch.equal(reading.content, reading.tokens[:, 1 : 1 + reading.features.tokens.shape[1]]) or (
            reading.content is reading.features.tokens
        )
        return reading.tokens.sum(dim=(1, 2))


class Double(nn.Module):
    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, str]:
        assert image.ndim == 4
        return torch.cat([tokens[:, :1], 2 * tokens], dim=1), "trace"

    def content(self, tokens: Tensor, length: int) -> Tensor:
        return tokens[:, 1 : 1 + length]


def test_a_path_stands_between_backbone_and_head_and_may_be_absent() -> None:
    model, x = Model(Echo(), Sum()), torch.rand(3, 2, 4, 4)
    plain = model(Inputs(x, route="here"))
    torch.testing.assert_close(plain.prediction, x.sum(dim=(1, 2, 3)))
    assert plain.trace is None and not model.state_dict()
    model.path = Double()
    doubled = model(Inputs(x, route="here"))
    torch.testing.assert_close(doubled.prediction, 2 * plain.prediction + x[:, :, 0, 0].sum(1))
    assert doubled.trace == "trace"
