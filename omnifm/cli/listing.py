"""`omnifm list`."""

from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Literal

import typer

Kind = Annotated[Literal["strategies", "tasks"], typer.Argument(help="strategies or tasks")]


def list_(kind: Kind) -> None:
    """Show what can be named in a config."""
    from rich.console import Console
    from rich.table import Table

    from omnifm.build import STRATEGIES, TASKS

    table = Table(title=kind, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, line in first_lines(STRATEGIES if kind == "strategies" else TASKS).items():
        table.add_row(name, line)
    Console().print(table)


def first_lines(plugins: Mapping[str, str]) -> dict[str, str]:
    """Return by name the first line of what the plug-in's file says of itself."""
    return {name: (import_module(place.partition(":")[0]).__doc__ or "").splitlines()[0] for name, place in plugins.items()}
