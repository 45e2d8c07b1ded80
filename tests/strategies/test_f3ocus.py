from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from omnifm.errors import FederationError
from omnifm.federation import nsga2
from omnifm.federation.low_rank import DOWN, UP, changed_layers
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from omnifm.federation.strategies.f3ocus import greedy
from omnifm.federation.tangent import kernels, shares
from omnifm.tasks.base import Batch, Output
from tests.federation.test_nsga2 import every_mask
from tests.support import HOSPITALS, LAYERS, Altered, Lab, Spy, differing, make_lab, spy

MASK, SCORES = "f3ocus/mask", "f3ocus/scores"
NAMES = ["backbone.conv", *(f"backbone.layers.{i}" for i in range(4))]


def chosen(mask: Tensor) -> set[str]:
    """The tensors of the layers in a mask."""
    return {layer + end for layer, there in zip(NAMES, mask.tolist(), strict=True) if there for end in (DOWN, UP)}


def masks_of(server: ServerState) -> nsga2.Masks:
    return np.stack([server.extra[f"{MASK}/{h.id}"].numpy() for h in HOSPITALS])


@pytest.mark.parametrize("changes", [{}, {"model__norm": "batch", "federation__participation": 0.5, "federation__rounds": 3}])
@pytest.mark.parametrize("options", [{"layers": 5}, {"layers": 99, "search": "greedy", "rank": 2, "alpha": 3.0}])
def test_where_all_layers_are_chosen_it_is_lora_bit_for_bit(
    options: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    ours = make_lab(tmp_path / "1", "f3ocus", options, **changes).run()
    low_rank = {n: v for n, v in options.items() if n in ("rank", "alpha")}
    plain = make_lab(tmp_path / "2", "lora", low_rank, layers=LAYERS["f3ocus"], **changes).run()
    assert differing(ours.shared, plain.shared) == []
    assert changed_layers(ours.shared) == NAMES


def test_a_client_trains_all_layers_first_and_then_what_it_was_told(tmp_path: Path) -> None:
    schedule = [["a", "b"], ["a", "c"], ["a", "b", "c", "d"]]
    changes: dict[str, Any] = {"schedule": schedule, "federation__rounds": 3, "optimiser__weight_decay": 0.1}
    lab = make_lab(tmp_path, "f3ocus", engine=Spy, **changes)
    lab.run()
    requests = [r for r in spy(lab).requests if r.kind == "train"]
    first = [(r.round, r.client) for r in requests if not r.extra]
    assert first == [(0, "a"), (0, "b"), (1, "c"), (2, "d")]
    for request, reply in zip(requests, spy(lab).trained(), strict=True):
        mask = request.extra.get(MASK, torch.ones(5, dtype=torch.bool))
        assert int(mask.sum()) == (2 if request.extra else 5)
        head = {n for n in request.tensors if n.startswith("head")}
        assert set(differing(dict(request.tensors), dict(reply.tensors))) == chosen(mask) | head


def test_a_layer_is_averaged_over_those_that_trained_it(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "f3ocus", engine=Spy, federation__rounds=3)
    seen: list[dict[str, Tensor]] = []
    lab.after_round = lambda lab, server, done: seen.append(dict(server.shared))
    lab.run()
    some = set()
    for index in (1, 2):
        requests = [r for r in spy(lab).requests if r.kind == "train" and r.round == index]
        for name, before in seen[index - 1].items():
            pairs = zip(requests, spy(lab).trained(index), strict=True)
            those = [r for q, r in pairs if name.startswith("head") or name in chosen(q.extra[MASK])]
            total = sum(r.num_examples for r in those)
            mean = sum(r.num_examples / total * r.tensors[name].double() for r in those) if those else before.double()
            torch.testing.assert_close(seen[index][name].double(), torch.as_tensor(mean), atol=1e-7, rtol=1e-6)
            some.add(len(those))
    assert len(some) > 2, "some layers are trained by some"


def test_a_layer_that_nobody_trained_stays(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "f3ocus", {"layers": 1, "search": "greedy", "spread": 0.0, "server_step": 0.5})
    seen: list[ServerState] = []
    lab.after_round = lambda lab, server, done: seen.append(replace(server, shared=dict(server.shared), extra={**server.extra}))
    lab.run()
    trained = set().union(*(chosen(seen[0].extra[f"{MASK}/{h.id}"]) for h in HOSPITALS))
    head = {n for n in seen[0].shared if n.startswith("head")}
    assert set(differing(seen[0].shared, seen[1].shared)) == trained | head and len(trained) < 10


# --------------------------------------------------------------------------- scores
def test_scores_are_shares_of_the_first_eigenvalues_of_the_kernels(tmp_path: Path) -> None:
    """Written out: gradients of each example of the model that was sent, and power iteration on their products."""
    lab = make_lab(tmp_path, "f3ocus", engine=Spy, model__norm="batch")
    lab.run()
    reply = next(r for r in spy(lab).trained(1) if r.client == "b")
    model = lab.site.model
    model.load_state_dict({**model.state_dict(), **reply.tensors})
    model.eval()
    train = lab.task.client_data("b").train
    first = []
    for layer in NAMES:
        parameters = [dict(model.named_parameters())[layer + end] for end in (DOWN, UP)]
        rows = []
        for i in range(len(train)):
            batch = train.batch(torch.tensor([i]))
            loss = functional.cross_entropy(model(batch.inputs).prediction, batch.target)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double())
        kernel, vector = torch.stack(rows) @ torch.stack(rows).t(), torch.ones(len(train)).double()
        for _ in range(500):
            vector = kernel @ vector / (kernel @ vector).norm()
        first.append(float(vector @ kernel @ vector))
    found = reply.extra[SCORES]
    assert found.tolist() == pytest.approx([value / sum(first) for value in first], rel=1e-4)
    assert float(found.sum()) == pytest.approx(1)


