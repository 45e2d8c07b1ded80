"""The composition root: from a `Config` to the objects of a run. One table per plug-in kind, NAME -> "module:Class"."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from omnifm import seeds
from omnifm.config import CohortConfig, Config, EngineConfig, one_line
from omnifm.data.cache import default_cache_dir
from omnifm.data.cohort import Cohort
from omnifm.data.partition import ClientPlan, partition, require_own_ids
from omnifm.data.splits import crossing
from omnifm.data.vetted import require_vetted
from omnifm.data.words import Words
from omnifm.engines.device import device_of, prepare_process
from omnifm.engines.inprocess import InProcessEngine
from omnifm.engines.simulation import SimulationEngine, require_simulation
from omnifm.engines.stage import Stage
from omnifm.engines.workers import WorkerEngine
from omnifm.errors import ConfigError, DataError
from omnifm.federation.client import LocalConfig, Site
from omnifm.federation.compression import Compression, check_compression
from omnifm.federation.private import Noise, check_private, longest_update
from omnifm.federation.rounds import Engine, Federation
from omnifm.federation.schedule import draw_schedule
from omnifm.federation.secure import SecureEngine
from omnifm.federation.state import ClientInfo, Context, ServerState
from omnifm.federation.store import ClientStore
from omnifm.federation.strategy import Strategy, StrategyOptions
from omnifm.tasks.base import Model, Task, TaskData, TaskOptions

log = logging.getLogger(__name__)

STRATEGIES = {
    "local": "omnifm.federation.strategies.local:Local",
    "centralised": "omnifm.federation.strategies.centralised:Centralised",
    "fedavg": "omnifm.federation.strategies.fedavg:FedAvg",
    "fedprox": "omnifm.federation.strategies.fedprox:FedProx",
    "fedper": "omnifm.federation.strategies.fedper:FedPer",
    "fedbn": "omnifm.federation.strategies.fedbn:FedBN",
    "scaffold": "omnifm.federation.strategies.scaffold:Scaffold",
    "feddyn": "omnifm.federation.strategies.feddyn:FedDyn",
    "fedavgm": "omnifm.federation.strategies.fedavgm:FedAvgM",
    "fedadam": "omnifm.federation.strategies.fedadam:FedAdam",
    "fedyogi": "omnifm.federation.strategies.fedyogi:FedYogi",
    "fedrep": "omnifm.federation.strategies.fedrep:FedRep",
    "ditto": "omnifm.federation.strategies.ditto:Ditto",
    "adcol": "omnifm.federation.strategies.adcol:ADCOL",
    "feddat": "omnifm.federation.strategies.feddat:FedDAT",
    "feddg": "omnifm.federation.strategies.feddg:FedDG",
    "gpfl": "omnifm.federation.strategies.gpfl:GPFL",
    "harmofl": "omnifm.federation.strategies.harmofl:HarmoFL",
    "f3ocus": "omnifm.federation.strategies.f3ocus:F3OCUS",
    "lora": "omnifm.federation.strategies.lora:LoRA",
    "median": "omnifm.federation.strategies.median:Median",
    "trimmed_mean": "omnifm.federation.strategies.trimmed_mean:TrimmedMean",
    "multikrum": "omnifm.federation.strategies.multikrum:MultiKrum",
    "clipped_mean": "omnifm.federation.strategies.clipped_mean:ClippedMean",
    "fedgma": "omnifm.federation.strategies.fedgma:FedGMA",
    "and_mask": "omnifm.federation.strategies.and_mask:AndMask",
    "fediir": "omnifm.federation.strategies.fediir:FedIIR",
    "fedproto": "omnifm.federation.strategies.fedproto:FedProto",
    "moon": "omnifm.federation.strategies.moon:MOON",
    "omnifm": "omnifm.federation.strategies.omnifm:OmniFM",
}
TASKS = {
    "classification": "omnifm.tasks.classification:Classification",
    "segmentation": "omnifm.tasks.segmentation:Segmentation",
    "vqa": "omnifm.tasks.vqa:Vqa",
    "fusion": "omnifm.tasks.fusion:Fusion",
    "super_resolution": "omnifm.tasks.super_resolution:SuperResolution",
    "mixed": "omnifm.tasks.mixed:Mixed",
}


def lookup(table: Mapping[str, str], kind: str, name: str) -> type[Any]:
    """Return the class called `name`. Raises ConfigError that lists the known names."""
    if name not in table:
        raise ConfigError(f"{kind} = {name!r}: unknown; known are {', '.join(sorted(table))}")
    module, _, attribute = table[name].partition(":")
    found: type[Any] = getattr(import_module(module), attribute)
    return found


def strategy_options(config: Config) -> tuple[type[Strategy], StrategyOptions]:
    """Return the strategy's class and its checked options. Tables of other strategies are checked too: a typo is a typo."""
    chosen: tuple[type[Strategy], StrategyOptions] | None = None
    for name in dict.fromkeys([*config.strategies, config.strategy]):
        found = lookup(STRATEGIES, "strategy", name)
        try:
            options = found.Options.model_validate(config.strategies.get(name, {}))
        except ValidationError as error:
            raise ConfigError(f"strategies.{name}.{one_line(error)}") from None
        if name == config.strategy:
            chosen = found, options
    assert chosen is not None  # the loop visits config.strategy
    return chosen


def task_options(config: Config) -> dict[str, TaskOptions]:
    """Return the checked options of the run's task and of every task that `[tasks]` names."""
    options: dict[str, TaskOptions] = {}
    for name in dict.fromkeys([*config.tasks, config.task]):
        found = lookup(TASKS, "task", name)
        try:
            options[name] = found.Options.model_validate(config.tasks.get(name, {}))
        except ValidationError as error:
            raise ConfigError(f"tasks.{name}.{one_line(error)}") from None
    return options


@dataclass(frozen=True)
class Data:
    """Cohorts by name, the clients they are cut into, and where decoded images are kept."""

    cohorts: dict[str, Cohort]
    plans: tuple[ClientPlan, ...]
    cache: Path
    words: tuple[Words, ...] = ()


def load_data(config: Config, *, check: bool = True) -> Data:
    """Read, check and cut the cohorts.

    Args:
        config: the run.
        check: validate cohorts that changed since they were last found sound; a worker process need not.

    Raises:
        DataError: a cohort has a problem, is for another task, or cannot be cut as asked; or two clients have one id.
    """
    cohorts: dict[str, Cohort] = {}
    plans: list[ClientPlan] = []
    for entry in config.federation.cohorts:
        cohort = read_cohort(config, Path(entry.path))
        if cohort.name in cohorts:
            raise DataError(f"cohort {cohort.name}: two cohorts of the federation have this name")
        cohorts[cohort.name] = cohort
        plans += cut(config, entry, cohort)
    require_own_ids(plans)
    cache = cache_folder(config)
    if check:
        require_vetted(cohorts.values(), cache)
        if said := crossing({name: cohort.patients() for name, cohort in cohorts.items()}):
            log.warning("%s", said)
    return Data(cohorts, tuple(plans), cache)


def cache_folder(config: Config) -> Path:
    """Return the folder of decoded images."""
    return Path(config.data.cache) if config.data.cache else default_cache_dir()


def read_cohort(config: Config, folder: Path) -> Cohort:
    """Read a cohort's text files. Raises DataError if one has a problem, or the run's task cannot train on it.

    Splits that the manifest leaves open are the same for every seed: what one run is chosen by is no other run's test.
    """
    cohort = Cohort.read(folder)
    require_readable(config, cohort)
    return cohort


def require_readable(config: Config, cohort: Cohort) -> None:
    """Raise DataError unless the run's task trains on cohorts of this kind."""
    reads: frozenset[str] = lookup(TASKS, "task", config.task).reads
    if cohort.spec.task not in reads:
        known = " or ".join(sorted(reads))
        raise DataError(f"cohort {cohort.name}: its task is {cohort.spec.task}; a run of {config.task} reads {known}")


def cut(config: Config, entry: CohortConfig, cohort: Cohort) -> list[ClientPlan]:
    """Cut a cohort into clients as its entry in the config says. Raises DataError if it cannot be."""
    return partition(
        cohort,
        clients=entry.clients,
        kind=entry.partition or config.federation.partition,
        gamma=config.federation.gamma,
        min_examples=config.federation.min_examples,
        column=entry.column,
        seed=config.seed,
    )


def make_task(config: Config, data: Data) -> Task:
    """Return the task of the run."""
    return build_task(TaskData(config, data.cohorts, data.plans, data.cache, build_task, data.words))


def build_task(data: TaskData) -> Task:
    """Return the task that `data.config` names, on these data.

    Raises:
        ConfigError: some data are on other machines and this task needs them all.
    """
    name = data.config.task
    found: type[Task] = lookup(TASKS, "task", name)
    if not found.apart and len(data.local) < len(data.cohorts):
        raise ConfigError(f"task {name} cannot run across machines yet: it reads the rows of every cohort; use omnifm run")
    task = found(data, task_options(data.config)[name])
    return task


def num_train(data: Data, task: Task) -> dict[str, int]:
    """Return how many training examples every client has: slices, where rows are volumes and are here; else rows."""
    here = {plan.id for plan in data.plans if data.cohorts[plan.cohort].here}
    return {plan.id: len(task.client_data(plan.id).train if plan.id in here else plan.train) for plan in data.plans}


def make_strategy(config: Config, data: Data, task: Task) -> Strategy:
    """Return the strategy of the run."""
    found, options = strategy_options(config)
    clients = tuple(ClientInfo(plan.id, plan.modality) for plan in data.plans)
    return found(options, make_context(config, clients, task))


