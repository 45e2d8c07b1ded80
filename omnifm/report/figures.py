"""The figures of one run: curves, clients, sizes, traffic. Each takes a `Run` and returns None where it has nothing to draw."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from omnifm.report.definitions import VIEWS, metric_label
from omnifm.report.load import Run
from omnifm.report.page import Figure
from omnifm.report.records import ClientEvent, ClientResult
from omnifm.report.style import DASHES, Trace, axis, colours, drawable, figure, gaps, layout, round_axis, safe

# Bars can be read for this many clients; beyond it, one box per modality shows the spread.
MAX_BARS = 40
BANK_GROUPS = frozenset({"bank", "prototypes", "retrievals"})


def by_round(events: Iterable[ClientEvent], value: Callable[[ClientEvent], float | None]) -> tuple[list[int], list[float | None]]:
    """Return the rounds, and the mean of `value` over each round's clients weighted by their examples.

    Clients without a value (None) do not count; a round where none has one is left out.
    """
    groups: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for event in events:
        found = value(event)
        if found is not None:
            groups[event.round].append((found, event.num_examples))
    rounds = sorted(groups)
    return rounds, [_weighted_mean(groups[index]) for index in rounds]


def _weighted_mean(pairs: Sequence[tuple[float, int]]) -> float | None:
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def loss_curve(run: Run) -> Figure | None:
    """Draw the training loss and, where the strategy has one, its penalty."""
    if not run.round_events:
        return None
    rounds = [event.round for event in run.round_events]
    losses = [event.loss for event in run.round_events]
    data: list[Trace] = [_line("training loss", rounds, losses, "#0072B2", "solid")]
    at, penalties = by_round(run.client_events, lambda event: event.penalty)
    if any(penalties):
        data.append(_line("penalty, added to the loss", at, penalties, "#D55E00", "dash"))
    caption = "How badly the models still fit the clients' training images; it should fall and level off."
    if any(penalties):
        caption += " A penalty of the strategy is no part of it: training lowers the sum of the two."
    return figure("loss", "Training loss", data, layout(round_axis(rounds), axis("loss")), caption + gaps(losses))


def score_curve(run: Run) -> Figure | None:
    """Draw the validation score of each view over the rounds; test evaluations, where there are any, dotted."""
    metric = run.metrics.primary
    data: list[Trace] = []
    drawn: list[float | None] = []
    for colour, (view, (label, _)) in zip(colours(VIEWS).values(), VIEWS.items(), strict=True):
        for split, dash in (("val", DASHES[0]), ("test", DASHES[2])):
            events = [e for e in run.evaluations if e.split == split and e.named()[view] is not None]
            if not events:
                continue
            values = [(e.named()[view] or {}).get(metric) for e in events]
            drawn += values
            name = label if split == "val" else f"{label} (test)"
            data.append(_line(name, [e.round for e in events], values, colour, dash))
    if not data:
        return None
    rounds = [e.round for e in run.evaluations]
    caption = f"{metric_label(metric).capitalize()} on the clients' validation images after each evaluated round."
    best = run.metrics.best_validation_round
    look = layout(round_axis(rounds), axis(metric_label(metric)))
    if best is not None:
        look["shapes"] = [{"type": "line", "x0": best, "x1": best, "y0": 0, "y1": 1, "yref": "paper", "line": {"dash": "dot"}}]
        caption += f" The dotted upright line marks round {best}, the best on validation."
    return figure("scores", "Validation score", data, look, caption + gaps(drawn))


def _line(name: str, x: list[int], y: Iterable[float | None], colour: str, dash: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= 40 else "lines",
        "name": safe(name),
        "x": x,
        "y": drawable(y),
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"size": 6},
    }


def by_modality(run: Run) -> list[ClientResult]:
    """Return the clients of the metrics, grouped by modality."""
    return sorted(run.metrics.clients, key=lambda client: (client.modality, client.id))


def client_scores(run: Run) -> Figure | None:
    """Draw each client's own-model and fine-tuned test score, grouped by modality."""
    clients = by_modality(run)
    if not clients:
        return None
    metric = run.metrics.primary
    views = [view for view in ("personal", "finetuned") if any(c.test.named()[view] for c in clients)]
    scores = {view: [(c.test.named()[view] or {}).get(metric) for c in clients] for view in views}
    caption = f"Test {metric_label(metric)} of each client at the last round."
    caption += gaps(value for values in scores.values() for value in values)
    palette = dict(zip(("personal", "finetuned"), ("#0072B2", "#E69F00"), strict=True))
    if len(clients) > MAX_BARS:
        boxes = [_box(VIEWS[view][0], [c.modality for c in clients], scores[view], palette[view]) for view in views]
        look = layout(axis(""), axis(metric_label(metric))) | {"boxmode": "group"}
        return figure("clients", "Score per client", boxes, look, caption + " One box per modality: every dot is a client.")
    bars = [_bars(VIEWS[view][0], clients, scores[view], palette[view]) for view in views]
    look = layout(axis(metric_label(metric)), _client_axis(), 120 + len(clients) * (16 * len(views) + 10))
    return figure("clients", "Score per client", bars, look | {"barmode": "group", "bargap": 0.25}, caption)


