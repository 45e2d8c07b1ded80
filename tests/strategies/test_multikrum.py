from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from tests.support import Hospital, Lab, Spy, differing, make_lab, spy

SEVEN = tuple(Hospital(name, "CT", 6 + 2 * i) for i, name in enumerate("abcdefg"))


def scores(models: list[np.ndarray[Any, Any]], f: int) -> list[float]:
    """The paper's, slowly."""
    found = []
    for i, one in enumerate(models):
        others = sorted(float(((one - other) ** 2).sum()) for j, other in enumerate(models) if j != i)
        found.append(sum(others[: len(models) - f - 2]))
    return found


def flat(reply: Reply, lab: Lab) -> np.ndarray[Any, Any]:
    weights = [t for n, t in reply.tensors.items() if t.is_floating_point() and n not in lab.strategy.buffers]
    return torch.cat([t.flatten() for t in weights]).numpy().astype(float)


@pytest.mark.parametrize(("options", "f", "q"), [({}, 2, 5), ({"hostile": 0.1}, 1, 6), ({"chosen": 1}, 2, 1)])
def test_a_round_is_the_plain_mean_of_the_lowest_scores(options: dict[str, Any], f: int, q: int, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"federation__rounds": 1, "model__norm": "batch"}
    lab = make_lab(tmp_path, "multikrum", options, hospitals=SEVEN, engine=Spy, **changes)
    new, replies = lab.run().shared, spy(lab).trained()
    best = np.argsort(scores([flat(reply, lab) for reply in replies], f))[:q]
    (event,) = (e for e in lab.events if e["event"] == "round")
    assert event["chosen"] == sorted(replies[i].client for i in best)
    for name, tensor in new.items():
        if name not in lab.strategy.buffers:
            expected = np.mean([replies[i].tensors[name].numpy().astype(float) for i in sorted(best)], axis=0)
            np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-7, rtol=1e-6)
    assert lab.strategy.buffers <= new.keys()


def test_without_fear_it_is_fedavg_with_equal_weights_bit_for_bit(tmp_path: Path) -> None:
    ours = make_lab(tmp_path / "1", "multikrum", {"hostile": 0.0}, hospitals=SEVEN, federation__rounds=3)
    plain = make_lab(tmp_path / "2", "fedavg", hospitals=SEVEN, federation__rounds=3, federation__weighting="equal")
    assert differing(ours.run().shared, plain.run().shared) == []


@pytest.mark.parametrize("clients", [1, 2, 3, 4])
def test_few_clients_are_enough(clients: int, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "multikrum", {"chosen": 1}, hospitals=SEVEN[:clients])
    lab.run()
    assert all(len(e["chosen"]) == 1 for e in lab.events if e["event"] == "round")


def combine(lab: Lab, sent: dict[str, dict[str, float]]) -> tuple[dict[str, float], list[str]]:
    """Return what a round of single numbers gives, and who was chosen for any of them."""
    server = ServerState({"w": torch.zeros(1), "v": torch.zeros(1)})
    lab.strategy.begin_round(server)
    for client, tensors in sent.items():
        lab.strategy.receive(server, Reply("train", 0, client, 3, {n: torch.tensor([x]) for n, x in tensors.items()}))
    facts = lab.strategy.end_round(server, 0)
    return {name: float(tensor) for name, tensor in server.shared.items()}, facts["chosen"]


def test_of_four_the_lone_stranger_is_not_chosen(tmp_path: Path) -> None:
    sent = {client: {"w": w} for client, w in zip("abcd", (1.0, 1.1, -8.0, 0.9), strict=True)}
    new, chosen = combine(make_lab(tmp_path, "multikrum"), sent)
    assert chosen == ["a", "b", "d"] and new == {"w": pytest.approx(1.0), "v": 0.0}


def test_it_looks_at_as_many_neighbours_as_the_paper(tmp_path: Path) -> None:
    """n = 5, f = 2: at one neighbour. With two, the middle of the looser three would win."""
    lab = make_lab(tmp_path, "multikrum", {"hostile": 0.4, "chosen": 1})
    sent = {client: {"w": w} for client, w in zip("abcde", (0.0, 0.1, 10.0, 10.5, 11.0), strict=True)}
    assert combine(lab, sent)[1] == ["a"]


def test_running_statistics_are_no_part_of_the_distance_and_take_the_median_of_all(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "multikrum")
    lab.strategy.buffers = frozenset({"v"})
    sent = {c: {"w": w, "v": v} for c, w, v in zip("abcd", (1.0, 1.1, -8.0, 0.9), (500.0, 2.0, 3.0, 4.0), strict=True)}
    assert combine(lab, sent) == ({"w": pytest.approx(1.0), "v": 3.5}, ["a", "b", "d"])


def test_tensors_are_judged_among_those_that_hold_them(tmp_path: Path) -> None:
    """Two tasks share w; who is a stranger in w is still one of two that hold v."""
    sent = {"a": {"w": 1.0}, "b": {"w": 1.1}, "c": {"w": -8.0, "v": 2.0}, "d": {"w": 0.9, "v": 4.0}}
    new, chosen = combine(make_lab(tmp_path, "multikrum"), sent)
    assert new == {"w": pytest.approx(1.0), "v": 3.0} and chosen == ["a", "b", "c", "d"]
