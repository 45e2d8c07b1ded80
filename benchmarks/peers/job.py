"""The job that every system does: model, data, batch order, and what a runner leaves behind. Pure torch, in all environments.

A runner is called as `python run_NAME.py JSON`; the JSON is an `Assignment`. It writes into `Assignment.out`:
    result.json   begin and end of each round, of this system and, with `pair`, of the bare loop that ran after each round
    weights.npz   the final weights, in the order of the model's state; `bare.npz` those of the paired bare loop
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omnifm import seeds

CLASSES = 10
CHANNELS = 3
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Job:
    """One federation: every client trains in every round, one pass over its examples.

    Attributes:
        model: `cnn` (282 k parameters) or `resnet18` (11.2 M, GroupNorm).
        clients: clients, all of them in each round.
        rounds: rounds; the first one is warm-up.
        examples: training examples per client; not one more than a whole number of batches, since omnifm skips batches of one.
        batch: examples per SGD step.
        side: side of the square images, pixels.
        lr: learning rate.
        seed: root of all randomness.
        bf16: autocast to bfloat16 with the channels-last layout.
    """

    model: str
    clients: int
    rounds: int
    examples: int
    batch: int
    side: int
    lr: float = 0.01
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.examples % self.batch == 1:
            raise ValueError(f"{self.examples} examples in batches of {self.batch} leave a batch of one, which omnifm skips")

    def client(self, number: int) -> str:
        """Return the id of client `number`."""
        return f"c{number:05d}"


@dataclass(frozen=True)
class Assignment:
    """What a runner is asked for. `options` are the runner's own (workers, recorder, actors)."""

    job: Job
    out: Path
    pair: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return it as the runner's argument."""
        return json.dumps({"job": asdict(self.job), "out": str(self.out), "pair": self.pair, "options": dict(self.options)})

    @classmethod
    def from_argv(cls) -> "Assignment":
        """Read the runner's argument and give torch one thread."""
        torch.set_num_threads(1)
        raw = json.loads(sys.argv[1])
        return cls(Job(**raw["job"]), Path(raw["out"]), raw["pair"], raw["options"])


class Net(nn.Module):
    """body `(b, 3, side, side)` -> `(b, d)`, then a linear head."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits `(b, 10)`."""
        logits: Tensor = self.head(self.body(image))
        return logits


class Block(nn.Module):
    """The basic block of ResNet-18 (He et al., CVPR 2016), with GroupNorm of 8 groups."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.GroupNorm(8, width),
        )
        same = stride == 1 and before == width
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.GroupNorm(8, width))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, before, h, w)` to `(b, width, h/stride, w/stride)`."""
        return torch.relu(self.residual(x) + self.shortcut(x))


def _resnet18() -> Net:
    stem = [nn.Conv2d(CHANNELS, 64, 7, 2, 3, bias=False), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = (64, 64, 128, 128, 256, 256, 512, 512)
    blocks: list[nn.Module] = []
    before = 64
    for width in widths:
        blocks.append(Block(before, width, 1 if width == before else 2))
        before = width
    return Net(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 512)


def _cnn(side: int) -> Net:
    layers: list[nn.Module] = []
    for before, width in ((CHANNELS, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return Net(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (side // 8) ** 2, 218), nn.ReLU()), 218)


def build(job: Job) -> Net:
    """Return the model with its initial weights, the same in every system."""
    with seeds.scope(job.seed, "init"):
        return _resnet18() if job.model == "resnet18" else _cnn(job.side)


@cache
def client_data(job: Job, client: int) -> tuple[Tensor, Tensor]:
    """Return a client's images `(n, 3, side, side)` float32 and labels `(n,)`; kept in memory by every system."""
    generator = seeds.generator(job.seed, "data", client)
    images = torch.randn(job.examples, CHANNELS, job.side, job.side, generator=generator)
    return images, torch.randint(CLASSES, (job.examples,), generator=generator)


def batch_order(job: Job, round_index: int, client: int) -> Tensor:
    """Return the order `(n,)` in which a client sees its examples in a round. It is omnifm's own draw (`federation.client`)."""
    generator = seeds.generator(job.seed, "batches", round_index, job.client(client), 0)
    return torch.randperm(job.examples, generator=generator)


def optimiser(model: nn.Module, job: Job) -> torch.optim.SGD:
    """Return a fresh SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=job.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


class Stopwatch:
    """Begin and end of rounds on the machine's monotonic clock, and the processor time of this process between them."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []

    def begin(self) -> None:
        """A round begins."""
        self._begin, self._cpu = time.monotonic(), time.process_time()

    def end(self) -> None:
        """The round is over."""
        self.rounds.append({"begin": self._begin, "end": time.monotonic(), "cpu": time.process_time() - self._cpu})

    @contextmanager
    def round(self) -> Any:
        """Time the block as one round."""
        self.begin()
        yield
        self.end()


class Result:
    """Collects what a runner measures; with `pair`, runs a round of the bare loop after each of the system's."""

    def __init__(self, assignment: Assignment, bare_round: Callable[[int], object] | None) -> None:
        self._assignment = assignment
        self._bare_round = bare_round if assignment.pair else None
        self.watch, self._bare_watch = Stopwatch(), Stopwatch()

    def after_round(self, index: int) -> None:
        """Let the bare loop do the same round, if asked for."""
        if self._bare_round is not None:
            with self._bare_watch.round():
                self._bare_round(index)

    def save(self, weights: Mapping[str, Tensor], bare: Mapping[str, Tensor] | None = None) -> None:
        """Write the files; fail if a round is missing."""
        expected = self._assignment.job.rounds
        if len(self.watch.rounds) != expected:
            raise RuntimeError(f"{len(self.watch.rounds)} rounds were timed, {expected} were asked for")
        out = self._assignment.out
        out.mkdir(parents=True, exist_ok=True)
        _save_weights(out / "weights.npz", weights)
        if self._bare_round is not None and bare is not None:
            _save_weights(out / "bare.npz", bare)
        record = {"rounds": self.watch.rounds, "bare_rounds": self._bare_watch.rounds}
        (out / "result.json").write_text(json.dumps(record), encoding="utf-8")


def _save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    arrays = {f"{number:04d}": tensor.detach().contiguous().numpy() for number, tensor in enumerate(weights.values())}
    np.savez(path, **arrays)  # type: ignore[arg-type]
