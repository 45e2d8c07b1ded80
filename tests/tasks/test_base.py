from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from omnifm.errors import FederationError
from omnifm.tasks.base import Backbone, Batch, ClientData, Features, Head, Inputs, JoinedSplit, Model, Reading
from tests.support import MemorySplit


def make_split(start: int, count: int) -> MemorySplit:
    numbers = torch.arange(start, start + count)
    return MemorySplit(numbers[:, None, None, None].float(), numbers)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_joined_splits_are_one_after_the_other(sizes: list[int], data: st.DataObject) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    joined = JoinedSplit([make_split(s, n) for s, n in zip(starts, sizes, strict=True)])
    total = sum(sizes)
    assert len(joined) == total
    if total:
        index = data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=8))
        batch = joined.batch(torch.tensor(index))
        assert batch.target.tolist() == index and batch.image.flatten().tolist() == index
        # A row is a row of its own client's cohort.
        owner = [max(i for i, s in enumerate(starts) if s <= k and sizes[i]) for k in index]
        assert batch.row.tolist() == [k - starts[o] for k, o in zip(index, owner, strict=True)]


def test_a_client_has_three_splits_by_name() -> None:
    data = ClientData(make_split(0, 3), make_split(0, 2), make_split(0, 1))
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [3, 2, 1]
    with pytest.raises(KeyError):
        data.split("validation")


@dataclass(frozen=True)
class RichSplit:
    """Examples with further inputs, for one network of several."""

    images: Tensor
    side: Mapping[str, Tensor] = field(default_factory=dict)
    route: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor) -> Batch:
        return Batch(self.images[index], index, index, {n: t[index] for n, t in self.side.items()}, self.route)


def test_further_inputs_are_joined_with_their_images() -> None:
    parts = [RichSplit(torch.full((n, 1, 2, 2), n), {"question": torch.arange(n) + 10 * n}, "vqa") for n in (2, 3)]
    batch = JoinedSplit(parts).batch(torch.tensor([4, 0, 2]))
    assert batch.side["question"].tolist() == [32, 20, 30] and batch.image[:, 0, 0, 0].tolist() == [3, 2, 3]
    assert batch.route == "vqa" and batch.inputs == Inputs(batch.image, batch.side, "vqa")


def test_what_cannot_be_one_batch_is_refused() -> None:
    small, large = RichSplit(torch.zeros(2, 1, 2, 2)), RichSplit(torch.zeros(2, 1, 4, 4))
    with pytest.raises(FederationError, match="cannot be pooled"):
        JoinedSplit([small, large]).batch(torch.tensor([0, 2]))
    other = RichSplit(torch.zeros(2, 1, 2, 2), route="x4")
    with pytest.raises(FederationError, match="different networks"):
        JoinedSplit([small, other]).batch(torch.tensor([0, 2]))
    asked = RichSplit(torch.zeros(2, 1, 2, 2), {"question": torch.zeros(2)})
    with pytest.raises(FederationError, match="cannot be pooled"):
        JoinedSplit([asked, small]).batch(torch.tensor([0, 2]))


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