def test_at_most_sixteen_examples_are_drawn_anew_each_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab(tmp_path, "f3ocus")
    drawn: list[list[int]] = []

    def listen(layers: Any, examples: Any, passes: Any) -> Tensor:
        batches = list(examples)
        drawn.append([int(batch.row) for batch in batches])
        return kernels(layers, batches, passes)

    monkeypatch.setattr("omnifm.federation.strategies.f3ocus.kernels", listen)
    monkeypatch.setattr("omnifm.federation.strategies.f3ocus._EXAMPLES", 7)
    lab.run()
    assert [len(rows) for rows in drawn] == [7, 6, 7, 7] * 2
    assert all(len(set(rows)) == len(rows) for rows in drawn) and drawn[0] != drawn[4]


def test_what_does_not_train_or_has_no_gradient_counts_nothing() -> None:
    weight, frozen, unused = torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2, requires_grad=True)
    examples = [Batch(torch.tensor([1.0, k]), torch.zeros(1), torch.zeros(1)) for k in range(3)]
    passes: Callable[[Batch], tuple[Output, Tensor]] = lambda b: (Output(b.image), (b.image * weight * frozen).sum())  # noqa: E731
    found = kernels([[weight], [frozen], [unused]], examples, passes)
    assert found[0].tolist() == [[1, 1, 1], [1, 2, 3], [1, 3, 5]] and not bool(found[1:].any())
    assert shares(found).tolist() == [1, 0, 0]
    assert shares(kernels([[frozen]] * 4, examples, passes)).tolist() == [0.25] * 4
    assert not bool(shares(found * float("nan")).isfinite().any())


