"""`omnifm list`."""

from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Literal

import typer

Kind = Annotated[Literal["strategies", "tasks"], typer.Argument(help="strategies or tasks")]
_NOTHING = "-"


def list_(kind: Kind) -> None:
    """Show what can be named in a config."""
    from rich.console import Console
    from rich.table import Table

    from omnifm.build import TASKS

    if kind == "tasks":
        table = Table(title=kind, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        rows = [[name, line] for name, line in first_lines(TASKS).items()]
    else:
        table = Table(title=kind, title_justify="left", box=None, padding=(0, 2, 0, 0))
        rows = strategy_rows()
    for number, heading in enumerate(HEADINGS[: len(rows[0])]):
        table.add_column(heading, no_wrap=not number, style="" if number else "bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


HEADINGS = ("name", "paper", "at the client alone", "traffic beside the model", "defined for")


def strategy_rows() -> list[list[str]]:
    """Return for each strategy its name and what its card says, under `HEADINGS`."""
    from omnifm.build import STRATEGIES, lookup
    from omnifm.federation.card import Card

    rows = []
    for name in sorted(STRATEGIES):
        card: Card = lookup(STRATEGIES, "strategy", name).card
        rows.append([name, card.paper, card.private or _NOTHING, traffic(card.up, card.down), card.needs or "every task"])
    return rows


def traffic(up: str, down: str) -> str:
    """Return what travels beside the model's shared tensors, in words."""
    return "; ".join(f"{way}: {what}" for way, what in (("up", up), ("down", down)) if what) or _NOTHING


def first_lines(plugins: Mapping[str, str]) -> dict[str, str]:
    """Return by name the first line of what the plug-in's file says of itself."""
    return {name: (import_module(place.partition(":")[0]).__doc__ or "").splitlines()[0] for name, place in plugins.items()}
