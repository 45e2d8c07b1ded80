"""A site: what answers requests where the data are. Holds one model, whatever the number of clients it answers for."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from omnifm import seeds
from omnifm.config import CompressionConfig, EngineConfig, OptimiserConfig, PrivacyConfig
from omnifm.errors import ConfigError, FederationError, NotFiniteError
from omnifm.federation import sharing
from omnifm.federation.aggregation import shortened
from omnifm.federation.compression import Compression
from omnifm.federation.effort import Effort, Phase, steps_of
from omnifm.federation.example_level import ExampleLevel
from omnifm.federation.messages import Reply, Request
from omnifm.federation.optimisers import build_optimiser, learning_rate
from omnifm.federation.pooled import JoinedSplit, order_of
from omnifm.federation.release import Release
from omnifm.federation.secure import Parties
from omnifm.federation.state import LocalJob
from omnifm.federation.store import ClientStore
from omnifm.federation.strategy import Step, Strategy
from omnifm.tasks.base import Batch, ClientData, Model, Output, Task

STATE = "state:"
"""Prefix of the strategy's own tensors in a client's private file."""
RESIDUAL = "residual:"
"""Prefix there of what compression holds back for the client's next upload."""
POOLED = "pooled"
"""Name of the client that holds everybody's data (`centralised`)."""


@dataclass(frozen=True)
class LocalConfig:
    """What the local loop needs to know of the config."""

    optimiser: OptimiserConfig
    engine: EngineConfig
    device: torch.device
    seed: int
    rounds: int
    augmented: bool
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)


