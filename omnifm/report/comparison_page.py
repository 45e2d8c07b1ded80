"""The page of a comparison, and `summary.csv` with the same statistics for other programs."""

import csv
import io
from urllib.parse import quote

from omnifm.errors import ConfigError
from omnifm.report import comparison_figures as figures
from omnifm.report import definitions as define
from omnifm.report.comparison_figures import bare_metric, percent
from omnifm.report.load import Comparison, Row
from omnifm.report.page import (
    Block,
    Cell,
    Figure,
    Note,
    Page,
    Section,
    Table,
    Terms,
    byte_size,
    duration,
    number,
    number_cell,
    signed,
)
from omnifm.report.statistics import (
    NO_SPREAD,
    WILCOXON_MIN_PAIRS,
    Paired,
    Summary,
    compare,
    method_of,
    methods,
    participations,
    score,
    summarise,
)
from omnifm.report.writing import write

_MOST_SCORES = 12
_LEVEL = 0.05
VIEWS = ("personal", "worst", "global", "finetuned", "best_personal", "best_finetuned")
_VIEW_LABELS = {name: label for name, (label, _) in define.VIEWS.items()} | {
    "best_personal": "own models, best on validation",
    "best_finetuned": "fine-tuned, best on validation",
}


def comparison_page(comparison: Comparison, reference: str | None = None) -> Page:
    """Lay out the report of a comparison."""
    rows, metric = comparison.rows, primary(comparison)
    chosen = reference_of(comparison, reference)
    shares = participations(rows)
    sections = (
        _scores(comparison, metric),
        _differences(comparison, chosen, metric),
        Section("curves", "Training, round by round", _drawn([figures.curves(comparison, p, metric) for p in shares])),
        Section("per-client", "Client by client", _drawn([figures.client_bars(comparison, p, metric) for p in shares])),
        _cost(comparison, metric),
        _heterogeneity(comparison),
        _cells(comparison, metric),
        _definitions(metric),
    )
    tasks = sorted({run.metrics.task for run in comparison.runs.values()})
    return Page(
        title="Comparison" + (f", {', '.join(tasks)}" if tasks else ""),
        subtitle=f"{_plural(len(methods(rows)), 'method')} on the same clients, the same seeds and the same images.",
        facts=(*_facts(comparison), ("main score", define.metric_label(metric)), ("reference", chosen)),
        sections=sections,
        simulated=any(run.simulated for run in comparison.runs.values()),
        summary=tuple(_sentence(comparison, share, metric) for share in shares),
    )


