"""The servers' rules against Flower's own, round by round; golden/make_flower.py says how its numbers were made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from tests.support import make_lab

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "flower.json").read_text())


def tensors(lists: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in lists.items()}


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_every_round_ends_where_flowers_does(case: str, tmp_path: Path) -> None:
    golden = GOLDEN["cases"][case]
    strategy = make_lab(tmp_path, golden["strategy"], golden["options"]).strategy
    server = ServerState(tensors(GOLDEN["start"]))
    for index, told in enumerate(golden["rounds"]):
        strategy.begin_round(server)
        for k, (examples, move) in enumerate(zip(told["examples"], told["moves"], strict=True)):
            moved = {name: server.shared[name] + change for name, change in tensors(move).items()}
            strategy.receive(server, Reply("train", index, f"client {k}", examples, moved))
        strategy.end_round(server, index)
        for name, expected in tensors(told["after"]).items():
            torch.testing.assert_close(server.shared[name], expected, atol=1e-9, rtol=0)
