"""`omnifm run`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from omnifm import config as config_

Config = Annotated[Path, typer.Argument(help="A TOML config, e.g. configs/demo.toml.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key; VALUE is TOML. May be repeated.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run.", show_default="runs/CONFIG-STRATEGY-SEED")]


_MOST_COLUMNS = 8


def run(config: Config, set_: Set = [], out: Out = None, resume: Resume = False) -> None:  # noqa: B006  # typer copies it
    """Train and test one federation; leave scores, checkpoint and report in a folder."""
    from omnifm.cli.progress import RunView
    from omnifm.config import load

    settings = load(config, set_)
    folder = out or Path("runs") / f"{config.stem}-{settings.strategy}-{settings.seed}"
    with RunView(f"{settings.strategy} on {config.name}") as view:
        from omnifm.run import execute

        say_what_is_slow(settings)
        metrics = execute(settings, folder, resume=resume, watch=view.event)
    print_scores(metrics)
    typer.echo(f"report: {folder / 'report.html'}")


def say_what_is_slow(settings: "config_.Config") -> None:
    """Say in one line what makes the run slow on this machine, if anything does."""
    from omnifm.engines.device import slow_precision

    if line := slow_precision(settings):
        typer.echo(f"omnifm: {line}", err=True)


def print_scores(metrics: dict[str, Any]) -> None:
    """Print the test scores, one row per view, and what they cost."""
    from rich.console import Console
    from rich.table import Table

    title = f"{metrics['strategy']}, test split" + (" (simulated data)" if metrics["simulated"] else "")
    last, best = metrics["test"], (metrics["best"] or {}).get("test", {})
    found = dict.fromkeys([metrics["primary"], *(name for scores in last.values() for name in scores or ())])
    # Scores of single classes or question types ("dice/anterior") are in metrics.json; a table of a screen's width has no room.
    names = metrics.get("headline") or [name for name in found if "/" not in name][:_MOST_COLUMNS]
    table = Table(title=title)
    for column in ("round, model", *names):
        table.add_column(column.replace("_", " "), justify="left" if column == "round, model" else "right")
    for label, views in (("last", last), ("best val.", best)):
        for view, scores in views.items():
            if scores:
                table.add_row(f"{label} {view}", *(_number(scores.get(name)) for name in names))
        table.add_section()
    for name, views in metrics.get("references", {}).items():
        table.add_row(f"{name} (untrained)", *(_number(views["personal"].get(score)) for score in names))
    console = Console()
    console.print(table)
    traffic, seconds = metrics["bytes"], metrics["seconds"]
    console.print(
        f"{traffic['up'] / 2**20:.1f} MiB up, {traffic['down'] / 2**20:.1f} MiB down "
        f"(bank {(traffic['bank_up'] + traffic['bank_down']) / 2**20:.2f}); "
        f"{seconds['total']:.0f} s; {metrics['peak_rss_mib']:.0f} MiB at most"
    )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
