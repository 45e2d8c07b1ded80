"""A table of many strategies as a picture: a line per strategy, a dot per participation at the mean over seeds, a bar from the
lowest seed to the highest.

    python benchmarks/picture.py classification_all     # docs/results/classification_all.svg
"""

import argparse
import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plans import ROOT, TABLES
from tables import RESULTS, Row, read_results

_LEFT, _WIDTH, _LINE, _TOP = 130, 560, 20, 44
_COLOURS = ("#0969da", "#cf6a00", "#8250df")
_GREY, _PALE = "#6e7781", "#8c959f40"


@dataclass(frozen=True)
class Dot:
    """One row of the table: a strategy at a participation."""

    lowest: float
    mean: float
    highest: float


Dots = Mapping[str, Mapping[float, Dot]]


def dots(rows: Sequence[Row], score: str) -> Dots:
    """Return the personal score by strategy and participation, over its seeds; the best mean of the first participation first.

    A strategy with several variants has a line for each.
    """
    scored = [row for row in rows if row["status"] == "ok" and row.get(f"personal_{score}")]
    variants: dict[str, set[str]] = {}
    for row in scored:
        variants.setdefault(row["strategy"], set()).add(row["variant"])
    found: dict[str, dict[float, list[float]]] = {}
    for row in scored:
        name = f"{row['strategy']} {row['variant']}" if len(variants[row["strategy"]]) > 1 else row["strategy"]
        found.setdefault(name, {}).setdefault(float(row["participation"]), []).append(float(row[f"personal_{score}"]))
    spread = {
        strategy: {level: Dot(min(v), statistics.mean(v), max(v)) for level, v in sorted(levels.items())}
        for strategy, levels in found.items()
    }
    first = min((level for levels in spread.values() for level in levels), default=0.0)
    return dict(sorted(spread.items(), key=lambda item: -item[1][first].mean if first in item[1] else 1.0))


def svg(found: Dots, title: str) -> str:
    """Return the picture. The axis is from 0 to 1."""
    levels = sorted({level for own in found.values() for level in own})
    colours = dict(zip(levels, _COLOURS, strict=False))
    height = _TOP + _LINE * len(found) + 10
    parts = [f'<text x="{_LEFT}" y="14" font-weight="bold">{html.escape(title)}</text>', *_legend(colours), *_axis(height)]
    for number, (strategy, own) in enumerate(found.items()):
        parts += _line(strategy, own, _TOP + _LINE * number + _LINE // 2, colours)
    total = _LEFT + _WIDTH + 20
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}" height="{height}"'
    style = f'font-family="system-ui, sans-serif" font-size="12" fill="{_GREY}"'
    return "\n".join([f'{head} {style} role="img" aria-label="{html.escape(title)}">', *parts, "</svg>", ""])


def _x(score: float) -> float:
    return round(_LEFT + _WIDTH * score, 1)


def _legend(colours: Mapping[float, str]) -> list[str]:
    parts = []
    for number, (level, colour) in enumerate(colours.items()):
        x = _LEFT + 6 + 150 * number
        parts.append(f'<circle cx="{x}" cy="27" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 9}" y="31">{level:.0%} participation</text>')
    return parts


def _axis(height: int) -> list[str]:
    parts = []
    for tenth in range(0, 11, 2):
        x = _x(tenth / 10)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{height - 10}" stroke="{_PALE}"/>')
        parts.append(f'<text x="{x}" y="{_TOP - 2}" font-size="10" text-anchor="middle">{tenth / 10:.1f}</text>')
    return parts


def _line(strategy: str, own: Mapping[float, Dot], y: int, colours: Mapping[float, str]) -> list[str]:
    weight = ' font-weight="bold"' if strategy.split()[0] == "omnifm" else ""
    parts = [f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end"{weight}>{html.escape(strategy)}</text>']
    for level, dot in own.items():
        colour, low, high = colours[level], _x(dot.lowest), _x(dot.highest)
        parts.append(f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2" opacity=".45"/>')
        parts.append(f'<circle cx="{_x(dot.mean)}" cy="{y}" r="4" fill="{colour}"/>')
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(TABLES))
    name = parser.parse_args().table
    score = TABLES[name].scores[0]
    found = dots(read_results(RESULTS / f"{name}.csv"), score)
    if not found:
        raise SystemExit(f"{RESULTS / name}.csv: no finished run in it")
    if max(dot.highest for own in found.values() for dot in own.values()) > 1:
        raise SystemExit(f"{name}: {score} is no share of 1, and the picture's axis ends there")
    path = ROOT / "docs" / "results" / f"{name}.svg"
    title = f"{score} of each client's own model (test); bars: lowest to highest seed"
    path.write_text(svg(found, title), encoding="utf-8")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
