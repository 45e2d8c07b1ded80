"""Flower's own federated averaging on a config of omnifm's, as its quickstart does it: a plain ClientApp, `FedAvg`, its programs.

Model, data, batches and steps are those of the config. As in the quickstart, a message finds neither: the client loads its data
and builds its model, trains, and answers with the weights. What the server saw goes into `out`/result.json. Environment variable
`OMNIFM_BENCHMARK` names a JSON file with `config` and `out`.

    python flower_app.py simulation ACTORS     the simulation on Ray; a deployment loads `client` and `server` from here
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from omnifm import build, seeds
from omnifm.config import Config, parse
from omnifm.federation.client import Site
from omnifm.federation.optimisers import build_optimiser

JOB = "OMNIFM_BENCHMARK"
client, server = ClientApp(), ServerApp()


def assignment() -> tuple[Config, Path]:
    """Return the config and the folder for the result."""
    raw = json.loads(Path(os.environ[JOB]).read_text(encoding="utf-8"))
    return parse(raw["config"]), Path(raw["out"])


def make_site(config: Config, out: Path) -> tuple[Site, build.Data]:
    """Return omnifm's site, for its model and its data."""
    data = build.load_data(config, check=False)
    return build.make_site(config, out / "unused", data), data


def steps(site: Site, config: Config, round_index: int, name: str) -> Iterable[torch.Tensor]:
    """Yield the examples of each step: the draw of omnifm's local loop."""
    left, epoch, count = config.federation.local_steps, 0, len(site.task.client_data(name).train)
    while left:
        generator = seeds.generator(config.seed, "batches", round_index, name, epoch)
        for index in torch.randperm(count, generator=generator).split(config.optimiser.batch_size)[:left]:
            yield index
            left -= 1
        epoch += 1


def fit(site: Site, config: Config, round_index: int, name: str) -> int:
    """Train the site's model in place; return the steps."""
    model, split, done = site.model, site.task.client_data(name).train, 0
    optimiser = build_optimiser(model, config.optimiser, config.optimiser.lr)
    model.train()
    for index in steps(site, config, round_index, name):
        batch = split.batch(index)
        optimiser.zero_grad(set_to_none=True)
        site.task.loss(model(batch.inputs).prediction, batch).backward()
        optimiser.step()
        done += 1
    return done


@client.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Do a client's steps and answer with the weights."""
    config, out = assignment()
    site, data = make_site(config, out)
    name = data.plans[int(context.node_config["partition-id"])].id
    site.model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    done = fit(site, config, int(message.content["config"]["server-round"]) - 1, name)
    metrics = MetricRecord({"num-examples": len(site.task.client_data(name).train), "steps": done})
    return Message(content=RecordDict({"arrays": ArrayRecord(site.model.state_dict()), "metrics": metrics}), reply_to=message)


class Timed(FedAvg):  # type: ignore[misc]
    """FedAvg that notes when rounds begin and end, counts steps, and fails on a missing reply."""

    def __init__(self, clients: int) -> None:
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self._clients = clients
        self.rounds: list[dict[str, float]] = []

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """A round begins."""
        self.rounds.append({"begin": time.monotonic()})
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """A round ends."""
        found = list(replies)
        good = [reply for reply in found if not reply.has_error()]
        if len(good) != self._clients:
            raise RuntimeError(f"round {server_round}: {len(good)} of {self._clients} clients answered")
        result = super().aggregate_train(server_round, found)
        steps = sum(int(reply.content["metrics"]["steps"]) for reply in good)
        self.rounds[-1] |= {"end": time.monotonic(), "steps": steps}
        return result


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    config, out = assignment()
    site, data = make_site(config, out)
    strategy = Timed(len(data.plans))
    initial = ArrayRecord(site.model.state_dict())
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=config.federation.rounds)
    partial = out / "result.part"
    partial.write_text(json.dumps({"rounds": strategy.rounds}), encoding="utf-8")
    partial.replace(out / "result.json")


def simulate(actors: int) -> None:
    """Run both in Flower's simulation."""
    import flower_app
    from flwr.simulation import run_simulation

    clients = len(build.load_data(assignment()[0], check=False).plans)
    init = {"num_cpus": actors, "include_dashboard": False}
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    # Ray pickles what __main__ holds; what a module holds it imports.
    backend = {"client_resources": resources, "init_args": init}
    run_simulation(flower_app.server, flower_app.client, clients, backend_config=backend)


if __name__ == "__main__":
    simulate(int(sys.argv[2]))
