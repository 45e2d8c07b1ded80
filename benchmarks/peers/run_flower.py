"""Flower 1.41 on the job: FedAvg in its simulation on Ray, no evaluation. Option `actors`: Ray actors of one CPU each."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from job import Assignment, Job, Net, Result, batch_order, build, client_data, optimiser
from run_bare import BareLoop
from torch.nn import functional


class TimedFedAvg(FedAvg):  # type: ignore[misc]
    """FedAvg that tells when a round begins and ends, and fails on a missing reply."""

    def __init__(self, job: Job, result: Result) -> None:
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=job.clients, min_available_nodes=job.clients)
        self._job, self._result = job, result

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """A round begins."""
        self._result.watch.begin()
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """A round ends."""
        found = list(replies)
        answered = sum(not reply.has_error() for reply in found)
        if answered != self._job.clients:
            raise RuntimeError(f"round {server_round}: {answered} of {self._job.clients} clients answered")
        arrays, metrics = super().aggregate_train(server_round, found)
        self._result.watch.end()
        self._result.after_round(server_round - 1)
        return arrays, metrics


class Client:
    """A client's half: one model per actor, kept from message to message."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._net: Net | None = None

    def train(self, message: Message, context: Context) -> Message:
        """Do a client's steps and answer with the weights."""
        torch.set_num_threads(1)
        job = self._job
        self._net = self._net or build(job)
        net, client = self._net, int(context.node_config["partition-id"])
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        images, labels = client_data(job, client)
        sgd = optimiser(net, job)
        net.train()
        for batch in batch_order(job, int(message.content["config"]["server-round"]) - 1, client).split(job.batch):
            sgd.zero_grad(set_to_none=True)
            functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            sgd.step()
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": job.examples})}
        return Message(content=RecordDict(content), reply_to=message)


# Ray pickles the app for each message; what a module holds stays in the actor.
_CLIENTS: dict[Job, Client] = {}


def client_app(job: Job) -> ClientApp:
    """Return the app that answers training messages."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        import run_flower

        client = run_flower._CLIENTS.setdefault(job, run_flower.Client(job))
        return client.train(message, context)

    return app


def server_app(assignment: Assignment) -> ServerApp:
    """Return the app that runs the rounds."""
    job = assignment.job
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        # Flower samples before it waits: without this, early rounds train the few nodes that are there already.
        while len(list(grid.get_node_ids())) < job.clients:
            time.sleep(0.05)
        bare = BareLoop(job)
        result = Result(assignment, bare.round)
        found: Any = TimedFedAvg(job, result).start(
            grid=grid, initial_arrays=ArrayRecord(build(job).state_dict()), num_rounds=job.rounds
        )
        result.save(found.arrays.to_torch_state_dict(), bare.weights)

    return app


def main() -> None:
    assignment = Assignment.from_argv()
    actors = int(assignment.options.get("actors", 1))
    run_simulation(
        server_app(assignment),
        client_app(assignment.job),
        num_supernodes=assignment.job.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": actors, "include_dashboard": False},
        },
    )
    if not (assignment.out / "result.json").is_file():
        raise SystemExit("the simulation ended without a result")


if __name__ == "__main__":
    main()
