"""The look of the figures: colours that colour-blind readers can tell apart, and one layout for all.

A figure is a plain Plotly description (`data`, `layout`, `frames`), so that drawing needs no library but the page's plotly.js.
"""

import html
import math
from collections.abc import Iterable
from typing import Any

from omnifm.report.page import Figure

Trace = dict[str, Any]

# Okabe and Ito, "Color Universal Design" (2008), without black and with the yellow darkened for a white page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#B8A800", "#6B6B6B")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "triangle-down")
PATTERNS = ("", "/", ".", "x")
INK, GRID = "#1d2733", "#e4e8ee"


def colours(names: Iterable[str]) -> dict[str, str]:
    """Give each name its colour, in the order given; after eight names the colours begin again."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(dict.fromkeys(names))}


def dashes(names: Iterable[str]) -> dict[str, str]:
    """Give each name its dash, so that two names of one colour still differ."""
    return {name: DASHES[i // len(PALETTE) % len(DASHES)] for i, name in enumerate(dict.fromkeys(names))}


def patterns(names: Iterable[str]) -> dict[str, str]:
    """Give each name its bar pattern, so that two names of one colour still differ."""
    return {name: PATTERNS[i // len(PALETTE) % len(PATTERNS)] for i, name in enumerate(dict.fromkeys(names))}


def safe(text: str) -> str:
    """Escape a name for Plotly, which reads tags such as <b> or <a> in its labels."""
    return html.escape(text, quote=False)


def drawable(values: Iterable[float | None]) -> list[float | None]:
    """Return the values with None (a gap) for what cannot be drawn: undefined, NaN, infinite."""
    return [value if value is not None and math.isfinite(value) else None for value in values]


def gaps(values: Iterable[float | None]) -> str:
    """Return the sentence that says how many values are gaps in a figure, or nothing."""
    count = sum(value is None for value in drawable(values))
    return "" if count == 0 else f" {count} {'value is' if count == 1 else 'values are'} undefined and left as a gap."


def axis(title: str) -> dict[str, Any]:
    """Return an axis with the common look."""
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": GRID,
        "zerolinecolor": GRID,
        "linecolor": "#aab4c0",
        "automargin": True,
    }


def round_axis(rounds: Iterable[int]) -> dict[str, Any]:
    """Return the x axis of everything over rounds: whole numbers only."""
    few = len(set(rounds)) <= 12
    return axis("round") | ({"dtick": 1} if few else {"tickformat": "d"})


def layout(x: dict[str, Any], y: dict[str, Any], height: int = 380) -> dict[str, Any]:
    """Return the common layout: legend on top, room made by the labels."""
    return {
        "xaxis": x,
        "yaxis": y,
        "height": height,
        "margin": {"l": 10, "r": 34, "t": 14, "b": 10},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": INK},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "traceorder": "normal"},
        "hoverlabel": {"align": "left"},
        # Upright at the right edge, where it does not cover a legend of several lines.
        "modebar": {"orientation": "v"},
    }


def figure(id_: str, title: str, data: list[Trace], look: dict[str, Any], caption: str) -> Figure:
    """Put a figure together from its traces and its layout."""
    return Figure(id_, title, {"data": data, "layout": look}, caption)
