"""The figures of the prototype bank: its rows in two dimensions, its make-up, what clients retrieve from it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from omnifm.report.figures import by_round
from omnifm.report.load import Run, Snapshot
from omnifm.report.page import Figure
from omnifm.report.records import ClientEvent
from omnifm.report.style import SYMBOLS, Trace, axis, colours, dashes, drawable, figure, layout, round_axis, safe

MAX_FRAMES = 40
_SHARES = {
    "own": ("its own", "#6B6B6B"),
    "same": ("another client's, same modality", "#0072B2"),
    "other": ("another modality's", "#E69F00"),
}


def principal_plane(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit the plane of largest variance by a singular value decomposition of the centred rows.

    Args:
        vectors: (m, d).

    Returns:
        The mean (d,), the two axes (d, 2), each with its largest entry positive so that a rerun does not mirror the picture,
        and the share of the variance along each (2,). What m or d is too small for is zero.
    """
    mean = vectors.mean(axis=0)
    _, singular, rows = np.linalg.svd(vectors - mean, full_matrices=False)
    axes = np.zeros((vectors.shape[1], 2))
    share = np.zeros(2)
    count = min(2, len(singular))
    axes[:, :count] = rows[:count].T
    variance = singular**2
    if variance.sum() > 0:
        share[:count] = variance[:count] / variance.sum()
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    return mean, axes * np.where(signs == 0, 1, signs), share


def bank_map(run: Run) -> Figure | None:
    """Draw the bank in two dimensions, one frame per round with a slider, in the plane fitted on the last snapshot."""
    snapshots = [s for s in run.bank if len(s.vectors)]
    if not snapshots:
        return None
    last = snapshots[-1]
    mean, axes, share = principal_plane(last.vectors.astype(np.float64))
    chosen = _spread(snapshots, MAX_FRAMES)
    places = {s.round: (s.vectors.astype(np.float64) - mean) @ axes for s in chosen}
    modalities = sorted({name for s in chosen for name in s.modalities})
    frames = [{"name": str(s.round), "data": _frame(s, places[s.round], modalities)} for s in chosen]
    ranges = _ranges(np.concatenate(list(places.values())))
    look = layout(
        axis(f"component 1 ({share[0]:.0%} of the variance)") | {"range": ranges[0]},
        axis(f"component 2 ({share[1]:.0%})") | {"range": ranges[1]},
        620,
    )
    caption = (
        "Each dot is one vector of the bank, coloured by modality. Clouds apart: the vectors name the modality; "
        "clouds mixed: they describe something the modalities have in common. Move the slider to see the bank grow."
    )
    if len(chosen) < len(snapshots):
        caption += f" {len(chosen)} of {len(snapshots)} rounds are shown."
    spec: dict[str, Any] = {"data": frames[-1]["data"], "layout": look}
    if len(frames) > 1:
        spec |= {"frames": frames, "layout": look | _controls([str(frame["name"]) for frame in frames])}
    return Figure("bank-map", "The bank in two dimensions", spec, caption)


def _spread(snapshots: Sequence[Snapshot], most: int) -> list[Snapshot]:
    picks = np.unique(np.linspace(0, len(snapshots) - 1, min(most, len(snapshots))).round().astype(int))
    return [snapshots[i] for i in picks]


def _frame(snapshot: Snapshot, places: np.ndarray, modalities: Sequence[str]) -> list[Trace]:
    palette = colours(modalities)
    traces: list[Trace] = []
    for index, modality in enumerate(modalities):
        rows = [i for i, name in enumerate(snapshot.modalities) if name == modality]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": safe(modality),
                "x": places[rows, 0].round(5).tolist(),
                "y": places[rows, 1].round(5).tolist(),
                "text": [safe(snapshot.clients[i]) for i in rows],
                "hovertemplate": "%{text}",
                "marker": {
                    "color": palette[modality],
                    "symbol": SYMBOLS[index % len(SYMBOLS)],
                    "size": 9,
                    "opacity": 0.8,
                    "line": {"width": 0.5, "color": "#ffffff"},
                },
            }
        )
    return traces


def _ranges(places: np.ndarray) -> list[list[float]]:
    low, high = places.min(axis=0), places.max(axis=0)
    room = np.where(high > low, (high - low) * 0.06, 1.0)
    return [[float(a), float(b)] for a, b in zip(low - room, high + room, strict=True)]


