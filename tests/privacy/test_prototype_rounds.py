"""What a server may do to get more out of a budget of prototypes than it paid for, and what it gets."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("cryptography")
pytest.importorskip("dp_accounting")
pytest.importorskip("opacus")

from omnifm.errors import CheckpointError
from omnifm.federation.budgets import by_client
from omnifm.federation.messages import Reply, Request
from omnifm.federation.strategies.omnifm import OmniFM
from omnifm.privacy.accounting import Releases, epsilon_of_examples
from omnifm.spectral.compose import SpectralPath
from omnifm.spectral.lloyd import bound
from tests.privacy.test_prototype_budget import MEAN, UPLOAD, Kept, checked, private
from tests.support import Altered, MemorySplit, differing


def overflowing(path: SpectralPath, images: Tensor) -> Tensor:
    """Return a weight of the tokenizer with which the embedding of one of the images, and of no other, is not finite."""
    weight = torch.nn.init.zeros_(path.tokenizer.embed.weight)
    for scale in torch.logspace(19, 20, 200).tolist():
        torch.nn.init.constant_(weight[:, :1].detach(), scale)  # a sum over all frequencies of a patch may be near 0
        if int((~path.embed(images).isfinite()).any(dim=1).sum()) == 1:
            return weight.detach().clone()
    raise AssertionError("no weight parts the images")


def test_an_image_whose_embedding_overflows_stops_nothing_and_moves_the_sums_by_no_more_than_any(tmp_path: Path) -> None:
    """A server that makes such weights learned of one image through any noise: by the error, or by sums that are no numbers."""
    changes = {**MEAN, "strategies__omnifm__mixing": "identity", "optimiser__weight_decay": 0.0}
    lab, quiet = (private(tmp_path / str(noise), noise=noise, **changes) for noise in (1.0, 0.0))
    strategy, kept, path = quiet.site.strategy, Kept(quiet.config.privacy, 0), quiet.site.model.path
    assert isinstance(strategy, OmniFM) and isinstance(path, SpectralPath)
    job = quiet.site._job(Request("train", 0, "c", quiet.untrained), {})
    batch = job.data.train.batch(torch.arange(len(job.data.train)))
    path.eval()
    weight = overflowing(path, batch.image)
    finite = path.embed(batch.image).isfinite().all(dim=1)

    def sums(rows: Tensor) -> Tensor:
        data = replace(job.data, train=MemorySplit(batch.image[rows], batch.target[rows]))
        strategy._released(replace(job, data=data), path, kept)
        return kept.found

    moved = sums(torch.ones_like(finite)) - sums(finite)
    assert 0 < float(moved.norm()) <= bound(1.0) and int(moved.any(dim=1).sum()) == 1
    sent = {**lab.untrained, "path.tokenizer.embed.weight": weight}
    reply = lab.site.handle(Request("train", 0, "c", sent, {}, {"epochs": 1, "steps": 0, "keep": []}))
    assert set(reply.extra) == UPLOAD and all(bool(tensor.isfinite().all()) for tensor in reply.extra.values())


@pytest.mark.parametrize("releases", [1, 2])
def test_a_round_that_does_not_count_is_paid_for_too(releases: int, tmp_path: Path) -> None:
    """A client whose replies came late, or were refused, began again from the same centres every time: noise to be averaged."""
    left: list[set[str]] = []

    def spoil(reply: Reply) -> Reply:
        if (reply.kind, reply.client) != ("train", "a"):
            return reply
        left.append(set(reply.extra))
        return replace(reply, num_examples=0) if reply.round < 3 else reply

    facts = {"security__refused": "skip", "federation__rounds": 4, "privacy__prototype_releases": releases}
    lab = checked(private(tmp_path, engine=lambda site: Altered(site, spoil), **facts))
    lab.run()
    assert left == [UPLOAD] * releases + [set()] * (4 - releases)
    spectra = epsilon_of_examples(0.0, 1e-5, 0, 1.0, Releases(1.0, releases + 1))  # the mean spectrum is the one more
    assert by_client(lab.config, lab.num_train, lab.schedule, lab.strategy)["a"].prototypes == spectra


def test_a_round_that_is_done_again_is_the_same_release(tmp_path: Path) -> None:
    """After a crash of the server a run goes on bit for bit, and its client still has its one release."""
    lab = private(tmp_path, **MEAN)
    settings = {"epochs": 1, "steps": 0, "keep": []}
    once, again = (lab.site.handle(Request("train", 0, "a", lab.untrained, {}, settings)).extra for _ in range(2))
    assert set(once) == UPLOAD and not differing(once, again)
    for void in ([], [0]):
        assert not lab.site.handle(Request("train", 1, "a", lab.untrained, {}, {**settings, "void": void})).extra
    assert set(lab.site.handle(Request("train", 0, "b", lab.untrained, {}, settings)).extra) == UPLOAD


def test_a_release_that_cannot_be_noted_does_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise CheckpointError(f"{path}: cannot be written (No space left on device)")

    lab = private(tmp_path, **MEAN)
    monkeypatch.setattr("omnifm.federation.store.write_tensors", refuse)
    with pytest.raises(CheckpointError, match=r"a/released: cannot be written"):
        lab.site.handle(Request("train", 0, "a", lab.untrained, {}, {"epochs": 1, "steps": 0, "keep": []}))
