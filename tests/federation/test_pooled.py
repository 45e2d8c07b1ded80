from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omnifm.errors import FederationError
from omnifm.federation.effort import Effort
from omnifm.federation.pooled import JoinedSplit, order_of
from omnifm.seeds import generator
from omnifm.tasks.base import Batch, Inputs
from tests.support import HOSPITALS, MemorySplit, make_lab


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


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), st.integers(0, 40), st.integers(0, 9))
def test_equal_shares_are_equal_and_go_round(sizes: list[int], count: int, seed: int) -> None:
    """Whoever holds anything is drawn as often as any other to within one, and so is every example of his."""
    joined = JoinedSplit([make_split(0, n) for n in sizes])
    drawn = joined.in_equal_shares(count, generator(seed, "draw"))
    assert len(drawn) == count
    owner = [k for k, size in enumerate(sizes) for _ in range(size)]
    owners = Counter(owner[k] for k in drawn.tolist())
    shares = [owners[k] for k, size in enumerate(sizes) if size]
    assert sum(shares) == count and max(shares) - min(shares) <= 1
    examples = Counter(drawn.tolist())
    for part in {owner[k] for k in drawn.tolist()}:
        own = [examples[k] for k, whose in enumerate(owner) if whose == part]
        assert max(own) - min(own) <= 1
    if count > 20:
        assert not torch.equal(drawn, joined.in_equal_shares(count, generator(seed + 1, "draw"))) or sum(sizes) == 1


def test_only_a_number_of_steps_on_pooled_examples_is_shared_out() -> None:
    pooled, own = JoinedSplit([make_split(0, 30), make_split(30, 2)]), make_split(0, 32)
    steps, epoch = Effort(1, budget=16, steps=4), Effort(1, budget=16)
    for split, effort in ((pooled, epoch), (own, epoch), (own, steps)):
        found = order_of(split, effort, 4, generator(0, "draw"))
        assert torch.equal(found, torch.randperm(32, generator=generator(0, "draw"))[:16])
    assert int((order_of(pooled, steps, 4, generator(0, "draw")) >= 30).sum()) == 8


def test_with_local_steps_pooled_examples_come_from_all_clients_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do where every client takes as many steps as any other."""
    lab = make_lab(tmp_path, "centralised", federation__local_steps=6, federation__rounds=3)
    drawn: list[int] = []
    batch = JoinedSplit.batch

    def note(self: JoinedSplit, index: Tensor) -> Batch:
        ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)
        drawn.extend(torch.searchsorted(ends, index, right=True).tolist())
        return batch(self, index)

    monkeypatch.setattr(JoinedSplit, "batch", note)
    lab.run()
    counts = Counter(drawn)
    assert sum(counts.values()) == 3 * 6 * 4 * lab.config.optimiser.batch_size, "as many as four clients take in as many steps"
    assert len(counts) == len(HOSPITALS) and max(counts.values()) - min(counts.values()) <= 3
    assert len(set(lab.num_train.values())) > 1


def test_statistics_that_clients_keep_are_the_pools_own_where_data_are_pooled(tmp_path: Path) -> None:
    """The client `pooled` alone has trained; the real clients, who are scored, have none of their own."""
    averaged, kept = (
        make_lab(tmp_path / buffers, "centralised", model__norm="batch", model__buffers=buffers)
        for buffers in ("average", "local")
    )
    theirs, ours = averaged.evaluate(averaged.run()), kept.evaluate(kept.run())
    assert ours.views["personal"] == theirs.views["personal"]
    personal = [{client: views["personal"] for client, views in found.clients.items()} for found in (theirs, ours)]
    assert personal[0] == personal[1]
