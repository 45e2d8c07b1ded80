"""Fusion: one picture from two registered ones, learned without an example of what is right.

A network sees the luminance of the anatomical picture (MRI) and of the other (CT, PET, SPECT). It is trained on windows and
applied to whole pictures; colour is put back for people. Scores are those of `omnifm.metrics.fusion`.

Main score: `vif`, the mean over both sources, on luminance 0..255, because the paper reports it. It has two weak sides: it
rewards contrast beyond the sources', and a copy of one source beats every fusion (1 from that source). So rows that need no
training stand next to it in every table, copies of the sources among them, and `vif_least`, `qabf`, `ssim` and `scd` are to be
read with it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from omnifm.backbones.build import load_weights
from omnifm.backbones.maps import MOST_TOKENS, add_back, to_tokens
from omnifm.backbones.u2fusion import U2FusionDecoder, U2FusionEncoder
from omnifm.backbones.vgg import VggInput, load_vgg16
from omnifm.config import Real
from omnifm.data.cache import to_planes, to_slices
from omnifm.data.orient import lying_as
from omnifm.data.pairs import ImagePairs, load_pairs, to_rgb, to_ycbcr
from omnifm.data.readers import Image
from omnifm.data.resample import resize
from omnifm.errors import ConfigError, DataError
from omnifm.metrics.base import Metric
from omnifm.metrics.fusion import FusionMetric, pair_scores
from omnifm.metrics.fusion_scores import VIF_LEAST_SIDE
from omnifm.tasks.base import (
    Answer,
    Backbone,
    Batch,
    ClientData,
    Features,
    Head,
    Inputs,
    Model,
    Picture,
    Pixels,
    Reading,
    Task,
    TaskData,
    TaskOptions,
)
from omnifm.tasks.cases import case_rows, cohort_of, on_grid, slice_size, slices_of
from omnifm.tasks.fusion_loss import FusionLoss, Intensity, at_vgg_size, gaussian_pyramid

log = logging.getLogger(__name__)

_PUBLISHED_C = 3200.0
# Standardised input is 58 times smaller than grey levels, so squares of what VGG makes of it are this much smaller.
_DEFAULT_C = {"caffe": _PUBLISHED_C, "imagenet": _PUBLISHED_C / (0.225 * 255) ** 2}
_PYRAMID_C = 200.0
_AT_ONCE = 4


class FusionOptions(TaskOptions):
    """The table `[tasks.fusion]`."""

    lam: Real = Field(20.0, ge=0.0, description="Weight of the intensity term against 1 - SSIM.")
    c: Real | None = Field(
        None,
        gt=0.0,
        description="Scale of differences of information; null: 3200 (VGG, caffe), .97 (VGG, imagenet), 200 (pyramid).",
    )
    intensity: Intensity = Field(
        "sources", description="`sources`: near both, by information (the paper); `maximum`: near the brighter source."
    )
    gradient: Real = Field(0.0, ge=0.0, description="Weight of a term for the stronger source's gradients; the paper has none.")
    patch: int = Field(64, ge=VIF_LEAST_SIDE, description="Side of the windows that are trained on, pixels; needs data.augment.")
    vgg: str = Field(
        "", description="safetensors file with VGG-16's `features.*`; empty: a Gaussian pyramid measures information."
    )
    vgg_input: VggInput = Field("caffe", description="What those weights were trained on: grey levels BGR, or standardised RGB.")


@dataclass(frozen=True)
class PairSplit:
    """Pairs of some manifest rows, read from the memory maps when asked for.

    Attributes:
        pairs: of the cohort.
        places: positions in `pairs`.
        kind: number of the cohort, for the captions of pictures.
    """

    pairs: ImagePairs
    places: npt.NDArray[np.int64]
    kind: int

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, index: Tensor) -> Batch:
        """Return the pairs at `index`: `image` and `target` are both luminances; `side` has the other's colour and the kind."""
        places = self.places[index.numpy()]
        luminance, chroma = (torch.from_numpy(planes) for planes in self.pairs.read(places))
        side = {"chroma": chroma, "kind": torch.full((len(places),), self.kind)}
        return Batch(luminance, luminance, torch.from_numpy(self.pairs.row[places]), side)


class FusionBackbone(Backbone):
    """U2Fusion's encoder. The context is its map `(b, d, h, w)` and the tokens' grid.

    In training it looks at the windows that `side["window"]` names and gives tokens of the size that those of a whole
    picture have: what stands between tokens and head then meets the same kind of token in training and in use.

    Args:
        width: n of the encoder.
        size: side of whole pictures.
        patch: side of windows.
    """

    def __init__(self, width: int, size: int, patch: int) -> None:
        super().__init__()
        self.trunk = U2FusionEncoder(width)
        self.token_dim = self.trunk.token_dim
        self._size, self._patch = size, patch

    def forward(self, inputs: Inputs) -> Features:
        """Return tokens `(b, l, d)`, l at most 256."""
        seen = inputs.image
        if "window" in inputs.side:
            seen = cut(seen, inputs.side["window"], self._patch)
        found = self.trunk(seen)
        share = seen.shape[2] * seen.shape[3] / self._size**2
        tokens, grid = to_tokens(found, max(1, min(MOST_TOKENS, round(share * MOST_TOKENS))))
        return Features(tokens, (found, grid))


