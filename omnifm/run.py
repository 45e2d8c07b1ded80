"""One run from config to report: build, train round by round, evaluate, leave a folder that says all."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from omnifm import build
from omnifm.config import Config, digest, dump, load
from omnifm.data.heterogeneity import gini, heterogeneity
from omnifm.data.partition import plans_digest
from omnifm.errors import CheckpointError
from omnifm.federation.client import Site
from omnifm.federation.evaluation import Evaluation, Evaluator
from omnifm.federation.private import statement
from omnifm.federation.rounds import Engine, run_rounds
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import Strategy
from omnifm.sources import source_record, what_changed
from omnifm.tasks.base import Task
from omnifm.track.checkpoint import Checkpoint
from omnifm.track.examples import save_examples
from omnifm.track.folder import environment, note_commit, read_json, write_config, write_json
from omnifm.track.lock import locked
from omnifm.track.memory import forget_peak, peak_rss_mib
from omnifm.track.recorder import RunRecorder, Watcher
from omnifm.track.snapshots import save_bank
from omnifm.track.summary import totals

T = TypeVar("T")

VALIDATION = "validation.json"
"""What a run that sees no test split leaves last."""
LOCK = "run.lock"
"""Held by the process that works in a run folder."""
_ANEW = "start anew with another --out"
_LAST = ("metrics.json", "report.html")
_SNAPSHOTS = 10


class RunEngine(Engine, Protocol):
    """An engine that holds something until the run is over."""

    def host(self, work: Callable[[], T]) -> T:
        """Run the server's work, in which `exchange` is called, where the engine wants it; return what it returns."""

    def close(self) -> None:
        """Let go of it."""


@dataclass(frozen=True)
class Elsewhere:
    """A federation whose data are not here: what its clients said of themselves, and the engine that reaches them."""

    data: build.Data
    engine: RunEngine


@dataclass
class _Parts:
    """Everything a run is made of."""

    config: Config
    out: Path
    data: build.Data
    task: Task
    strategy: Strategy
    site: Site
    engine: RunEngine
    evaluator: Evaluator
    schedule: tuple[tuple[str, ...], ...]
    checkpoint: Checkpoint
    recorder: RunRecorder


def execute(
    config: Config, out: Path, *, resume: bool = False, watch: Watcher | None = None, elsewhere: Elsewhere | None = None
) -> dict[str, Any]:
    """Run `config` in the folder `out`; return what `metrics.json` holds.

    Args:
        config: the run.
        out: its folder.
        resume: go on with what is there.
        watch: called with each event.
        elsewhere: a federation across machines, in place of the cohorts that the config names.

    Raises:
        OmnifmError: bad config or data, a folder in use, a damaged checkpoint, a client that fails.
    """
    if require_usable(config, out, resume=resume):
        return read_json(out / "metrics.json")
    metrics = _conduct(config, out, resume, watch, elsewhere, _finish)
    write_json(out / "metrics.json", metrics)
    from omnifm.report.html import write_report

    write_report(out)
    return metrics


def validate(config: Config, out: Path, *, resume: bool = False, watch: Watcher | None = None) -> dict[str, Any]:
    """Train, and score on the validation split alone: all that a search may look at. Returns what `validation.json` holds.

    Of the run its events stay; the weights go, as a search leaves hundreds of them.

    Raises:
        OmnifmError: as `execute`.
    """
    if require_usable(config, out, resume=resume, last=(VALIDATION,)):
        return read_json(out / VALIDATION)
    found = _conduct(config, out, resume, watch, None, _validation)
    write_json(out / VALIDATION, found)
    shutil.rmtree(out / "checkpoint")
    return found


def _conduct(
    config: Config,
    out: Path,
    resume: bool,
    watch: Watcher | None,
    elsewhere: Elsewhere | None,
    end: Callable[[_Parts], dict[str, Any]],
) -> dict[str, Any]:
    """Train; return what `end` makes of it."""
    build.strategy_options(config)  # a misspelt option must not wait for the images
    build.task_options(config)
    build.check_engine(config)
    forget_peak()
    with ExitStack() as held:
        parts = _assemble(config, out, elsewhere, watch, partial(_claim, config, out, resume, held))
        held.callback(parts.engine.close)
        held.callback(parts.recorder.close)

        def work() -> dict[str, Any]:
            _train(parts, *_start(parts, resume))
            return end(parts)

        return parts.engine.host(work)


