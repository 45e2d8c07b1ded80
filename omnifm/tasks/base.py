"""What a task owes the federation: data, network parts, loss, metric, picture. One file per task implements it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from omnifm.config import Config
from omnifm.data.cohort import Cohort
from omnifm.data.partition import ClientPlan
from omnifm.data.readers import Image
from omnifm.data.words import Discretion, Words
from omnifm.errors import ConfigError, DataError
from omnifm.metrics.base import NOTHING, Metric


class Inputs(NamedTuple):
    """What a network sees of a batch: never the target.

    Attributes:
        image: `(b, c, h, w)` float32, read by the backbone and by the spectral path.
        side: further inputs by name, first dimension b (the tokens of a question).
        route: which of several networks inside one model these examples are for; empty where there is one.
    """

    image: Tensor
    side: Mapping[str, Tensor] = NOTHING
    route: str = ""


class Batch(NamedTuple):
    """Examples of one client.

    Attributes:
        image: `(b, c, h, w)` float32.
        target: what the loss compares with, first dimension b.
        row: `(b,)` int64, the manifest row of each example; slices of one volume share it.
        side: further inputs, and facts the metric needs (voxel spacing), by name, first dimension b.
        route: as in `Inputs`; all examples of a batch share it.
    """

    image: Tensor
    target: Tensor
    row: Tensor
    side: Mapping[str, Tensor] = NOTHING
    route: str = ""

    @property
    def inputs(self) -> Inputs:
        """What the network may see."""
        return Inputs(self.image, self.side, self.route)

    def to(self, device: torch.device, memory_format: torch.memory_format) -> "Batch":
        """Move to `device`; images take `memory_format`."""
        image = self.image.to(device, non_blocking=True).contiguous(memory_format=memory_format)
        side = {name: tensor.to(device, non_blocking=True) for name, tensor in self.side.items()} if self.side else self.side
        return self._replace(image=image, target=self.target.to(device, non_blocking=True), side=side)


class Split(Protocol):
    """An indexable set of examples; nothing is in memory until `batch` asks for it. Its examples have equal shapes."""

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, index: Tensor) -> Batch:
        """Return the examples at `index` `(b,)` int64."""


@dataclass(frozen=True)
class ClientData:
    """One client's three splits. An empty split has length 0."""

    train: Split
    val: Split
    test: Split

    def split(self, name: str) -> Split:
        """Return the split called `train`, `val` or `test`."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


class Features(NamedTuple):
    """What a backbone makes of an image: tokens `(b, l, d)`, and whatever else the head needs (skip features), or None."""

    tokens: Tensor
    context: Any = None


class Backbone(nn.Module):
    """A network that turns `Inputs` into `Features`. `token_dim` is d."""

    token_dim: int

    def forward(self, inputs: Inputs) -> Features:
        """Return the tokens of the images."""
        raise NotImplementedError

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its transformer blocks, first to last, each from `(b, n, d)` to the same shape. By default there are none."""
        return ()


class Reading(NamedTuple):
    """What a head reads.

    Attributes:
        tokens: r' `(b, L, d)`; L is l, or longer where a prefix and a suffix were added.
        content: `(b, l, d)`, the positions of r in r'; r itself where nothing stands between backbone and head.
        features: the backbone's answer.
        inputs: what the network saw.
    """

    tokens: Tensor
    content: Tensor
    features: Features
    inputs: Inputs


class Head(nn.Module):
    """A task head on a token sequence."""

    def forward(self, reading: Reading) -> Tensor:
        """Return the prediction."""
        raise NotImplementedError

    @property
    def own(self) -> nn.Module:
        """The part that personalised methods keep at the client: the last layers. By default the whole head."""
        return self


