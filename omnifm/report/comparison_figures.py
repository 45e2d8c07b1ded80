"""The figures of a comparison: curves and clients per method, differences, traffic against score."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from omnifm.report.definitions import metric_label
from omnifm.report.figures import MAX_BARS
from omnifm.report.load import Comparison, Row, Run
from omnifm.report.page import Figure
from omnifm.report.records import ClientResult
from omnifm.report.statistics import Paired, method_of, methods, participations, score
from omnifm.report.style import SYMBOLS, Trace, axis, colours, dashes, drawable, figure, gaps, layout, patterns, round_axis, safe


def percent(participation: float | None) -> str:
    """Write a participation; None stands for all of them."""
    return "all participations" if participation is None else f"{participation:.0%} participation"


def slug(participation: float) -> str:
    """Return the end of an element's id for a participation."""
    return f"{participation * 100:g}".replace(".", "_")


def runs_of(comparison: Comparison, participation: float) -> Iterator[tuple[str, Row, Run]]:
    """Yield (method, table row, run) for the rows at this participation whose cell folder is there."""
    for row, cell in zip(comparison.rows, comparison.cells, strict=True):
        if cell is not None and float(row["participation"]) == participation:
            yield method_of(row), row, comparison.runs[cell]


def difference_plot(results: Sequence[Paired], id_: str) -> Figure | None:
    """Draw the paired differences with their Student intervals: one line per method and participation, coloured by the latter."""
    known = [r for r in results if r.difference is not None]
    if not known:
        return None
    reference, metric = known[0].a, known[0].metric
    palette = colours([percent(r.participation) for r in known])
    data = [
        _differences(label, colour, [r for r in known if percent(r.participation) == label]) for label, colour in palette.items()
    ]
    order = [_line_name(r) for r in known]
    y = axis("") | {"categoryorder": "array", "categoryarray": order, "autorange": "reversed", "type": "category"}
    look = layout(axis(f"difference in {metric_label(bare_metric(metric))}"), y, 150 + 26 * len(known))
    look["shapes"] = [
        {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": "#55616e", "dash": "dot"}}
    ]
    caption = f"Own models. Right of the dotted line {reference} has the higher score."
    caption += " Dot: mean over seeds; whisker: 95 % Student interval, each by itself (none with one seed, or without a spread)."
    return figure(id_, f"{reference} minus each other method", data, look, caption)


def _line_name(result: Paired) -> str:
    share = "all" if result.participation is None else f"{result.participation:.0%}"
    return safe(f"− {result.b}, {share}")


def _differences(label: str, colour: str, results: Sequence[Paired]) -> Trace:
    half = [0.0 if r.student is None else (r.student[1] - r.student[0]) / 2 for r in results]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label,
        "x": [r.difference for r in results],
        "y": [_line_name(r) for r in results],
        "error_x": {"type": "data", "array": half, "thickness": 2, "width": 5, "color": colour},
        "marker": {"size": 10, "color": colour},
        "hovertemplate": "%{x:+.3f}",
    }


def bare_metric(metric: str) -> str:
    """Return the metric of a column of the table: `accuracy` of `best_personal_accuracy`."""
    for prefix in ("best_personal_", "best_finetuned_", "personal_", "finetuned_", "global_", "worst_"):
        if metric.startswith(prefix):
            return metric.removeprefix(prefix)
    return metric


def curves(comparison: Comparison, participation: float, metric: str) -> Figure | None:
    """Draw each method's own-model validation score over the rounds: mean over seeds, with the range of the seeds as a band."""
    names = methods(comparison.rows)
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    undefined: list[float | None] = []
    for method, _, run in runs_of(comparison, participation):
        for event in run.evaluations:
            if event.split == "val" and event.personal is not None:
                found = event.personal.get(metric)
                undefined += [None] if found is None else []
                values[method][event.round] += [] if found is None else [found]
    data: list[Trace] = []
    for method in names:
        if method in values:
            data += _curve(method, values[method], colours(names)[method], dashes(names)[method])
    if not data:
        return None
    label = metric_label(metric)
    caption = (
        f"{label.capitalize()} of the clients' own models on validation images. Line: mean over seeds; band: lowest to highest."
    )
    rounds = [index for by_round in values.values() for index in by_round]
    title = f"Validation score, {percent(participation)}"
    return figure(
        f"curves-{slug(participation)}", title, data, layout(round_axis(rounds), axis(label), 420), caption + gaps(undefined)
    )


