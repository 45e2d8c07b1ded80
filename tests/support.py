"""A federation that lives in memory and trains in milliseconds, for every test that needs one.

Hospitals hold noise images with stripes: the modality decides how the stripes run, the class how bright a half is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from omnifm import build, seeds
from omnifm.config import Config, parse, put
from omnifm.engines.inprocess import InProcessEngine
from omnifm.federation.client import LocalConfig, Site
from omnifm.federation.evaluation import Evaluation, Evaluator
from omnifm.federation.messages import Reply, Request, decode, encode
from omnifm.federation.rounds import Engine, run_rounds
from omnifm.federation.schedule import draw_schedule
from omnifm.federation.state import ClientInfo, ServerState
from omnifm.federation.store import ClientStore
from omnifm.federation.strategy import Strategy
from omnifm.metrics.base import Metric
from omnifm.metrics.classification import ClassificationMetric
from omnifm.tasks.augment import flip_shift
from omnifm.tasks.base import Backbone, Batch, ClientData, Features, Head, Inputs, Picture, Task
from omnifm.tasks.classification import PooledLinear
from omnifm.track.checkpoint import Checkpoint

SIZE, CLASSES, BATCH = 16, 3, 4
STRIPES = {"CT": (1.0, 0.0), "MRI": (0.0, 2.0), "US": (3.0, 3.0)}
# Sizes for 16-pixel images and 8-dimensional tokens; every other option is the default.
TINY = {
    "omnifm": {"band": 8, "width": 4, "dim": 8, "head_dim": 4, "heads": 2, "top_k": 3, "bank": {"capacity": 8, "prototypes": 3}},
    "feddat": {"reduction": 2},
    "f3ocus": {"layers": 2},
}
# Layers after the convolution, for strategies that choose among layers.
LAYERS = {"f3ocus": 4}
# What a strategy cannot do without.
NEEDS = {"fedbn": {"model__norm": "batch"}}
NEIGHBOURS = {"aggregation": "neighbours"}


@dataclass(frozen=True)
class Hospital:
    """A client, and how many examples it has."""

    id: str
    modality: str
    train: int
    val: int = 4
    test: int = 6


# Unequal sizes, of which no sum leaves a batch of one: with BatchNorm it is skipped, and counts would differ by it.
HOSPITALS = (Hospital("a", "CT", 10), Hospital("b", "MRI", 6), Hospital("c", "CT", 12, test=3), Hospital("d", "US", 8))


@dataclass(frozen=True)
class MemorySplit:
    """Examples in memory."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> Batch:
        return Batch(self.images[index], self.labels[index], index)


def make_split(count: int, modality: str, *stream: str | int) -> MemorySplit:
    """Draw `count` images of a modality, the classes in turn."""
    g = seeds.generator(7, "toy", *stream)
    labels = torch.arange(count) % CLASSES
    fy, fx = STRIPES[modality]
    y, x = torch.meshgrid(torch.arange(SIZE) / SIZE, torch.arange(SIZE) / SIZE, indexing="ij")
    stripes = 0.3 * torch.sin(2 * torch.pi * (fy * y + fx * x))
    half = torch.where(x < 0.5, -1.0, 1.0) * (labels - 1)[:, None, None] * 0.2
    noise = 0.1 * torch.randn(count, SIZE, SIZE, generator=g)
    return MemorySplit((0.5 + stripes + half + noise)[:, None].clamp(0, 1), labels)


class TinyBackbone(Backbone):
    """16 tokens of width 8 from an image of 16 pixels."""

    token_dim = 8

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(2, 8)

    def forward(self, inputs: Inputs) -> Features:
        return Features(functional.relu(self.norm(self.conv(inputs.image - 0.5))).flatten(2).transpose(1, 2))


