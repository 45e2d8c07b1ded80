"""What does a round cost over Flower? One job in one process, two workers, our simulation, our SuperLink, and Flower's own two.

FedAvg on three hospitals' real images (noise where ../shared/data is not there): the same model, images, batches and number of
steps everywhere, which are counted; nothing is evaluated between the rounds. `flower, ...` is Flower's strategy FedAvg with a
plain ClientApp and its standard programs, without certificates as ours. The first round holds what starting costs and is told
apart: from the first program's start to the end of the first round. Finished runs are kept in runs/benchmarks/flower.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w
from deployments import PYTHONPATH, Place, place, start_flowers, start_ours
from engine import OFFLINE, _can_unshare

from omnifm.config import digest, parse

from measure import ROOT, Spread, finish, goal, load_average, row, say, scratch_folder
from runs import noise_cohort

HOSPITALS = ("cls_brain_mri", "cls_breast_us", "cls_chest_ct")
SYSTEMS = (
    "in process",
    "2 workers",
    "our simulation, 2 actors",
    "our SuperLink, 3 nodes",
    "flower, simulation, 2 actors",
    "flower, SuperLink, 3 nodes",
)


@dataclass(frozen=True)
class Run:
    """What one run gave: seconds to the end of the first round, seconds of each further round, steps of all rounds."""

    start: float
    rounds: list[float]
    steps: int


def job(scratch: Path, rounds: int, steps: int, width: int) -> dict[str, Any]:
    """Return the config. Each cohort is one hospital."""
    shared = ROOT.parent / "shared" / "data"
    real = all((shared / name).is_dir() for name in HOSPITALS)
    cohorts = [shared / name if real else noise_cohort(scratch / f"noise_{n}", 300 + n) for n, name in enumerate(HOSPITALS)]
    return {
        "strategy": "fedavg",
        "federation": {
            "cohorts": [{"path": str(path)} for path in cohorts],
            "rounds": rounds,
            "local_steps": steps,
            "evaluate_every": rounds,
            "finetune_epochs": 0,
        },
        "data": {"image_size": 64, "cache": str(scratch / "cache")},
        "model": {"width": width},
        "optimiser": {"lr": 0.02, "batch_size": 32},
        "engine": {"device": "cpu"},
    }


# ---------------------------------------------------------------------- ours
def ours(where: Place, config: dict[str, Any], start: Callable[[], Any]) -> Run:
    """Start a run of omnifm, wait for its end, and read its events."""
    process = start()
    events = where.folder / "run" / "events.jsonl"
    while not (events.is_file() and '"event": "round"' in events.read_text(encoding="utf-8")):
        if process.poll() is not None:
            break
        time.sleep(0.02)
    first = time.monotonic() - where.begin
    where.wait(process, where.folder / "nowhere")
    return read_ours(events, config, first)


def read_ours(events: Path, config: Mapping[str, Any], first: float) -> Run:
    """Return what a finished run of omnifm gave. Raises RuntimeError if a reply is missing."""
    found = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    federation = config["federation"]
    replies = sum(event["event"] == "client" for event in found)
    if replies != (expected := federation["rounds"] * len(federation["cohorts"])):
        raise RuntimeError(f"{events}: {replies} of {expected} replies")
    rounds = [sum(event["seconds"].values()) for event in found if event["event"] == "round"]
    return Run(first, rounds[1:], replies * federation["local_steps"])


def run_alone(where: Place, config: dict[str, Any], engine: Mapping[str, Any]) -> Run:
    """Run `omnifm run`."""
    whole = {**config, "engine": {**config["engine"], **engine}}
    (where.folder / "job.toml").write_text(tomli_w.dumps(whole), encoding="utf-8")
    command = [sys.executable, "-m", "omnifm", "run", "job.toml", "--out", "run"]
    return ours(where, whole, lambda: where.start(alone(command) if "kind" in engine else command, "run"))


def alone(command: list[str]) -> list[str]:
    """Return a command that runs in a network of its own: what other people's Rays listen on is of no concern then."""
    return ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command] if _can_unshare() else command


# ---------------------------------------------------------------------- Flower's own
def read_flowers(where: Place, config: Mapping[str, Any]) -> Run:
    """Return what Flower's own run gave. Raises RuntimeError if a round is missing; a missing reply fails the run itself."""
    rounds = json.loads((where.folder / "result.json").read_text(encoding="utf-8"))["rounds"]
    if len(rounds) != config["federation"]["rounds"]:
        raise RuntimeError(f"{where.folder}: {len(rounds)} of {config['federation']['rounds']} rounds")
    times = [r["end"] - r["begin"] for r in rounds[1:]]
    return Run(rounds[0]["end"] - where.begin, times, sum(int(r["steps"]) for r in rounds))


def run_flowers_simulation(where: Place, config: dict[str, Any]) -> Run:
    """Run Flower's FedAvg in its simulation."""
    (where.folder / "job.json").write_text(json.dumps({"config": config, "out": str(where.folder)}), encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "peers" / "flower_app.py"), "simulation", "2"]
    more = {**OFFLINE, "FLWR_HOME": str(where.folder / "home"), "OMNIFM_BENCHMARK": str(where.folder / "job.json")}
    process = where.start(alone(command), "simulation", {**more, "PYTHONPATH": PYTHONPATH})
    where.wait(process, where.folder / "nowhere")
    return read_flowers(where, config)


