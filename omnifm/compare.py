"""Many runs of one config: strategies x participation x seeds. Resumable: a cell that is finished is not run again."""

import csv
import io
import itertools
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnifm.config import Config, digest, load, parse_override, put, read_toml
from omnifm.errors import CheckpointError, ConfigError, OmnifmError
from omnifm.track.folder import read_json, write_text

_VIEWS = ("personal", "global", "worst", "finetuned")


@dataclass(frozen=True)
class Variant:
    """A row of the comparison: a strategy, perhaps with changed keys."""

    strategy: str
    name: str = ""
    overrides: tuple[str, ...] = ()


_Lines = dict[tuple[float, int], dict[str, float | None]]
"""Scores of a reference by participation and seed."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    variant: Variant
    participation: float
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """The cell's folder."""
        label = "-".join(filter(None, (self.variant.strategy, self.variant.name)))
        return f"{label}-p{self.participation:g}-s{self.seed}"

    def folder(self, out: Path) -> Path:
        """Return the folder of its run in the comparison's folder."""
        return out / "cells" / self.name


def read_variants(path: Path) -> list[Variant]:
    """Read `[NAME]` tables with `strategy` and `set` from a TOML file.

    Raises:
        ConfigError: the file is missing, or a table has a bad name, other keys or other types.
    """
    raw = read_toml(path)
    for name, table in raw.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ConfigError(f"{path}: [{name!r}] names a folder, so it may have letters, digits, '_', '-' and '.' only")
        if not isinstance(table, dict) or not _is_variant(table):
            raise ConfigError(f"{path}: [{name}] needs the key strategy, and may have set = ['key=value', ...]")
    # [fedprox-tuned] of strategy fedprox is its variant `tuned`.
    return [
        Variant(table["strategy"], name.removeprefix(f"{table['strategy']}-"), tuple(table.get("set", ())))
        for name, table in raw.items()
    ]


def _is_variant(table: Mapping[str, Any]) -> bool:
    overrides = table.get("set", [])
    texts = [table.get("strategy"), *overrides] if isinstance(overrides, list) else [None]
    return set(table) <= {"strategy", "set"} and all(isinstance(text, str) for text in texts)


def plan_cells(
    path: Path, variants: Sequence[Variant], seeds: Sequence[int], participation: Sequence[float], overrides: Sequence[str]
) -> list[Cell]:
    """Return the cells, every config of them checked before the first run starts.

    Raises:
        ConfigError: a config is wrong, a variant sets what a cell is named after, there is no cell, or two cells would share a
            folder or be one and the same run.
    """
    from omnifm.build import strategy_options, task_options

    levels: list[float | None] = [*participation] or [None]
    for variant in variants:
        _require_truthful(variant, levels_asked=bool(participation))
    cells = []
    for level, seed, variant in itertools.product(levels, seeds, variants):
        own = [f"strategy={variant.strategy!r}", f"seed={seed}"]
        own += [] if level is None else [f"federation.participation={level}"]
        config = load(path, [*overrides, *own, *variant.overrides])
        strategy_options(config)
        task_options(config)
        cells.append(Cell(variant, config.federation.participation, seed, config))
    _require_different(cells)
    return cells


def _require_truthful(variant: Variant, *, levels_asked: bool) -> None:
    """Refuse a variant that sets what its rows are labelled with: they would say one thing and be another."""
    changed: dict[str, Any] = {}
    for text in variant.overrides:
        put(changed, *parse_override(text))
    federation = changed.get("federation")
    level = levels_asked and isinstance(federation, dict) and "participation" in federation
    for key, given in (("strategy", "strategy" in changed), ("seed", "seed" in changed), ("federation.participation", level)):
        if given:
            label = variant.name or variant.strategy
            raise ConfigError(f"variant {label}: leave {key} out of its set; the comparison gives it to every cell")


