"""Which data whom: a hospital's own cohort and what it knows of the others; the server's none."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnifm import build
from omnifm.config import CohortConfig, Config
from omnifm.data.cohort import Cohort
from omnifm.data.partition import BOUNDARY, ClientPlan
from omnifm.data.vetted import require_vetted
from omnifm.data.words import Discretion
from omnifm.errors import ConfigError, DataError, FederationError
from omnifm.federation.introduction import Introduction, in_order, introduce
from omnifm.tasks.base import Task
from omnifm.tasks.mixed import changed

COLUMNS = ("site", "modality")
"""What a config may part a hospital's cohort by, unless the hospital names other columns."""
FILES = ("tasks.fusion.vgg", "tasks.vqa.llava.vision", "tasks.vqa.llava.language", "tasks.vqa.llava.connector")
"""Options of tasks that name a file or a folder of weights."""
_RESERVED = Discretion()


@dataclass(frozen=True)
class Own:
    """The client whose data are here."""

    cohort: Cohort
    plan: ClientPlan
    introduction: Introduction


def public(config: Config) -> Config:
    """Return the config as it travels: no path of the server's machine is in it.

    Raises:
        ConfigError: the run needs what no hospital has: all data in one place, or a file of weights.
    """
    strategy, _ = build.strategy_options(config)
    build.task_options(config)
    if strategy.pooled:
        raise ConfigError(f"strategy {config.strategy}: pools all data in one place; across machines nobody may")
    _require_no_file(config)
    for kind, changes in config.tasks.get("mixed", {}).get("set", {}).items() if config.task == "mixed" else ():
        inner = changed(config, kind, changes)
        if inner.data.cache != config.data.cache:
            raise ConfigError(f"tasks.mixed.set.{kind}: data.cache: a folder does not travel")
        _require_no_file(inner)
    entries = tuple(entry.model_copy(update={"path": _name(entry)}) for entry in config.federation.cohorts)
    if len({entry.path for entry in entries}) < len(entries):
        raise ConfigError("federation.cohorts: across machines a cohort is known by its folder's name, and two have the same")
    return config.model_copy(
        update={
            "federation": config.federation.model_copy(update={"cohorts": entries}),
            "data": config.data.model_copy(update={"cache": ""}),
            "engine": config.engine.model_copy(update={"kind": "local", "workers": 1, "ray_address": ""}),
        }
    )


def _require_no_file(config: Config) -> None:
    """Refuse keys that name a file: whoever reads it tells by what it says whether there is one."""
    if config.model.weights not in ("", "imagenet"):
        raise ConfigError("model.weights: a file of weights does not travel; across machines use '' or 'imagenet'")
    for key in FILES:
        value: Any = config.tasks
        for part in key.split(".")[1:]:
            value = value.get(part, "") if isinstance(value, Mapping) else ""
        if value != "":
            raise ConfigError(f"{key}: a file of weights does not travel; across machines leave it empty")


def _name(entry: CohortConfig) -> str:
    return Path(entry.path).name


def own_client(
    config: Config, folder: Path, client: str, discretion: Discretion = _RESERVED, columns: Collection[str] = COLUMNS
) -> Own:
    """Read a hospital's cohort, cut it as the config says, and return the part that is this client's.

    Args:
        config: the server's.
        folder: of the cohort, on this machine.
        client: id of the client; where the cohort is one client's, NAME-0 by the cohort's name.
        discretion: what may be told of answers, where the task has to know some.
        columns: of the manifest, those by whose values the cohort may be parted; a value is in a client's id.

    Raises:
        DataError: the cohort has a problem, is not in the config, or has no such client. Its text may name rows: it stays here.
        FederationError: the config parts the cohort by another column.
    """
    cohort = build.read_cohort(config, folder)
    entry = next((e for e in config.federation.cohorts if _name(e) == cohort.name), None)
    if entry is None:
        known = ", ".join(_name(e) for e in config.federation.cohorts)
        raise DataError(f"cohort {cohort.name}: not in the server's config, whose cohorts are {known}")
    for column in filter(None, (BOUNDARY.get(entry.partition or config.federation.partition), entry.column)):
        if column not in columns:
            raise FederationError(
                f"cohort {cohort.name}: refused by this hospital's policy: to be parted by column {column!r}, "
                f"allowed: {', '.join(columns) or 'none'}"
            )
    plans = build.cut(config, entry, cohort)
    place = next((k for k, plan in enumerate(plans) if plan.id == client), None)
    if place is None:
        known = ", ".join(plan.id for plan in plans)
        raise DataError(f"client {client}: cohort {cohort.name} has no such client; it is cut into {known}")
    require_vetted([cohort], build.cache_folder(config))
    plan, words = _task_of(cohort.spec.task).introduce(cohort, plans[place], discretion)
    return Own(cohort, plan, introduce(cohort, plan, place, words))


def _task_of(kind: str) -> type[Task]:
    """Return the task of a kind of cohort; a mixture has one for each."""
    found: type[Task] = build.lookup(build.TASKS, "task", kind)
    return found


def data_apart(config: Config, introductions: Sequence[Introduction], own: Own | None = None) -> build.Data:
    """Return the federation's data as far as they are here: one client's at a hospital, none at the server.

    The clients are in the order of a run in one process, so the context, the label space and the initial weights are its too.

    Raises:
        FederationError: the introductions contradict each other, the config, or what this client is.
        DataError: a cohort is for another task.
    """
    ordered = in_order(introductions, [_name(entry) for entry in config.federation.cohorts])
    cohorts = {one.spec.name: Cohort.elsewhere(one.spec) for one in ordered}
    for cohort in cohorts.values():
        build.require_readable(config, cohort)
    for one in ordered:
        if _task_of(one.spec.task).tells != (one.words is not None):
            said = "words" if one.words else "no words"
            raise FederationError(f"client {one.client}: says {said} of a cohort of {one.spec.task}")
    plans = [one.plan for one in ordered]
    if own is not None:
        if own.introduction not in ordered:
            raise FederationError(f"client {own.plan.id}: the server's list of clients does not have it as it is")
        cohorts[own.cohort.name] = own.cohort
        plans = [own.plan if plan.id == own.plan.id else plan for plan in plans]
    words = tuple(one.words for one in ordered if one.words is not None)
    return build.Data(cohorts, tuple(plans), build.cache_folder(config), words)