def run_flowers_deployment(where: Place, config: dict[str, Any]) -> Run:
    """Run Flower's FedAvg over its SuperLink."""
    superlink = start_flowers(where, config, len(config["federation"]["cohorts"]))
    try:
        # Flower ends a run whose server does not say in time that it lives, and its nodes wait on.
        where.wait(where.started[0], where.folder / "result.json", lost="Runtime task-token authentication failed")
        if not (where.folder / "result.json").is_file():
            raise RuntimeError(f"{where.folder}: a SuperNode ended; see node-0.out")
    finally:
        superlink.stop()
    return read_flowers(where, config)


def run_system(system: str, where: Place, config: dict[str, Any]) -> Run:
    """Run a system once."""
    runners: dict[str, Callable[[], Run]] = {
        "in process": lambda: run_alone(where, config, {}),
        "2 workers": lambda: run_alone(where, config, {"workers": 2}),
        "our simulation, 2 actors": lambda: run_alone(where, config, {"kind": "flower-simulation", "workers": 2}),
        "our SuperLink, 3 nodes": lambda: ours(where, config, lambda: start_ours(where, config).server),
        "flower, simulation, 2 actors": lambda: run_flowers_simulation(where, config),
        "flower, SuperLink, 3 nodes": lambda: run_flowers_deployment(where, config),
    }
    return runners[system]()


def measure(systems: list[str], repeats: int, config: dict[str, Any], scratch: Path) -> dict[str, list[Run]]:
    """Run what is not there yet, the systems in rotated order."""
    found: dict[str, list[Run]] = {system: [] for system in systems}
    for repeat in range(repeats):
        shift = repeat % len(systems)
        for system in systems[shift:] + systems[:shift]:
            folder = scratch / f"{system.replace(', ', '-').replace(' ', '_')}-{repeat}"
            kept = folder / "kept.json"
            if not kept.is_file():
                say(f"repeat {repeat + 1}: {system} (load {load_average()})")
                shutil.rmtree(folder, ignore_errors=True)
                with place(folder) as where:
                    run = run_system(system, where, config)
                kept.write_text(json.dumps(asdict(run)), encoding="utf-8")
            found[system].append(Run(**json.loads(kept.read_text(encoding="utf-8"))))
    if len(steps := {run.steps for runs in found.values() for run in runs}) > 1:
        raise RuntimeError(f"the systems did different numbers of steps: {sorted(steps)}")
    return found


def goals(runs: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    """Return the goals that the measured systems can tell: ours below Flower's own."""
    found = []
    for kind, one, other in (
        ("deployment", "our SuperLink, 3 nodes", "flower, SuperLink, 3 nodes"),
        ("simulation", "our simulation, 2 actors", "flower, simulation, 2 actors"),
    ):
        if one in runs and other in runs:
            pairs = list(zip(runs[one], runs[other], strict=True))
            ratio = statistics.median(statistics.median(a.rounds) / statistics.median(b.rounds) for a, b in pairs)
            found.append(goal(f"{kind}: ours / Flower's own, rounds after the first", ratio, 1.0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system, interleaved [default: 3]")
    parser.add_argument("--rounds", type=int, default=6, help="rounds, the first one warm-up [default: 6]")
    parser.add_argument("--systems", default=";".join(SYSTEMS), help="semicolon-separated [default: %(default)s]")
    parser.add_argument("--fresh", action="store_true", help="forget finished runs of an earlier call")
    parser.add_argument("--quick", action="store_true", help="a small model, two rounds, nothing kept: does it work at all?")
    args = parser.parse_args()
    systems = [name.strip() for name in args.systems.split(";")]
    if unknown := set(systems) - set(SYSTEMS):
        raise SystemExit(f"--systems: unknown {min(unknown)!r}; known are {'; '.join(SYSTEMS)}")
    scratch = scratch_folder("flower", quick=args.quick, fresh=args.fresh)
    rounds, steps, width, repeats = (3, 2, 8, 1) if args.quick else (args.rounds, 8, 32, args.repeats)
    config = job(scratch, rounds, steps, width)
    runs = measure(systems, repeats, config, scratch)
    name = f"fedavg, resnet18 width {width}, 64 px, 3 hospitals, {steps} steps x {rounds} rounds, config {digest(parse(config))}"
    rows = []
    for system, found in runs.items():
        rows.append(row(name, system, "round after the first", "s", Spread.of([statistics.median(r.rounds) for r in found])))
        rows.append(row(name, system, "start to the end of the first round", "s", Spread.of([r.start for r in found])))
        rows.append(row(name, system, "steps", "count", float(found[0].steps)))
    finish("flower", {"config": config, "repeats": repeats, "goals": goals(runs)}, rows, 0, quick=args.quick)


if __name__ == "__main__":
    main()
