from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from omnifm.errors import ConfigError
from omnifm.federation.client import STATE
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from omnifm.federation.strategies.feddyn import LINEAR, SERVER
from tests.strategies.quadratic import CLIENTS, CURVES, OPTIMUM, minimise
from tests.support import HOSPITALS, Lab, Spy, differing, make_lab, spy

EVERYBODY = (("a", "b", "c"),)
PAIRS = (("a", "b"), ("b", "c"), ("a", "c"))


def lab_of(folder: Path, alpha: float, strategy: str = "feddyn") -> Lab:
    return make_lab(folder, strategy, {"alpha": alpha} if strategy == "feddyn" else {}, hospitals=CLIENTS)


@pytest.mark.parametrize("schedule", [EVERYBODY, PAIRS])
def test_three_parabolas_are_minimised_to_the_optimum_of_all(schedule: Sequence[Sequence[str]], tmp_path: Path) -> None:
    """-0.857143, where each client goes to the end of its own objective. FedAvg stops elsewhere."""
    server, _ = minimise(lab_of(tmp_path / "1", 1.0).strategy, 200, 100, 0.1, schedule)
    assert float(server.shared["theta"]) == pytest.approx(-0.857143, abs=1e-6) == OPTIMUM
    plain, _ = minimise(lab_of(tmp_path / "2", 1.0, "fedavg").strategy, 200, 100, 0.1, schedule)
    assert abs(float(plain.shared["theta"]) - OPTIMUM) > 0.1


@pytest.mark.parametrize("schedule", [EVERYBODY, PAIRS])
def test_every_number_is_that_of_the_paper(schedule: Sequence[Sequence[str]], tmp_path: Path) -> None:
    """Algorithm 1 as printed, undivided, with the same few steps in place of the argmin."""
    alpha, steps, lr = 0.3, 7, 0.05
    theta, h, g = 0.0, 0.0, dict.fromkeys(CURVES, 0.0)
    for index in range(9):
        sampled = schedule[index % len(schedule)]
        found: dict[str, float] = {}
        for client in sampled:
            a, b = CURVES[client]
            own = theta
            for _ in range(steps):
                own -= lr * (a * (own - b) - g[client] + alpha * (own - theta))
            g[client] -= alpha * (own - theta)
            found[client] = own
        h -= alpha / 3 * sum(own - theta for own in found.values())
        theta = float(np.mean(list(found.values()))) - h / alpha
    server, states = minimise(lab_of(tmp_path, alpha).strategy, 9, steps, lr, schedule)
    assert float(server.shared["theta"]) == pytest.approx(theta, rel=1e-12)
    assert alpha * float(server.extra[SERVER + "theta"]) == pytest.approx(h, rel=1e-12)
    assert {c: alpha * float(s[LINEAR + "theta"]) for c, s in states.items()} == pytest.approx(g, rel=1e-12)


def test_at_the_end_a_client_stands_still_and_its_linear_term_is_its_gradient(tmp_path: Path) -> None:
    """There g_i is the gradient of L_i at the common optimum; they cancel."""
    _, states = minimise(lab_of(tmp_path, 1.0).strategy, 200, 100, 0.1)
    for client, (a, b) in CURVES.items():
        assert float(states[client][LINEAR + "theta"]) == pytest.approx(a * (OPTIMUM - b), abs=1e-6)


def test_the_first_round_is_fedproxs_at_the_clients(tmp_path: Path) -> None:
    """Before anybody has learned a linear term only the quadratic one is there: uploads agree bit for bit."""
    ours = make_lab(tmp_path / "1", "feddyn", {"alpha": 0.1}, engine=Spy, model__norm="batch")
    prox = make_lab(tmp_path / "2", "fedprox", {"mu": 0.1}, engine=Spy, model__norm="batch")
    ours.run()
    prox.run()
    for index, same in ((0, True), (1, False)):
        for a, b in zip(spy(ours).trained(index), spy(prox).trained(index), strict=True):
            assert (differing(dict(a.tensors), dict(b.tensors)) == []) == same


def test_two_rounds_on_a_network_by_hand(tmp_path: Path) -> None:
    lab = make_lab(
        tmp_path,
        "feddyn",
        {"alpha": 0.5},
        optimiser__batch_size=99,
        optimiser__momentum=0.0,
        federation__local_epochs=3,
    )
    model = make_lab(tmp_path, "fedavg").site.model
    names = [n for n, _ in model.named_parameters()]
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    h = {n: torch.zeros_like(t) for n, t in theta.items()}
    g = {c.id: {n: torch.zeros_like(t) for n, t in theta.items()} for c in HOSPITALS}
    for _ in range(2):
        ends: list[dict[str, Tensor]] = []
        for c in HOSPITALS:
            batch = lab.task.client_data(c.id).train.batch(torch.arange(c.train))
            for n, p in model.named_parameters():
                p.data.copy_(theta[n])
            for _ in range(3):
                loss = functional.cross_entropy(model(batch.inputs).prediction, batch.target)
                for n, grad in zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                    p = model.get_parameter(n)
                    p.data -= 0.1 * (grad + 1e-4 * p.data - g[c.id][n] + 0.5 * (p.data - theta[n]))
            ends.append({n: p.detach().clone() for n, p in model.named_parameters()})
            for n in names:
                g[c.id][n] -= 0.5 * (ends[-1][n] - theta[n])
        for n in names:
            h[n] -= 0.5 / 4 * sum(end[n] - theta[n] for end in ends)
            theta[n] = torch.stack([end[n] for end in ends]).mean(0) - h[n] / 0.5
    server = lab.run()
    for n in names:
        torch.testing.assert_close(server.shared[n], theta[n], atol=3e-6, rtol=1e-5)
        for c in HOSPITALS:
            torch.testing.assert_close(0.5 * lab.private(c.id)[STATE + LINEAR + n], g[c.id][n], atol=3e-6, rtol=1e-5)