def _curve(method: str, by_round: dict[int, list[float]], colour: str, dash: str) -> list[Trace]:
    rounds = sorted(by_round)
    scores = [by_round[index] for index in rounds]
    line: Trace = {
        "type": "scatter",
        "mode": "lines+markers" if len(rounds) <= 40 else "lines",
        "name": safe(method),
        "legendgroup": method,
        "x": rounds,
        "y": [float(np.mean(group)) if group else None for group in scores],
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"size": 5},
    }
    if max(map(len, scores)) < 2:
        return [line]
    both = [(index, group) for index, group in zip(rounds, scores, strict=True) if group]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    band: Trace = {
        "type": "scatter",
        "mode": "lines",
        "x": [index for index, _ in both] + [index for index, _ in reversed(both)],
        "y": [max(group) for _, group in both] + [min(group) for _, group in reversed(both)],
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.13)",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": method,
    }
    return [band, line]


def client_bars(comparison: Comparison, participation: float, metric: str) -> Figure | None:
    """Draw each client's own-model test score under each method (mean over seeds), grouped by modality."""
    names = methods(comparison.rows)
    scores: dict[str, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    clients: dict[str, ClientResult] = {}
    for method, _, run in runs_of(comparison, participation):
        for client in run.metrics.clients:
            clients[client.id] = client
            scores[method][client.id].append((client.test.personal or {}).get(metric))
    if not clients:
        return None
    order = sorted(clients.values(), key=lambda c: (c.modality, c.id))
    drawn = [name for name in names if name in scores]
    means = {name: [_mean(scores[name][client.id]) for client in order] for name in drawn}
    caption = f"Test {metric_label(metric)} of each client's own model at the last round, mean over seeds."
    caption += gaps(value for values in means.values() for value in values)
    id_, title = f"clients-{slug(participation)}", f"Score per client, {percent(participation)}"
    if len(order) > MAX_BARS:
        boxes = [
            {"type": "box", "name": safe(n), "y": drawable(means[n]), "boxpoints": "all", "marker": {"color": colours(names)[n]}}
            for n in drawn
        ]
        return figure(id_, title, boxes, layout(axis(""), axis(metric_label(metric)), 460), caption + " Every dot is a client.")
    labels = [[safe(c.modality) for c in order], [safe(c.id) for c in order]]
    data = [_bars(name, labels, means[name], names) for name in drawn]
    y = axis("") | {"autorange": "reversed", "type": "multicategory"}
    look = layout(axis(metric_label(metric)), y, 140 + len(order) * (11 * len(drawn) + 12)) | {"barmode": "group", "bargap": 0.22}
    return figure(id_, title, data, look, caption)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in drawable(values) if value is not None]
    return float(np.mean(known)) if known else None


def _bars(name: str, labels: list[list[str]], values: Sequence[float | None], names: Sequence[str]) -> Trace:
    return {
        "type": "bar",
        "orientation": "h",
        "name": safe(name),
        "y": labels,
        "x": drawable(values),
        "marker": {"color": colours(names)[name], "pattern": {"shape": patterns(names)[name]}},
        "hovertemplate": "%{y}: %{x:.3f}",
    }


def bytes_against_score(rows: Sequence[Row], metric: str) -> Figure | None:
    """Draw each cell's traffic against its score: colour by method, shape by participation."""
    names, shares = methods(rows), participations(rows)
    data: list[Trace] = []
    for name in names:
        for index, share in enumerate(shares):
            group = [row for row in rows if method_of(row) == name and float(row["participation"]) == share]
            points = [
                (total, s) for row in group if (total := _traffic(row)) is not None and (s := score(row, metric)) is not None
            ]
            if points:
                data.append(_dots(f"{name}, {share:.0%}", points, colours(names)[name], SYMBOLS[index % len(SYMBOLS)]))
    if not data:
        return None
    look = layout(
        axis("MiB up and down, whole run") | {"rangemode": "tozero"},
        axis(f"own models, {metric_label(bare_metric(metric))}"),
        460,
    )
    caption = "Each dot is one cell (one seed). Up is better, left is cheaper; the shape tells the participation."
    return figure("bytes-score", "Traffic against score", data, look, caption)


def _traffic(row: Row) -> float | None:
    up, down = score(row, "bytes_up"), score(row, "bytes_down")
    return None if up is None or down is None else (up + down) / 2**20


def _dots(name: str, points: Sequence[tuple[float, float]], colour: str, symbol: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": safe(name),
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "marker": {"color": colour, "symbol": symbol, "size": 11, "opacity": 0.85},
        "hovertemplate": "%{x:.1f} MiB, %{y:.3f}",
    }
