"""What a report page is made of: sections of blocks, and how a number is written.

The template knows each block by its `kind` and escapes every text; nothing here is HTML.
"""

import math
from dataclasses import dataclass, field
from typing import Any

UNDEFINED = "undefined"


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `tone` is one of "", "good", "bad", "strong", "muted", `href` a relative link."""

    text: str
    tone: str = ""
    href: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first `labels` columns are text and the others numbers, aligned right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    labels: int = 1
    caption: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A Plotly figure: `spec` has `data`, `layout` and perhaps `frames`; `caption` says how to read it."""

    id: str
    title: str
    spec: dict[str, Any]
    caption: str = ""
    kind: str = "figure"


@dataclass(frozen=True)
class Note:
    """A paragraph; `tone` "warning" makes it a banner."""

    text: str
    tone: str = ""
    kind: str = "note"


@dataclass(frozen=True)
class Picture:
    """An example prediction with its image as a data URI; `verdict` is "correct", "wrong" or ""."""

    source: str
    lines: tuple[str, ...]
    verdict: str
    alt: str
    panels: int = 1


@dataclass(frozen=True)
class Gallery:
    """Example predictions side by side."""

    pictures: tuple[Picture, ...]
    kind: str = "gallery"


@dataclass(frozen=True)
class Terms:
    """Definitions: (term, meaning)."""

    entries: tuple[tuple[str, str], ...]
    kind: str = "terms"


@dataclass(frozen=True)
class Verbatim:
    """Text shown as it stands, such as the config."""

    text: str
    kind: str = "verbatim"


Block = Table | Figure | Note | Gallery | Terms | Verbatim


@dataclass(frozen=True)
class Section:
    """A titled part of the page; a `folded` one opens on a click."""

    id: str
    title: str
    blocks: tuple[Block, ...]
    lead: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A whole report. `facts` are short (name, value) pairs under the title."""

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    simulated: bool
    summary: tuple[str, ...] = field(default=())


def number(value: float | None, digits: int = 3) -> str:
    """Write a score; None is "undefined" and NaN "NaN", never a blank."""
    if value is None:
        return UNDEFINED
    return "NaN" if math.isnan(value) else f"{value:.{digits}f}"


def number_cell(value: float | None, tone: str = "", digits: int = 3) -> Cell:
    """Return the cell of a score; an undefined one is muted."""
    return Cell(number(value, digits), "muted" if value is None else tone)


def signed(value: float | None, digits: int = 3) -> str:
    """Write a difference with its sign."""
    return UNDEFINED if value is None else f"{value:+.{digits}f}"


def byte_size(count: float) -> str:
    """Write a number of bytes in binary units."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def duration(seconds: float) -> str:
    """Write a number of seconds as a person would."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