class FlatBackbone(Backbone):
    """One token: 16 averages of 4 x 4 pixels as they are, which makes the model a softmax regression, or `hidden` tanh units."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.token_dim = hidden or SIZE
        self.layers = nn.Sequential(nn.Linear(SIZE, hidden), nn.Tanh()) if hidden else nn.Sequential()

    def forward(self, inputs: Inputs) -> Features:
        return Features(self.layers(functional.avg_pool2d(inputs.image - 0.5, 4).flatten(1))[:, None])


class DeeperBackbone(TinyBackbone):
    """The tiny backbone and linear layers after it. Its first layers start as they do without the others."""

    def __init__(self, norm: str, layers: int) -> None:
        super().__init__(norm)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, inputs: Inputs) -> Features:
        tokens = super().forward(inputs).tokens
        for layer in self.layers:
            tokens = tokens + torch.tanh(layer(tokens))
        return Features(tokens)


class MemoryTask(Task):
    """Classification of the hospitals' images.

    `data` replaces what a hospital holds; `seen` counts trained examples. `hidden`: see FlatBackbone; None: convolution.
    """

    name = "classification"
    reads = frozenset({"classification"})
    primary = "accuracy"
    one_label_space = True
    label_count = CLASSES

    def __init__(
        self,
        hospitals: Sequence[Hospital],
        norm: str = "group",
        data: Mapping[str, ClientData] | None = None,
        hidden: int | None = None,
        layers: int = 0,
    ) -> None:
        self._norm, self._hidden, self._layers = norm, hidden, layers
        self._data = {h.id: self._draw(h) for h in hospitals} | dict(data or {})
        self.seen = 0

    @staticmethod
    def _draw(h: Hospital) -> ClientData:
        sizes = {"train": h.train, "val": h.val, "test": h.test}
        return ClientData(*(make_split(count, h.modality, h.id, split) for split, count in sizes.items()))

    def client_data(self, client: str) -> ClientData:
        return self._data[client]

    def labels(self, client: str) -> Tensor:
        train = self._data[client].train
        return train.batch(torch.arange(len(train))).target

    def backbone(self) -> Backbone:
        if self._hidden is not None:
            return FlatBackbone(self._hidden)
        return DeeperBackbone(self._norm, self._layers) if self._layers else TinyBackbone(self._norm)

    def head(self, token_dim: int) -> Head:
        return PooledLinear(token_dim, CLASSES)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        return batch._replace(image=flip_shift(batch.image, generator))

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        self.seen += len(batch.target) if torch.is_grad_enabled() else 0
        return functional.cross_entropy(prediction, batch.target)

    def probes(self) -> list[Inputs]:
        return [Inputs(torch.zeros(2, 1, SIZE, SIZE))]

    def metric(self, client: str | None = None) -> Metric:
        return ClassificationMetric(CLASSES)

    def picture(self, prediction: Tensor, batch: Batch, index: int) -> Picture:
        raise NotImplementedError


def make_config(strategy: str = "fedavg", options: Mapping[str, Any] | None = None, **changes: Any) -> Config:
    """Return a config of two rounds of everybody; `changes` are dotted keys with `__` for the dot."""
    raw: dict[str, Any] = {
        "strategy": strategy,
        "federation": {"cohorts": [{"path": "nowhere"}], "rounds": 2},
        "data": {"image_size": SIZE, "channels": 1},
        "optimiser": {"lr": 0.1, "batch_size": BATCH},
        "strategies": {strategy: merge_options(strategy, options or {})},
    }
    for key, value in (NEEDS.get(strategy, {}) | changes).items():
        put(raw, key.replace("__", "."), value)
    return parse(raw)


def merge_options(strategy: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tiny sizes of a strategy with `options` over them."""
    tiny = TINY.get(strategy, {})
    merged = {**tiny, **options}
    if "bank" in tiny:
        merged["bank"] = {**tiny["bank"], **options.get("bank", {})}
    if merged.get("aggregation") == "neighbours" or strategy == "omnifm":
        merged.setdefault("neighbourhood_band", 8)
    return merged


MakeEngine = Callable[[Site], Engine]


@dataclass
class Lab:
    """A federation on the bench: build with `make_lab`, then `run`.

    Implements `federation.rounds.Recorder`; checkpoints are saved where `checkpoint` is set.
    """

    config: Config
    hospitals: Sequence[Hospital]
    task: MemoryTask
    strategy: Strategy
    site: Site
    store: ClientStore
    engine: Engine
    schedule: Sequence[Sequence[str]]
    untrained: Mapping[str, Tensor]
    checkpoint: Checkpoint | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    after_round: Callable[["Lab", ServerState, int], None] = lambda lab, server, done: None

    def event(self, record: Mapping[str, Any]) -> None:
        self.events.append({k: v for k, v in record.items() if k != "seconds"})

    def commit(self, server: ServerState, rounds_completed: int) -> None:
        if self.checkpoint:
            self.checkpoint.save(server, rounds_completed, {"events_bytes": 0, "seconds": 0.0, "best": None})
        self.after_round(self, server, rounds_completed)

    @property
    def num_train(self) -> dict[str, int]:
        return {h.id: len(self.task.client_data(h.id).train) for h in self.hospitals}

    def start(self) -> ServerState:
        return ServerState(shared=dict(self.untrained))

    def run(self, server: ServerState | None = None, start: int = 0) -> ServerState:
        server = server or self.start()
        federation = build.make_federation(
            self.config, self.strategy, self.engine, self.schedule, self.num_train, lambda state, done: None
        )
        run_rounds(federation, server, start, self)
        return server

    def evaluate(self, server: ServerState, split: str = "test", *, finetune: bool = False) -> Evaluation:
        sizes = {h.id: {s: len(self.task.client_data(h.id).split(s)) for s in ("train", "val", "test")} for h in self.hospitals}
        facts = (sizes, self.config.federation, self.config.optimiser, self.site.has_global())
        evaluator = Evaluator(self.task, self.strategy, self.engine, *facts, skips=self.config.security.refused == "skip")
        return evaluator.evaluate(server, len(self.schedule), split, finetune=finetune)

    def private(self, client: str, completed: int = 10**6) -> dict[str, Tensor]:
        """Return what the client's disk holds after `completed` rounds."""
        return self.store.load(client, completed)

    def snapshot(self, server: ServerState) -> dict[str, Tensor]:
        """Return everything that is remembered: the server's tensors and every client's."""
        found = {f"shared:{n}": t for n, t in server.shared.items()} | {f"extra:{n}": t for n, t in server.extra.items()}
        for h in self.hospitals:
            found |= {f"{h.id}:{n}": t for n, t in self.private(h.id).items()}
        return found


