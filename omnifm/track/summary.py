"""Totals over a run's events."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnifm.track.recorder import read_events

BANK_UP = ("prototypes", "retrievals")
BANK_DOWN = ("bank",)


def totals(events: Path, test_seconds: float, total_seconds: float) -> dict[str, Any]:
    """Return `bytes` and `seconds` as `metrics.json` has them.

    Bytes are those of training messages and descriptions; evaluation needs no traffic that training does not already pay
    for in a deployment, where a client tests the model it was sent.

    Args:
        events: events.jsonl.
        test_seconds: time of the final tests.
        total_seconds: wall time of the run over all its starts.
    """
    found = read_events(events)
    up = [event["bytes_up"] for event in found if event["event"] in ("client", "description")]
    down = [event["bytes_down"] for event in found if event["event"] == "client"]
    rounds = [event["seconds"] for event in found if event["event"] == "round"]
    evaluating = sum(event["seconds"] for event in found if event["event"] == "evaluation")
    return {
        "bytes": {
            "up": _sum(up),
            "down": _sum(down),
            "bank_up": _sum(up, BANK_UP),
            "bank_down": _sum(down, BANK_DOWN),
        },
        "seconds": {
            "total": total_seconds,
            "train": sum(s["train"] for s in rounds),
            "aggregate": sum(s["aggregate"] for s in rounds),
            "evaluate": evaluating + test_seconds,
        },
    }


def _sum(messages: list[Mapping[str, int]], groups: tuple[str, ...] | None = None) -> int:
    return sum(size for message in messages for group, size in message.items() if groups is None or group in groups)
