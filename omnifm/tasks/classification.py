"""Classification: one label per image, over the union of the cohorts' classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from omnifm.backbones.build import build_trunk
from omnifm.backbones.efficientnet import IMAGENET_MEAN, IMAGENET_STD
from omnifm.data.cache import load_images, to_slices
from omnifm.data.cohort import Cohort
from omnifm.data.readers import Image
from omnifm.metrics.base import Metric
from omnifm.metrics.classification import ClassificationMetric
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
    Reading,
    Task,
    TaskData,
    TaskOptions,
)
from omnifm.tasks.cases import case_rows, cohort_of, only_image, slices_of


@dataclass(frozen=True)
class ImageSplit:
    """Images of some manifest rows, read from the memory map when asked for.

    Attributes:
        pixels: `(n_slices, c, h, w)` in [0, 1].
        slices: positions in `pixels`.
        labels: class of each of `slices`.
        rows: manifest row of each of `slices`.
    """

    pixels: npt.NDArray[np.float32]
    slices: npt.NDArray[np.int64]
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.slices)

    def batch(self, index: Tensor) -> Batch:
        """Return the examples at `index`."""
        image = torch.from_numpy(self.pixels[self.slices[index.numpy()]])
        return Batch(image, self.labels[index], self.rows[index])


class TrunkBackbone(Backbone):
    """A trunk that sees images on the scale it expects: (x - mean) / std per channel."""

    def __init__(self, trunk: nn.Module, token_dim: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.trunk = trunk
        self.token_dim = token_dim
        shape = (1, len(mean), 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)

    def forward(self, inputs: Inputs) -> Features:
        """Return tokens `(b, l, d)` of images in [0, 1]."""
        return Features(self.trunk((inputs.image - self.get_buffer("mean")) / self.get_buffer("std")))


class PooledLinear(Head):
    """Mean over the tokens, then a linear layer: `(b, L, d)` to logits `(b, classes)`."""

    def __init__(self, token_dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(token_dim, classes)

    def forward(self, reading: Reading) -> Tensor:
        """Return logits."""
        logits: Tensor = self.linear(reading.tokens.mean(dim=1))
        return logits


def label_union(cohorts: Mapping[str, Cohort], label_space: str) -> tuple[tuple[str, ...], dict[str, dict[str, int]]]:
    """Return the names of the label union, and for each cohort the number of each of its classes.

    Args:
        cohorts: by name.
        label_space: `name`: equal class names are one class; `cohort`: a class belongs to its cohort (`cohort/class`).
    """
    names: dict[str, int] = {}
    table: dict[str, dict[str, int]] = {}
    # By name, so that the order of the cohorts in the config changes neither a class's number nor its weights.
    for cohort in sorted(cohorts.values(), key=lambda c: c.name):
        prefix = f"{cohort.name}/" if label_space == "cohort" else ""
        table[cohort.name] = {c: names.setdefault(prefix + c, len(names)) for c in cohort.classes}
    return tuple(names), table


class Classification(Task):
    """One class per image."""

    name: ClassVar[str] = "classification"
    reads: ClassVar[frozenset[str]] = frozenset({"classification"})
    apart: ClassVar[bool] = True
    primary = "accuracy"

    def __init__(self, data: TaskData, options: TaskOptions) -> None:
        super().__init__(data, options)
        config, cohorts = data.config, data.cohorts
        self._config = config
        size, channels = config.data.image_size, config.data.channels
        self._images = {n: load_images(c, size, channels, data.cache) for n, c in data.local.items()}
        self.classes, table = label_union(cohorts, config.federation.label_space)
        self.label_count = len(self.classes)
        self.one_label_space = len({tuple(sorted(numbers.values())) for numbers in table.values()}) == 1
        self._labels = {
            name: np.array([table[name][row.label] for row in cohort.rows], dtype=np.int64) for name, cohort in data.local.items()
        }

    def client_data(self, client: str) -> ClientData:
        """Return a client's splits."""
        plan = self.data.plan(client)
        return ClientData(*(self._split(plan.cohort, rows) for rows in (plan.train, plan.val, plan.test)))

    def _split(self, cohort: str, rows: Sequence[int]) -> ImageSplit:
        images = self._images[cohort]
        slices = slices_of(images.slice_row, rows)
        owner = images.slice_row[slices]
        return ImageSplit(images.pixels, slices, torch.from_numpy(self._labels[cohort][owner]), torch.from_numpy(owner.copy()))

    def row_labels(self) -> dict[str, list[str]]:
        """Return the label of every row by cohort; where classes belong to cohorts, so do their names."""
        return {cohort: [self.classes[number] for number in labels] for cohort, labels in self._labels.items()}

    def labels(self, client: str) -> Tensor:
        """Return the training labels of a client."""
        plan = self.data.plan(client)
        return self._split(plan.cohort, plan.train).labels

    def backbone(self) -> Backbone:
        """Return the backbone that `[model]` names."""
        channels = self._config.data.channels
        trunk, token_dim = build_trunk(self._config.model, channels)
        if self._config.model.backbone == "efficientnet_lite0" and channels == 3:
            return TrunkBackbone(trunk, token_dim, IMAGENET_MEAN, IMAGENET_STD)
        return TrunkBackbone(trunk, token_dim, [0.5] * channels, [0.25] * channels)

    def head(self, token_dim: int) -> Head:
        """Return a linear classifier over the label union."""
        return PooledLinear(token_dim, len(self.classes))

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Mirror and shift."""
        return batch._replace(image=flip_shift(batch.image, generator))

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(prediction, batch.target)

    def metric(self, client: str | None = None) -> Metric:
        """Return accuracy, AUC, F1."""
        return ClassificationMetric(len(self.classes))

    def picture(self, prediction: Tensor, batch: Batch, index: int) -> Picture:
        """Show the image with the most probable class."""
        probability = prediction[index].double().softmax(0)
        guess, truth = int(probability.argmax()), int(batch.target[index])
        pixels = (batch.image[index].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
        image = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        return Picture((("image", image),), self.classes[truth], self.classes[guess], float(probability[guess]), guess == truth)

    def examples(self, images: Sequence[Image], question: str, client: str) -> Batch:
        """Return the slices of an image."""
        image = only_image(images, question, self.name)
        data = self._config.data
        slices = to_slices(image, data.image_size, data.channels, cohort_of(self.data, client).spec.slice_axis)
        return Batch(torch.from_numpy(slices), case_rows(len(slices)), case_rows(len(slices)))

    def answer(self, prediction: Tensor, batch: Batch, images: Sequence[Image], client: str) -> Answer:
        """Return the probability of every class of the union, the mean over slices as in the scores."""
        probability = prediction.double().softmax(dim=1).mean(dim=0)
        guess = self.classes[int(probability.argmax())]
        return Answer({"class": guess, "probabilities": dict(zip(self.classes, probability.tolist(), strict=True))})