def make_lab(
    folder: Path,
    strategy: str = "fedavg",
    options: Mapping[str, Any] | None = None,
    *,
    hospitals: Sequence[Hospital] = HOSPITALS,
    data: Mapping[str, ClientData] | None = None,
    engine: MakeEngine = InProcessEngine,
    schedule: Sequence[Sequence[str]] | None = None,
    checkpoint: bool = False,
    hidden: int | None = None,
    layers: int | None = None,
    **changes: Any,
) -> Lab:
    """Build a federation with private state in `folder`. `hidden`, `layers`: MemoryTask's; `changes`: keys, `__` for the dot."""
    config = make_config(strategy, options, **changes)
    deep = LAYERS.get(strategy, 0) if layers is None else layers
    task = MemoryTask(hospitals, config.model.norm, data, hidden, deep)
    site_strategy, server_strategy = (make_strategy(config, hospitals, task) for _ in range(2))
    store = ClientStore(folder / "clients")
    local = LocalConfig(
        optimiser=config.optimiser,
        engine=config.engine,
        device=torch.device("cpu"),
        seed=config.seed,
        rounds=config.federation.rounds,
        augmented=config.data.augment != "none",
        privacy=config.privacy,
        compression=config.compression,
    )
    clients = tuple(h.id for h in hospitals)
    site = Site(partial(build.make_model, config, task, site_strategy), task, site_strategy, clients, store, local)
    server_strategy.buffers = site_strategy.buffers
    server_strategy.holds = site_strategy.holds
    server_strategy.width = site_strategy.width
    server_strategy.common = site_strategy.common
    turns = schedule or draw_schedule(clients, config.federation.rounds, config.federation.participation, config.seed)
    saved = Checkpoint(folder) if checkpoint else None
    return Lab(config, hospitals, task, server_strategy, site, store, engine(site), turns, site.initial_shared(), saved)


def make_strategy(config: Config, hospitals: Sequence[Hospital], task: Task) -> Strategy:
    found, options = build.strategy_options(config)
    infos = tuple(ClientInfo(h.id, h.modality) for h in hospitals)
    return found(options, build.make_context(config, infos, task))


class Spy:
    """An engine that remembers every message."""

    def __init__(self, site: Site) -> None:
        self._inner = InProcessEngine(site)
        self.requests: list[Request] = []
        self.replies: list[Reply] = []

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        for request in requests:
            self.requests.append(request)
            for reply in self._inner.exchange([request]):
                self.replies.append(reply)
                yield reply

    def messages(self) -> list[Request | Reply]:
        return [*self.requests, *self.replies]

    def trained(self, round_index: int | None = None) -> list[Reply]:
        return [r for r in self.replies if r.kind == "train" and round_index in (None, r.round)]


def spy(lab: Lab) -> Spy:
    assert isinstance(lab.engine, Spy)
    return lab.engine


class Wire:
    """An engine that sends every message as bytes."""

    def __init__(self, site: Site) -> None:
        self._inner = InProcessEngine(site)

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        for request in requests:
            sent = decode(encode(request))
            assert isinstance(sent, Request)
            for reply in self._inner.exchange([sent]):
                received = decode(encode(reply))
                assert isinstance(received, Reply)
                yield received


class Ahead:
    """An engine that draws all requests of a round before it answers the first, as one with many workers may."""

    def __init__(self, site: Site) -> None:
        self._inner = InProcessEngine(site)

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        return self._inner.exchange(list(requests))


class Altered:
    """An engine that changes replies on their way."""

    def __init__(self, site: Site, change: Callable[[Reply], Reply]) -> None:
        self._inner = InProcessEngine(site)
        self._change = change

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        return map(self._change, self._inner.exchange(requests))


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose tensors are not the same bits in both."""
    odd = sorted(a.keys() ^ b.keys())
    return odd + [n for n in a if n in b and not (a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]))]
