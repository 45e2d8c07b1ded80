from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from tests.support import HOSPITALS, Lab, Spy, differing, make_lab, spy


def reference(lab: Lab, kind: str, tau: float, *, rescale: bool = True, step: float = 1.0) -> None:
    """Check one round against numpy, element by element."""
    start, new, replies = lab.start().shared, lab.run().shared, spy(lab).trained()
    share = np.array([reply.num_examples for reply in replies], dtype=float)
    share /= share.sum()
    masked = 0
    for name, tensor in new.items():
        old = start[name].numpy().astype(float)
        deltas = np.stack([reply.tensors[name].numpy().astype(float) - old for reply in replies])
        mean = np.tensordot(share, deltas, axes=1)
        if not tensor.is_floating_point():
            assert int(tensor) == max(int(reply.tensors[name]) for reply in replies)
            continue
        agreed = np.abs(np.sign(deltas).mean(axis=0))
        mask = np.where(agreed >= tau, 1.0, agreed if kind == "fedgma" else 0.0)
        if kind == "and_mask" and rescale:
            mask /= mask[deltas.any(axis=0)].mean()
        if name in lab.strategy.buffers:
            mask = np.ones_like(mask)
        masked += int((mask < 1).sum())
        np.testing.assert_allclose(tensor.numpy(), old + step * mask * mean, atol=3e-6, rtol=1e-5)
    assert masked > 20, "the mask does something"


CHANGES: dict[str, Any] = {"engine": Spy, "federation__rounds": 1, "model__norm": "batch"}


@pytest.mark.parametrize("tau", [0.4, 0.6, 1.0])
def test_fedgma_is_the_masked_mean(tau: float, tmp_path: Path) -> None:
    reference(make_lab(tmp_path, "fedgma", {"tau": tau}, **CHANGES), "fedgma", tau)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("tau", [0.6, 1.0])
def test_the_and_mask_moves_what_all_agree_on(tau: float, rescale: bool, tmp_path: Path) -> None:
    reference(make_lab(tmp_path, "and_mask", {"tau": tau, "rescale": rescale}, **CHANGES), "and_mask", tau, rescale=rescale)


@pytest.mark.parametrize("strategy", ["fedgma", "and_mask"])
def test_a_server_step_shortens_the_masked_step(strategy: str, tmp_path: Path) -> None:
    reference(make_lab(tmp_path, strategy, {"tau": 1.0, "server_step": 0.3}, **CHANGES), strategy, 1.0, step=0.3)


@pytest.mark.parametrize("strategy", ["fedgma", "and_mask"])
@pytest.mark.parametrize("changes", [{}, {"federation__participation": 0.5, "model__norm": "batch"}])
def test_without_a_threshold_it_is_fedavg_bit_for_bit(strategy: str, changes: dict[str, Any], tmp_path: Path) -> None:
    ours = make_lab(tmp_path / "1", strategy, {"tau": 0.0}, federation__rounds=3, **changes)
    plain = make_lab(tmp_path / "2", "fedavg", federation__rounds=3, **changes)
    assert differing(ours.run().shared, plain.run().shared) == []


def test_every_client_has_one_vote_whatever_its_size(tmp_path: Path) -> None:
    """With a threshold above one half, the one large client against two small ones is outvoted as if it were small."""
    lab = make_lab(tmp_path, "fedgma", {"tau": 1.0}, hospitals=HOSPITALS[:3], **CHANGES)
    reference(lab, "fedgma", 1.0)
    (event,) = (e for e in lab.events if e["event"] == "round")
    assert 1 / 3 < event["agreement"] < 1


def test_a_tensor_is_voted_on_by_those_that_hold_it(tmp_path: Path) -> None:
    strategy = make_lab(tmp_path, "and_mask").strategy
    server = ServerState({"w": torch.zeros(1), "v": torch.zeros(1), "u": torch.ones(1)})
    strategy.begin_round(server)
    for client, sent in {"a": {"w": 1.0, "v": 2.0}, "b": {"w": -0.5}}.items():
        strategy.receive(server, Reply("train", 0, client, 3, {n: torch.tensor([x]) for n, x in sent.items()}))
    strategy.end_round(server, 0)
    assert {n: float(t) for n, t in server.shared.items()} == {"w": 0.0, "v": 2.0, "u": 1.0}
