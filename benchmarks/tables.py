"""The published classification tables: strategies x seeds x participation, and the ablation. Resumable.

    python benchmarks/classification.py [--jobs 2] [--only main20|ablation|main100]
    python benchmarks/classification.py --markdown      # the tables of docs/results/classification.md, nothing is run

Each finished cell is one line of benchmarks/results/classification.csv with commit, seed, config hash and machine. A cell whose
line is there (same config hash) is not run again, so the script can be stopped at any time. The last line of the output is a
JSON object: mean personal accuracy by row.
"""

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

from omnifm.compare import Cell, Variant, cell_row, plan_cells, read_variants, run_cells
from omnifm.config import digest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "classification.toml"
RESULTS = ROOT / "benchmarks" / "results" / "classification.csv"
STRATEGIES = ("local", "centralised", "fedavg", "fedprox", "fedper", "omnifm")
SEEDS = (0, 1, 2)
Row = dict[str, str]


def plan(only: str) -> list[Cell]:
    """Return the cells of the part called `only`, all parts for an empty string; cheap and important ones first."""
    main = [Variant(name) for name in STRATEGIES]
    ablation = read_variants(CONFIG.with_name("classification_ablation.toml"))
    parts = {"main20": (main, 0.2), "ablation": (ablation, 0.2), "main100": (main, 1.0)}
    wanted = [only] if only else list(parts)
    return [cell for name in wanted for cell in plan_cells(CONFIG, parts[name][0], SEEDS, [parts[name][1]], ())]


def read_results(path: Path) -> list[Row]:
    """Return the lines written so far."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_results(path: Path, rows: list[Row]) -> None:
    """Write all lines, columns in the order they first appear in the longest line."""
    columns = list(dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row))
    partial = path.with_suffix(".part")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def summary(rows: list[Row]) -> dict[str, float]:
    """Return the mean personal accuracy over seeds, by strategy, variant and participation."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.get("personal_accuracy"):
            name = " ".join(filter(None, (row["strategy"], row["variant"], f"p={row['participation']}")))
            groups.setdefault(name, []).append(float(row["personal_accuracy"]))
    return {name: round(statistics.mean(values), 4) for name, values in groups.items()}


def markdown(rows: list[Row]) -> str:
    """Return the results as a Markdown table: mean and standard deviation over seeds, in points of accuracy."""
    columns = ("personal", "worst", "global", "finetuned", "best_personal")
    lines = [
        f"| strategy | variant | participation | rounds | seeds | {' | '.join(columns)} |",
        "|---" * (5 + len(columns)) + "|",
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("strategy", "variant", "participation", "rounds")), []).append(row)
    for names, members in groups.items():
        cells = [_spread([row.get(f"{column}_accuracy") or "" for row in members]) for column in columns]
        lines.append(f"| {' | '.join((*names, str(len(members)), *cells))} |")
    return "\n".join(lines)


def _spread(texts: list[str]) -> str:
    values = [100 * float(text) for text in texts if text]
    if not values:
        return "none"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    parser.add_argument("--only", choices=["", "main20", "ablation", "main100"], default="", help="one part of the tables")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "classification", help="folder of the runs")
    parser.add_argument("--markdown", action="store_true", help="print the tables, run nothing")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(read_results(arguments.results)))
        return
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    rows = read_results(arguments.results)
    known = {(row["cell"], row["config_hash"]) for row in rows if row["status"] == "ok"}
    todo = [cell for cell in plan(arguments.only) if (cell.name, digest(cell.config)) not in known]
    for number, (cell, outcome) in enumerate(run_cells(todo, arguments.out, arguments.jobs), 1):
        row = {key: "" if value is None else str(value) for key, value in cell_row(cell, outcome, arguments.out).items()}
        # A failed try is kept until a later one replaces it.
        rows = [old for old in rows if not (old["cell"] == cell.name and old["status"] != "ok")] + [row]
        write_results(arguments.results, rows)
        print(f"{number}/{len(todo)} {cell.name}: {outcome} {row.get('personal_accuracy', '')}", file=sys.stderr, flush=True)
    print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