def _require_different(cells: Sequence[Cell]) -> None:
    names = [cell.name for cell in cells]
    if not names:
        raise ConfigError("nothing to compare: give at least one strategy or variant, and one seed")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"cell {twice[0]} is asked for twice: name each strategy, variant, seed and participation once")
    known: dict[str, str] = {}
    for cell in cells:
        if (first := known.setdefault(digest(cell.config), cell.name)) != cell.name:
            raise ConfigError(f"cells {first} and {cell.name} are one and the same run: nothing differs in their configs")


Work = Callable[[Cell, Path], str]
"""Runs a cell in its folder; returns `ok`, or the one line that says why it failed. Travels to other processes."""


def run_cells(cells: Sequence[Cell], out: Path, jobs: int = 1) -> Iterator[tuple[Cell, str]]:
    """Run what is not finished; yield each cell and `ok`, or the one line that says why it failed."""
    todo = [cell for cell in cells if not finished(cell, out, "metrics.json")]
    yield from ((cell, "ok") for cell in cells if cell not in todo)
    # Side by side each cell has a process of its own, so that its peak memory is its own; one by one, a run forgets the last's.
    yield from side_by_side(_run_cell, todo, out, jobs, lasting=False)


def side_by_side(work: Work, cells: Sequence[Cell], out: Path, jobs: int, *, lasting: bool) -> Iterator[tuple[Cell, str]]:
    """Yield each cell and what `work` says of it, in the order in which they end. `lasting`: processes serve several cells."""
    if jobs == 1:
        yield from ((cell, work(cell, out)) for cell in cells)
        return
    lost = []
    for cell, outcome in _in_pool(work, cells, out, jobs, lasting):
        if outcome is None:
            lost.append(cell)
        else:
            yield cell, outcome
    # A process that dies takes the pool's other cells with it: each gets another try, alone.
    for cell in lost:
        _, outcome = next(_in_pool(work, [cell], out, 1, lasting))
        yield cell, outcome or "its process has died (killed, or out of memory)"


def _in_pool(work: Work, cells: Sequence[Cell], out: Path, jobs: int, lasting: bool) -> Iterator[tuple[Cell, str | None]]:
    """Run cells in a pool; None is the outcome where it broke."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=None if lasting else 1) as pool:
        futures: dict[Future[str], Cell] = {pool.submit(work, cell, out): cell for cell in cells}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], None


def finished(cell: Cell, out: Path, last: str) -> bool:
    """Return whether `last`, the last file of a run of this very config on these very cohorts, is in the cell's folder."""
    from omnifm.sources import what_changed

    path = cell.folder(out) / last
    try:
        same = path.is_file() and read_json(path).get("config_hash") == digest(cell.config)
        return same and not what_changed(cell.config, path.parent)
    except CheckpointError:
        return False  # to be run like the unfinished ones, which makes it a line of the table that names the damaged file


def _run_cell(cell: Cell, out: Path) -> str:
    from omnifm.run import execute

    return outcome(execute, cell, out)


def outcome(run: Callable[..., object], cell: Cell, out: Path) -> str:
    """Run a cell; return `ok`, or the one line that says why it failed."""
    try:
        run(cell.config, cell.folder(out), resume=True)
    except OmnifmError as error:
        return str(error)
    return "ok"