class TokenPath(Protocol):
    """What may stand between backbone and head."""

    def __call__(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        """Return r' `(b, L, d)` and a trace, from images and r `(b, l, d)`."""

    def content(self, tokens: Tensor, length: int) -> Tensor:
        """Return the positions of r in r': `(b, L, d)` to `(b, length, d)`."""


class Output(NamedTuple):
    """A model's answer: the prediction, and the trace of the token path (None without one)."""

    prediction: Tensor
    trace: Any = None


class Model(nn.Module):
    """backbone -> (path) -> head. Every strategy trains this one shape; strategies may put a `path` in."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        # A module; the annotation says what is asked of it.
        self.path: TokenPath | None = None
        self.head = head

    def forward(self, inputs: Inputs) -> Output:
        """Predict."""
        features = self.backbone(inputs)
        tokens = features.tokens
        if self.path is None:
            return Output(self.head(Reading(tokens, tokens, features, inputs)))
        read, trace = self.path(inputs.image, tokens)
        return Output(self.head(Reading(read, self.path.content(read, tokens.shape[1]), features, inputs)), trace)


Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Picture(NamedTuple):
    """One prediction for people.

    Attributes:
        panels: caption and picture, `(h, w)` or `(h, w, 3)` uint8, to be shown side by side.
        truth: in words, where words say something.
        prediction: in words.
        confidence: of the prediction, 0 to 1.
        correct: whether it is right, where that is a yes or no.
    """

    panels: tuple[tuple[str, Pixels], ...]
    truth: str = ""
    prediction: str = ""
    confidence: float | None = None
    correct: bool | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a task says about one case that came as files, on the grid of its first image.

    Attributes:
        facts: in words and numbers, for JSON.
        mask: `(*spatial)`, a class number for every pixel of the image's array.
        classes: names of the mask's numbers; 0 is background.
        image: `(c, *axes)` float32 in [0, 1], c 1 or 3, over the same extent as the image's array. It may have more pixels.
    """

    facts: Mapping[str, Any]
    mask: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    classes: tuple[str, ...] = ()
    image: np.ndarray[Any, np.dtype[np.float32]] | None = None


class TaskOptions(BaseModel):
    """The table `[tasks.NAME]` of a config; a task with options derives its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _no_tasks_inside(data: "TaskData") -> "Task":
    raise ConfigError(f"task {data.config.task}: nothing here knows how to build it")


@dataclass(frozen=True)
class TaskData:
    """What a task is built from.

    Attributes:
        config: the run.
        cohorts: by name.
        plans: which rows each client holds.
        cache: folder of decoded images.
        make_task: builds the task that `config.task` names; for a task that is made of tasks.
        words: what hospitals say of the words in their rows, where those are elsewhere; empty: all rows are here.
    """

    config: Config
    cohorts: Mapping[str, Cohort]
    plans: Sequence[ClientPlan]
    cache: Path
    make_task: Callable[["TaskData"], "Task"] = _no_tasks_inside
    words: Sequence[Words] = ()

    @property
    def local(self) -> dict[str, Cohort]:
        """The cohorts whose images are here, by name. Across machines the others are known by their spec alone."""
        return {name: cohort for name, cohort in self.cohorts.items() if cohort.here}

    def plan(self, client: str) -> ClientPlan:
        """Return which rows a client holds. Raises DataError for a stranger."""
        for plan in self.plans:
            if plan.id == client:
                return plan
        raise DataError(f"client {client}: not in this federation")


class Task(ABC):
    """Everything that depends on the task. The federation sees this class alone."""

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]]
    """Kinds of cohort (`task` in cohort.toml) that it can train on."""
    apart: ClassVar[bool] = False
    """Whether it can be built where only `TaskData.local` has rows: then it reads the spec of the other cohorts and no more."""
    tells: ClassVar[bool] = False
    """Whether it has to know more of other cohorts' rows than their number: what `introduce` tells."""
    Options: ClassVar[type[TaskOptions]] = TaskOptions
    primary: str
    """The metric that model choice and tables go by; larger is better."""
    headline: tuple[str, ...] = ()
    """Scores that a narrow table shows; empty: all whose names have no "/"."""
    lower_is_better: frozenset[str] = frozenset()
    """Names of scores for which the worst client is the one with the largest value."""
    one_label_space: bool
    """Whether all cohorts have the same label space, so that one head can serve them."""
    label_count: int = 0
    """How many classes the numbers in `labels`, which are then also the targets of a batch, tell apart; 0 without such."""
    notes: tuple[str, ...] = ()
    """What a reader of the results has to know of how they were made; shown in the report."""

    def __init__(self, data: TaskData, options: TaskOptions) -> None:
        self.data = data
        self.options = options

    @classmethod
    def introduce(cls, cohort: Cohort, plan: ClientPlan, discretion: Discretion) -> tuple[ClientPlan, Words | None]:
        """Return what a client says of the words in its rows, and its plan without training rows that this leaves out.

        Raises:
            DataError: nothing may be told.
        """
        del cohort, discretion
        return plan, None

    @abstractmethod
    def client_data(self, client: str) -> ClientData:
        """Return a client's splits. Raises DataError if a client that trains has nothing to train on."""

    @abstractmethod
    def backbone(self) -> Backbone:
        """Return a new backbone, initialised from torch's global generator."""

    @abstractmethod
    def head(self, token_dim: int) -> Head:
        """Return a new head for tokens of width `token_dim`."""

    @abstractmethod
    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return a training batch with random changes that keep its target true."""

    @abstractmethod
    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar."""

    @abstractmethod
    def metric(self, client: str | None = None) -> Metric:
        """Return a fresh metric, for a client or (None) for all of them together."""

    @abstractmethod
    def picture(self, prediction: Tensor, batch: Batch, index: int) -> Picture:
        """Show example `index` of a batch with its prediction."""

    def begin_training(self, model: Model, round_index: int) -> None:
        """Freeze and thaw what the task trains in this round; called at the client before the strategy's `begin`."""
        del model, round_index

    def predict(self, model: Model, batch: Batch) -> Tensor:
        """Return the predictions that are scored: the network's answer, or what a task makes of the network (generated text)."""
        prediction: Tensor = model(batch.inputs).prediction
        return prediction

    def references(self, client: str) -> Mapping[str, Callable[[Batch], Tensor]]:
        """Return the untrained rows of the tables by name (bicubic, majority answer): each gives predictions for a batch."""
        del client
        return {}

    def holds(self, model: Model, client: str) -> frozenset[str] | None:
        """Return the names of `model`'s tensors that a client has and trains; None: all of them."""
        del model, client
        return None

    def probes(self) -> Sequence[Inputs]:
        """Return small inputs that between them pass through every part of the model."""
        size, channels = self.data.config.data.image_size, self.data.config.data.channels
        return [Inputs(torch.zeros(2, channels, size, size))]

    def row_labels(self) -> Mapping[str, Sequence[str]] | None:
        """Return the label of every manifest row by cohort, in the names of the label union; None where a task has no labels."""
        return None

    def labels(self, client: str) -> Tensor | None:
        """Return the training labels `(n,)` of a client, for per-class prototypes; None where a task has none."""
        del client
        return None

    def examples(self, images: Sequence[Image], question: str, client: str) -> Batch:
        """Return the examples of one case of a client's: its slices, scaled and resized as training data are.

        Args:
            images: what was decoded of the case's files; two of them for a pair.
            question: what was asked, or nothing.
            client: whose cohort says how volumes are cut.

        Raises:
            DataError: these images cannot be used.
            ConfigError: no image of this kind can be, or a question is missing or one too many.
        """
        raise ConfigError(f"task {self.name} cannot predict on files")

    def answer(self, prediction: Tensor, batch: Batch, images: Sequence[Image], client: str) -> Answer:
        """Return what the predictions for `examples(images, ...)` say about the case."""
        raise ConfigError(f"task {self.name} cannot predict on files")
