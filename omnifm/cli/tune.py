"""`omnifm tune`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omnifm.cli.compare import Jobs, Strategies, parts
from omnifm.cli.run import Config, Set, say_what_is_slow

if TYPE_CHECKING:
    from omnifm.tune import Trial

Seed = Annotated[
    int, typer.Option(min=0, help="Not one of the seeds that are compared later: it draws clients, weights and order.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the search.")]


def tune(
    config: Config,
    strategies: Strategies = "",
    seed: Seed = 100,
    set_: Set = [],  # noqa: B006  # typer copies it
    jobs: Jobs = 1,
    out: Out = Path("runs/tune"),
) -> None:
    """Search 12 configurations of each strategy on the validation split. Skips finished ones; sees no test image."""
    from omnifm.cli.progress import cells_bar
    from omnifm.errors import ConfigError
    from omnifm.tune import plan, remarks
    from omnifm.tune import tune as search

    names = parts(strategies, str, "--strategies")
    if not names:
        raise ConfigError("nothing to tune: give --strategies")
    cells = plan(config, names, seed, set_)
    say_what_is_slow(cells[0].config)
    with cells_bar(len(cells)) as show:
        trials = search(cells, out, jobs=jobs, show=show)
    _print_best(trials)
    for name, said in remarks(trials).items():
        for remark in said:
            typer.echo(f"{name}: {remark}")
    typer.echo(f"trials: {out / 'trials.csv'}\nchosen: {out / 'tuned.toml'}, for omnifm compare {config} --variants")
    if without := [name for name in names if all(t.score is None for t in trials if t.cell.variant.strategy == name)]:
        reason = next(t.status for t in trials if t.cell.variant.strategy == without[0])
        typer.echo(f"omnifm: no configuration of {without[0]} could be run: {reason}", err=True)
        sys.exit(1)


def _print_best(trials: "Sequence[Trial]") -> None:
    """Print, by strategy, the best configuration, its score, and that of the first."""
    from rich.console import Console
    from rich.table import Table

    from omnifm.tune import best, changes

    table = Table(title="personal score on the validation split, last round")
    for column in ("strategy", "best", "first", "failed", "best configuration"):
        table.add_column(column, justify="left" if column in ("strategy", "best configuration") else "right")
    for name, trial in best(trials).items():
        own = [t for t in trials if t.cell.variant.strategy == name]
        first = "failed" if own[0].score is None else f"{own[0].score:.3f}"
        failed = sum(t.score is None for t in own)
        table.add_row(name, f"{trial.score:.3f}", first, str(failed), "\n".join(changes(trial)))
    Console().print(table)
