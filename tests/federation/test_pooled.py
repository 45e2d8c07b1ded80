from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omnifm.errors import FederationError
from omnifm.federation.pooled import JoinedSplit
from omnifm.tasks.base import Batch, Inputs
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
