"""Super-resolution: pictures with 2, 4 or 8 times the pixels a side, learned from pictures and their own reductions.

Pictures keep the size they have. What the network enlarges is made from them when they are read, by the one definition in
`omnifm.data.resample`. In training it sees patches at random places, in use whole pictures, in tiles where they are large. The
spectral path always sees the whole low-resolution picture, bicubically brought to `data.image_size`: its spectrum then has one
shape at all scales, for patches and for tiles, and holds nothing that the low-resolution picture does not.

Clients may have different scales: they share the trunk, and each scale has its own upsampler. Scores are those of
`omnifm.metrics.super_resolution`; main score: `psnr`, strict convention, on luma.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from omnifm.backbones.build import load_weights
from omnifm.backbones.edsr import EdsrTrunk, Enlarger
from omnifm.backbones.maps import MOST_TOKENS, add_back, to_tokens
from omnifm.data.cache import LUMINANCE, to_planes
from omnifm.data.native import NativeImages, Window, load_native
from omnifm.data.pairs import to_rgb, to_ycbcr
from omnifm.data.partition import ClientPlan
from omnifm.data.readers import Image
from omnifm.data.resample import enlarged, low_resolution
from omnifm.errors import ConfigError, DataError
from omnifm.metrics.base import Metric
from omnifm.metrics.super_resolution import SSIM_LEAST_SIDE, SuperResolutionMetric, picture_scores
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
from omnifm.tasks.cases import case_rows, cohort_of, on_grid, only_image, slices_of
from omnifm.tasks.tiling import enlarge, overview

log = logging.getLogger(__name__)

Scale = Literal[2, 4, 8]
_SHOWN_SIDE = 256
_GAIN = 0.1
"""What the path changes is added as EDSR adds its blocks where training is delicate: a tenth of it (their residual scaling)."""


class SuperResolutionOptions(TaskOptions):
    """The table `[tasks.super_resolution]`."""

    scale: Scale = Field(2, description="How many times as many pixels a side.")
    scales: dict[str, Scale] | tuple[Scale, ...] = Field(
        (), description="By client or cohort, where it differs from `scale`; or a list that is given to the clients in turn."
    )
    patch: int = Field(64, ge=16, description="Side of training patches, high-resolution pixels; needs data.augment.")
    view: int | None = Field(
        None,
        ge=16,
        description="Side of the squares that training pictures are cut into; null: the smallest side of all cohorts.",
    )
    blocks: int = Field(8, ge=1, description="Residual blocks of the trunk; EDSR-baseline has 16 (and model.width = 64).")
    cell: int = Field(8, ge=1, description="Side of the square that a token stands for, low-resolution pixels.")
    tile: int = Field(128, ge=16, description="Largest side that goes through the network at once in use, low-resolution pixels.")
    overlap: int = Field(16, ge=0, description="Least overlap of neighbouring tiles, low-resolution pixels.")

    @model_validator(mode="after")
    def _tiles_advance(self) -> "SuperResolutionOptions":
        if 2 * self.overlap > self.tile:
            raise ValueError(f"overlap = {self.overlap} is more than half of tile = {self.tile}")
        return self


@dataclass(frozen=True)
class PictureSplit:
    """Pictures, or windows of them, read from the memory map and reduced when asked for.

    Attributes:
        images: of the cohort.
        windows: which picture and where.
        size: height and width of every window, multiples of `scale`.
        scale: of the client.
        overview: side of what the spectral path sees.
    """

    images: NativeImages
    windows: Sequence[Window]
    size: tuple[int, int]
    scale: int
    overview: int

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, index: Tensor) -> Batch:
        """Return examples: `target` high resolution, `side["low"]` low resolution, `image` the overview of that."""
        windows = [self.windows[k] for k in index.tolist()]
        target = torch.from_numpy(self.images.read(windows, *self.size))
        low = low_resolution(target, self.scale)
        row = torch.from_numpy(self.images.slice_row[[image for image, _, _ in windows]])
        side = {"low": low, "scale": torch.full((len(windows),), self.scale)}
        return Batch(overview(low, self.overview), target, row, side, f"x{self.scale}")


class SuperResolutionBackbone(Backbone):
    """EDSR's trunk on `side["low"]` (on `image` where there is none). Context: its map, the tokens' grid, the picture.

    A token stands for a square of `cell` pixels, or for a larger one where that would be more than 256: so what
    stands between trunk and head meets tokens of one kind in patches, tiles and whole pictures.
    """

    def __init__(self, trunk: EdsrTrunk, cell: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.token_dim = trunk.token_dim
        self._cell = cell

    def forward(self, inputs: Inputs) -> Features:
        """Return tokens `(b, l, d)`, l at most 256."""
        picture = inputs.side.get("low", inputs.image)
        found = self.trunk(picture)
        cells = -(-picture.shape[2] // self._cell) * -(-picture.shape[3] // self._cell)
        tokens, grid = to_tokens(found, min(MOST_TOKENS, cells))
        return Features(tokens, (found, grid, picture))


class SuperResolutionHead(Head):
    """The upsampler of the batch's scale, on the trunk's map plus what happened to its tokens. A client's own: the upsamplers."""

    def __init__(self, enlarger: Enlarger) -> None:
        super().__init__()
        self.enlarger = enlarger

    def forward(self, reading: Reading) -> Tensor:
        """Return the enlarged pictures `(b, c, s h, s w)`."""
        found, grid, picture = reading.features.context
        if reading.content is not reading.features.tokens:
            found = add_back(found, _GAIN * (reading.content - reading.features.tokens), grid)
        answer: Tensor = self.enlarger(found, picture, reading.inputs.route)
        return answer

    @property
    def own(self) -> nn.Module:
        """The upsamplers with their last convolutions."""
        return self.enlarger.tails


