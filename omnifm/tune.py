"""A search of equal size for every strategy, on the validation split: `SIZE` configurations each, none of them sees a test image.

The configurations of a strategy are the product of the values that its card names with three learning rates, and, where that
is less than `SIZE`, with two weight decays and two schedules. The best one is what the validation split says after the last
round, of equals the first.
"""

import csv
import io
import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnifm.build import STRATEGIES, lookup
from omnifm.compare import Cell, Shown, Variant, finished, outcome, plan_cells, side_by_side
from omnifm.config import Config, digest, load
from omnifm.errors import ConfigError
from omnifm.federation.card import Card
from omnifm.run import VALIDATION, validate
from omnifm.track.folder import read_json, write_text

SIZE = 12
_RATES = (1 / 3, 1, 3)
_MORE_DECAY = 10
_WHERE = ("commit", "machine")
_EVALUATION = "federation.evaluate_every"
_OWN = ("strategy", "seed", "federation.rounds", "federation.participation", _EVALUATION)
"""What a search sets for itself: its seed is another than a comparison's, it may be shorter, and a comparison has levels."""


@dataclass(frozen=True)
class Trial:
    """One configuration and what became of it; if it failed there is no `score`. `where`: commit and machine."""

    cell: Cell
    status: str
    score: float | None
    seconds: float | None
    where: Mapping[str, str] | None = None