def write_table(cells: Iterable[Cell], status: Mapping[str, str], out: Path) -> Path:
    """Write `table.csv`: a line per cell that was run, with scores and cost, then the references; empty is undefined."""
    cells = [cell for cell in cells if cell.name in status]
    rows = [cell_row(cell, status[cell.name], out) for cell in cells]
    rows += reference_rows([cell for cell in cells if status[cell.name] == "ok"], out)
    columns = list(dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = out / "table.csv"
    write_text(path, text.getvalue())
    return path


def cell_row(cell: Cell, status: str, out: Path) -> dict[str, Any]:
    """Return a cell's line of the table."""
    federation = cell.config.federation
    row: dict[str, Any] = {
        "cell": cell.name,
        "strategy": cell.variant.strategy,
        "variant": cell.variant.name,
        "participation": cell.participation,
        "seed": cell.seed,
        "rounds": federation.rounds,
        "config_hash": digest(cell.config),
        "status": status,
    }
    folder = cell.folder(out)
    if status != "ok":
        return row
    metrics, machine = read_json(folder / "metrics.json"), read_json(folder / "environment.json")
    row |= _scores(metrics["test"], "")
    row |= _scores((metrics["best"] or {}).get("test", {}), "best_")
    row |= {"best_validation_round": metrics["best_validation_round"]}
    row |= {f"bytes_{way}": metrics["bytes"][way] for way in ("up", "down")}
    row |= {way: metrics["bytes"][way] for way in ("bank_up", "bank_down")}
    row |= {"seconds": round(metrics["seconds"]["total"], 1), "peak_rss_mib": round(metrics["peak_rss_mib"])}
    return row | {"commit": machine["commit"], "machine": machine["machine"]}


def reference_rows(cells: Iterable[Cell], out: Path) -> list[dict[str, Any]]:
    """Return a line for each untrained reference of the task, once per seed and participation: it depends on the data alone.

    Variants may change the data. Where their references differ, each has lines that name it.
    """
    found: dict[str, dict[Variant, _Lines]] = {}
    for cell in cells:
        for name, views in read_json(cell.folder(out) / "metrics.json").get("references", {}).items():
            lines = found.setdefault(name, {}).setdefault(cell.variant, {})
            lines[cell.participation, cell.seed] = {**_scores(views, ""), **_scores(views, "best_")}
    return [
        {
            **{"cell": "", "strategy": name, "variant": label, "participation": participation, "seed": seed},
            **{"rounds": 0, "status": "reference", **scores},
        }
        for name, by_variant in found.items()
        for label, lines in _labelled(by_variant).items()
        for (participation, seed), scores in lines.items()
    ]


def _labelled(by_variant: Mapping[Variant, _Lines]) -> dict[str, _Lines]:
    """Join variants whose lines agree, under the name of the first; under no name if all do."""
    groups: dict[Variant, _Lines] = {}
    for variant, lines in by_variant.items():
        joined = next((first for first, known in groups.items() if _agree(first, known, variant, lines)), variant)
        groups[joined] = {**groups.get(joined, {}), **lines}
    if len(groups) == 1:
        return {"": next(iter(groups.values()))}
    labelled: dict[str, _Lines] = {}
    for variant, lines in groups.items():
        label = variant.name if variant.name not in labelled else "-".join(filter(None, (variant.strategy, variant.name)))
        labelled[label] = lines
    return labelled


def _agree(a: Variant, of_a: _Lines, b: Variant, of_b: _Lines) -> bool:
    shared = of_a.keys() & of_b.keys()
    # Without a seed in common nothing is known, but that variants which change nothing have the same data.
    return all(of_a[key] == of_b[key] for key in shared) and (bool(shared) or not (a.overrides or b.overrides))


def _scores(views: Mapping[str, Mapping[str, float | None] | None], prefix: str) -> dict[str, float | None]:
    return {
        f"{prefix}{view}_{name}": None if value is None else round(value, 6)
        for view in _VIEWS
        for name, value in (views.get(view) or {}).items()
    }


Shown = Callable[[Cell, str], None]


def compare(cells: Sequence[Cell], out: Path, *, jobs: int = 1, show: Shown | None = None) -> dict[str, str]:
    """Run all cells, keep the table up to date after each, write the report. Returns the status of each cell."""
    from omnifm.report.html import write_comparison

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made ({error.strerror})") from None
    status: dict[str, str] = {}
    for cell, outcome in run_cells(cells, out, jobs):
        status[cell.name] = outcome
        write_table(cells, status, out)
        if show:
            show(cell, outcome)
    if "ok" in status.values():
        write_comparison(out)
    return status