# --------------------------------------------------------------------------- the choice
def test_it_chooses_the_knee_of_the_front(tmp_path: Path) -> None:
    """All masks of the problem are enumerated, from the scores that were sent."""
    lab = make_lab(tmp_path, "f3ocus", hospitals=HOSPITALS[:3], federation__rounds=1)
    server = lab.run()
    scores = np.stack([server.extra[f"{SCORES}/{c}"].double().numpy() for c in "abc"])
    masks = every_mask(np.ones((3, 5), bool), [2] * 3)
    values = nsga2.objectives(masks, scores)
    front = nsga2.ranks(values) == 0
    best = values[front][nsga2.knee(values[front])]
    found = np.stack([server.extra[f"{MASK}/{c}"].numpy() for c in "abc"])
    assert nsga2.objectives(found[None], scores)[0].tolist() == pytest.approx(best.tolist(), abs=1e-9)
    (event,) = [e for e in lab.events if e["event"] == "round"]
    assert event["f3ocus"] == pytest.approx({"score": -best[0] / 3, "variance": best[1]})


def test_greed_takes_turns_and_avoids_what_others_have() -> None:
    scores = np.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    everything, budget = np.ones((2, 3), bool), np.array([2, 1])
    assert greedy(scores, everything, budget, 0.0).tolist() == [[True, True, False], [True, False, False]]
    # The second row's first choice is .6 - 1 * .5 = .1 against .3.
    assert greedy(scores, everything, budget, 1.0).tolist() == [[True, False, True], [False, True, False]]
    allowed = np.array([[0, 1, 1], [0, 1, 0]], bool)
    assert greedy(scores, allowed, budget, 1.0).tolist() == allowed.tolist()
    even = greedy(np.random.default_rng(0).random((8, 4)), np.ones((8, 4), bool), np.full(8, 1), 100.0)
    assert even.sum(axis=0).tolist() == [2] * 4 and even.sum(axis=1).tolist() == [1] * 8


@pytest.mark.parametrize("search", ["nsga2", "greedy"])
def test_a_client_chooses_among_the_layers_that_it_has(search: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "f3ocus", {"search": search, "layers": 2})
    strategy = lab.strategy
    shared = {layer + end: torch.zeros(1) for layer in "pqrs" for end in (DOWN, UP)}
    own = {"a": "pq", "b": "r", "c": "pqrs"}
    strategy.holds = {c: frozenset(layer + end for layer in layers for end in (DOWN, UP)) for c, layers in own.items()}
    server = ServerState(dict(shared))
    strategy.begin_round(server)
    for client, layers in own.items():
        tensors = {n: t + 1 for n, t in shared.items() if n in strategy.holds[client]}
        scores = torch.full((len(layers),), 1 / len(layers))
        strategy.receive(server, Reply("train", 0, client, 8, tensors, {SCORES: scores}))
    strategy.end_round(server, 0)
    sizes = {c: (len(m := strategy.extra_for(server, c)[MASK]), int(m.sum())) for c in own}
    assert sizes == {"a": (2, 2), "b": (1, 1), "c": (4, 2)} and strategy.extra_for(server, "d") == {}


Change = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {}, "are missing, or not one for each"),
        (lambda x: {SCORES: x[SCORES][1:]}, "are missing, or not one for each"),
        (lambda x: {SCORES: x[SCORES] * float("nan")}, "are not shares of one"),
        (lambda x: {SCORES: x[SCORES] * 2}, "are not shares of one"),
        (lambda x: {SCORES: x[SCORES] - torch.tensor([2.0, -2, 0, 0, 0])}, "are not shares of one"),
    ],
)
def test_bad_scores_name_client_and_round(change: Change, message: str, tmp_path: Path) -> None:
    def alter(reply: Reply) -> Reply:
        return replace(reply, extra=change(reply.extra)) if (reply.client, reply.round) == ("c", 1) else reply

    lab: Lab = make_lab(tmp_path, "f3ocus", engine=lambda site: Altered(site, alter))
    with pytest.raises(FederationError, match=rf"client c, round 1: .*{message}") as caught:
        lab.run()
    assert "\n" not in str(caught.value)


def test_masks_keep_their_budget_whatever_the_search(tmp_path: Path) -> None:
    for search in ("nsga2", "greedy"):
        server = make_lab(tmp_path / search, "f3ocus", {"search": search, "layers": 3}).run()
        assert masks_of(server).sum(axis=1).tolist() == [3] * 4
