"""The published tables: strategies x seeds, by task. Resumable.

    python benchmarks/tables.py classification [--jobs 2] [--only main20]
    python benchmarks/tables.py segmentation --markdown     # the table of docs/results/segmentation.md, nothing is run
    python benchmarks/tables.py segmentation --against omnifm   # omnifm minus every other row, seed by seed, nothing is run

Each finished cell is one line of benchmarks/results/TABLE.csv with commit, seed, config hash and machine, and each untrained
reference one line per seed. A cell whose line is there (same config hash) is not run again, so the script can be stopped at any
time. The last line of the output is a JSON object: the mean personal main score by row.
"""

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from plans import ROOT, TABLES, Table

from omnifm.compare import Cell, cell_row, reference_rows, run_cells
from omnifm.config import digest
from omnifm.errors import ConfigError
from omnifm.report.statistics import Paired, compare, methods, participations

RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, str]
_COSTS = {"MiB up": ("bytes_up", 2**20), "MiB down": ("bytes_down", 2**20), "seconds": ("seconds", 1)}


def plan(table: Table, only: str = "") -> list[Cell]:
    """Return the cells of the part called `only`, all parts for an empty string; cheap and important ones first."""
    return [cell for name, part in table.parts.items() if only in ("", name) for cell in part.cells()]


def read_results(path: Path) -> list[Row]:
    """Return the lines written so far."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Write all lines, columns in the order they first appear in the longest line."""
    columns = list(dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row))
    partial = path.with_suffix(".part")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def merged(rows: Sequence[Row], cell: Cell, outcome: str, out: Path) -> list[Row]:
    """Return the lines with those of a cell that has just ended. What has the same name gives way to it."""
    new = [cell_row(cell, outcome, out)]
    if outcome == "ok":
        # A variant may run on other data, so its references are its own.
        new += [{**row, "variant": cell.variant.name} for row in reference_rows([cell], out)]
    texts = [{key: "" if value is None else str(value) for key, value in row.items()} for row in new]
    names = {_name(row) for row in texts}
    return [row for row in rows if _name(row) not in names] + texts


def _name(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in ("cell", "strategy", "variant", "participation", "seed"))


def _groups(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("strategy", "variant", "participation", "rounds")), []).append(row)
    return groups


def summary(rows: Sequence[Row], score: str) -> dict[str, float]:
    """Return the mean personal `score` over seeds, by strategy, variant and participation."""
    found = {}
    for (strategy, variant, participation, _), members in _groups(rows).items():
        values = [float(row[f"personal_{score}"]) for row in members if row.get(f"personal_{score}")]
        if values:
            found[" ".join(filter(None, (strategy, variant, f"p={participation}")))] = round(statistics.mean(values), 4)
    return found


def markdown(rows: Sequence[Row], table: Table) -> str:
    """Return the results as a Markdown table, mean and standard deviation over seeds: the main score's views, others, cost."""
    main, *others = table.scores
    columns = [f"{view}_{main}" for view in ("personal", "worst", "global", "finetuned", "best_personal")]
    columns += [f"personal_{score}" for score in others]
    lines = [
        f"| strategy | variant | participation | rounds | seeds | {' | '.join([*columns, *_COSTS])} |",
        "|---" * (5 + len(columns) + len(_COSTS)) + "|",
    ]
    for names, members in _groups(rows).items():
        cells = [_spread([row.get(column) or "" for row in members], table) for column in columns]
        cells += [_mean([row.get(column) or "" for row in members], unit) for column, unit in _COSTS.values()]
        scored = sum(row["status"] in ("ok", "reference") for row in members)
        lines.append(f"| {' | '.join((*names, str(scored), *cells))} |")
    return "\n".join(lines)


def differences(rows: Sequence[Row], table: Table, reference: str) -> str:
    """Return `reference` minus every other method as a Markdown table, one family of comparisons for each participation.

    The personal main score, paired by seed: mean and 95 % Student interval, the single seeds, p of the paired t-test as it is and
    Holm-adjusted over the family. The same difference on every seed has neither interval nor p: there is no spread to test
    against. What failed, or shares no seed with the reference, has a line without figures.

    Raises:
        ConfigError: no row is called `reference`.
    """
    done = [row for row in rows if row["status"] != "reference"]
    lines = [f"| {reference} minus | participation | difference | per seed | p | p, Holm |", "|---" * 6 + "|"]
    for share in participations(done):
        there = methods([row for row in done if float(row["participation"]) == share])
        for result in compare(done, reference, f"personal_{table.scores[0]}", share):
            if result.b in there:
                by_seed = [_signed(result.by_seed[seed], table) for seed in sorted(result.by_seed, key=int)]
                cells = (result.b, f"{share:.0%}", _interval(result, table), ", ".join(by_seed))
                lines.append(f"| {' | '.join((*cells, _p(result.ttest), _p(result.ttest_holm)))} |")
    return "\n".join(lines)


def _signed(value: float, table: Table) -> str:
    return f"{table.factor * value:+.{table.digits}f}"


def _interval(result: Paired, table: Table) -> str:
    if result.difference is None:
        return ""
    text = _signed(result.difference, table)
    if result.student is None:
        return text
    return f"{text} ± {table.factor * (result.student[1] - result.difference):.{table.digits}f}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _spread(texts: Sequence[str], table: Table) -> str:
    values = [table.factor * float(text) for text in texts if text]
    if not values:
        return ""
    mean, digits = statistics.mean(values), table.digits
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _mean(texts: Sequence[str], unit: float) -> str:
    values = [float(text) / unit for text in texts if text]
    return f"{statistics.mean(values):.0f}" if values else ""


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    parser.add_argument("--only", default="", help="one part of the table")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/TABLE.csv")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: runs/TABLE")
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--markdown", action="store_true", help="print the table, run nothing")
    printed.add_argument("--against", metavar="METHOD", help="print METHOD (STRATEGY or STRATEGY:VARIANT) minus the others")
    arguments = parser.parse_args()
    table = TABLES[arguments.table]
    results: Path = arguments.results or RESULTS / f"{arguments.table}.csv"
    out: Path = arguments.out or ROOT / "runs" / arguments.table
    if arguments.only and arguments.only not in table.parts:
        parser.error(f"--only {arguments.only}: the parts of {arguments.table} are {', '.join(table.parts)}")
    if arguments.markdown:
        print(markdown(read_results(results), table))
        return
    if arguments.against:
        try:
            print(differences(read_results(results), table, arguments.against))
        except ConfigError as error:
            parser.error(f"--against {arguments.against}: {error}")
        return
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = read_results(results)
    known = {(row["cell"], row["config_hash"]) for row in rows if row["status"] == "ok"}
    todo = [cell for cell in plan(table, arguments.only) if (cell.name, digest(cell.config)) not in known]
    for number, (cell, outcome) in enumerate(run_cells(todo, out, arguments.jobs), 1):
        rows = merged(rows, cell, outcome, out)
        write_results(results, rows)
        print(f"{number}/{len(todo)} {cell.name}: {outcome}", file=sys.stderr, flush=True)
    print(json.dumps(summary(rows, table.scores[0])))


if __name__ == "__main__":
    main()