class Site:
    """Answers `Request`s for the clients whose data are here.

    Args:
        build_model: returns the model, the strategy's modules included; the same one at every site for one seed.
        task: data, loss and metric.
        strategy: the client half is used here.
        clients: ids of the clients of the federation.
        store: private state.
        config: optimiser, engine, device.
    """

    def __init__(
        self,
        build_model: Callable[[], Model],
        task: Task,
        strategy: Strategy,
        clients: tuple[str, ...],
        store: ClientStore,
        config: LocalConfig,
    ) -> None:
        self.task = task
        self.strategy = strategy
        self._clients = clients
        self._store = store
        self._config = config
        self._parties = Parties(config.privacy, strategy.context.weight)
        self._format = torch.channels_last if config.engine.channels_last else torch.contiguous_format
        self.model = build_model().to(config.device)
        if config.engine.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it, its stubs do not
        optimiser, privacy = config.optimiser, config.privacy
        example = ExampleLevel(self.model, privacy, config.seed, optimiser.batch_size) if privacy.example_clip else None
        self._example = example
        self._compression = Compression(config.compression, strategy.buffers)
        self.release = Release(privacy, config.seed) if privacy.prototype_clip else None
        self.sharing = sharing.split_state(self.model, strategy.private(self.model), strategy.context.buffers)
        self.holds = {client: names for client in clients if (names := self._held(client)) is not None}
        strategy.holds = self.holds
        self._has_batch_norm = any(isinstance(module, sharing.BATCH_NORMS) for module in self.model.modules())
        # Clients that never trained start from these, so the model can be handed from client to client.
        self._initial = sharing.read(self.model, (*self.sharing.private, *self.sharing.dropped))

    def initial_shared(self) -> dict[str, Tensor]:
        """Return the shared tensors of the untrained model."""
        return sharing.read(self.model, self.sharing.shared)

    def _held(self, client: str) -> frozenset[str] | None:
        """Return the names a client holds; None: all. Raises ConfigError if they are not the model's."""
        names = self.task.holds(self.model, client)
        if names is not None and (unknown := names - self.model.state_dict().keys()):
            raise ConfigError(
                f"client {client}: task {self.task.name} says it holds tensor {min(unknown)}, which the model has not"
            )
        return names

    def _of(self, client: str, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of `names` that the client holds."""
        own = self.holds.get(client)
        return tuple(names if own is None else (name for name in names if name in own))

    def has_global(self) -> bool:
        """Whether the method has a global model: all that is private is what the strategy knows a neutral value for."""
        private_by_policy = set(self.sharing.private) - self.strategy.private(self.model)
        return not private_by_policy and self.strategy.globalise(self.model)

    def handle(self, request: Request) -> Reply:
        """Answer one request. Raises OmnifmError, naming the client, when it cannot."""
        started = time.perf_counter()
        answers = {"describe": self._describe, "train": self._train, "evaluate": self._evaluate, "secagg": self._parties.answer}
        reply = answers[request.kind](request)
        return replace(reply, seconds=time.perf_counter() - started, nonce=request.nonce)

    # ------------------------------------------------------------------ the three answers
    def _describe(self, request: Request) -> Reply:
        job = self._job(request, {})
        if not len(job.data.train):
            raise FederationError(f"client {job.client}: no training examples")
        return self._reply(request, len(job.data.train), extra=self.strategy.describe(job))

    def _train(self, request: Request) -> Reply:
        try:
            return self._trained(request)
        except NotFiniteError:
            if not self.strategy.tolerates_nonfinite:
                raise
            # The server discards it by its loss. Nothing was saved: the client's private state is that before the round.
            unchanged, _ = self._compression.compress(request.tensors, request.tensors, {})
            return self._reply(request, self._count(request), unchanged, metrics={"loss": math.nan})

    def _count(self, request: Request) -> int:
        return int(request.settings.get("budget") or len(self._data(request.client).train))

    def _trained(self, request: Request) -> Reply:
        state, residual = self._install(request)
        config = self._config
        job = self._job(request, state, learning_rate(config.optimiser, request.round, config.rounds))
        with seeds.scope(config.seed, "train", request.round, request.client):
            self.task.begin_training(self.model, request.round)
            self.strategy.begin(job)
            losses = self._fit(job, self.strategy.phases(job, Effort.of(request.settings)), with_strategy=True)
            upload = self.strategy.finish(job)
        tensors: Mapping[str, Tensor] = sharing.read(self.model, self._of(request.client, self.sharing.shared))
        if self.strategy.tolerates_nonfinite:
            sharing.require_finite(tensors, request.label, "a tensor is not finite after training")
        if self._config.privacy.clip:
            tensors = shortened(tensors, request.tensors, self._config.privacy.clip)
        tensors, held_back = self._compression.compress(tensors, request.tensors, residual)
        if job.release and upload.extra:
            self._store.note_release(job.client, job.round)
        self._save(request, job, held_back)
        reply = self._reply(request, self._count(request), tensors, upload.extra, {**losses, **upload.metrics})
        return self._parties.hide(request, reply)

    def _evaluate(self, request: Request) -> Reply:
        """Score one split. `view`: `personal` (own private state), `global` (shared model alone) or an untrained `reference`."""
        settings = request.settings
        if settings["view"] == "reference":
            answer = self.task.references(request.client)[settings["reference"]]
            data = self._data(request.client)
            return self._reply(request, len(data.train), extra=self._score(request, data, answer))
        if settings["view"] == "global":
            sharing.write(self.model, {**self._initial, **request.tensors})
            self.strategy.globalise(self.model)
            state: dict[str, Tensor] = {}
        else:
            state, _ = self._install(request)
        job = self._job(request, state, float(settings.get("finetune_lr") or 0.0), training=False)
        try:
            states = self._tested(request, job)
        except NotFiniteError:
            if not self.strategy.tolerates_nonfinite:
                raise
            states = {}  # no state of the metric: no score
        return self._reply(request, len(job.data.train), extra=states)

    def _tested(self, request: Request, job: LocalJob) -> dict[str, Tensor]:
        """Fine-tune if asked to; return the state of the metric. Raises NotFiniteError if a loss or prediction is not finite."""
        with seeds.scope(self._config.seed, "evaluate", request.round, request.client):
            self.strategy.begin(job)
            self._settle(job)
            if epochs := request.settings.get("finetune_epochs"):
                self.task.begin_training(self.model, request.round)
                self._fit(job, [Phase(Effort(int(epochs)))], with_strategy=False)
        return self._score(request, job.data, partial(self._predict, job))

    # ------------------------------------------------------------------ state
    def _data(self, client: str) -> ClientData:
        if client != POOLED:
            return self.task.client_data(client)
        # In the order of their ids: what is drawn from all of them does not depend on the order in the config.
        parts = [self.task.client_data(c) for c in sorted(self._clients)]
        return ClientData(*(JoinedSplit([p.split(name) for p in parts]) for name in ("train", "val", "test")))

    def _install(self, request: Request) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Put shared and private tensors into the model; return the strategy's private tensors, and the residual."""
        # Where data are pooled, what stays private is everybody's: no client but the pool ever trains.
        owner = POOLED if self.strategy.pooled else request.client
        saved = self._store.load(owner, request.round, request.settings.get("void", ()))
        private = {name: tensor for name, tensor in saved.items() if not name.startswith((STATE, RESIDUAL))}
        missing = set(self._of(request.client, self.sharing.shared)) - set(request.tensors)
        if missing:
            raise FederationError(f"client {request.client}: the request lacks tensor {min(missing)}")
        try:
            sharing.write(self.model, {**self._initial, **private, **request.tensors})
        except FederationError as error:
            raise FederationError(f"client {request.client}: {error}") from None
        state, residual = (
            {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
            for prefix in (STATE, RESIDUAL)
        )
        return state, residual

    def _save(self, request: Request, job: LocalJob, residual: Mapping[str, Tensor]) -> None:
        private = sharing.read(self.model, self._of(request.client, self.sharing.private))
        private |= {STATE + name: tensor for name, tensor in job.state.items()}
        private |= {RESIDUAL + name: tensor for name, tensor in residual.items()}
        if private:
            sharing.require_finite(private, request.label, "a private tensor is not finite after training (lower optimiser.lr?)")
            asked = request.settings
            self._store.save(request.client, request.round, private, asked.get("keep", ()), asked.get("void", ()))

    def _job(self, request: Request, state: dict[str, Tensor], lr: float = 0.0, *, training: bool = True) -> LocalJob:
        return LocalJob(
            client=request.client,
            round=request.round,
            model=self.model,
            data=self._data(request.client),
            received=request.extra,
            anchor=request.tensors,
            state=state,
            seed=self._config.seed,
            device=self._config.device,
            labels=None if request.client == POOLED else self.task.labels(request.client),
            lr=lr,
            training=training,
            release=self.release,
            released=self._store.released(request.client) if self.release else frozenset(),
        )

    @staticmethod
    def _reply(
        request: Request,
        num_examples: int,
        tensors: Mapping[str, Tensor] | None = None,
        extra: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Reply:
        return Reply(request.kind, request.round, request.client, num_examples, tensors or {}, extra or {}, metrics or {})

    # ------------------------------------------------------------------ the one local loop
    def _batches(self, job: LocalJob, effort: Effort) -> Iterator[Batch | None]:
        """Yield the batches of a round; None: a private draw of no example."""
        if self._example is not None and job.training:
            return self._draws(self._example, job, effort)
        if not effort.steps:
            return itertools.chain.from_iterable(self._epoch(job, epoch, effort) for epoch in range(effort.epochs))
        per_epoch = len(job.data.train) if effort.budget is None else min(effort.budget, len(job.data.train))
        if self._has_batch_norm and min(per_epoch, self._config.optimiser.batch_size) == 1:
            return iter(())  # no epoch has a batch
        epochs = (self._epoch(job, epoch, effort) for epoch in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(epochs), effort.steps)

    def _draws(self, example: ExampleLevel, job: LocalJob, effort: Effort) -> Iterator[Batch | None]:
        count, size = len(job.data.train), self._config.optimiser.batch_size
        for step in range(steps_of(effort, count, size)):
            index = example.draw(job, step)
            batch = job.data.train.batch(index) if len(index) else None
            yield self.task.augment(batch, example.changes(job, step)) if batch is not None and self._config.augmented else batch

    def _epoch(self, job: LocalJob, epoch: int, effort: Effort) -> Iterator[Batch]:
        later = ("phase", job.phase) if job.phase else ()
        generator = seeds.generator(self._config.seed, "batches", job.round, job.client, epoch, *later)
        size = self._config.optimiser.batch_size
        for index in order_of(job.data.train, effort, size, generator).split(size):
            # BatchNorm cannot train on one example; skipping it is what FL-bench does.
            if len(index) > 1 or not self._has_batch_norm:
                batch = job.data.train.batch(index)
                yield self.task.augment(batch, generator) if self._config.augmented else batch

    def _fit(self, job: LocalJob, phases: Sequence[Phase], *, with_strategy: bool) -> dict[str, float]:
        """Train in place; return mean loss and penalty over the steps. Raises NotFiniteError if a loss is not finite."""
        if not len(job.data.train):
            raise FederationError(f"client {job.client}: no training examples")
        self.model.train()
        total = torch.zeros(2, device=self._config.device, dtype=torch.float64)
        for job.phase, phase in enumerate(phases):
            with phase.of(self.model), self._recording(job):
                optimiser = build_optimiser(self.model, self._config.optimiser, job.lr)
                for batch in self._batches(job, phase.effort):
                    total += self._step(job, batch, optimiser, with_strategy)
                    job.steps += 1
        if not job.steps:
            raise FederationError(f"client {job.client}: BatchNorm cannot train on batches of one (set model.norm = 'group')")
        loss, penalty = (total / job.steps).tolist()
        if not math.isfinite(loss + penalty):
            raise NotFiniteError(f"client {job.client}, round {job.round}: the loss is not finite (lower optimiser.lr?)")
        return {"loss": loss, "penalty": penalty}

    def _recording(self, job: LocalJob) -> AbstractContextManager[None]:
        return self._example.recording() if self._example is not None and job.training else nullcontext()

    def _step(self, job: LocalJob, batch: Batch | None, optimiser: torch.optim.Optimizer, with_strategy: bool) -> Tensor:
        """One optimiser step; return (loss, penalty), detached."""
        if batch is None:
            return self._noise_step(job, optimiser)
        batch = batch.to(self._config.device, self._format)
        batch = self.strategy.prepare(job, batch)
        optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            output, loss = self._pass(batch)
            step = Step(job, batch, output, self._again)
            penalty = self.strategy.penalty(step) if with_strategy else None
        (loss if penalty is None else loss + penalty).backward()
        if with_strategy:
            self.strategy.correct(step)
        if self._example is not None and job.training:
            self._example.privatise(job)
        if self._config.optimiser.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._config.optimiser.clip_norm)
        optimiser.step()
        return torch.stack([loss.detach(), torch.zeros_like(loss) if penalty is None else penalty.detach()])

    def _noise_step(self, job: LocalJob, optimiser: torch.optim.Optimizer) -> Tensor:
        assert self._example is not None  # nobody else draws no example
        self._example.privatise(job)
        optimiser.step()
        return torch.zeros(2, device=self._config.device)

    def _pass(self, batch: Batch) -> tuple[Output, Tensor]:
        output: Output = self.model(batch.inputs)
        return output, self.task.loss(output.prediction.float(), batch)

    def _again(self, batch: Batch) -> tuple[Output, Tensor]:
        with self._autocast(), sharing.still_statistics(self.model):
            return self._pass(batch)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._config.device.type, torch.bfloat16, enabled=self._config.engine.precision == "bf16")

    def _settle(self, job: LocalJob) -> None:
        """Fill running statistics that were dropped."""
        train, size = job.data.train, 4 * self._config.optimiser.batch_size
        some = (index for index in torch.arange(len(train)).split(size) if len(index) > 1)
        passes = (partial(self._answer, job, train.batch(index)) for index in some)
        sharing.settle(self.model, self.sharing.dropped, job.client, passes)

    def _predict(self, job: LocalJob, batch: Batch) -> Tensor:
        """Return the model's predictions for a batch, on the CPU. Raises NotFiniteError if what the network says is not."""
        self.model.eval()
        who = f"client {job.client}, round {job.round}"
        with sharing.finite_predictions(self.model, who):
            prediction = self._answer(job, batch)
        sharing.require_finite({"": prediction}, who, sharing.PREDICTION)
        return prediction

    @torch.no_grad()
    def _answer(self, job: LocalJob, batch: Batch) -> Tensor:
        batch = self.strategy.prepare(job, batch.to(self._config.device, self._format))
        with self._autocast():
            prediction = self.task.predict(self.model, batch)
        # Token ids stay whole numbers; what autocast computed is read as float32.
        return (prediction.float() if prediction.is_floating_point() else prediction).cpu()

    def _score(self, request: Request, data: ClientData, answer: Callable[[Batch], Tensor]) -> dict[str, Tensor]:
        metric, split = self.task.metric(request.client), data.split(request.settings["split"])
        for index in torch.arange(len(split)).split(4 * self._config.optimiser.batch_size):
            batch = split.batch(index)
            metric.update(answer(batch), batch.target, batch.row, batch.side)
        state = metric.state()
        sharing.require_finite(state, request.label, sharing.PREDICTION)
        return state

    def predictor(self, request: Request) -> Callable[[Batch], Tensor]:
        """Make the model the client's; return what predicts with it, until the next request."""
        job = self._job(request, self._install(request)[0], training=False)
        self.strategy.begin(job)
        self._settle(job)
        return partial(self._predict, job)

    def predict(self, request: Request, index: Tensor) -> tuple[Tensor, Batch]:
        """Return a client's predictions for test examples `index`, for pictures."""
        batch = self._data(request.client).test.batch(index)
        return self.predictor(request)(batch), batch