def test_statistics_are_fedavgs_and_have_no_terms(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "feddyn", engine=Spy, model__norm="batch")
    server = lab.run()
    parameters = {n for n, _ in lab.site.model.named_parameters()}
    assert server.extra.keys() == {SERVER + n for n in parameters} and parameters < server.shared.keys()
    assert lab.private("a").keys() == {STATE + LINEAR + n for n in parameters}
    sent = spy(lab).trained(1)
    for name in ("backbone.norm.running_mean", "backbone.norm.running_var"):
        mean = sum(r.num_examples / 36 * r.tensors[name].double() for r in sent)
        torch.testing.assert_close(server.shared[name].double(), mean, atol=1e-7, rtol=1e-6)
    assert all(not message.extra for message in spy(lab).messages())


def test_a_tensor_that_few_hold_counts_those(tmp_path: Path) -> None:
    strategy = make_lab(tmp_path, "feddyn").strategy
    strategy.holds = {h.id: frozenset({"w"}) for h in HOSPITALS[:3]}
    server = ServerState({"w": torch.zeros(1), "own": torch.zeros(1)})
    strategy.begin_round(server)
    strategy.receive(server, Reply("train", 0, "a", 10, {"w": torch.ones(1)}))
    strategy.receive(server, Reply("train", 0, "d", 2, {"w": 3 * torch.ones(1), "own": torch.ones(1)}))
    strategy.end_round(server, 0)
    # -h / alpha: (1 + 3) / 4 of w, 1 / 1 of d's own; uniform means 2 and 1 before.
    assert float(server.extra[SERVER + "w"]) == -1 and float(server.shared["w"]) == 3
    assert float(server.extra[SERVER + "own"]) == -1 and float(server.shared["own"]) == 2
    kept = {n: t.clone() for n, t in (server.shared | server.extra).items() if n.endswith("own")}
    strategy.begin_round(server)
    strategy.receive(server, Reply("train", 1, "a", 10, {"w": torch.ones(1)}))
    strategy.end_round(server, 1)
    assert differing(kept, {n: t for n, t in (server.shared | server.extra).items() if n.endswith("own")}) == []


def test_the_server_may_go_part_of_the_way(tmp_path: Path) -> None:
    labs = [make_lab(tmp_path / str(s), "feddyn", {"server_step": s}, federation__rounds=1) for s in (1.0, 0.25)]
    whole, part = (lab.run().shared for lab in labs)
    for name, start in labs[0].untrained.items():
        torch.testing.assert_close(part[name], start + 0.25 * (whole[name] - start), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("options", "message"), [({"alpha": 0.0}, "alpha"), ({"aggregation": "neighbours"}, "aggregation")])
def test_bad_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"strategies\.feddyn\.{message}"):
        make_lab(tmp_path, "feddyn", options)


@pytest.mark.parametrize("changes", [{}, {"federation__participation": 0.5, "model__norm": "batch"}])
def test_clients_train_alike_whichever_model_is_scored(changes: dict[str, Any], tmp_path: Path) -> None:
    changes = {"federation__rounds": 4, **changes}
    server_, mean_ = (
        make_lab(tmp_path / scored, "feddyn", {"alpha": 0.1, "scored": scored}, engine=Spy, **changes)
        for scored in ("server", "mean")
    )
    first, second = server_.run(), mean_.run()
    for a, b in zip(spy(server_).trained(), spy(mean_).trained(), strict=True):
        assert (a.client, differing(dict(a.tensors), dict(b.tensors))) == (b.client, [])
    assert differing(first.extra, second.extra) == []
    last = spy(mean_).trained(3)
    for name, tensor in second.shared.items():
        duals = second.extra.get(SERVER + name)
        torch.testing.assert_close(first.shared[name], tensor if duals is None else tensor - duals, atol=0, rtol=0)
        if duals is not None:
            mean = torch.stack([reply.tensors[name].double() for reply in last]).mean(dim=0)
            torch.testing.assert_close(tensor.double(), mean, atol=1e-6, rtol=0)
    scored = {n: t for r in evaluated(mean_, second) for n, t in r.items()}
    assert differing(scored, dict(second.shared)) == [], "the mean is what an evaluation sends"


def evaluated(lab: Lab, server: ServerState) -> list[dict[str, Tensor]]:
    before = len(spy(lab).requests)
    lab.evaluate(server)
    return [dict(request.tensors) for request in spy(lab).requests[before:]]


def test_the_mean_is_of_whole_steps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategies\.feddyn.*set server_step = 1"):
        make_lab(tmp_path, "feddyn", {"scored": "mean", "server_step": 0.5})