class SuperResolution(Task):
    """More pixels."""

    name: ClassVar[str] = "super_resolution"
    reads: ClassVar[frozenset[str]] = frozenset({"super_resolution", "classification"})
    apart: ClassVar[bool] = True
    Options: ClassVar[type[TaskOptions]] = SuperResolutionOptions
    options: SuperResolutionOptions
    primary = "psnr"
    headline = ("psnr", "ssim", "psnr_rgb", "ssim_rgb", "legacy_psnr", "legacy_ssim")
    one_label_space = True

    def __init__(self, data: TaskData, options: SuperResolutionOptions) -> None:
        super().__init__(data, options)
        if data.config.model.width % 4:
            raise ConfigError(f"model.width = {data.config.model.width}: super-resolution needs a multiple of 4")
        self._scale_of = scales_of(data.plans, options)
        self.scales = tuple(sorted({*self._scale_of.values()} or {options.scale}))
        self._images = {n: load_native(cohort, data.config.data.channels, data.cache) for n, cohort in data.local.items()}
        for name, images in self._images.items():
            if min(images.size) < (least := SSIM_LEAST_SIDE + 3 * self.scales[-1]):
                raise DataError(f"cohort {name}: images of {images.size[0]} x {images.size[1]} are too small, {least} are needed")
        if options.view is None and len(data.local) < len(data.cohorts):
            raise ConfigError(
                "tasks.super_resolution.view: set it; across machines nobody knows the smallest side of all cohorts"
            )
        sides = [min(images.size) for images in self._images.values()]
        self._view = options.view or min(sides, default=options.patch)
        low = "low-resolution pictures are antialiased bicubic reductions (a = -1/2, MATLAB's imresize), rounded to 8 bits"
        self.notes = (low, *(images.cropped for images in self._images.values() if images.cropped))
        for note in self.notes[1:]:
            log.warning("super_resolution: %s", note)

    def client_data(self, client: str) -> ClientData:
        """Return a client's splits: squares to train on, whole pictures (to the last multiple of the scale) to score."""
        plan = self.data.plan(client)
        return ClientData(self._split(plan, plan.train, cut=True), *(self._split(plan, rows) for rows in (plan.val, plan.test)))

    def _split(self, plan: ClientPlan, rows: Sequence[int], *, cut: bool = False) -> PictureSplit:
        images, scale = self._images[plan.cohort], self._scale_of[plan.id]
        height, width = (min(side, self._view) if cut else side for side in images.size)
        size = (height - height % scale, width - width % scale)
        places = slices_of(images.slice_row, sorted(rows)).tolist()
        corners = (
            [(y, x) for y in _spread(images.size[0], size[0]) for x in _spread(images.size[1], size[1])] if cut else [(0, 0)]
        )
        windows = [(place, top, left) for place in places for top, left in corners]
        return PictureSplit(images, windows, size, scale, self.data.config.data.image_size)

    def backbone(self) -> Backbone:
        """Return EDSR's trunk, `model.width` channels. `model.norm` has no meaning here: there is nothing to normalise."""
        config = self.data.config
        trunk = EdsrTrunk(config.data.channels, config.model.width, self.options.blocks)
        if config.model.weights:
            load_weights(trunk, Path(config.model.weights))
        return SuperResolutionBackbone(trunk, self.options.cell)

    def head(self, token_dim: int) -> Head:
        """Return an upsampler for each scale."""
        return SuperResolutionHead(Enlarger(token_dim, self.data.config.data.channels, self.scales))

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Draw a patch of each picture and turn or mirror it, one of eight ways; the overview stays that of the picture."""
        low, scale = batch.side["low"], batch.target.shape[-1] // batch.side["low"].shape[-1]
        b, _, h, w = low.shape
        side = min(self.options.patch // scale, h, w)
        tops, lefts = (torch.randint(0, room - side + 1, (b,), generator=generator).tolist() for room in (h, w))
        turned = torch.rand(3, b, generator=generator) < 0.5
        small = _turn(_patches(low, tops, lefts, side), turned)
        large = _turn(_patches(batch.target, [scale * t for t in tops], [scale * x for x in lefts], scale * side), turned)
        return batch._replace(target=large, side={**batch.side, "low": small})

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Mean absolute difference, EDSR's."""
        return functional.l1_loss(prediction, batch.target)

    def predict(self, model: Model, batch: Batch) -> Tensor:
        """Enlarge whole pictures, by tiles where they are large."""
        o, low = self.options, batch.side["low"]
        scale = batch.target.shape[-1] // low.shape[-1]
        return enlarge(model, low, scale, tile=o.tile, overlap=o.overlap, view=batch.image.shape[-1])

    def metric(self, client: str | None = None) -> Metric:
        """Return PSNR and SSIM in all conventions."""
        del client
        return SuperResolutionMetric()

    def references(self, client: str) -> Mapping[str, Callable[[Batch], Tensor]]:
        """Return what needs no training: bicubic enlargement."""
        return {"bicubic": partial(_bicubic, self._scale_of[client])}

    def holds(self, model: Model, client: str) -> frozenset[str] | None:
        """Return all but the upsamplers of other scales; None where there is one scale."""
        if len(self.scales) == 1:
            return None
        assert isinstance(model.head, SuperResolutionHead)
        own = f"x{self._scale_of[client]}"
        others = {name: tail for name, tail in model.head.enlarger.tails.items() if name != own}
        foreign = {f"head.enlarger.tails.{name}.{tensor}" for name, tail in others.items() for tensor in tail.state_dict()}
        return frozenset(model.state_dict().keys() - foreign)

    def probes(self) -> Sequence[Inputs]:
        """Return two patches with their overviews for each scale."""
        channels, side = self.data.config.data.channels, self.data.config.data.image_size
        seen = torch.zeros(2, channels, side, side)
        patches = {s: torch.zeros(2, channels, self.options.patch // s, self.options.patch // s) for s in self.scales}
        return [Inputs(seen, {"low": patch}, f"x{scale}") for scale, patch in patches.items()]

    def picture(self, prediction: Tensor, batch: Batch, index: int) -> Picture:
        """Show low resolution, bicubic, the answer and the truth (of large pictures the middle), and say what was gained."""
        low, truth, found = (t[index].float() for t in (batch.side["low"], batch.target, prediction))
        scale = truth.shape[-1] // low.shape[-1]
        simple = enlarged(low, scale)
        blocks = low.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
        ours, bicubic = (picture_scores(p.double().numpy(), truth.double().numpy(), scale) for p in (found, simple))
        words = f"PSNR {ours['psnr']:.2f} dB, SSIM {ours['ssim']:.4f} (bicubic {bicubic['psnr']:.2f}, {bicubic['ssim']:.4f})"
        captions = (f"low resolution, x{scale}", "bicubic", "enlarged", "truth")
        panels = tuple(zip(captions, map(_shown, (blocks, simple, found, truth)), strict=True))
        return Picture(panels, prediction=words)

    def examples(self, images: Sequence[Image], question: str, client: str) -> Batch:
        """Return the slices of an image, which count as low resolution. The target tells the size of the answer alone."""
        image, data, scale = only_image(images, question, self.name), self.data.config.data, self._scale_of[client]
        planes = to_planes(image, data.channels, cohort_of(self.data, client).spec.slice_axis)
        low = torch.from_numpy(np.repeat(planes, data.channels // planes.shape[1], axis=1))
        n, channels, height, width = low.shape
        target = torch.zeros(1).expand(n, channels, scale * height, scale * width)
        return Batch(overview(low, data.image_size), target, case_rows(n), {"low": low}, f"x{scale}")

    def answer(self, prediction: Tensor, batch: Batch, images: Sequence[Image], client: str) -> Answer:
        """Return the enlarged slices. Colours of a picture whose luminance alone was enlarged are enlarged bicubically."""
        image, axis, scale = images[0], cohort_of(self.data, client).spec.slice_axis, self._scale_of[client]
        found = prediction.clamp(0, 1).numpy()
        if len(image.array) == 1:
            # A network for colours gives three nearly equal channels.
            found = (
                found
                if found.shape[1] == 1
                else np.einsum("c,nchw->nhw", np.asarray(LUMINANCE, dtype=np.float32), found)[:, None]
            )
        elif found.shape[1] == 1:
            chroma = torch.from_numpy(np.ascontiguousarray(to_ycbcr(to_planes(image, 3, axis))[:, 1:]))
            found = to_rgb(np.concatenate([found, enlarged(chroma, scale).numpy()], axis=1))
        return Answer({"scale": scale}, image=on_grid(found, image, axis))


def scales_of(plans: Sequence[ClientPlan], options: SuperResolutionOptions) -> dict[str, int]:
    """Return each client's scale. Raises ConfigError if `scales` names what is neither a client nor a cohort."""
    given = options.scales
    if not isinstance(given, Mapping):
        return {plan.id: given[k % len(given)] if given else options.scale for k, plan in enumerate(plans)}
    known = {plan.id for plan in plans} | {plan.cohort for plan in plans}
    if plans and (strange := sorted(given.keys() - known)):
        raise ConfigError(f"tasks.super_resolution.scales.{strange[0]}: is neither a client nor a cohort of this federation")
    return {plan.id: given.get(plan.id, given.get(plan.cohort, options.scale)) for plan in plans}


def _spread(length: int, part: int) -> list[int]:
    """Return where the parts begin that `length` is cut into: as many as come closest to it, evenly spread, one in the middle."""
    count = max(1, round(length / part))
    return [(length - part) // 2] if count == 1 else [round(k * (length - part) / (count - 1)) for k in range(count)]


def _patches(image: Tensor, tops: Sequence[int], lefts: Sequence[int], side: int) -> Tensor:
    corners = zip(image, tops, lefts, strict=True)
    return torch.stack([one[:, top : top + side, left : left + side] for one, top, left in corners])


def _turn(image: Tensor, turned: Tensor) -> Tensor:
    """Mirror, put upside down and transpose squares `(b, c, h, h)` where rows 0, 1, 2 of `turned` `(3, b)` say so."""
    mirrored, upside_down, transposed = turned.view(3, -1, 1, 1, 1)
    image = torch.where(mirrored, image.flip(3), image)
    image = torch.where(upside_down, image.flip(2), image)
    return torch.where(transposed, image.mT, image)


def _bicubic(scale: int, batch: Batch) -> Tensor:
    return enlarged(batch.side["low"], scale)


def _shown(image: Tensor) -> Pixels:
    """Return the middle of `(c, h, w)` in [0, 1] as grey `(h, w)` or colour `(h, w, 3)`, 8 bits."""
    top, left = (max(0, (side - _SHOWN_SIDE) // 2) for side in image.shape[1:])
    middle = image[:, top : top + _SHOWN_SIDE, left : left + _SHOWN_SIDE]
    pixels: Pixels = (middle.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels
