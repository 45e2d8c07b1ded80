"""Several tasks in one federation: each client has its own task, and the spectral path is shared by all.

    backbone_t -> enter_t -> path -> leave_t -> head_t          t: the client's task

Tasks whose backbones have the same tensors share one. `enter` and `leave` are linear maps between a backbone's token width and
the path's, identities where the widths agree. A client holds its task's backbone and head and the path, nothing else, so every
tensor is averaged over the clients that train it. Heads count as the client's own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from omnifm import seeds
from omnifm.config import Config, dump, parse, put
from omnifm.data.readers import Image
from omnifm.errors import ConfigError, DataError, FederationError
from omnifm.metrics.base import NOTHING, Metric, Scores
from omnifm.tasks.base import (
    Answer,
    Backbone,
    Batch,
    ClientData,
    Features,
    Head,
    Inputs,
    Model,
    Output,
    Picture,
    Reading,
    Split,
    Task,
    TaskData,
    TaskOptions,
)

T = TypeVar("T")

_SEPARATOR = ":"


class MixedOptions(TaskOptions):
    """How the tasks live together."""

    token_dim: int = Field(128, ge=4, multiple_of=4, description="Width of the tokens that the shared path reads.")
    set: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="By task: config keys that differ from the run's, such as 'data.image_size' = 96."
    )
    full_score: dict[str, float] = Field(
        default_factory=lambda: {"super_resolution": 50.0},
        description="By task: the value of its main score that counts as 1 in `score`; 1 where it is not given.",
    )


def _split_route(route: str) -> tuple[str, str]:
    task, _, inner = route.partition(_SEPARATOR)
    return task, inner


def _inner(batch: Batch) -> Batch:
    """Return a batch as its own task knows it."""
    return batch._replace(route=_split_route(batch.route)[1])


@dataclass(frozen=True)
class RoutedSplit:
    """A task's split whose batches say which task they are for."""

    split: Split
    task: str

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: Tensor) -> Batch:
        """Return the examples at `index`."""
        batch = self.split.batch(index)
        return batch._replace(route=f"{self.task}{_SEPARATOR}{batch.route}")


class MixedBackbone(Backbone):
    """One network per task, or per group of tasks that have the same.

    Args:
        nets: by task.
        token_dim: width of the tokens that leave.
        seed: draws the maps.
    """

    def __init__(self, nets: Mapping[str, Backbone], token_dim: int, seed: int) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.group = _groups(nets)
        self.nets = nn.ModuleDict({group: nets[group] for group in dict.fromkeys(self.group.values())})
        self.enter = nn.ModuleDict({task: _linear(net.token_dim, token_dim, seed, "enter", task) for task, net in nets.items()})

    def forward(self, inputs: Inputs) -> Features:
        """Return tokens `(b, l, token_dim)`; the context is the inner network's features."""
        task, inner = _split_route(inputs.route)
        features: Features = self.nets[self.group[task]](inputs._replace(route=inner))
        return Features(self.enter[task](features.tokens), features)