class FusionHead(Head):
    """U2Fusion's decoder of the encoder's map, plus what happened to its tokens. Its last two convolutions are a client's own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.decoder = U2FusionDecoder(channels)

    def forward(self, reading: Reading) -> Tensor:
        """Return fused luminance `(b, 1, h, w)` in (0, 1)."""
        found, grid = reading.features.context
        if reading.content is not reading.features.tokens:
            found = add_back(found, reading.content - reading.features.tokens, grid)
        fused: Tensor = self.decoder(found)
        return fused

    @property
    def own(self) -> torch.nn.Module:
        """The decoder's last two convolutions."""
        return self.decoder.tail


def cut(image: Tensor, window: Tensor, side: int) -> Tensor:
    """Return the windows of `image` `(b, c, h, w)` whose upper left corners are `window` `(b, 2)`: `(b, c, side, side)`."""
    step = torch.arange(side, device=image.device)
    rows, columns = window[:, :1] + step, window[:, 1:] + step
    place = torch.arange(len(image), device=image.device)[:, None, None]
    # Advanced indices around the channel slice put it last.
    return image[place, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Fusion(Task):
    """One picture from two."""

    name: ClassVar[str] = "fusion"
    reads: ClassVar[frozenset[str]] = frozenset({"fusion"})
    apart: ClassVar[bool] = True
    Options: ClassVar[type[TaskOptions]] = FusionOptions
    options: FusionOptions
    primary = "vif"
    headline = ("vif", "vif_least", "ssim", "qabf", "scd", "mi")
    one_label_space = True

    def __init__(self, data: TaskData, options: FusionOptions) -> None:
        super().__init__(data, options)
        config = data.config
        self._size = config.data.image_size
        if self._size < VIF_LEAST_SIDE:
            raise ConfigError(f"data.image_size = {self._size}: VIF over four scales needs at least {VIF_LEAST_SIDE} pixels")
        if config.model.width % 2:
            raise ConfigError(
                f"model.width = {config.model.width}: fusion needs an even number (tokens have 6 times as many channels)"
            )
        self._patch = min(options.patch, self._size)
        self._pairs = {name: load_pairs(cohort, self._size, data.cache) for name, cohort in data.local.items()}
        self._kinds = sorted(data.cohorts)
        self._loss, self.notes = make_loss(options)
        for note in self.notes:
            log.info("fusion: %s", note)

    def client_data(self, client: str) -> ClientData:
        """Return a client's splits."""
        plan = self.data.plan(client)
        return ClientData(*(self._split(plan.cohort, rows) for rows in (plan.train, plan.val, plan.test)))

    def _split(self, cohort: str, rows: Sequence[int]) -> PairSplit:
        pairs = self._pairs[cohort]
        return PairSplit(pairs, slices_of(pairs.row, rows), self._kinds.index(cohort))

    def backbone(self) -> Backbone:
        """Return U2Fusion's encoder, `model.width` channels per convolution."""
        net = FusionBackbone(self.data.config.model.width, self._size, self._patch)
        if self.data.config.model.weights:
            load_weights(net.trunk, Path(self.data.config.model.weights))
        return net

    def head(self, token_dim: int) -> Head:
        """Return U2Fusion's decoder."""
        return FusionHead(token_dim)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Mirror each pair left to right with probability 1/2 and draw one window of it; `image` stays whole."""
        b, _, h, w = batch.image.shape
        mirrored = torch.rand(b, generator=generator) < 0.5
        image = torch.where(mirrored.view(-1, 1, 1, 1), batch.image.flip(3), batch.image)
        corners = [torch.randint(0, side - self._patch + 1, (b,), generator=generator) for side in (h, w)]
        window = torch.stack(corners, dim=1)
        return batch._replace(image=image, target=cut(image, window, self._patch), side={"window": window})

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """U2Fusion's."""
        return self._loss(prediction, batch.target)

    def predict(self, model: Model, batch: Batch) -> Tensor:
        """Fuse whole pictures, a few at a time: the network keeps its full resolution, hundreds of MB a picture at n = 44."""
        pieces = [slice(start, start + _AT_ONCE) for start in range(0, len(batch.image), _AT_ONCE)]
        inputs = [Inputs(batch.image[piece], {n: t[piece] for n, t in batch.side.items()}, batch.route) for piece in pieces]
        return torch.cat([model(part).prediction for part in inputs])

    def metric(self, client: str | None = None) -> Metric:
        """Return the scores of fused pictures."""
        del client
        return FusionMetric()

    def references(self, client: str) -> Mapping[str, Callable[[Batch], Tensor]]:
        """Return what needs no training: the mean and the pixel-wise maximum of both sources, and either as it is."""
        del client
        copies = {name: partial(copy_of, place) for place, name in enumerate(("anatomical", "other"))}
        return {"mean": mean_fusion, "maximum": maximum_fusion, **copies}

    def probes(self) -> Sequence[Inputs]:
        """Return two whole pictures, and two windows."""
        image = torch.zeros(2, 2, self._size, self._size)
        return [Inputs(image), Inputs(image, {"window": torch.zeros(2, 2, dtype=torch.int64)})]

    def picture(self, prediction: Tensor, batch: Batch, index: int) -> Picture:
        """Show both sources and the fused picture, in the other's colours where it has some, and say what is kept of them."""
        name = self._kinds[int(batch.side["kind"][index])]
        other_name, _, anatomical_name = (self.data.cohorts[name].spec.modality or "other-anatomical").partition("-")
        anatomical, other = batch.target[index].float().numpy()
        fused = prediction[index, 0].float().numpy()
        colour = batch.side["chroma"][index].numpy()
        found, simple = (
            pair_scores(*(255.0 * p.astype(np.float64) for p in (anatomical, other, f)))
            for f in (fused, np.maximum(anatomical, other))
        )
        panels = (
            (anatomical_name, _shown(anatomical)),
            (other_name, _shown(other, colour)),
            ("fused", _shown(fused, colour)),
        )
        words = ", ".join(f"{label} {found[key]:.3f}" for label, key in (("VIF", "vif"), ("Qabf", "qabf"), ("SSIM", "ssim")))
        return Picture(panels, prediction=f"{words} (pixel-wise maximum: VIF {simple['vif']:.3f})")

    def examples(self, images: Sequence[Image], question: str, client: str) -> Batch:
        """Return the slices of a registered pair, the anatomical image first."""
        if question or len(images) != 2:
            raise ConfigError("task fusion reads two images a case and no question: name the second image with --with")
        cohort = cohort_of(self.data, client)
        axis = cohort.spec.slice_axis
        try:
            pair = (images[0], lying_as(images[1], images[0]))
        except DataError as error:
            raise DataError(f"its second image: {error}") from error
        anatomical, other = (to_slices(image, self._size, c, axis) for image, c in zip(pair, (1, 3), strict=True))
        coloured = to_ycbcr(other)
        luminance = torch.from_numpy(np.concatenate([anatomical, coloured[:, :1]], axis=1))
        side = {"chroma": torch.from_numpy(coloured[:, 1:]), "kind": torch.full((len(other),), self._kinds.index(cohort.name))}
        return Batch(luminance, luminance, case_rows(len(other)), side)

    def answer(self, prediction: Tensor, batch: Batch, images: Sequence[Image], client: str) -> Answer:
        """Return the fused slices at the first image's size, in the second one's colours where it has some."""
        first, second = images
        axis = cohort_of(self.data, client).spec.slice_axis
        size = slice_size(first, axis)
        found = resize(prediction, size).clamp(0, 1).numpy()
        if len(second.array) == 3:
            # Colours come from the file, so they keep the detail that the network's size would have cost them.
            chroma = torch.from_numpy(np.ascontiguousarray(to_ycbcr(to_planes(second, 3, axis))[:, 1:]))
            found = to_rgb(np.concatenate([found, resize(chroma, size).numpy()], axis=1))
        return Answer({}, image=on_grid(found, first, axis))


def _shown(luminance: npt.NDArray[np.float32], chroma: npt.NDArray[np.float32] | None = None) -> Pixels:
    """Return grey `(h, w)`, or `(h, w, 3)` where there is colour, 8 bits."""
    if chroma is None or np.ptp(chroma) < 1 / 255:
        plane: npt.NDArray[Any] = luminance
    else:
        plane = np.moveaxis(to_rgb(np.concatenate([luminance[None], chroma])), 0, -1)
    shown: Pixels = np.rint(np.clip(plane, 0, 1) * 255).astype(np.uint8)
    return shown


def mean_fusion(batch: Batch) -> Tensor:
    """Return the mean of both sources, `(b, 1, h, w)`."""
    return batch.target.mean(dim=1, keepdim=True)


def maximum_fusion(batch: Batch) -> Tensor:
    """Return the larger of both sources at each pixel, `(b, 1, h, w)`."""
    return batch.target.amax(dim=1, keepdim=True)


def copy_of(place: int, batch: Batch) -> Tensor:
    """Return one of the sources as if it were fused, `(b, 1, h, w)`."""
    return batch.target[:, place : place + 1]


def make_loss(options: FusionOptions) -> tuple[FusionLoss, tuple[str, ...]]:
    """Return the loss, and in words how it measures information. Raises ConfigError if the weights of VGG-16 do not fit."""
    if options.vgg:
        c = options.c or _DEFAULT_C[options.vgg_input]
        features = at_vgg_size(load_vgg16(Path(options.vgg), options.vgg_input))
        note = f"information is measured by the gradients of VGG-16's maps ({options.vgg_input} weights, c = {c:g})"
    else:
        c, features = options.c or _PYRAMID_C, gaussian_pyramid
        note = f"information is measured by the gradients of a Gaussian pyramid, not of VGG-16's maps (c = {c:g})"
    return FusionLoss(features, c, options.lam, options.intensity, options.gradient), (note,)
