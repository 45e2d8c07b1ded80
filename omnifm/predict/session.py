"""A client's model out of a run's folder, ready to answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnifm import build
from omnifm.config import Config, digest, load
from omnifm.data.orient import Affine, Rows, turned
from omnifm.data.partition import plans_digest
from omnifm.data.readers import Image, read_image, read_slice
from omnifm.errors import CheckpointError, ConfigError, DataError, NotFiniteError
from omnifm.federation.messages import Request
from omnifm.federation.rounds import held
from omnifm.predict.cases import Case
from omnifm.predict.orient import is_slice, turned_back, turned_slice
from omnifm.sources import what_changed
from omnifm.tasks.base import Answer, Batch, Task
from omnifm.track.checkpoint import Checkpoint
from omnifm.track.folder import read_json


@dataclass(frozen=True)
class Session:
    """One client's model.

    Attributes:
        config: of the run.
        client: whose model it is.
        checkpoint: `last` or `best`.
        rounds: after how many rounds.
    """

    config: Config
    client: str
    checkpoint: str
    rounds: int
    _task: Task
    _predict: Callable[[Batch], Tensor]
    _rows: Rows

    @property
    def facts(self) -> dict[str, Any]:
        """What answered, for the record."""
        config = self.config
        return {
            "task": config.task,
            "strategy": config.strategy,
            "seed": config.seed,
            "config_hash": digest(config),
            "client": self.client,
            "checkpoint": self.checkpoint,
            "rounds": self.rounds,
        }

    def answer(self, case: Case, question: str = "") -> tuple[Answer, Sequence[Image]]:
        """Read a case's files and predict.

        Raises:
            DataError: these files cannot be used; the line names the first.
            ConfigError: no files of this kind can be, with this model.
        """
        like = self._rows.like
        images = [_read(path, like) for path in case.files]
        try:
            self._rows.require_stored_alike(images[0])
            seen = [self._as_in_training(image, images[0]) for image in images]
            batch = self._task.examples(seen, question, self.client)
            prediction = self._in_parts(batch)
            if not bool(prediction.isfinite().all()):
                raise DataError("the prediction is not finite")
            answer = turned_back(self._task.answer(prediction, batch, seen, self.client), images[0], like, self._axis)
            return answer, images
        except DataError as error:
            raise DataError(f"{case.files[0]}: {error}") from error

    def _as_in_training(self, image: Image, first: Image) -> Image:
        """Turn a volume to lie as the client's do; one that does not say how it lies is taken to lie as the first of its case."""
        if image.affine is None and image.array.ndim == first.array.ndim:
            image = replace(image, affine=first.affine)
        return turned_slice(image, self._rows.like, self._axis) if is_slice(image) else turned(image, self._rows.like)

    @property
    def _axis(self) -> int:
        return self._rows.cohort.spec.slice_axis or 0

    def _in_parts(self, batch: Batch) -> Tensor:
        """Predict a few slices at a time: a volume has hundreds."""
        parts = torch.arange(len(batch.image)).split(4 * self.config.optimiser.batch_size)
        try:
            return torch.cat([self._predict(_part(batch, part)) for part in parts])
        except NotFiniteError:
            raise DataError("the prediction is not finite") from None


def _part(batch: Batch, index: Tensor) -> Batch:
    side = {name: tensor[index] for name, tensor in batch.side.items()}
    return Batch(batch.image[index], batch.target[index], batch.row[index], side, batch.route)


def _read(path: Path, like: Affine | None) -> Image:
    # A model of volumes that lie one way needs to know how a slice lies.
    read = read_slice if like is not None and path.suffix.lower() == ".dcm" and path.is_file() else read_image
    try:
        return read(path)
    except DataError as error:
        raise DataError(f"{path}: {str(error).removeprefix(f'{path.name}: ')}") from error


def open_run(folder: Path, client: str, *, best: bool = False) -> Session:
    """Build a client's model as a run left it: shared tensors, the client's private ones, its snapshot of the bank.

    Args:
        folder: of the run.
        client: id of a client of the run.
        best: take the round that was best on validation, not the last one.

    Raises:
        CheckpointError: there is no run, no finished round, or the cohorts are not those of the run.
        ConfigError: the run has no such client.
        DataError: a cohort of the run is gone or does not fit.
    """
    if not (folder / "config.toml").is_file():
        raise CheckpointError(f"{folder}: holds no run (no config.toml)")
    name = "best" if best else "last"
    checkpoint = Checkpoint(folder / "checkpoint")
    if not checkpoint.exists(name):
        missing = "no round was best on validation" if best and checkpoint.exists() else "no round was completed"
        raise CheckpointError(f"{folder}: has no checkpoint, {missing}")
    config = load(folder / "config.toml")
    build.strategy_options(config)
    build.task_options(config)
    data = build.load_data(config, check=False)
    clients = [plan.id for plan in data.plans]
    if client not in clients:
        raise ConfigError(f"--client {client}: not in this run; its clients are {', '.join(clients)}")
    changed = what_changed(config, folder, files=False)
    if read_json(folder / "split.json").get("sha256") != plans_digest(data.plans) or changed:
        why = f" ({changed})" if changed else ""
        raise CheckpointError(f"{folder / 'split.json'}: the cohorts are not those this run was trained on{why}")
    server, record = checkpoint.load(name)
    site = build.make_site(config, checkpoint.clients, data)
    tensors = held(site.strategy.shared_for(server, client), site.holds.get(client))
    rounds = int(record["rounds_completed"])
    extra = site.strategy.extra_for_prediction(server, client)
    request = Request("evaluate", rounds, client, tensors, extra, server.told(client))
    plan = next(plan for plan in data.plans if plan.id == client)
    return Session(config, client, name, rounds, site.task, site.predictor(request), Rows(data.cohorts[plan.cohort]))