def grid(name: str, config: Config) -> list[tuple[str, ...]]:
    """Return the `SIZE` configurations of a strategy, each as the overrides that make it. The config's own learning rate,
    weight decay and schedule come first; options of the strategy come as its card names them.

    Raises:
        ConfigError: the strategy is unknown.
    """
    card: Card = lookup(STRATEGIES, "strategy", name).card
    optimiser = config.optimiser
    rates = sorted((float(f"{optimiser.lr * factor:.3g}") for factor in _RATES), key=lambda rate: rate != optimiser.lr)
    axes: dict[str, Sequence[Any]] = {f"strategies.{name}.{key}": values for key, values in card.search.items()}
    axes["optimiser.lr"] = rates
    others = ("constant", "cosine") if optimiser.schedule == "constant" else ("cosine", "constant")
    decay = optimiser.weight_decay
    fillers = {"optimiser.weight_decay": (decay, decay * _MORE_DECAY or 1e-2), "optimiser.schedule": others}
    for key, values in fillers.items():
        if math.prod(map(len, axes.values())) < SIZE:
            axes[key] = values
    found = [
        tuple(f"{key}={json.dumps(value)}" for key, value in zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]
    assert len(found) == SIZE, f"the card of {name} names {len(found)} configurations"
    return found


def plan(path: Path, strategies: Sequence[str], seed: int, overrides: Sequence[str]) -> list[Cell]:
    """Return the trials of all strategies as cells `STRATEGY-NN`. Validation comes after the last round alone.

    Raises:
        ConfigError: a config is wrong, or nothing is asked for.
    """
    config = load(path, overrides)
    once = f"{_EVALUATION}={config.federation.rounds}"
    variants = [
        Variant(name, f"{number:02d}", (*_besides(overrides, changes), *changes, once))
        for name in strategies
        for number, changes in enumerate(grid(name, config))
    ]
    return plan_cells(path, variants, [seed], [], overrides)


def _besides(overrides: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Return what was set for all trials and belongs to what they chose: a strategy tuned with BatchNorm is compared with it."""
    own = {_key(text) for text in (*changes, *_OWN)}
    return [text for text in overrides if _key(text) not in own]


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def tune(cells: Sequence[Cell], out: Path, *, jobs: int = 1, show: Shown | None = None) -> list[Trial]:
    """Run the trials that are not finished; keep `trials.csv` and `tuned.toml` up to date. Returns all trials in order.

    Raises:
        ConfigError: the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made ({error.strerror})") from None
    status = {cell.name: "ok" for cell in cells if finished(cell, out, VALIDATION)}
    todo = [cell for cell in cells if cell.name not in status]
    for cell in cells:
        if show and cell not in todo:
            show(cell, "ok")
    for cell, said in side_by_side(_try, todo, out, jobs, lasting=True):
        status[cell.name] = said
        _write(_trials(cells, status, out), out)
        if show:
            show(cell, said)
    trials = _trials(cells, status, out)
    _write(trials, out)
    return trials


def _try(cell: Cell, out: Path) -> str:
    return outcome(validate, cell, out)


def _trials(cells: Sequence[Cell], status: Mapping[str, str], out: Path) -> list[Trial]:
    trials = []
    for cell in (cell for cell in cells if cell.name in status):
        found = read_json(cell.folder(out) / VALIDATION) if status[cell.name] == "ok" else None
        score = found["personal"].get(found["primary"]) if found else None
        if found and score is None:
            status = {**status, cell.name: "no client has a row of the validation split to choose by"}
        seconds, where = (found["seconds"], read_json(cell.folder(out) / "environment.json")) if found else (None, None)
        trials.append(Trial(cell, status[cell.name], score, seconds, where))
    return trials


def best(trials: Sequence[Trial]) -> dict[str, Trial]:
    """Return the best trial of each strategy that has one with a score; of equals the first."""
    found: dict[str, Trial] = {}
    for trial in trials:
        name = trial.cell.variant.strategy
        if trial.score is not None and (name not in found or trial.score > (found[name].score or 0)):
            found[name] = trial
    return found


def changes(trial: Trial) -> list[str]:
    """Return what the configuration sets."""
    return [text for text in trial.cell.variant.overrides if _key(text) != _EVALUATION]


def remarks(trials: Sequence[Trial]) -> dict[str, list[str]]:
    """Return, by strategy, what a reader of its search should know: where the best value is the last one tried, and what made no
    difference. Strategies with a trial that has no score are left out.
    """
    found: dict[str, list[str]] = {}
    for name, chosen in best(trials).items():
        own = [trial for trial in trials if trial.cell.variant.strategy == name]
        if all(trial.score is not None for trial in own):
            found[name] = _remarks(own, chosen)
    return found


def _remarks(own: Sequence[Trial], chosen: Trial) -> list[str]:
    settings = [dict(text.split("=", 1) for text in changes(trial)) for trial in own]
    said = []
    for key, value in dict(text.split("=", 1) for text in changes(chosen)).items():
        tried = {values[key] for values in settings}
        if len(tried) == 1:
            continue
        scores: dict[tuple[str, ...], set[float | None]] = {}
        for values, trial in zip(settings, own, strict=True):
            others = tuple(text for other, text in values.items() if other != key)
            scores.setdefault(others, set()).add(trial.score)
        if all(len(group) == 1 for group in scores.values()):
            said.append(f"{key} makes no difference here: all {len(tried)} values score alike")
        elif edge := _edge(value, tried):
            said.append(f"{key} = {value} is the {edge} tried: there may be better ones")
    return said


def _edge(value: str, tried: Collection[str]) -> str:
    """Return whether a number is the `lowest` or `highest` of three or more tried; empty: neither, or no number."""
    numbers = sorted(number for text in tried if type(number := json.loads(text)) in (int, float))
    if len(numbers) < 3 or json.loads(value) not in (numbers[0], numbers[-1]):
        return ""
    return "lowest" if json.loads(value) == numbers[0] else "highest"


def _write(trials: Sequence[Trial], out: Path) -> None:
    chosen = best(trials)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("trial", "strategy", "set", "seed", "rounds", "config_hash", "status", "validation", "seconds", "chosen", *_WHERE)
    )
    for trial in trials:
        config, name = trial.cell.config, trial.cell.variant.strategy
        score = "" if trial.score is None else round(trial.score, 6)
        seconds = "" if trial.seconds is None else round(trial.seconds, 1)
        facts = (config.seed, config.federation.rounds, digest(config), trial.status, score, seconds)
        where = trial.where or dict.fromkeys(_WHERE, "")
        row = (trial.cell.name, name, " ".join(changes(trial)), *facts, trial is chosen.get(name))
        writer.writerow((*row, *(where[key] for key in _WHERE)))
    write_text(out / "trials.csv", text.getvalue())
    said = remarks(trials)
    tables = [
        "".join(f"# {remark}\n" for remark in said.get(name, ()))
        + f"[{name}-tuned]\nstrategy = {json.dumps(name)}\nset = {json.dumps(changes(t))}\n"
        for name, t in chosen.items()
    ]
    write_text(out / "tuned.toml", "\n".join(tables))
