"""A few test predictions per client as pictures, for the report."""

import json
from pathlib import Path
from typing import Any

import torch

from omnifm import seeds
from omnifm.federation.client import Site
from omnifm.federation.messages import Request
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import Strategy
from omnifm.track.folder import write_text

_PER_CLIENT = 3
_MOST_CLIENTS = 12


def save_examples(folder: Path, site: Site, strategy: Strategy, server: ServerState, completed: int) -> None:
    """Draw test images of up to twelve clients, predict with each client's own model, write PNGs and `examples.json`."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    records: list[dict[str, Any]] = []
    for client in strategy.context.clients[:_MOST_CLIENTS]:
        count = len(site.task.client_data(client.id).test)
        if not count:
            continue
        generator = seeds.generator(strategy.context.seed, "examples", client.id)
        index = torch.randperm(count, generator=generator)[:_PER_CLIENT]
        tensors, extra = strategy.shared_for(server, client.id), strategy.extra_for(server, client.id)
        prediction, batch = site.predict(Request("evaluate", completed, client.id, tensors, extra), index)
        for place in range(len(index)):
            picture = site.task.picture(prediction, batch, place)
            name = f"{client.id}-{place}.png"
            Image.fromarray(picture.image).save(folder / name)
            shown = {"truth": picture.truth, "prediction": picture.prediction, "confidence": picture.confidence}
            records.append({"client": client.id, "modality": client.modality, "file": name, **shown, "correct": picture.correct})
    write_text(folder / "examples.json", json.dumps(records, indent=1))
