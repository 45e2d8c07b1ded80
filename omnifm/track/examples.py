"""A few test predictions per client as pictures, for the report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnifm import seeds
from omnifm.errors import NotFiniteError
from omnifm.federation.client import Site
from omnifm.federation.messages import Request
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import Strategy
from omnifm.tasks.base import Pixels
from omnifm.track.folder import write_text

_PER_CLIENT = 3
_MOST_CLIENTS = 12


def strip(panels: Sequence[Pixels]) -> Pixels:
    """Put pictures side by side, two white pixels apart, white below those that are lower; grey becomes colour if need be."""
    if len(panels) == 1:
        return panels[0]
    height, colour = max(len(panel) for panel in panels), [np.atleast_3d(panel) for panel in panels]
    pieces: list[Pixels] = []
    for panel in colour:
        wide = np.broadcast_to(panel, (*panel.shape[:2], 3))
        pieces.append(np.pad(wide, ((0, height - len(wide)), (0, 2), (0, 0)), constant_values=255))
    return np.concatenate(pieces, axis=1)[:, :-2]


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
        tensors, extra = strategy.shared_for(server, client.id), strategy.extra_for_prediction(server, client.id)
        try:
            request = Request("evaluate", completed, client.id, tensors, extra, server.told(client.id))
            prediction, batch = site.predict(request, index)
        except NotFiniteError:
            continue  # a strategy that goes on all the same: the client has no score either
        for place in range(len(index)):
            picture = site.task.picture(prediction, batch, place)
            name = f"{client.id}-{place}.png"
            Image.fromarray(strip([pixels for _, pixels in picture.panels])).save(folder / name)
            said = {"truth": picture.truth or None, "prediction": picture.prediction or None, "confidence": picture.confidence}
            shown = {"panels": [caption for caption, _ in picture.panels], **said, "correct": picture.correct}
            records.append({"client": client.id, "modality": client.modality, "file": name, **shown})
    write_text(folder / "examples.json", json.dumps(records, indent=1))
