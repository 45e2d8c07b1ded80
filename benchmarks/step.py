"""What does an OmniFM step cost beside a FedAvg step, and the bank beside the model?

Time: both strategies train a client through the real `Site`, ResNet-18 (width 64), 64 px, batch 32, OmniFM with a full bank of
256 rows; single steps are timed one after the other, interleaved, and so are whole client-rounds (prototypes included).
Traffic: from the metrics.json of a two-round `omnifm run`, and of one request with the full bank.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from omnifm import build
from omnifm.config import Config, parse
from omnifm.federation.client import Site
from omnifm.federation.messages import Reply, Request, size_by_group
from omnifm.federation.optimisers import build_optimiser
from omnifm.federation.state import LocalJob, ServerState
from omnifm.seeds import generator

from measure import Spread, finish, goal, row, say, scratch_folder
from runs import noise_cohort, run_omnifm

BANK_ROWS = 256
CLIENTS = 20


def config_of(strategy: str, cohort: Path, cache: Path, width: int, **federation: Any) -> dict[str, Any]:
    """Return the config of a run at batch 32 and 64 px; `omnifm` is the default preset."""
    return {
        "strategy": strategy,
        "federation": {"cohorts": [{"path": str(cohort), "clients": CLIENTS}], "partition": "iid", **federation},
        "data": {"image_size": 64, "cache": str(cache)},
        "model": {"width": width},
        "optimiser": {"batch_size": 32},
        "engine": {"device": "cpu"},
    }


def full_bank(site: Site, server: ServerState) -> int:
    """Fill the server's bank with random prototypes of all clients; return its rows."""
    strategy, context = site.strategy, site.strategy.context
    if strategy.needs_description:
        strategy.described(server, {info.id: site.handle(Request("describe", 0, info.id)) for info in context.clients})
    strategy.begin_round(server)
    for info in context.clients:
        vectors = torch.nn.functional.normalize(torch.randn(16, 128, generator=generator(0, "bank", info.id)), dim=-1)
        extra = {"prototypes/vectors": vectors, "prototypes/weight": torch.ones(16)}
        strategy.receive(server, Reply("train", 0, info.id, info.num_train, server.shared, extra))
    strategy.end_round(server, 0)
    rows = strategy.bank_rows(server)
    return 0 if rows is None else len(rows)


class Half:
    """One strategy at work on one client: a single step, or a client-round."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.site = build.make_site(config, folder)
        self.server = ServerState(shared=self.site.initial_shared())
        self.bank = full_bank(self.site, self.server) if config.strategy == "omnifm" else 0
        client = self.site.strategy.context.clients[0].id
        extra = self.site.strategy.extra_for(self.server, client)
        self.request = Request("train", 1, client, self.server.shared, extra, {"epochs": 1})
        self.bytes = size_by_group(self.request.tensors, self.request.extra)

    def stepper(self) -> Callable[[], object]:
        """Return a function that does one step of the site's own local loop, its model prepared as for a round."""
        site, strategy = self.site, self.site.strategy
        # The site's private parts: the point is to time the very code that trains, not a copy of it.
        job: LocalJob = site._job(self.request, site._install(self.request))
        strategy.begin(job)
        optimiser = build_optimiser(site.model, self.config.optimiser, self.config.optimiser.lr)
        site.model.train()
        batch = job.data.train.batch(torch.arange(32))
        return lambda: site._step(job, batch, optimiser, True)

    def client_round(self) -> object:
        """Do a whole client-round: weights in, an epoch, prototypes, weights out."""
        return self.site.handle(self.request)


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleave(first: Callable[[], object], second: Callable[[], object], repeats: int) -> dict[str, Spread]:
    """Time two functions in turn; return milliseconds of each and their ratio (second / first), wall and processor time."""
    first(), second()  # warm-up
    times: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for number in range(repeats):
        if number % 2:
            late = seconds_of(second)
            times.append((seconds_of(first), late))
        else:
            times.append((seconds_of(first), seconds_of(second)))
    return {
        "first_ms": Spread.of([1e3 * a[0] for a, _ in times]),
        "second_ms": Spread.of([1e3 * b[0] for _, b in times]),
        "ratio": Spread.of([b[0] / a[0] for a, b in times]),
        "ratio_cpu": Spread.of([b[1] / a[1] for a, b in times]),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40, help="steps of each strategy, interleaved [default: 40]")
    parser.add_argument("--rounds", type=int, default=5, help="client-rounds of each strategy, interleaved [default: 5]")
    parser.add_argument("--fresh", action="store_true", help="forget the finished run of an earlier call")
    parser.add_argument("--quick", action="store_true", help="a small model, few steps, nothing kept: does it work at all?")
    return parser.parse_args()


