"""What a task owes the federation: data, network parts, loss, metric, picture. One file per task implements it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from omnifm.metrics.base import Metric


class Batch(NamedTuple):
    """Examples of one client.

    Attributes:
        image: `(b, c, h, w)` float32.
        target: what the loss compares with, first dimension b.
        row: `(b,)` int64, the manifest row of each example; slices of one volume share it.
    """

    image: Tensor
    target: Tensor
    row: Tensor

    def to(self, device: torch.device, memory_format: torch.memory_format) -> "Batch":
        """Move to `device`; images take `memory_format`."""
        image = self.image.to(device, non_blocking=True).contiguous(memory_format=memory_format)
        return Batch(image, self.target.to(device, non_blocking=True), self.row)


class Split(Protocol):
    """An indexable set of examples; nothing is in memory until `batch` asks for it."""

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, index: Tensor) -> Batch:
        """Return the examples at `index` `(b,)` int64."""


@dataclass(frozen=True)
class JoinedSplit:
    """Several splits one after the other (the pooled client of `centralised`)."""

    parts: Sequence[Split]

    def __len__(self) -> int:
        """Number of examples of all parts."""
        return sum(len(part) for part in self.parts)

    def batch(self, index: Tensor) -> Batch:
        """Return the examples at `index`, in its order."""
        starts = np.cumsum([0, *(len(part) for part in self.parts)])
        owner = torch.from_numpy(np.searchsorted(starts, index.numpy(), side="right") - 1)
        pieces: list[Batch] = []
        places: list[Tensor] = []
        for number in owner.unique().tolist():
            place = (owner == number).nonzero().flatten()
            pieces.append(self.parts[number].batch(index[place] - int(starts[number])))
            places.append(place)
        order = torch.cat(places).argsort()
        return Batch(*(torch.cat(field)[order] for field in zip(*pieces, strict=True)))


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
    """A network that turns `(b, c, h, w)` into `Features`. `token_dim` is d."""

    token_dim: int

    def forward(self, image: Tensor) -> Features:
        """Return the tokens of `image`."""
        raise NotImplementedError


class Head(nn.Module):
    """A task head on a token sequence `(b, L, d)`; L is l, or longer where a prefix and a suffix were added."""

    def forward(self, tokens: Tensor, context: Any) -> Tensor:
        """Return the prediction."""
        raise NotImplementedError


class Output(NamedTuple):
    """A model's answer: the prediction, and the trace of the token path (None without one)."""

    prediction: Tensor
    trace: Any = None


class Model(nn.Module):
    """backbone -> (path) -> head. Every strategy trains this one shape; strategies may put a `path` in."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        # Image and tokens in, tokens and a trace out.
        self.path: nn.Module | None = None
        self.head = head

    def forward(self, image: Tensor) -> Output:
        """Predict for `(b, c, h, w)`."""
        features = self.backbone(image)
        if self.path is None:
            return Output(self.head(features.tokens, features.context))
        tokens, trace = self.path(image, features.tokens)
        return Output(self.head(tokens, features.context), trace)


class Picture(NamedTuple):
    """One prediction for people: an image `(h, w)` or `(h, w, 3)` uint8, the truth and the prediction in words."""

    image: np.ndarray[Any, np.dtype[np.uint8]]
    truth: str
    prediction: str
    confidence: float
    correct: bool


class Task(ABC):
    """Everything that depends on the task. The federation sees this class alone."""

    name: str
    primary: str
    """The metric that model choice and tables go by; larger is better."""
    one_label_space: bool
    """Whether all cohorts have the same label space, so that one head can serve them."""

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
    def metric(self) -> Metric:
        """Return a fresh metric."""

    @abstractmethod
    def picture(self, prediction: Tensor, batch: Batch, index: int) -> Picture:
        """Show example `index` of a batch with its prediction."""

    def row_labels(self) -> Mapping[str, Sequence[str]] | None:
        """Return the label of every manifest row by cohort, in the names of the label union; None where a task has no labels."""
        return None

    def labels(self, client: str) -> Tensor | None:
        """Return the training labels `(n,)` of a client, for per-class prototypes; None where a task has none."""
        del client
        return None
