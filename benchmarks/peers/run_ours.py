"""omnifm's engine on the job: the real round loop, site, engine and FedAvg, with a small task around the job's model.

Options: `workers` (1: in process), `record` (true: the real recorder with events and a checkpoint per round on disk).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from job import CHANNELS, MOMENTUM, WEIGHT_DECAY, Assignment, Job, Result, build, client_data
from run_bare import BareLoop
from torch import Tensor, nn
from torch.nn import functional

from omnifm.config import CohortConfig, EngineConfig, FederationConfig, OptimiserConfig
from omnifm.engines.inprocess import InProcessEngine
from omnifm.engines.workers import WorkerEngine
from omnifm.federation.client import LocalConfig, Site
from omnifm.federation.rounds import Federation, Recorder, run_rounds
from omnifm.federation.state import ClientInfo, Context, ServerState
from omnifm.federation.store import ClientStore
from omnifm.federation.strategies.fedavg import FedAvg
from omnifm.federation.strategy import StrategyOptions
from omnifm.metrics.base import Metric
from omnifm.tasks.base import Backbone, Batch, ClientData, Features, Head, Inputs, Model, Picture, Reading, Task
from omnifm.track.checkpoint import Checkpoint
from omnifm.track.recorder import RunRecorder


@dataclass(frozen=True)
class MemorySplit:
    """A client's examples in memory, as the other systems have them."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> Batch:
        """Return the examples at `index`."""
        return Batch(self.images[index], self.labels[index], index)


class Body(Backbone):
    """The job's body, whose features are one token."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.token_dim = width

    def forward(self, inputs: Inputs) -> Features:
        """Return `(b, 1, d)`."""
        return Features(self.body(inputs.image).unsqueeze(1))


class Classifier(Head):
    """The job's head on the one token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, reading: Reading) -> Tensor:
        """Return logits."""
        logits: Tensor = self.linear(reading.tokens.squeeze(1))
        return logits


class JobTask(Task):
    """The job as a task. Nothing is evaluated, drawn or augmented."""

    name = "benchmark"
    reads = frozenset[str]()
    primary = "accuracy"
    one_label_space = True

    def __init__(self, job: Job) -> None:
        self._job = job
        self._net = build(job)
        self._empty = MemorySplit(torch.empty(0), torch.empty(0))

    def client_data(self, client: str) -> ClientData:
        """Return all examples as the training split."""
        return ClientData(MemorySplit(*client_data(self._job, int(client[1:]))), self._empty, self._empty)

    def backbone(self) -> Backbone:
        """Return the job's body."""
        return Body(self._net.body, self._net.head.in_features)

    def head(self, token_dim: int) -> Head:
        """Return the job's head."""
        return Classifier(self._net.head)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(prediction, batch.target)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return the batch as it is."""
        return batch

    def metric(self, client: str | None = None) -> Metric:
        """Not part of the job."""
        raise NotImplementedError("the benchmark does not evaluate")

    def picture(self, prediction: Tensor, batch: Batch, index: int) -> Picture:
        """Not part of the job."""
        raise NotImplementedError("the benchmark draws no picture")


class SilentRecorder:
    """Keeps nothing."""

    def event(self, record: Mapping[str, Any]) -> None:
        """Forget it."""

    def commit(self, server: ServerState, rounds_completed: int) -> None:
        """Nothing to save."""


def make_site(job: Job, folder: Path) -> Site:
    """Build a site, here or in a worker process."""
    torch.set_num_threads(1)
    clients = tuple(job.client(number) for number in range(job.clients))
    context = Context(tuple(ClientInfo(client, "CT") for client in clients), job.seed, job.rounds)
    task = JobTask(job)
    return Site(
        lambda: Model(backbone := task.backbone(), task.head(backbone.token_dim)),
        task,
        FedAvg(StrategyOptions(), context),
        clients,
        ClientStore(folder / "clients"),
        LocalConfig(
            optimiser=OptimiserConfig(lr=job.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, batch_size=job.batch),
            engine=EngineConfig(device="cpu", precision="bf16" if job.bf16 else "fp32", channels_last=job.bf16),
            device=torch.device("cpu"),
            seed=job.seed,
            rounds=job.rounds,
            augmented=False,
        ),
    )


@contextmanager
def recorder_for(folder: Path, record: bool) -> Iterator[Recorder]:
    """Give a recorder that keeps nothing, or the one of a real run."""
    if not record:
        yield SilentRecorder()
        return
    folder.mkdir(parents=True, exist_ok=True)
    recorder = RunRecorder(folder, Checkpoint(folder / "checkpoint"), "accuracy")
    try:
        yield recorder
    finally:
        recorder.close()


def run(assignment: Assignment, folder: Path) -> None:
    """Do the job round by round, so that the paired bare loop can run in between."""
    job = assignment.job
    site = make_site(job, folder)
    workers = int(assignment.options.get("workers", 1))
    engine = InProcessEngine(site) if workers == 1 else WorkerEngine(partial(make_site, job, folder), workers)
    clients = tuple(job.client(number) for number in range(job.clients))
    config = FederationConfig(cohorts=(CohortConfig(path="."),), rounds=job.rounds, evaluate_every=job.rounds)
    sizes = dict.fromkeys(clients, job.examples)
    server = ServerState(shared=site.initial_shared())
    bare = BareLoop(job)
    result = Result(assignment, bare.round)
    try:
        with recorder_for(folder, bool(assignment.options.get("record"))) as recorder:
            for index in range(job.rounds):
                schedule = (clients,) * (index + 1)
                federation = Federation(site.strategy, engine, schedule, config, sizes, lambda state, done: None)
                with result.watch.round():
                    run_rounds(federation, server, index, recorder)
                result.after_round(index)
    finally:
        engine.close()
    result.save(server.shared, bare.weights)


def main() -> None:
    assignment = Assignment.from_argv()
    assert CHANNELS == 3
    # On the disk of the checkout, not in /tmp, which may be memory.
    assignment.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=assignment.out) as folder:
        run(assignment, Path(folder))


if __name__ == "__main__":
    main()