def time_steps(cohort: Path, scratch: Path, width: int, repeats: int, rounds: int) -> tuple[dict[str, Any], Half]:
    """Return the spreads of steps and client-rounds, and the OmniFM half."""
    with TemporaryDirectory(dir=scratch) as folder:
        halves = {
            name: Half(parse(config_of(name, cohort, scratch / "cache", width)), Path(folder) / name)
            for name in ("fedavg", "omnifm")
        }
        say(f"steps, bank of {halves['omnifm'].bank} rows")
        steps = interleave(halves["fedavg"].stepper(), halves["omnifm"].stepper(), repeats)
        say("client-rounds")
        turns = interleave(halves["fedavg"].client_round, halves["omnifm"].client_round, rounds)
    return {"step": steps, "client-round": turns}, halves["omnifm"]


def main() -> None:
    args = parse_arguments()
    scratch = scratch_folder("step", quick=args.quick, fresh=args.fresh)
    width, repeats, rounds = (8, 3, 1) if args.quick else (64, args.repeats, args.rounds)
    cohort = noise_cohort(scratch / "noise", CLIENTS * 60)
    times, omnifm = time_steps(cohort, scratch, width, repeats, rounds)
    say("two rounds of omnifm run, for the traffic")
    config = config_of("omnifm", cohort, scratch / "cache", width, rounds=2, evaluate_every=2, finetune_epochs=0)
    traffic = run_omnifm(config, scratch / "traffic")[0]["bytes"]
    bank = traffic["bank_up"] + traffic["bank_down"]
    share = bank / (traffic["up"] + traffic["down"] - bank)
    full = omnifm.bytes["bank"] / sum(size for group, size in omnifm.bytes.items() if group != "bank")
    job = f"resnet18 width {width}, 64 px, batch 32"
    rows = [row(job, "omnifm / fedavg", name, "ratio", found["ratio"]) for name, found in times.items()]
    rows += [row(job, "omnifm / fedavg", f"{name}, processor time", "ratio", found["ratio_cpu"]) for name, found in times.items()]
    for place, system in (("first_ms", "fedavg"), ("second_ms", "omnifm")):
        rows += [row(job, system, name, "ms", found[place]) for name, found in times.items()]
    rows.append(row(job, "omnifm", "bank traffic, share of the model's, two rounds", "ratio", share))
    rows.append(row(job, "omnifm", f"bank of {omnifm.bank} rows, share of the model's bytes down", "ratio", full))
    report = {
        "bank_rows": omnifm.bank,
        "times": {name: {key: spread.to_json() for key, spread in found.items()} for name, found in times.items()},
        "traffic": {**traffic, "bank_share": share, "full_bank_share_down": full},
        "goals": [
            goal("a full bank was used, rows", omnifm.bank, BANK_ROWS, at_least=True),
            goal("OmniFM step / FedAvg step", times["step"]["ratio"].median, 1.25),
            goal("bank traffic / model traffic", share, 0.01),
            goal("full bank / model, bytes down", full, 0.01),
        ],
    }
    finish("step", report, rows, 0, quick=args.quick)


if __name__ == "__main__":
    main()
