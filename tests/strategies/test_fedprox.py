from pathlib import Path

import torch

from omnifm.federation.messages import Request
from omnifm.federation.state import LocalJob
from omnifm.federation.strategies.fedprox import FedProx, FedProxOptions
from omnifm.federation.strategy import Step
from omnifm.tasks.base import Batch, Output
from tests.support import Lab, Spy, make_lab, spy


def make_step(lab: Lab) -> Step:
    """A step whose model has moved away from the anchor, each parameter another way."""
    model = lab.site.model
    anchor = {n: t.clone() for n, t in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data += torch.randn(p.shape, generator=generator)
        p.grad = torch.randn(p.shape, generator=generator)
    data = lab.task.client_data("a")
    job = LocalJob("a", 0, model, data, {}, anchor, {}, 0, torch.device("cpu"))
    return Step(job, Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1)), Output(torch.zeros(1)))


def strategy(lab: Lab, mu: float) -> FedProx:
    return FedProx(FedProxOptions(mu=mu), lab.strategy.context)


def test_the_gradient_is_that_of_half_mu_times_the_squared_distance(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedprox")
    step = make_step(lab)
    model = step.job.model
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    parameters = dict(model.named_parameters())
    term = 0.7 / 2 * torch.stack([(p - step.job.anchor[n]).square().sum() for n, p in parameters.items()]).sum()
    expected = torch.autograd.grad(term, list(parameters.values()))
    prox = strategy(lab, 0.7)
    prox.begin(step.job)
    prox.correct(step)
    assert len(before) == len(parameters) == 6
    for (name, p), g in zip(parameters.items(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad - before[name], g)


def test_parameters_without_gradient_stay_without(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedprox")
    step = make_step(lab)
    head = next(iter(step.job.model.head.parameters()))
    head.grad = None
    prox = strategy(lab, 0.7)
    prox.begin(step.job)
    prox.correct(step)
    assert head.grad is None


def test_a_strong_pull_keeps_the_model_near_the_received_one(tmp_path: Path) -> None:
    def moved(mu: float) -> float:
        lab = make_lab(tmp_path / str(mu), "fedprox", {"mu": mu}, engine=Spy, federation__local_epochs=5)
        lab.run()
        requests = [r for r in spy(lab).requests if r.kind == "train"]
        return sum(distance(q, r.tensors) for q, r in zip(requests, spy(lab).trained(), strict=True))

    assert moved(3.0) < 0.7 * moved(0.0)


def distance(request: Request, tensors: object) -> float:
    assert isinstance(tensors, dict)
    return sum(float((tensors[n] - t).square().sum()) for n, t in request.tensors.items())


def test_the_anchor_is_the_model_of_this_round(tmp_path: Path) -> None:
    """Of two rounds, the second pulls to what the first gave: a hand-written run of one client agrees."""
    lab = make_lab(
        tmp_path,
        "fedprox",
        {"mu": 0.5},
        hospitals=make_lab(tmp_path).hospitals[:1],
        optimiser__batch_size=10,
        optimiser__momentum=0.0,
        federation__local_epochs=3,
    )
    model = make_lab(tmp_path, "fedavg").site.model
    train = lab.task.client_data("a").train
    batch = train.batch(torch.arange(len(train)))
    parameters = list(model.parameters())
    for _ in range(2):
        start = [p.detach().clone() for p in parameters]
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(model(batch.inputs).prediction, batch.target)
            for p, s, g in zip(parameters, start, torch.autograd.grad(loss, parameters), strict=True):
                p.data -= 0.1 * (g + 0.5 * (p.data - s) + 1e-4 * p.data)
    server = lab.run()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(server.shared[name], tensor, atol=2e-6, rtol=1e-5)