def _controls(names: Sequence[str]) -> dict[str, Any]:
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": False}, "transition": {"duration": 0}}
    play = {"fromcurrent": True, "frame": {"duration": 350, "redraw": False}, "transition": {"duration": 150}}
    slider = {
        "active": len(names) - 1,
        "currentvalue": {"prefix": "round "},
        "pad": {"t": 96},
        "steps": [{"label": name, "method": "animate", "args": [[name], still]} for name in names],
    }
    button = {
        "type": "buttons",
        "showactive": False,
        "x": 0,
        "y": 0,
        "xanchor": "left",
        "yanchor": "top",
        "pad": {"t": 56},
        "buttons": [{"label": "▶ play", "method": "animate", "args": [None, play]}],
    }
    return {"sliders": [slider], "updatemenus": [button]}


def bank_rows(run: Run) -> Figure | None:
    """Draw how many rows of each modality the bank holds over the rounds."""
    events = [(event.round, event.bank) for event in run.round_events if event.bank is not None]
    if not events:
        return None
    modalities = sorted({name for _, bank in events for name in bank.by_modality})
    palette = colours(modalities)
    rounds = [index for index, _ in events]
    data = [
        _stack(name, rounds, [float(bank.by_modality.get(name, 0)) for _, bank in events], palette[name]) for name in modalities
    ]
    caption = "A modality whose band shrinks to nothing has been pushed out of the bank."
    return figure("bank-rows", "Rows of the bank by modality", data, _stacked_layout(rounds, "rows"), caption)


def retrieval_share(run: Run) -> Figure | None:
    """Draw whose vectors the clients used, over the rounds (mean over clients, weighted by their examples)."""
    data: list[Trace] = []
    rounds: list[int] = []
    for key, (label, colour) in _SHARES.items():
        at, shares = by_round(run.client_events, _share_of(key))
        data.append(_stack(label, at, shares, colour))
        rounds += at
    if not rounds:
        return None
    look = _stacked_layout(rounds, "share of retrieved vectors")
    look["yaxis"] |= {"range": [0, 1], "tickformat": ".0%"}
    caption = "Whose bank vectors the clients drew on. Knowledge crosses modalities only in the 'another modality's' part."
    return figure("retrieval", "What clients retrieve", data, look, caption)


def _share_of(key: str) -> Callable[[ClientEvent], float | None]:
    return lambda event: None if event.retrieval is None else event.retrieval.get(key, 0.0)


def effective_rank(run: Run) -> Figure | None:
    """Draw the effective rank of the spectral embeddings over the rounds, one line per modality."""
    caption = (
        "How many directions the frequency descriptions use, whatever their scale; 1 or below: all lie on a line, or are alike."
    )
    data = _by_modality(run, lambda event: event.effective_rank)
    return _lines(run, data, ("effective-rank", "Effective rank", caption), {"rangemode": "tozero"})


def spread(run: Run) -> Figure | None:
    """Draw how far apart the spectral embeddings of a client lie over the rounds, one line per modality."""
    caption = (
        "How far a client's frequency descriptions lie from their mean, squared, the ball's radius being 1. "
        "A line that falls by orders of magnitude is a collapse: all images come to look alike."
    )
    data = _by_modality(run, lambda event: event.spread or None)  # a logarithm has no zero
    return _lines(run, data, ("spread", "Spread", caption), {"type": "log", "dtick": 1, "exponentformat": "power"})


def _by_modality(run: Run, value: Callable[[ClientEvent], float | None]) -> list[Trace]:
    events: dict[str, list[ClientEvent]] = defaultdict(list)
    for event in run.client_events:
        if value(event) is not None:
            events[run.modality.get(event.client, "unknown")].append(event)
    data: list[Trace] = []
    for modality in sorted(events):
        rounds, found = by_round(events[modality], value)
        line = {"color": colours(sorted(events))[modality], "dash": dashes(sorted(events))[modality], "width": 2}
        data.append(
            {"type": "scatter", "mode": "lines+markers", "name": safe(modality), "x": rounds, "y": drawable(found), "line": line}
        )
    return data


def _lines(run: Run, data: list[Trace], words: tuple[str, str, str], scale: dict[str, Any]) -> Figure | None:
    """Return lines over the rounds as a figure of this name, title and caption; None without any."""
    name, title, caption = words
    look = layout(round_axis([e.round for e in run.client_events]), axis(title.lower()) | scale)
    return figure(name, title, data, look, caption) if data else None


def _stack(name: str, x: list[int], y: Sequence[float | None], colour: str) -> Trace:
    return {"type": "bar", "name": safe(name), "x": x, "y": drawable(y), "marker": {"color": colour}}


def _stacked_layout(rounds: list[int], title: str) -> dict[str, Any]:
    return layout(round_axis(rounds), axis(title)) | {"barmode": "stack", "bargap": 0.1}
