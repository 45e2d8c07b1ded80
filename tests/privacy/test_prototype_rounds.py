"""What a server may do to get more out of a budget of prototypes than it paid for, and what it gets."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("cryptography")
pytest.importorskip("dp_accounting")
pytest.importorskip("opacus")

from omnifm.federation.messages import Request
from omnifm.federation.strategies.omnifm import OmniFM
from omnifm.spectral.compose import SpectralPath
from omnifm.spectral.lloyd import bound
from tests.privacy.test_prototype_budget import MEAN, UPLOAD, Kept, private
from tests.support import MemorySplit


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