def _validation(parts: _Parts) -> dict[str, Any]:
    """Return the personal scores of the last round on the validation split, and what they cost."""
    with (parts.out / "events.jsonl").open(encoding="utf-8") as file:
        last = json.loads([line for line in file if '"event": "evaluation"' in line][-1])
    facts = {"config_hash": digest(parts.config), "primary": parts.task.primary, "personal": last["personal"]}
    return {**facts, "seconds": parts.recorder.seconds}


def require_usable(config: Config, out: Path, *, resume: bool, last: Sequence[str] = _LAST) -> bool:
    """Check that `out` may be used; return whether the run there is finished: the files it leaves `last` are there.

    Raises:
        CheckpointError: it holds another run, or one that was not to be resumed.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file, not a folder")
    # A start that was killed while it wrote its first file leaves a partial one.
    if not out.exists() or all(path.suffix == ".part" or path.name == LOCK for path in out.iterdir()):
        return False
    if not (out / "config.toml").is_file():
        raise CheckpointError(f"{out}: is not empty and holds no run; name another folder with --out")
    if not resume:
        raise CheckpointError(f"{out}: already holds a run; continue it with --resume, or name another folder with --out")
    if digest(load(out / "config.toml")) != digest(config):
        raise CheckpointError(f"{out / 'config.toml'}: the run was started with another config; --resume needs the same one")
    if changed := what_changed(config, out):
        raise CheckpointError(f"{out / 'split.json'}: {changed}; {_ANEW}")
    return all((out / name).is_file() for name in last)


def _assemble(config: Config, out: Path, elsewhere: Elsewhere | None, watch: Watcher | None, claim: Callable[[], None]) -> _Parts:
    checkpoint = Checkpoint(out / "checkpoint")
    data = elsewhere.data if elsewhere else build.load_data(config)
    site = build.make_site(config, checkpoint.clients, data)
    task, strategy = site.task, site.strategy
    schedule = build.make_schedule(config, site, [p.id for p in data.plans])
    claim()
    recorder = RunRecorder(out, checkpoint, task.primary, watch)
    engine = elsewhere.engine if elsewhere else build.make_engine(config, site, checkpoint.clients)
    sizes = {p.id: {"train": len(p.train), "val": len(p.val), "test": len(p.test)} for p in data.plans}
    facts = (sizes, config.federation, config.optimiser, site.has_global(), site.holds)
    evaluator = Evaluator(task, strategy, engine, *facts, skips=config.security.refused == "skip")
    return _Parts(config, out, data, task, strategy, site, engine, evaluator, schedule, checkpoint, recorder)


def _claim(config: Config, out: Path, resume: bool, held: ExitStack) -> None:
    """Make the folder this run's, and this process the only one there while `held` is open.

    The config is its first file but for the lock: a folder without one is nobody's and cannot be resumed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made ({error.strerror})") from None
    held.enter_context(locked(out / LOCK, "run"))
    require_usable(config, out, resume=resume)  # another process may have been here since it was asked first
    if not (out / "config.toml").is_file():
        write_config(out / "config.toml", dump(config))


def _start(parts: _Parts, resume: bool) -> tuple[ServerState, int]:
    """Return the state to go on from and the rounds completed."""
    if resume and parts.checkpoint.exists():
        _require_same_split(parts)
        server, record = parts.checkpoint.load()
        completed = int(record["rounds_completed"])
        if record["best"] and record["best"][0] != completed:
            parts.checkpoint.load("best")  # damage shows now, not after the last round
        parts.recorder.rewind(record)
        note_commit(parts.out / "environment.json")
        return server, completed
    # Nothing was committed yet: whatever an interrupted start left behind counts for nothing.
    parts.recorder.rewind({"rounds_completed": 0, "events_bytes": 0, "seconds": 0.0, "best": None})
    write_json(parts.out / "environment.json", environment())
    write_json(parts.out / "split.json", split_record(parts.config, parts.data, parts.task))
    return ServerState(shared=parts.site.initial_shared()), 0


def _require_same_split(parts: _Parts) -> None:
    path = parts.out / "split.json"
    if read_json(path).get("sha256") != plans_digest(parts.data.plans):
        raise CheckpointError(f"{path}: the cohorts are not those this run was started with; {_ANEW}")


def split_record(config: Config, data: build.Data, task: Task) -> dict[str, Any]:
    """Return who holds which rows, its SHA-256, and how heterogeneous that is."""
    return {
        "sha256": plans_digest(data.plans),
        "seed": config.seed,
        "heterogeneity": _measured(data, task),
        **source_record(config, data),
        "clients": [plan.record() for plan in data.plans],
        "simulated": _simulated(data),
    }


def _measured(data: build.Data, task: Task) -> dict[str, float | None]:
    """Return how different the clients are; where their rows are elsewhere, how unequal their sizes are."""
    if all(cohort.here for cohort in data.cohorts.values()):
        return asdict(heterogeneity(data.cohorts, data.plans, task.row_labels()))
    return {"h_mod": None, "h_lab": None, "h_size": gini([len(plan.train) for plan in data.plans]), "h_ls": None}


def _simulated(data: build.Data) -> bool:
    return any("simulated" in cohort.spec.title.lower() for cohort in data.cohorts.values())


def _train(parts: _Parts, server: ServerState, completed: int) -> None:
    schedule, plans = parts.schedule, parts.data.plans
    parts.recorder.announce(completed, len(schedule), len(schedule[0]), len(plans))
    federation = build.make_federation(
        parts.config,
        parts.strategy,
        parts.engine,
        schedule,
        build.num_train(parts.data, parts.task),
        lambda state, done: _evaluate_validation(parts, state, done),
    )
    run_rounds(federation, server, completed, parts.recorder)


def _evaluate_validation(parts: _Parts, server: ServerState, done: int) -> None:
    started = time.perf_counter()
    found = parts.evaluator.evaluate(server, done, "val")
    clients = {client: views["personal"] for client, views in found.clients.items()}
    record = {"event": "evaluation", "round": done - 1, "split": "val", **found.views, "clients": clients}
    parts.recorder.event({**record, "seconds": time.perf_counter() - started})
    rows, rounds = parts.strategy.bank_rows(server), parts.config.federation.rounds
    if rows is not None and (done % max(1, rounds // _SNAPSHOTS) == 0 or done == rounds):
        save_bank(parts.out / "bank", done - 1, rows, parts.strategy.context)


def _finish(parts: _Parts) -> dict[str, Any]:
    """Test the last and the best round; return what `metrics.json` holds."""
    started = time.perf_counter()
    tested: dict[str, Evaluation] = {}
    best_round: int | None = None
    for name in ("last", "best"):
        if parts.checkpoint.exists(name):
            server, record = parts.checkpoint.load(name)
            done = int(record["rounds_completed"])
            best_round = done - 1 if name == "best" else best_round
            tested[name] = parts.evaluator.evaluate(server, done, "test", finetune=True)
            if name == "last" and all(cohort.here for cohort in parts.data.cohorts.values()):
                save_examples(parts.out / "examples", parts.site, parts.strategy, server, done)
    config = parts.config
    return {
        "task": config.task,
        "strategy": config.strategy,
        "seed": config.seed,
        "rounds": config.federation.rounds,
        "participation": config.federation.participation,
        "primary": parts.task.primary,
        "config_hash": digest(config),
        "simulated": _simulated(parts.data),
        "clients": _client_table(parts, tested["last"]),
        "test": tested["last"].views,
        "best": {"round": best_round, "test": tested["best"].views, "clients": _client_table(parts, tested["best"])}
        if "best" in tested
        else None,
        "best_validation_round": best_round,
        "headline": list(parts.task.headline),
        "notes": list(parts.task.notes),
        "references": parts.evaluator.references(config.federation.rounds, "test"),
        **totals(parts.out / "events.jsonl", time.perf_counter() - started, parts.recorder.seconds),
        **_privacy(parts),
        "peak_rss_mib": peak_rss_mib(config.engine.workers if config.engine.kind == "local" else 1),
    }


def _privacy(parts: _Parts) -> dict[str, Any]:
    found = statement(parts.config, build.num_train(parts.data, parts.task), parts.schedule, parts.strategy)
    return {} if found is None else {"privacy": found}


def _client_table(parts: _Parts, found: Evaluation) -> list[dict[str, Any]]:
    views = ("global", "personal", "finetuned")
    return [
        {
            "id": plan.id,
            "cohort": plan.cohort,
            "modality": plan.modality,
            "num_train": len(plan.train),
            "num_test": len(plan.test),
            "test": {view: found.clients[plan.id].get(view) for view in views},
        }
        for plan in parts.data.plans
    ]