def _client_axis() -> dict[str, object]:
    return axis("") | {"autorange": "reversed", "type": "multicategory", "showdividers": True}


def _bars(name: str, clients: Sequence[ClientResult], values: Iterable[float | None], colour: str) -> Trace:
    return {
        "type": "bar",
        "orientation": "h",
        "name": safe(name),
        "y": [[safe(c.modality) for c in clients], [safe(c.id) for c in clients]],
        "x": drawable(values),
        "marker": {"color": colour},
        # Written at the bar's end: a score of 0 has no bar to see.
        "texttemplate": "%{x:.2f}",
        "textposition": "outside",
        "textfont": {"size": 10},
        "cliponaxis": False,
        "hovertemplate": "%{y}: %{x:.3f}",
    }


def _box(name: str, groups: Sequence[str], values: Iterable[float | None], colour: str) -> Trace:
    return {
        "type": "box",
        "name": safe(name),
        "x": [safe(group) for group in groups],
        "y": drawable(values),
        "marker": {"color": colour, "size": 4},
        "boxpoints": "all",
    }


def client_sizes(run: Run) -> Figure | None:
    """Draw the clients' numbers of images (train, validation, test), grouped by modality."""
    clients = sorted(run.split.clients, key=lambda c: (c.modality, c.id))
    if not clients:
        return None
    if len(clients) > MAX_BARS:
        sizes = _box("training images", [c.modality for c in clients], [float(len(c.train)) for c in clients], "#0072B2")
        look = layout(axis(""), axis("training images"))
        return figure("sizes", "Size of the clients", [sizes], look, "One box per modality: every dot is a client.")
    names = [[safe(c.modality) for c in clients], [safe(c.id) for c in clients]]
    parts = {"train": [len(c.train) for c in clients], "validation": [len(c.val) for c in clients]}
    parts["test"] = [len(c.test) for c in clients]
    data: list[Trace] = [
        {"type": "bar", "orientation": "h", "name": part, "y": names, "x": counts, "marker": {"color": colour}}
        for (part, counts), colour in zip(parts.items(), ("#0072B2", "#56B4E9", "#B8C2CC"), strict=True)
    ]
    look = layout(axis("images"), _client_axis(), 120 + 26 * len(clients)) | {"barmode": "stack"}
    return figure("sizes", "Size of the clients", data, look, "How many images each client holds, and what they are used for.")


def traffic(run: Run) -> dict[str, dict[str, int]]:
    """Return the bytes of the whole run: `{"up": {group: bytes}, "down": {...}}`."""
    totals: dict[str, dict[str, int]] = {"up": defaultdict(int), "down": defaultdict(int)}
    for description in run.descriptions:
        for group, size in description.bytes_up.items():
            totals["up"][group] += size
    for event in run.client_events:
        for way, sizes in (("up", event.bytes_up), ("down", event.bytes_down)):
            for group, size in sizes.items():
                totals[way][group] += size
    return {way: dict(sizes) for way, sizes in totals.items()}


def traffic_bars(run: Run) -> Figure | None:
    """Draw the bytes up and down by tensor group: the model's stacked, the bank's apart on its own scale."""
    totals = traffic(run)
    groups = sorted({group for sizes in totals.values() for group in sizes})
    if not groups:
        return None
    palette = colours(groups)
    has_bank = not BANK_GROUPS.isdisjoint(groups)
    data: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": safe(group),
            "y": list(totals),
            "x": [sizes.get(group, 0) / 2**20 for sizes in totals.values()],
            "marker": {"color": palette[group]},
            "hovertemplate": "%{y}: %{x:.3f} MiB",
        }
        | ({"xaxis": "x2", "yaxis": "y2"} if group in BANK_GROUPS else {})
        for group in groups
    ]
    look = layout(axis("MiB, model"), axis("") | {"domain": [0.62, 1] if has_bank else [0, 1]}, 380 if has_bank else 240)
    look |= {"barmode": "stack"}
    if has_bank:
        look |= {"xaxis2": axis("MiB, bank") | {"anchor": "y2"}, "yaxis2": axis("") | {"domain": [0, 0.3], "anchor": "x2"}}
    caption = "All rounds together, by group of tensors." + (" The bank has its own scale below." if has_bank else "")
    return figure("traffic", "Traffic", data, look, caption)
