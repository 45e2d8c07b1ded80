"""Two workers against one: the same bits, and how much faster? ResNet-18 (width 64) on noise images, by `omnifm run`.

Both runs are of one config but for `engine.workers`; the server's final weights are compared bit for bit. The speed-up is that of
the rounds after the first, in which the worker processes start; that of the whole job is reported beside it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from measure import Spread, finish, goal, row, say, scratch_folder
from runs import noise_cohort, run_omnifm


def config(workers: int, clients: int, rounds: int, width: int, scratch: Path) -> dict[str, Any]:
    """Return the job: every client has 70 training images and trains in every round; nothing is evaluated in between."""
    cohort = noise_cohort(scratch / f"noise_{clients}", clients * 100)
    return {
        "strategy": "fedavg",
        "federation": {
            "cohorts": [{"path": str(cohort), "clients": clients}],
            "partition": "iid",
            "rounds": rounds,
            "evaluate_every": rounds,
            "finetune_epochs": 0,
        },
        "data": {"image_size": 64, "cache": str(scratch / "cache")},
        "model": {"width": width},
        "optimiser": {"batch_size": 32},
        "engine": {"workers": workers, "device": "cpu"},
    }


def steady_seconds(out: Path) -> float:
    """Return the seconds of all rounds but the first, from the run's events."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds = [event["seconds"] for event in events if event["event"] == "round" and event["round"] > 0]
    return float(sum(seconds["train"] + seconds["aggregate"] for seconds in rounds))


def same_weights(first: Path, second: Path) -> bool:
    """Whether two runs ended with the same server weights, bit for bit."""
    import torch
    from safetensors.torch import load_file

    states = []
    for out in (first, second):
        name = json.loads((out / "checkpoint" / "last.json").read_text(encoding="utf-8"))["file"]
        states.append(load_file(out / "checkpoint" / name))
    one, two = states
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, interleaved [default: 5]")
    parser.add_argument("--clients", type=int, default=8, help="clients [default: 8]")
    parser.add_argument("--rounds", type=int, default=4, help="rounds, the first one warm-up [default: 4]")
    parser.add_argument("--fresh", action="store_true", help="forget finished runs of an earlier call")
    parser.add_argument("--quick", action="store_true", help="a small model, one repeat, nothing kept: does it work at all?")
    return parser.parse_args()


def main() -> None:
    args = parse()
    scratch = scratch_folder("workers", quick=args.quick, fresh=args.fresh)
    clients, rounds, width = (2, 2, 8) if args.quick else (args.clients, args.rounds, 64)
    steady: dict[int, list[float]] = {1: [], 2: []}
    whole: dict[int, list[float]] = {1: [], 2: []}
    equal = True
    for repeat in range(1 if args.quick else args.repeats):
        outs = {workers: scratch / f"workers-{workers}-{repeat}" for workers in (1, 2)}
        for workers in (1, 2) if repeat % 2 == 0 else (2, 1):
            say(f"repeat {repeat + 1}: {workers} worker(s)")
            _, finished = run_omnifm(config(workers, clients, rounds, width, scratch), outs[workers])
            steady[workers].append(steady_seconds(outs[workers]))
            whole[workers].append(finished.end - finished.begin)
        equal = equal and same_weights(outs[1], outs[2])
    speed = Spread.of([one / two for one, two in zip(steady[1], steady[2], strict=True)])
    speed_whole = Spread.of([one / two for one, two in zip(whole[1], whole[2], strict=True)])
    job = f"resnet18 width {width}, {clients} clients x {rounds} rounds"
    rows = [row(job, f"{n} worker(s)", "rounds after the first", "s", Spread.of(steady[n])) for n in (1, 2)]
    rows += [row(job, f"{n} worker(s)", "whole job", "s", Spread.of(whole[n])) for n in (1, 2)]
    rows.append(row(job, "2 against 1 worker", "speed-up of rounds after the first", "ratio", speed))
    rows.append(row(job, "2 against 1 worker", "speed-up of the whole job", "ratio", speed_whole))
    report = {
        "bitwise_equal": equal,
        "speed_up": {"steady": speed.to_json(), "whole": speed_whole.to_json()},
        "goals": [
            goal("2 workers give the weights of 1, bit for bit (1 is yes)", float(equal), 1.0, at_least=True),
            goal("speed-up of 2 workers, rounds after the first", speed.median, 1.6, at_least=True),
        ],
    }
    finish("workers", report, rows, 0, quick=args.quick)


if __name__ == "__main__":
    main()
