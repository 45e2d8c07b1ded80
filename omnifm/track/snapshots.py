"""Snapshots of the knowledge bank, for the report's drawing of it over rounds."""

import json
from pathlib import Path

from omnifm.federation.state import Context
from omnifm.federation.store import write_tensors
from omnifm.spectral.rows import BankRows


def save_bank(folder: Path, round_index: int, rows: BankRows, context: Context) -> None:
    """Write `round-NNNN.safetensors`: vectors, and the numbers of client and modality with the names they stand for."""
    names = {"clients": json.dumps([c.id for c in context.clients]), "modalities": json.dumps(context.modalities)}
    tensors = {"vectors": rows.vectors, "client": rows.client, "modality": rows.modality, "round": rows.round}
    write_tensors(folder / f"round-{round_index:04d}.safetensors", tensors, names)
