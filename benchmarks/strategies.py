"""What does a round of every strategy cost beside a round of FedAvg, and do its own extra passes explain it?

Each strategy and FedAvg do the same rounds in turn in one process (all clients train; no evaluation, no files but private state),
so that a slow minute of the machine hits both. Passes are counted in a round that is not timed, by a hook on the backbone: a
pass that is differentiated counts three (forward, and twice that backward), another one counts one. A ratio well above the
counted one would be a strategy that slows the engine. Second derivatives (fediir) and what is trained besides the backbone
(adcol's discriminator, gpfl's map) are not counted.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from omnifm import build
from omnifm.config import parse
from omnifm.engines.inprocess import InProcessEngine
from omnifm.federation.rounds import Federation, run_rounds
from omnifm.federation.state import ServerState

from measure import Spread, finish, goal, row, say, scratch_folder
from runs import noise_cohort

CLIENTS = 4
UNEXPLAINED = 1.25
"""The most that a round may cost beyond its counted passes."""


class Silent:
    """A recorder that keeps the seconds spent aggregating, and nothing else."""

    def __init__(self) -> None:
        self.aggregate = 0.0

    def event(self, record: Mapping[str, Any]) -> None:
        """Take one fact."""
        if record["event"] == "round":
            self.aggregate = record["seconds"]["aggregate"]

    def commit(self, server: ServerState, rounds_completed: int) -> None:
        """Keep nothing."""


class Half:
    """One strategy's federation, to be moved on by single rounds."""

    def __init__(self, strategy: str, cohort: Path, folder: Path, width: int, rounds: int, norm: str) -> None:
        config = parse(
            {
                "strategy": strategy,
                "federation": {
                    "cohorts": [{"path": str(cohort), "clients": CLIENTS}],
                    "rounds": rounds,
                    "evaluate_every": rounds,
                },
                "data": {"image_size": 64, "cache": str(folder.parent / "cache")},
                "model": {"width": width, "norm": norm},
                "optimiser": {"batch_size": 32},
                "engine": {"device": "cpu"},
            }
        )
        data = build.load_data(config)
        self.site = build.make_site(config, folder, data)
        self.server = ServerState(shared=self.site.initial_shared())
        self.recorder, self.done = Silent(), 0
        self._everybody = tuple(plan.id for plan in data.plans)
        self._config, self._num_train = config.federation, {plan.id: len(plan.train) for plan in data.plans}

    def round(self) -> float:
        """Do the next round; return its processor seconds."""
        schedule = (self._everybody,) * (self.done + 1)
        engine = InProcessEngine(self.site)
        federation = Federation(self.site.strategy, engine, schedule, self._config, self._num_train, lambda server, done: None)
        started = time.process_time()
        run_rounds(federation, self.server, self.done, self.recorder)
        self.done += 1
        return time.process_time() - started

    def passes(self) -> int:
        """Do a round; return its passes through the backbone in examples, those that are differentiated three times."""
        seen = 0

        def count(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            nonlocal seen
            seen += len(arguments[0].image) * (3 if torch.is_grad_enabled() else 1)

        handle = self.site.model.backbone.register_forward_pre_hook(count, with_kwargs=True)
        self.round()
        handle.remove()
        return seen


def compare(strategy: str, cohort: Path, folder: Path, width: int, repeats: int) -> dict[str, Spread | float]:
    """Return the ratio of rounds, that of counted passes, and milliseconds of aggregation."""
    norm = "batch" if strategy == "fedbn" else "group"
    halves = [Half(name, cohort, folder / f"{i}-{name}", width, repeats + 3, norm) for i, name in enumerate(("fedavg", strategy))]
    for half in halves:
        half.round()  # warm-up, and what happens once (descriptions)
    counted = [half.passes() for half in halves]
    ratios, aggregation = [], []
    for number in range(repeats):
        first, second = halves if number % 2 else halves[::-1]
        times = {first: first.round(), second: second.round()}
        ratios.append(times[halves[1]] / times[halves[0]])
        aggregation.append(1e3 * halves[1].recorder.aggregate)
    return {"round": Spread.of(ratios), "passes": counted[1] / counted[0], "aggregation": Spread.of(aggregation)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each strategy [default: 5]")
    parser.add_argument("--strategies", default="", help="names with commas between [default: all]")
    parser.add_argument("--quick", action="store_true", help="a small model, one round, nothing kept: does it work at all?")
    args = parser.parse_args()
    scratch = scratch_folder("strategies", quick=args.quick, fresh=True)
    width, repeats = (4, 1) if args.quick else (16, args.repeats)
    cohort = noise_cohort(scratch / "noise", CLIENTS * 60 if args.quick else CLIENTS * 200)
    torch.set_num_threads(1)
    job = f"resnet18 width {width}, 64 px, batch 32, {CLIENTS} clients"
    rows, found = [], {}
    for name in [part for part in args.strategies.split(",") if part] or sorted(build.STRATEGIES):
        with TemporaryDirectory(dir=scratch) as folder:
            found[name] = compare(name, cohort, Path(folder), width, repeats)
        ratio, passes = found[name]["round"], found[name]["passes"]
        assert isinstance(ratio, Spread) and isinstance(passes, float)
        say(f"{name}: round {ratio.median:.2f}, counted passes {passes:.2f}")
        units = {"round": "ratio", "passes": "ratio", "aggregation": "ms"}
        names = {
            "round": "round / FedAvg's, processor time",
            "passes": "counted passes / FedAvg's",
            "aggregation": "aggregation",
        }
        rows += [row(job, name, names[key], units[key], value) for key, value in found[name].items()]
    goals = [
        goal(f"{name}: round / counted passes", values["round"].median / values["passes"], UNEXPLAINED)  # type: ignore[union-attr, operator]
        for name, values in found.items()
    ]
    finish("strategies", {"repeats": repeats, "goals": goals}, rows, 0, quick=args.quick)


if __name__ == "__main__":
    main()
