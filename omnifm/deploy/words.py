"""A run's status in words: for the terminal, and as a page that loads itself anew."""

import html
from collections.abc import Mapping
from typing import Any

COLUMNS = ("client", "connected", "waiting for", "replies", "late", "twice", "errors", "MiB down", "MiB up", "seconds", "trouble")
NUMBERS = COLUMNS[3:10]
_REFRESH_SECONDS = 5
_STYLE = "body{font:15px system-ui;margin:2em}td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:left}"


def headline(facts: Mapping[str, Any]) -> str:
    """Return state, round, loss and score in one line."""
    parts = [str(facts["state"]), f"round {facts['round']} of {facts['rounds']}"]
    parts += [f"loss {facts['loss']:.3f}"] if facts["loss"] is not None else []
    parts += [f"val {facts['primary']} {facts['score']:.3f}"] if facts["score"] is not None else []
    return ", ".join(parts)


def cells(client: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a client's cells, one for each of `COLUMNS`."""
    counts = [str(facts[key]) for key in ("replies", "late", "repeated", "errors")]
    sizes = [f"{facts[key] / 2**20:.1f}" for key in ("bytes_down", "bytes_up")]
    connected = "yes" if facts["connected"] else "no"
    return (client, connected, facts["waiting"], *counts, *sizes, f"{facts['seconds']:.1f}", facts["said"] or facts["trouble"])


def page(facts: Mapping[str, Any]) -> str:
    """Return the status as one self-contained page that loads itself anew every five seconds until the run is over."""
    refresh = "" if facts["state"] == "finished" else f'<meta http-equiv="refresh" content="{_REFRESH_SECONDS}">'
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(client, found)) + "</tr>"
        for client, found in facts["clients"].items()
    )
    title = html.escape(headline(facts))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}<title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><table><tr>{head}</tr>{rows}</table></body></html>\n"
    )
