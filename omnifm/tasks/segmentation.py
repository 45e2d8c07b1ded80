"""Segmentation: a class for every pixel, from a U-Net whose bottleneck is the token map; volumes are scored whole.

Each client's truth tells of its own classes alone, so the others take no part in its softmax: no client is taught that another's
structure is background. Scores are those of `omnifm.metrics.segmentation`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from omnifm.backbones.build import load_weights
from omnifm.backbones.maps import add_back, to_tokens
from omnifm.backbones.monai_parts import monai_part
from omnifm.backbones.unet import STEPS, UNetDecoder, UNetEncoder
from omnifm.config import Real
from omnifm.data.cache import CachedImages, load_images, to_slices
from omnifm.data.cohort import Cohort
from omnifm.data.masks import CachedMasks, load_masks
from omnifm.data.readers import Image
from omnifm.errors import ConfigError, DataError
from omnifm.metrics.base import Metric
from omnifm.metrics.segmentation import SegmentationMetric, Structures
from omnifm.tasks.augment import flip_shift
from omnifm.tasks.base import (
    Answer,
    Backbone,
    Batch,
    ClientData,
    Features,
    Head,
    Inputs,
    Picture,
    Pixels,
    Reading,
    Task,
    TaskData,
    TaskOptions,
)
from omnifm.tasks.cases import case_rows, cohort_of, on_grid, only_image, resized, slice_size, slices_of

BACKGROUND = "background"
BRATS_CLASSES = ("NCR", "ED", "ET")
BRATS_REGIONS: Structures = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
_OUT = -1e4
"""Logit of a class that takes no part; finite in bfloat16, and exactly 0 after a softmax in float32."""
_COLOURS = ((230, 97, 1), (26, 150, 65), (44, 123, 182), (202, 0, 32), (123, 50, 148), (253, 184, 99))
_SHOWN_SIDE = 192
_AT_ONCE = 16
"""Slices that are brought to the size of an image together."""


class SegmentationOptions(TaskOptions):
    """The table `[tasks.segmentation]`."""

    head_space: Literal["classes", "binary"] = Field(
        "classes", description="`classes`: the union of the cohorts' classes; `binary`: foreground, which all cohorts share."
    )
    regions: Literal["", "brats"] = Field("", description="`brats`: score WT, TC and ET instead of the three labels.")
    dice_weight: Real = Field(1.0, ge=0.0, description="Weight of the Dice loss.")
    ce_weight: Real = Field(1.0, ge=0.0, description="Weight of the cross-entropy.")
    train_slices: int = Field(
        0, ge=0, description="Slices of each training volume that are trained on, evenly spaced; 0: all. Scores are of all."
    )
    mirror: bool = Field(False, description="`flip_shift` also mirrors; wrong where left and right are classes.")


@dataclass(frozen=True)
class SliceSplit:
    """Slices of some manifest rows with their masks, read from the memory maps when asked for.

    Attributes:
        images: of the cohort.
        masks: of the cohort.
        slices: positions in both.
        numbers: `(classes of the cohort,)` uint8, the union's number of each class.
        allowed: `(outputs,)` bool, which of the union's classes the cohort has.
    """

    images: CachedImages
    masks: CachedMasks
    slices: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    allowed: Tensor

    def __len__(self) -> int:
        return len(self.slices)

    def batch(self, index: Tensor) -> Batch:
        """Return the slices at `index`; `target` `(b, h, w)` int64 class numbers of the union."""
        places = self.slices[index.numpy()]
        row = self.images.slice_row[places]
        target = torch.from_numpy(self.numbers[self.masks.labels[places]])
        side = {
            "allowed": self.allowed.expand(len(places), -1),
            "spacing": torch.from_numpy(self.masks.spacing[row]),
        }
        return Batch(torch.from_numpy(np.array(self.images.pixels[places])), target, torch.from_numpy(row.copy()), side)


class SegmentationBackbone(Backbone):
    """A U-Net's encoder; the context is the bottleneck, the skip maps and the tokens' grid."""

    def __init__(self, channels: int, width: int, norm: str) -> None:
        super().__init__()
        self.trunk = UNetEncoder(channels, width, norm)
        self.token_dim = self.trunk.token_dim

    def forward(self, inputs: Inputs) -> Features:
        """Return tokens `(b, l, 8w)`, l at most 256."""
        bottleneck, maps = self.trunk(inputs.image - 0.5)
        tokens, grid = to_tokens(bottleneck)
        return Features(tokens, (bottleneck, maps, grid))


class SegmentationHead(Head):
    """A U-Net's decoder; the last stage and the 1x1 convolution are a client's own."""

    def __init__(self, width: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.decoder = UNetDecoder(width, outputs, norm)

    def forward(self, reading: Reading) -> Tensor:
        """Return logits `(b, outputs, h, w)`; classes that the client's truth does not tell of are out."""
        bottleneck, maps, grid = reading.features.context
        if reading.content is not reading.features.tokens:
            bottleneck = add_back(bottleneck, reading.content - reading.features.tokens, grid)
        logits: Tensor = self.decoder(bottleneck, maps)
        return logits.masked_fill(~reading.inputs.side["allowed"][:, :, None, None], _OUT)

    @property
    def own(self) -> nn.Module:
        """The decoder's last stage with its 1x1 convolution."""
        return self.decoder.last