def make_context(config: Config, clients: tuple[ClientInfo, ...], task: Task) -> Context:
    """Return what a strategy is told of the federation."""
    federation = config.federation
    return Context(
        clients,
        config.seed,
        federation.rounds,
        buffers=config.model.buffers,
        one_label_space=task.one_label_space,
        weighting=federation.weighting,
        label_count=task.label_count,
        budgeted=config.privacy.prototype_clip > 0,
        epochs=federation.local_epochs,
        per_round=federation.local_steps * config.optimiser.batch_size,
    )


def make_model(config: Config, task: Task, strategy: Strategy) -> Model:
    """Build the model. Each part has its own stream, so that adding one part leaves the others' weights as they are.

    Raises:
        ConfigError: parts do not fit each other, or an image of the configured size.
    """
    with seeds.scope(config.seed, "init", "backbone"):
        backbone = task.backbone()
    with seeds.scope(config.seed, "init", "head"):
        head = task.head(backbone.token_dim)
    model = Model(backbone, head)
    try:
        with seeds.scope(config.seed, "init", "strategy"):
            strategy.setup(model)
            strategy.width = backbone.token_dim
            strategy.buffers = frozenset(name for name, _ in model.named_buffers())
            model.eval()
            with torch.no_grad():
                for inputs in task.probes():
                    model(inputs)
    except (ValueError, DataError) as error:
        raise ConfigError(f"the model cannot be built: {error}") from None
    return model


def make_site(config: Config, store: Path, data: Data | None = None) -> Site:
    """Build a site: in this process with `data` at hand, or in a worker process, which loads them."""
    device = prepare_process(config)
    data = data or load_data(config, check=False)
    task = make_task(config, data)
    strategy = make_strategy(config, data, task)
    local = LocalConfig(
        optimiser=config.optimiser,
        engine=config.engine,
        device=device,
        seed=config.seed,
        rounds=config.federation.rounds,
        augmented=config.data.augment != "none",
        privacy=config.privacy,
        compression=config.compression,
    )
    clients = tuple(plan.id for plan in data.plans)
    return Site(partial(make_model, config, task, strategy), task, strategy, clients, ClientStore(store), local)


def make_schedule(config: Config, site: Site, clients: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return who takes part in which round.

    Raises:
        ConfigError: the run asks for a privacy or a compression that this strategy, model or schedule cannot have.
    """
    federation = config.federation
    schedule = draw_schedule(clients, federation.rounds, federation.participation, config.seed)
    shared = site.initial_shared()
    if site.strategy.averages and not shared:
        raise ConfigError(f"strategy {config.strategy}: nothing that trains here is shared, so it would be strategy local")
    check_private(config, site.strategy, shared, schedule)
    check_compression(config, site.strategy, shared)
    return schedule


def make_federation(
    config: Config,
    strategy: Strategy,
    engine: Engine,
    schedule: Sequence[Sequence[str]],
    num_train: Mapping[str, int],
    evaluate: Callable[[ServerState, int], None],
) -> Federation:
    """Return what the round loop runs on, with the protection and the compression that the config asks for."""
    privacy, skips = config.privacy, config.security.refused == "skip"
    if privacy.secure_aggregation:
        engine = SecureEngine(engine, privacy, strategy.context.weight, num_train, skip=skips)
    return Federation(
        strategy=strategy,
        engine=engine,
        schedule=schedule,
        config=config.federation,
        num_train=num_train,
        evaluate=evaluate,
        holds=strategy.holds,
        longest=longest_update(config.security, privacy),
        skips=skips,
        drops=skips and privacy.secure_aggregation,
        counted=privacy.example_clip > 0 or privacy.prototype_clip > 0,
        noise=Noise(privacy, config.seed) if privacy.noise_multiplier else None,
        compression=Compression(config.compression, strategy.buffers),
    )


def check_engine(config: Config) -> None:
    """Raise ConfigError unless what the run's engine needs is installed."""
    if config.engine.kind == "flower-simulation":
        require_simulation()


def make_engine(config: Config, site: Site, store: Path) -> InProcessEngine | WorkerEngine | SimulationEngine:
    """Return the engine. With more than one worker, and in Flower's simulation, sites are built in processes of their own.

    Args:
        config: the run.
        site: that of this process.
        store: folder of the clients' private state, below the checkpoint of the run folder.
    """
    there = partial(make_site, config, store.resolve())
    if config.engine.kind == "flower-simulation":
        clients = [client.id for client in site.strategy.context.clients]
        return SimulationEngine(there, clients, make_stage(config.engine, store.resolve().parents[1]))
    if config.engine.workers == 1:
        return InProcessEngine(site)
    return WorkerEngine(there, config.engine.workers)


def make_stage(config: EngineConfig, out: Path) -> Stage:
    """Return what Ray is told. In a cluster an actor has a GPU of its own, if this machine's runs would have one."""
    gpus = float(device_of(config.device).type == "cuda")
    return Stage(config.workers, config.threads, gpus, config.ray_address, out / "simulation.log")
