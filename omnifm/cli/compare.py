"""`omnifm compare`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from omnifm.cli.run import Config, Set, say_what_is_slow
from omnifm.errors import ConfigError

Strategies = Annotated[str, typer.Option(help="Names with commas between, e.g. omnifm,fedavg,local.")]
Seeds = Annotated[str, typer.Option(help="Whole numbers with commas between.")]
Participation = Annotated[str, typer.Option(help="Fractions with commas between; default: the config's.")]
Variants = Annotated[Path | None, typer.Option(help="A TOML file of variants: [NAME] strategy = '...', set = ['key=value'].")]
Jobs = Annotated[int, typer.Option(min=1, help="Cells that run side by side, one process each.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the comparison.")]

T = TypeVar("T")


def compare(
    config: Config,
    strategies: Strategies = "",
    seeds: Seeds = "0",
    participation: Participation = "",
    variants: Variants = None,
    set_: Set = [],  # noqa: B006  # typer copies it
    jobs: Jobs = 1,
    out: Out = Path("runs/compare"),
) -> None:
    """Run strategies x seeds x participation; print means, write table.csv, summary.csv and a report. Skips finished cells."""
    from omnifm.cli.progress import cells_bar
    from omnifm.compare import Variant, plan_cells, read_variants
    from omnifm.compare import compare as run_all

    rows = [Variant(name) for name in parts(strategies, str, "--strategies")]
    rows += read_variants(variants) if variants else []
    if not rows:
        raise ConfigError("nothing to compare: give --strategies or --variants")
    cells = plan_cells(config, rows, parts(seeds, int, "--seeds"), parts(participation, float, "--participation"), set_)
    say_what_is_slow(cells[0].config)
    with cells_bar(len(cells)) as show:
        status = run_all(cells, out, jobs=jobs, show=show)
    failed = [name for name, outcome in status.items() if outcome != "ok"]
    if len(failed) < len(status):
        _print_means(out)
        typer.echo(f"table: {out / 'table.csv'}\nreport: {out / 'report.html'}")
    if failed:
        typer.echo(f"omnifm: {len(failed)} of {len(status)} cells failed, the first: {failed[0]}: {status[failed[0]]}", err=True)
        sys.exit(1)


def parts(text: str, convert: Callable[[str], T], option: str) -> list[T]:
    """Return the values of an option that has commas between them. Raises ConfigError naming the option."""
    try:
        return [convert(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected values with commas between") from None


def _print_means(out: Path) -> None:
    """Print mean and standard deviation, over seeds, of the score that the task goes by."""
    import csv
    import json

    from rich.console import Console
    from rich.table import Table

    with (out / "table.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] in ("ok", "reference")]
    first = next(row["cell"] for row in rows if row["status"] == "ok")
    primary = json.loads((out / "cells" / first / "metrics.json").read_text(encoding="utf-8"))["primary"]
    views = [f"{view}_{primary}" for view in ("personal", "worst", "global", "finetuned")]
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["strategy"], row["variant"], row["participation"]), []).append(row)
    table = Table(title=f"{primary} on the test split, last round, mean over seeds")
    for column in ("strategy", "participation", *views, "seconds"):
        table.add_column(column.removesuffix(f"_{primary}"), justify="left" if column == "strategy" else "right")
    for (strategy, variant, level), members in groups.items():
        cells = [_mean(members, view) for view in views] + [_mean(members, "seconds", digits=0)]
        table.add_row(" ".join(filter(None, (strategy, variant))), level, *cells)
    Console().print(table)


def _mean(rows: list[dict[str, str]], column: str, digits: int = 3) -> str:
    """Return the mean, with the standard deviation from two rows on."""
    import statistics

    values = [float(row[column]) for row in rows if row.get(column)]
    if not values:
        return "none"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