def class_union(cohorts: Mapping[str, Cohort], label_space: str, binary: bool) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Return the names of the union, background first, and for each cohort the number of each of its classes.

    Args:
        cohorts: by name.
        label_space: `name`: equal class names are one class; `cohort`: a class belongs to its cohort (`cohort/class`).
        binary: every class but background is `foreground`.
    """
    names: dict[str, int] = {BACKGROUND: 0}
    table: dict[str, list[int]] = {}
    for cohort in sorted(cohorts.values(), key=lambda c: c.name):
        prefix = f"{cohort.name}/" if label_space == "cohort" else ""
        inner = ["foreground" if binary else prefix + name for name in cohort.classes[1:]]
        if BACKGROUND in inner:
            raise DataError(f"cohort {cohort.name}: class {inner.index(BACKGROUND) + 1} is called {BACKGROUND}, which is class 0")
        table[cohort.name] = [0, *(names.setdefault(name, len(names)) for name in inner)]
    return tuple(names), table


class Segmentation(Task):
    """A class per pixel."""

    name: ClassVar[str] = "segmentation"
    reads: ClassVar[frozenset[str]] = frozenset({"segmentation"})
    apart: ClassVar[bool] = True
    Options: ClassVar[type[TaskOptions]] = SegmentationOptions
    options: SegmentationOptions
    primary = "dice"
    headline = ("dice", "hd95", "missed", "empty_cases")

    def __init__(self, data: TaskData, options: SegmentationOptions) -> None:
        super().__init__(data, options)
        config = data.config
        size = config.data.image_size
        if size % 2**STEPS:
            raise ConfigError(f"data.image_size = {size}: the U-Net halves it {STEPS} times; take a multiple of {2**STEPS}")
        self.classes, self._numbers = class_union(data.cohorts, config.federation.label_space, options.head_space == "binary")
        self.one_label_space = len({tuple(sorted(set(numbers))) for numbers in self._numbers.values()}) == 1
        self._structures = self._scored_structures()
        names = (*self._structures, "")
        self.lower_is_better = frozenset({"hd95", *(f"hd95/{name}" for name in names)})
        self._images = {n: load_images(c, size, config.data.channels, data.cache) for n, c in data.local.items()}
        self._masks = {n: load_masks(c, size, data.cache) for n, c in data.local.items()}

    def _scored_structures(self) -> Structures:
        if self.options.regions != "brats":
            return {name: (number,) for number, name in enumerate(self.classes) if number}
        for cohort in self.data.cohorts.values():
            if tuple(cohort.classes[1:]) != BRATS_CLASSES or self.options.head_space == "binary" or len(self.classes) != 4:
                wanted = f"classes background, {', '.join(BRATS_CLASSES)} and head_space 'classes'"
                raise ConfigError(f"tasks.segmentation.regions = 'brats' needs {wanted}; cohort {cohort.name} does not fit")
        return BRATS_REGIONS

    def client_data(self, client: str) -> ClientData:
        """Return a client's splits."""
        plan = self.data.plan(client)
        train = self._split(plan.cohort, plan.train, self.options.train_slices)
        return ClientData(train, self._split(plan.cohort, plan.val), self._split(plan.cohort, plan.test))

    def _split(self, cohort: str, rows: Sequence[int], most: int = 0) -> SliceSplit:
        images = self._images[cohort]
        slices = slices_of(images.slice_row, rows, most)
        numbers = np.asarray(self._numbers[cohort], dtype=np.int64)
        return SliceSplit(images, self._masks[cohort], slices, numbers, self._allowed(cohort))

    def _allowed(self, cohort: str) -> Tensor:
        """Return which of the union's classes a cohort has, `(classes,)` bool."""
        allowed = torch.zeros(len(self.classes), dtype=torch.bool)
        allowed[self._numbers[cohort]] = True
        return allowed

    def backbone(self) -> Backbone:
        """Return a U-Net's encoder of `model.width`."""
        model = self.data.config.model
        net = SegmentationBackbone(self.data.config.data.channels, model.width, model.norm)
        if model.weights:
            load_weights(net.trunk, Path(model.weights))
        return net

    def head(self, token_dim: int) -> Head:
        """Return a U-Net's decoder with an output for each class of the union."""
        return SegmentationHead(token_dim // 2**STEPS, len(self.classes), self.data.config.model.norm)

    def probes(self) -> Sequence[Inputs]:
        """Return two empty pictures in which every class takes part."""
        size, channels = self.data.config.data.image_size, self.data.config.data.channels
        return [Inputs(torch.zeros(2, channels, size, size), {"allowed": torch.ones(2, len(self.classes), dtype=torch.bool)})]

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Shift image and mask together, and mirror them where `mirror` says so."""
        both = torch.cat([batch.image, batch.target[:, None].to(batch.image.dtype)], dim=1)
        moved = flip_shift(both, generator, mirror=self.options.mirror)
        return batch._replace(image=moved[:, :-1].contiguous(), target=moved[:, -1].round().long())

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Dice loss over the client's own classes plus cross-entropy."""
        total = prediction.new_zeros(())
        if self.options.ce_weight:
            total = total + self.options.ce_weight * functional.cross_entropy(prediction, batch.target)
        if self.options.dice_weight:
            total = total + self.options.dice_weight * self._dice_loss(prediction, batch)
        return total

    @staticmethod
    def _dice_loss(prediction: Tensor, batch: Batch) -> Tensor:
        dice = monai_part("monai.losses.dice").DiceLoss(
            include_background=False, to_onehot_y=True, softmax=True, reduction="none"
        )
        terms = dice(prediction, batch.target[:, None])
        own = batch.side["allowed"][:, 1:].to(terms.dtype)
        mean: Tensor = (terms.flatten(2).mean(2) * own).sum() / own.sum()
        return mean

    def metric(self, client: str | None = None) -> Metric:
        """Return Dice and HD95 of the structures that the client's truth tells of."""
        if client is None:
            return SegmentationMetric(self._structures)
        known = set(self._numbers[self.data.plan(client).cohort])
        return SegmentationMetric(self._structures, [n for n, numbers in self._structures.items() if known.intersection(numbers)])

    def references(self, client: str) -> Mapping[str, Callable[[Batch], Tensor]]:
        """Return what needs no training: nothing is there."""
        outputs = len(self.classes)
        return {"all_background": lambda batch: all_background(batch, outputs)}

    def picture(self, prediction: Tensor, batch: Batch, index: int) -> Picture:
        """Show the image, and the true and the predicted outlines on it."""
        image = batch.image[index].clamp(0, 1)
        grey = image.expand(3, -1, -1) if len(image) == 1 else image
        base = (grey.permute(1, 2, 0) * 255).round().byte().numpy()
        truth, guess = batch.target[index].numpy(), prediction[index].argmax(0).numpy()
        present = [number for number in np.unique(np.concatenate([truth, guess])) if number]
        overlap = [f"{self.classes[n]} Dice {_dice(guess == n, truth == n):.2f}" for n in present]
        panels = (("image", enlarge(base)), ("truth", outlined(base, truth)), ("prediction", outlined(base, guess)))
        return Picture(panels, prediction=", ".join(overlap) or "nothing, and there is nothing")

    def examples(self, images: Sequence[Image], question: str, client: str) -> Batch:
        """Return the slices of an image."""
        image, cohort, data = only_image(images, question, self.name), cohort_of(self.data, client), self.data.config.data
        slices = torch.from_numpy(to_slices(image, data.image_size, data.channels, cohort.spec.slice_axis))
        side = {"allowed": self._allowed(cohort.name).expand(len(slices), -1)}
        return Batch(slices, torch.zeros_like(slices[:, 0], dtype=torch.int64), case_rows(len(slices)), side)

    def answer(self, prediction: Tensor, batch: Batch, images: Sequence[Image], client: str) -> Answer:
        """Return the mask in the cohort's own class numbers, and how much there is of each class.

        Probabilities, not labels, are brought to the image's size; the most probable class is chosen there.
        """
        image, cohort = images[0], cohort_of(self.data, client)
        axis, number = cohort.spec.slice_axis, self._numbers[cohort.name]
        chosen = list(dict.fromkeys(number))
        size = slice_size(image, axis)
        # A few slices at a time: all classes of a whole volume at its own size may not fit into memory.
        parts = (resized(part.softmax(dim=1)[:, chosen], size).argmax(dim=1).byte() for part in prediction.split(_AT_ONCE))
        mask = on_grid(torch.cat(list(parts)).numpy(), image, axis)
        own = cohort.classes if self.options.head_space == "classes" else self.classes
        classes = tuple(own[number.index(n)] for n in chosen)
        counts = dict(zip(classes, np.bincount(mask.ravel(), minlength=len(classes)).tolist(), strict=True))
        facts = {"classes": list(classes), "samples": counts}
        if image.spacing is not None:
            voxel = float(np.prod(image.spacing))
            unit, share = ("area_mm2", voxel) if mask.ndim == 2 else ("volume_ml", voxel / 1000)
            facts[unit] = {name: count * share for name, count in counts.items()}
        return Answer(facts, mask, classes)


def all_background(batch: Batch, outputs: int) -> Tensor:
    """Return logits `(b, outputs, h, w)` that call every pixel background."""
    logits = torch.zeros(len(batch.target), outputs, *batch.target.shape[1:])
    logits[:, 0] = 1.0
    return logits


def _dice(guess: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    return 2 * float((guess & truth).sum()) / max(1.0, float(guess.sum() + truth.sum()))


def enlarge(image: Pixels) -> Pixels:
    """Repeat pixels so that the longer side has about 192, enough to be looked at."""
    factor = max(1, _SHOWN_SIDE // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def outlined(image: Pixels, labels: npt.NDArray[np.int64]) -> Pixels:
    """Draw the classes of `labels` `(h, w)` on `image` `(h, w, 3)`: a thin tint inside, a line round it; a colour per class."""
    shown = enlarge(image).astype(np.float64)
    factor = shown.shape[0] // image.shape[0]
    large = labels.repeat(factor, axis=0).repeat(factor, axis=1)
    padded = np.pad(large, 1, mode="edge")
    neighbours = [padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]]
    edge = np.any([large != other for other in neighbours], axis=0)
    for number in np.unique(large[large > 0]):
        colour = np.array(_COLOURS[(int(number) - 1) % len(_COLOURS)], dtype=np.float64)
        inside = large == number
        shown[inside] = 0.75 * shown[inside] + 0.25 * colour
        shown[inside & edge] = colour
    return shown.round().astype(np.uint8)