def _facts(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    rows = comparison.rows
    return (
        ("methods", ", ".join(methods(rows))),
        ("seeds", ", ".join(sorted({row["seed"] for row in rows}))),
        ("participation", ", ".join(f"{share:.0%}" for share in participations(rows))),
        ("cells", _statuses(comparison)),
    )


def primary(comparison: Comparison) -> str:
    """Return the main metric: what the cells say, or the table's first `personal_` column.

    Raises:
        ConfigError: the cells disagree, or there is neither a cell nor such a column.
    """
    named = sorted({run.metrics.primary for run in comparison.runs.values()})
    if len(named) > 1:
        raise ConfigError(f"{comparison.folder}: the cells have different main metrics: {', '.join(named)}")
    columns = [column.removeprefix("personal_") for column in comparison.rows[0] if column.startswith("personal_")]
    if not named and not columns:
        raise ConfigError(f"{comparison.folder / 'table.csv'}: no column personal_METRIC and no cell that names a metric")
    return (named or columns)[0]


def reference_of(comparison: Comparison, reference: str | None) -> str:
    """Return the method to compare the others with: the one asked for, else the first of omnifm's, else the table's first."""
    known = methods(comparison.rows)
    if reference is not None:
        return reference
    return next((method_of(row) for row in comparison.rows if row["strategy"] == "omnifm"), known[0])


def _drawn(found: list[Figure | None]) -> tuple[Block, ...]:
    drawn: list[Block] = [figure for figure in found if figure is not None]
    return tuple(drawn) or (Note("No cell folder of this comparison has what this figure is drawn from."),)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _failed(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.get("status", "ok") not in ("ok", "", "reference")]


def _statuses(comparison: Comparison) -> str:
    failed, trained = len(_failed(comparison)), [row for row in comparison.rows if row.get("status") != "reference"]
    return f"{len(trained) - failed} finished" + (f", {failed} failed" if failed else "")


def _sentence(comparison: Comparison, participation: float, metric: str) -> str:
    found = [s for s in summarise(comparison.rows, [f"personal_{metric}"]) if s.participation == participation]
    known = [s for s in found if s.mean is not None]
    sign = -1 if define.lower_is_better(metric) else 1
    # A mean over other seeds is no rank: whoever failed on the hard one would win.
    seeds = _seeds(found)
    ranked = sorted(known, key=lambda s: (s.count < seeds, -sign * (s.mean or 0.0)))
    names = [f"{s.method} {number(s.mean)}" + (f" ({s.count} of {seeds} seeds)" if s.count < seeds else "") for s in ranked]
    order = ", ".join(names)
    return f"At {percent(participation)}, own models, best first: {order or 'no defined score'}."


def _seeds(summaries: list[Summary]) -> int:
    """Return how many seeds a method has that ran on all of them."""
    return max((s.count + s.undefined for s in summaries), default=0)


def _columns(comparison: Comparison, metric: str) -> list[str]:
    return [view for view in VIEWS if f"{view}_{metric}" in comparison.rows[0]]


def _scores(comparison: Comparison, metric: str) -> Section:
    views = [(f"{view}_{metric}", _VIEW_LABELS[view]) for view in _columns(comparison, metric)]
    others = [name.removeprefix("personal_") for name in comparison.rows[0] if name.startswith("personal_")][:_MOST_SCORES]
    more = [(f"personal_{name}", define.metric_label(name)) for name in others if name != metric]
    tables: list[Table] = []
    for share in participations(comparison.rows):
        where, label = percent(share).capitalize(), define.metric_label(metric)
        tables.append(_score_table(comparison, views, share, f"{where}, {label}"))
        if more:
            tables.append(_score_table(comparison, more, share, f"{where}, own models, other scores"))
    lead = "Mean ± standard deviation over the seeds, at the last round unless a column says otherwise. "
    lead += "Green: the best of those that have a score on every seed."
    failed = [Note(f"Failed: {row.get('cell') or method_of(row)}: {row['status']}", "warning") for row in _failed(comparison)]
    return Section("scores-table", "Test scores", (*failed, *tables), lead)


def _score_table(comparison: Comparison, columns: list[tuple[str, str]], participation: float, caption: str) -> Table:
    summaries = summarise(comparison.rows, [column for column, _ in columns])
    chosen = {(s.method, s.metric): s for s in summaries if s.participation == participation}
    names = [name for name in methods(comparison.rows) if any(method == name for method, _ in chosen)]
    best = {column: _best([chosen[name, column] for name in names]) for column, _ in columns}
    rows = []
    for name in names:
        seeds = chosen[name, columns[0][0]]
        cells = [_summary_cell(chosen[name, column], chosen[name, column] in best[column]) for column, _ in columns]
        rows.append((Cell(name, "strong"), Cell(str(seeds.count + seeds.undefined)), *cells))
    head = ("method", "seeds", *(label for _, label in columns))
    return Table(head, tuple(rows), caption=caption)


def _best(summaries: list[Summary]) -> list[Summary]:
    """Return the methods with the best mean, of those that have a score on every seed; none where there is no choice."""
    known, seeds = [s for s in summaries if s.mean is not None], _seeds(summaries)
    metric = bare_metric(summaries[0].metric)
    whole = {s.mean for s in known if s.mean is not None and s.count == seeds}
    if len(known) < 2 or not whole or not define.is_score(metric):
        return []
    best = min(whole) if define.lower_is_better(metric) else max(whole)
    return [s for s in known if s.mean == best and s.count == seeds]


def _summary_cell(summary: Summary, best: bool) -> Cell:
    if summary.mean is None:
        return number_cell(None)
    text = number(summary.mean) + (f" ± {summary.std:.3f}" if summary.std is not None else "")
    if summary.undefined:
        text += f" ({summary.undefined} undefined)"
    return Cell(text, "good" if best else "")


def _differences(comparison: Comparison, reference: str, metric: str) -> Section:
    shares: list[float | None] = [*participations(comparison.rows)]
    shares += [None] if len(shares) > 1 else []
    blocks: list[Block] = []
    for view in [view for view in ("personal", "finetuned", "worst") if view in _columns(comparison, metric)]:
        families = [compare(comparison.rows, reference, f"{view}_{metric}", share) for share in shares]
        results = [result for of_method in zip(*families, strict=True) for result in of_method]
        if any(result.seeds for result in results):
            figure = figures.difference_plot(results, "differences-figure") if view == "personal" else None
            table = _difference_table(results, f"{_VIEW_LABELS[view].capitalize()}, {define.metric_label(metric)}")
            blocks += [figure, table] if figure else [table]
    if not blocks:
        blocks = [Note("Nothing to compare: there is one method, or no seed that two methods share.")]
    lead = (
        f"{reference} minus each other method, seed by seed. Above zero, {reference} has the higher score. Coloured: what the "
        "t-test finds at 5 % after Holm's adjustment for the number of methods. Without colour nothing is shown, either way. "
        f"No spread: {NO_SPREAD}."
    )
    blocks = [*_commits(comparison, reference), *blocks]
    return Section("differences", "Is the difference real?", tuple(blocks), lead)


def _commits(comparison: Comparison, reference: str) -> list[Block]:
    """Warn where a method's cell and the reference's beside it were run at different commits."""
    rows = [row for row in comparison.rows if row.get("commit")]
    own = {(row["participation"], row["seed"]): row["commit"] for row in rows if method_of(row) == reference}
    apart = [row for row in rows if row["commit"] != own.get((row["participation"], row["seed"]), row["commit"])]
    if not apart:
        return []
    names = ", ".join(dict.fromkeys(method_of(row) for row in apart))
    text = f"Not run at the commit of {reference}'s cells: {names}. A difference to these may be one between versions."
    return [Note(text, "warning")]


def _difference_table(results: list[Paired], caption: str) -> Table:
    head = (
        f"{results[0].a} minus",
        "participation",
        "difference",
        "95 % Student",
        "95 % bootstrap",
        "seeds",
        "p, t-test, Holm",
        "p, Wilcoxon",
        "p, Wilcoxon, Holm",
    )
    return Table(head, tuple(_difference_row(result) for result in results), labels=2, caption=caption)


def _difference_row(result: Paired) -> tuple[Cell, ...]:
    found = result.ttest_holm is not None and result.ttest_holm < _LEVEL
    tone = ("good" if (result.difference or 0) > 0 else "bad") if found else ""
    too_few = Cell(f"{result.pairs} of {WILCOXON_MIN_PAIRS} pairs", "muted")
    return (
        Cell(result.b, "strong"),
        Cell("all" if result.participation is None else f"{result.participation:.0%}"),
        Cell(signed(result.difference), tone),
        _interval(result, result.student),
        _interval(result, result.bootstrap),
        Cell(f"{result.seeds}" + (f" ({result.undefined} pairs undefined)" if result.undefined else "")),
        _untested(result) if result.ttest_holm is None else Cell(f"{result.ttest_holm:.3g}"),
        too_few if result.wilcoxon is None else Cell(f"{result.wilcoxon:.3g}"),
        too_few if result.holm is None else Cell(f"{result.holm:.3g}"),
    )


def _interval(result: Paired, interval: tuple[float, float] | None) -> Cell:
    return _untested(result) if interval is None else Cell(f"{signed(interval[0])} to {signed(interval[1])}")


def _untested(result: Paired) -> Cell:
    return Cell("needs 2 seeds" if result.seeds < 2 else "no spread", "muted")


def _cost(comparison: Comparison, metric: str) -> Section:
    columns = ("bytes_up", "bytes_down", "bank_up", "bank_down", "seconds", "peak_rss_mib")
    summaries = {(s.method, s.participation, s.metric): s.mean for s in summarise(comparison.rows, columns)}
    rows: list[tuple[Cell, ...]] = []
    for name, share in dict.fromkeys((s[0], s[1]) for s in summaries):
        up, down, bank_up, bank_down, seconds, memory = (summaries[name, share, column] for column in columns)
        sizes = [Cell("unknown" if size is None else byte_size(size)) for size in (up, down, bank_up, bank_down)]
        time = Cell("unknown" if seconds is None else duration(seconds))
        rows.append(
            (Cell(name, "strong"), Cell(f"{share:.0%}"), *sizes, time, Cell("unknown" if memory is None else f"{memory:.0f} MiB"))
        )
    head = ("method", "participation", "up", "down", "bank up", "bank down", "time", "peak memory")
    figure = figures.bytes_against_score(comparison.rows, f"personal_{metric}")
    table = Table(head, tuple(rows), caption="Mean over the seeds, for a whole run.")
    return Section("cost", "What it costs", (figure, table) if figure else (table,))


def _heterogeneity(comparison: Comparison) -> Section:
    rows: list[tuple[Cell, ...]] = []
    seen: set[tuple[str, str]] = set()
    for row, cell in zip(comparison.rows, comparison.cells, strict=True):
        split = comparison.runs[cell].split if cell is not None else None
        if split is None or (row["seed"], split.sha256) in seen:
            continue
        seen.add((row["seed"], split.sha256))
        values = [number_cell(split.heterogeneity.get(key)) for key in define.HETEROGENEITY]
        rows.append((Cell(row["seed"], "strong"), Cell(split.sha256[:12]), Cell(str(len(split.clients))), *values))
    head = ("seed", "split", "clients", *(label for label, _ in define.HETEROGENEITY.values()))
    blocks: tuple[Block, ...] = (Table(head, tuple(rows), labels=2), Terms(tuple(define.HETEROGENEITY.values())))
    return Section("heterogeneity", "How different the clients are", blocks, "One line per seed and split that was used.")


def _cells(comparison: Comparison, metric: str) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for row, cell in zip(comparison.rows, comparison.cells, strict=True):
        if row.get("status") == "reference":
            continue
        labels = tuple(map(Cell, (method_of(row), f"{float(row['participation']):.0%}", row["seed"], row.get("status", ""))))
        values = (number_cell(score(row, f"personal_{metric}")), Cell(row.get("commit", "")))
        rows.append((_link(comparison, row, cell), *labels, *values))
    head = ("report", "method", "participation", "seed", "status", f"own models, {define.metric_label(metric)}", "commit")
    return Section("cells", "Every cell, with its own report", (Table(head, tuple(rows), labels=5),), folded=len(rows) > 24)


def _link(comparison: Comparison, row: Row, cell: str | None) -> Cell:
    if cell is None:
        return Cell("no folder", "muted")
    exists = (comparison.folder / "cells" / cell / "report.html").is_file()
    return Cell(cell, href=f"cells/{quote(cell)}/report.html" if exists else "")


def _definitions(metric: str) -> Section:
    terms = (*define.VIEWS.values(), *define.ROUNDS, *define.metric_terms([metric]), *define.COMPARISON, *define.TRAINING)
    return Section("definitions", "How each number is defined", (Terms(terms),), folded=True)


def write_summary(comparison: Comparison, reference: str | None = None) -> None:
    """Write `summary.csv`: mean, std and count per method, participation and metric, and the reference minus the method.

    `participation` is empty on the lines that pool all participations; they hold only the paired part. An empty field is an
    undefined number.
    """
    rows, chosen = comparison.rows, reference_of(comparison, reference)
    columns = [c for c in rows[0] if c.startswith(tuple(f"{view}_" for view in VIEWS))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(SUMMARY_HEAD)
    differences = {
        (r.b, share, column): r
        for column in columns
        for share in (*participations(rows), None)
        for r in compare(rows, chosen, column, share)
    }
    for s in summarise(rows, columns):
        left = (s.method, s.participation, s.metric, s.mean, s.std, s.count, s.undefined, chosen)
        writer.writerow([*left, *_paired_fields(differences.get((s.method, s.participation, s.metric)))])
    if len(participations(rows)) > 1:
        for (method, share, column), result in differences.items():
            if share is None:
                writer.writerow([method, None, column, None, None, None, None, chosen, *_paired_fields(result)])
    write(comparison.folder / "summary.csv", out.getvalue())


SUMMARY_HEAD = (
    *("method", "participation", "metric", "mean", "std", "count", "undefined", "reference", "reference_minus_method"),
    *("bootstrap_low", "bootstrap_high", "student_low", "student_high", "seeds", "pairs", "ttest_p", "ttest_holm_p"),
    *("wilcoxon_p", "holm_p", "note"),
)


def _paired_fields(result: Paired | None) -> list[float | int | str | None]:
    if result is None:
        return [None] * (len(SUMMARY_HEAD) - 8)
    bootstrap, student = result.bootstrap or (None, None), result.student or (None, None)
    tests = (result.ttest, result.ttest_holm, result.wilcoxon, result.holm)
    return [result.difference, *bootstrap, *student, result.seeds, result.pairs, *tests, result.note]
