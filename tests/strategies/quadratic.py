"""Three clients whose losses are parabolas, on which a strategy's two halves are run by hand: the optimum is known."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from omnifm.federation.messages import Reply
from omnifm.federation.state import LocalJob, ServerState
from omnifm.federation.strategy import Step, Strategy
from omnifm.tasks.base import Batch, ClientData, Model, Output
from tests.support import Hospital

CLIENTS = (Hospital("a", "CT", 9), Hospital("b", "CT", 9), Hospital("c", "CT", 9))
# L_i = a/2 (theta - b)^2: client by client (a, b). Clients count the same, so the optimum is sum ab / sum a.
CURVES: Mapping[str, tuple[float, float]] = {"a": (1.0, 2.0), "b": (2.0, 0.0), "c": (4.0, -2.0)}
OPTIMUM = -6 / 7


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def minimise(
    strategy: Strategy,
    rounds: int,
    steps: int,
    lr: float,
    schedule: Sequence[Sequence[str]] = (("a", "b", "c"),),
    momentum: float = 0.0,
) -> tuple[ServerState, dict[str, dict[str, torch.Tensor]]]:
    """Run gradient descent at the clients, the strategy everywhere; return what the server and the clients remember."""
    server = ServerState({"theta": torch.zeros(1, dtype=torch.float64)})
    states: dict[str, dict[str, torch.Tensor]] = {client: {} for client in CURVES}
    model = Point()
    nothing = torch.zeros(0)
    for index in range(rounds):
        strategy.begin_round(server)
        for client in schedule[index % len(schedule)]:
            a, b = CURVES[client]
            model.theta.data.copy_(server.shared["theta"])
            extra = dict(strategy.extra_for(server, client))
            whole, data = cast(Model, model), cast(ClientData, None)
            anchor = dict(server.shared)
            job = LocalJob(client, index, whole, data, extra, anchor, states[client], 0, torch.device("cpu"), lr=lr)
            strategy.begin(job)
            velocity = torch.zeros_like(model.theta)
            for _ in range(steps):
                model.theta.grad = a * (model.theta.data - b)
                strategy.correct(Step(job, Batch(nothing, nothing, nothing), Output(nothing)))
                velocity = momentum * velocity + model.theta.grad
                model.theta.data -= lr * velocity
                job.steps += 1
            upload = strategy.finish(job)
            tensors = {"theta": model.theta.detach().clone()}
            strategy.receive(server, Reply("train", index, client, 9, tensors, upload.extra))
        strategy.end_round(server, index)
    return server, states