class MixedHead(Head):
    """One head per task, each behind a map to its own token width, which `seed` draws."""

    def __init__(self, heads: Mapping[str, Head], widths: Mapping[str, int], token_dim: int, seed: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(heads)
        self.leave = nn.ModuleDict({task: _linear(token_dim, width, seed, "leave", task) for task, width in widths.items()})

    def forward(self, reading: Reading) -> Tensor:
        """Return the prediction of the task that the batch is for."""
        task, inner = _split_route(reading.inputs.route)
        leave = self.leave[task]
        inputs = reading.inputs._replace(route=inner)
        features = Features(leave(reading.features.tokens), reading.features.context.context)
        content = features.tokens if reading.content is reading.features.tokens else leave(reading.content)
        tokens = content if reading.tokens is reading.content else leave(reading.tokens)
        prediction: Tensor = self.heads[task](Reading(tokens, content, features, inputs))
        return prediction


def _linear(before: int, after: int, seed: int, *names: str) -> nn.Module:
    if before == after:
        return nn.Identity()
    with seeds.scope(seed, "init", *names):
        # Without a bias: what does not change on the way through the path is no change for the head either.
        return nn.Linear(before, after, bias=False)


def _groups(nets: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return for each task the first one, by name, with a network of the same kind and the same tensors."""
    first: dict[tuple[object, ...], str] = {}
    shape = {task: tuple((n, tuple(t.shape)) for n, t in net.state_dict().items()) for task, net in nets.items()}
    return {task: first.setdefault((type(nets[task]), shape[task]), task) for task in sorted(nets)}


class MixedMetric(Metric):
    """The metrics of several tasks; scores and states carry the task's name. `score` is the mean of their main scores."""

    def __init__(self, metrics: Mapping[str, Metric], main: Mapping[str, tuple[str, float]]) -> None:
        self._metrics = metrics
        self._main = main
        self.counts = frozenset(f"{task}/{name}" for task, metric in metrics.items() for name in metric.counts)

    def update(self, prediction: Tensor, target: Tensor, row: Tensor, side: Mapping[str, Tensor] = NOTHING) -> None:
        """Add a batch of the one task that this metric is for."""
        (metric,) = self._metrics.values()
        metric.update(prediction, target, row, side)

    def state(self) -> dict[str, Tensor]:
        """Return all states, `task/name`."""
        return {f"{task}/{name}": tensor for task, metric in self._metrics.items() for name, tensor in metric.state().items()}

    def vet(self, state: Mapping[str, Tensor], rows: int) -> None:
        """The one task that a client's metric is for judges."""
        ((task, metric),) = self._metrics.items()
        if odd := [name for name in state if not name.startswith(f"{task}/")]:
            raise FederationError(f"score {min(odd)[:60]} is unknown")
        metric.vet({name.removeprefix(f"{task}/"): tensor for name, tensor in state.items()}, rows)

    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> "MixedMetric":
        """Return the metric of the union of `states`, of whichever tasks they are."""
        parts: dict[str, list[dict[str, Tensor]]] = {task: [] for task in self._metrics}
        for state in states:
            for task, found in parts.items():
                own = {n.removeprefix(f"{task}/"): t for n, t in state.items() if n.startswith(f"{task}/")}
                found += [own] if own else []
        return MixedMetric({task: self._metrics[task].merge(found) for task, found in parts.items() if found}, self._main)

    def compute(self) -> Scores:
        """Return `score` and every task's scores, `task/name`."""
        scores = {task: metric.compute() for task, metric in self._metrics.items()}
        main = [(scores[task].get(self._main[task][0]), self._main[task][1]) for task in scores]
        known = [value / full for value, full in main if value is not None]
        own = {f"{task}/{name}": value for task, found in scores.items() for name, value in found.items()}
        return {"score": sum(known) / len(known) if known else None, **own}

    def shares(self) -> dict[str, Fraction]:
        """Return the shares of every task's examples, `task/name`."""
        return {f"{task}/{name}": share for task, metric in self._metrics.items() for name, share in metric.shares().items()}


class _OneTask(Model):
    """A mixed model as one of its tasks sees it. It owns nothing: the model inside is not registered as a part."""

    def __init__(self, model: Model, task: str) -> None:
        nn.Module.__init__(self)
        self._call: Callable[[Inputs], Output] = partial(_routed, model, task)

    def forward(self, inputs: Inputs) -> Output:
        """Predict."""
        return self._call(inputs)


def _routed(model: Model, task: str, inputs: Inputs) -> Output:
    output: Output = model(inputs._replace(route=f"{task}{_SEPARATOR}{inputs.route}"))
    return output


class Mixed(Task):
    """A task per client, after the kind of its cohort."""

    name: ClassVar[str] = "mixed"
    reads: ClassVar[frozenset[str]] = frozenset({"classification", "segmentation", "super_resolution", "vqa", "fusion"})
    apart: ClassVar[bool] = True
    Options: ClassVar[type[TaskOptions]] = MixedOptions
    options: MixedOptions
    primary = "score"
    one_label_space = False

    def __init__(self, data: TaskData, options: MixedOptions) -> None:
        super().__init__(data, options)
        self._task_of = {plan.id: data.cohorts[plan.cohort].spec.task for plan in data.plans}
        kinds: list[str] = sorted({cohort.spec.task for cohort in data.cohorts.values()})
        if strange := sorted(set(options.set) - set(kinds)):
            raise ConfigError(f"tasks.mixed.set.{strange[0]}: the federation has no cohort of this task")
        self.tasks = {kind: self._make(kind) for kind in kinds}
        self.headline = ("score", *(f"{kind}/{task.primary}" for kind, task in self.tasks.items()))
        self.notes = tuple(f"{kind}: {note}" for kind, task in self.tasks.items() for note in task.notes)
        self.lower_is_better = frozenset(f"{kind}/{n}" for kind, task in self.tasks.items() for n in task.lower_is_better)

    def _make(self, kind: str) -> Task:
        cohorts = {name: cohort for name, cohort in self.data.cohorts.items() if cohort.spec.task == kind}
        plans = [plan for plan in self.data.plans if plan.cohort in cohorts]
        config = changed(self.data.config, kind, self.options.set.get(kind, {}))
        return self.data.make_task(TaskData(config, cohorts, plans, self.data.cache, self.data.make_task, self.data.words))

    def _of(self, client: str) -> Task:
        if client not in self._task_of:
            raise DataError(f"client {client}: not in this federation")
        return self.tasks[self._task_of[client]]

    def _routed(self, batch: Batch) -> Task:
        return self.tasks[_split_route(batch.route)[0]]

    def client_data(self, client: str) -> ClientData:
        """Return a client's splits."""
        data = self._of(client).client_data(client)
        return ClientData(*(RoutedSplit(data.split(name), self._task_of[client]) for name in ("train", "val", "test")))

    def backbone(self) -> Backbone:
        """Return the backbones of all tasks. Each has the weights that it has without the others, or in a run of its task."""
        nets = {kind: self._drawn("backbone", task.backbone) for kind, task in self.tasks.items()}
        return MixedBackbone(nets, self.options.token_dim, self.data.config.seed)

    def head(self, token_dim: int) -> Head:
        """Return the heads of all tasks, each with the weights that it has without the others."""
        # Built once more for their widths alone.
        widths = {kind: self._drawn("backbone", task.backbone).token_dim for kind, task in self.tasks.items()}
        heads = {kind: self._drawn("head", partial(task.head, widths[kind])) for kind, task in self.tasks.items()}
        return MixedHead(heads, widths, token_dim, self.data.config.seed)

    def _drawn(self, part: str, make: Callable[[], T]) -> T:
        """Make a task's part from the stream that a run of this task makes it from: none depends on which others there are."""
        with seeds.scope(self.data.config.seed, "init", part):
            return make()

    def holds(self, model: Model, client: str) -> frozenset[str]:
        """Return the names of the client's backbone, head and maps, and of everything outside backbone and head."""
        kind, task = self._task_of[client], self._of(client)
        small = self._inner_model(model, kind)
        assert isinstance(model.backbone, MixedBackbone)
        group, net, head = model.backbone.group[kind], small.backbone, small.head
        inner = task.holds(small, client)
        places = {"backbone": f"backbone.nets.{group}", "head": f"head.heads.{kind}"}
        own = {"backbone": net.state_dict(), "head": head.state_dict()}
        names = {f"{places[part]}.{n}" for part in own for n in own[part] if inner is None or f"{part}.{n}" in inner}
        maps = (f"backbone.enter.{kind}.", f"head.leave.{kind}.")
        state = model.state_dict()
        outside = {n for n in state if not n.startswith(("backbone.", "head."))}
        return frozenset(names | outside | {n for n in state if n.startswith(maps)})

    def begin_training(self, model: Model, round_index: int) -> None:
        """Let every task say what it trains in this round."""
        for kind, task in self.tasks.items():
            task.begin_training(self._inner_model(model, kind), round_index)

    @staticmethod
    def _inner_model(model: Model, kind: str) -> Model:
        """Return backbone and head of one task, the parts themselves."""
        assert isinstance(model.backbone, MixedBackbone) and isinstance(model.head, MixedHead)
        net, head = model.backbone.nets[model.backbone.group[kind]], model.head.heads[kind]
        assert isinstance(net, Backbone) and isinstance(head, Head)
        return Model(net, head)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Change a batch as its task does."""
        return self._routed(batch).augment(_inner(batch), generator)._replace(route=batch.route)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the loss of the batch's task."""
        return self._routed(batch).loss(prediction, _inner(batch))

    def predict(self, model: Model, batch: Batch) -> Tensor:
        """Predict as the batch's task does."""
        kind = _split_route(batch.route)[0]
        return self.tasks[kind].predict(_OneTask(model, kind), _inner(batch))

    def metric(self, client: str | None = None) -> Metric:
        """Return the metric of a client's task, or of all tasks."""
        kinds = self.tasks if client is None else [self._task_of[client]]
        main = {kind: (task.primary, self.options.full_score.get(kind, 1.0)) for kind, task in self.tasks.items()}
        return MixedMetric({kind: self.tasks[kind].metric(client) for kind in kinds}, main)

    def picture(self, prediction: Tensor, batch: Batch, index: int) -> Picture:
        """Show what the batch's task shows."""
        return self._routed(batch).picture(prediction, _inner(batch), index)

    def references(self, client: str) -> Mapping[str, Callable[[Batch], Tensor]]:
        """Return the references of a client's task."""
        return {name: partial(_answered, answer) for name, answer in self._of(client).references(client).items()}

    def probes(self) -> Sequence[Inputs]:
        """Return the probes of all tasks."""
        return [
            inputs._replace(route=f"{kind}{_SEPARATOR}{inputs.route}")
            for kind, task in self.tasks.items()
            for inputs in task.probes()
        ]

    def row_labels(self) -> Mapping[str, Sequence[str]] | None:
        """Return the labels of the cohorts whose task has some."""
        found = [labels for task in self.tasks.values() if (labels := task.row_labels()) is not None]
        return {cohort: rows for labels in found for cohort, rows in labels.items()} if len(found) == len(self.tasks) else None

    def labels(self, client: str) -> Tensor | None:
        """Return a client's training labels, where its task has some."""
        return self._of(client).labels(client)

    def examples(self, images: Sequence[Image], question: str, client: str) -> Batch:
        """Return the examples of a case as the client's task makes them."""
        batch = self._of(client).examples(images, question, client)
        return batch._replace(route=f"{self._task_of[client]}{_SEPARATOR}{batch.route}")

    def answer(self, prediction: Tensor, batch: Batch, images: Sequence[Image], client: str) -> Answer:
        """Return what the client's task makes of the predictions."""
        return self._of(client).answer(prediction, _inner(batch), images, client)


def _answered(answer: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    return answer(_inner(batch))


def changed(config: Config, kind: str, changes: Mapping[str, Any]) -> Config:
    """Return the config of one task of a mixed run.

    Raises:
        ConfigError: a key is unknown or a value does not fit; the line says where it was set.
    """
    raw = dump(config)
    raw["task"] = kind
    for key, value in changes.items():
        put(raw, key, value)
    try:
        return parse(raw)
    except ConfigError as error:
        raise ConfigError(f"tasks.mixed.set.{kind}: {error}") from None
