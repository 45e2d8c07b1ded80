"""What does the engine cost? One job in a bare loop, in omnifm, in pfl and in Flower's simulation.

The same torch model, data, seeds and batch order everywhere; one thread per process; every system in processes of its own.
Each repeat runs every system twice, in rotated order: `paired`, where a round of the bare loop follows each round of the
system in the same process (for the overhead), and `whole`, the job alone (for start-up, wall time and memory). The first
round of each is warm-up and counts only for the wall time. Finished runs are kept in runs/benchmarks/engine and not repeated.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from peers.install import python_of
from peers.job import Assignment, Job

from measure import ONE_THREAD, ROOT, Finished, Spread, finish, goal, load_average, row, run_process, say, scratch_folder

JOBS = {
    "cnn282k": Job(model="cnn", clients=100, rounds=5, examples=32, batch=16, side=32),
    "resnet18": Job(model="resnet18", clients=5, rounds=4, examples=32, batch=16, side=64),
}
QUICK = {
    "cnn282k": replace(JOBS["cnn282k"], clients=4, rounds=3),
    "resnet18": replace(JOBS["resnet18"], clients=2, rounds=2, examples=4, batch=2),
}
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class System:
    """A row of the table: the runner, the environment it needs, and what it is told."""

    runner: str
    peer: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    bf16: bool = False


SYSTEMS = {
    "bare": System("run_bare"),
    "omnifm": System("run_ours"),
    "omnifm, recorded": System("run_ours", options={"record": True}),
    "omnifm, 2 workers": System("run_ours", options={"workers": 2}),
    "omnifm, bf16 channels-last": System("run_ours", bf16=True),
    "pfl": System("run_pfl", "pfl"),
    "flower, 1 actor": System("run_flower", "flower", {"actors": 1}),
    "flower, 2 actors": System("run_flower", "flower", {"actors": 2}),
}


@dataclass(frozen=True)
class Run:
    """What one run of one system gave. Times in seconds, memory in MiB."""

    start: float
    whole: float
    rounds: list[float]
    cpu: list[float]
    bare: list[float]
    bare_cpu: list[float]
    peak_pss: float
    difference: float


def run_system(system: System, job: Job, pair: bool, folder: Path) -> Run:
    """Run a system in a fresh process and read what it left in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    assignment = Assignment(replace(job, bf16=system.bf16), folder, pair, system.options)
    python = str(python_of(system.peer)) if system.peer else sys.executable
    command = [python, str(ROOT / "benchmarks" / "peers" / f"{system.runner}.py"), assignment.to_json()]
    if system.peer == "flower" and _can_unshare():
        # A network of its own with nothing but the loopback: Ray listens on all interfaces and asks outside for its address.
        command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    environment = {**ONE_THREAD, **OFFLINE, "FLWR_HOME": str(folder / "flwr"), "PYTHONPATH": _python_path()}
    finished = run_process(command, environment, folder / "log.txt", watch_memory=not pair)
    return _read(folder, finished, pair)


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "benchmarks" / "peers")])


def _can_unshare() -> bool:
    if not shutil.which("unshare") or not shutil.which("ip"):
        return False
    return subprocess.run(["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0


def _read(folder: Path, finished: Finished, pair: bool) -> Run:
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rounds, bare = record["rounds"], record["bare_rounds"]
    return Run(
        start=rounds[0]["begin"] - finished.begin,
        whole=finished.end - finished.begin,
        rounds=[r["end"] - r["begin"] for r in rounds],
        cpu=[r["cpu"] for r in rounds],
        bare=[r["end"] - r["begin"] for r in bare],
        bare_cpu=[r["cpu"] for r in bare],
        peak_pss=finished.peak_pss_mib,
        difference=max_difference(folder) if pair and bare else 0.0,
    )


def max_difference(folder: Path) -> float:
    """Return max |w - w_bare| over all weights."""
    with np.load(folder / "weights.npz", allow_pickle=False) as ours, np.load(folder / "bare.npz", allow_pickle=False) as bare:
        if ours.files != bare.files:
            raise RuntimeError(f"{folder}: the system and the bare loop have different tensors")
        return max(float(np.abs(ours[name].astype(np.float64) - bare[name]).max()) for name in ours.files)


def cells(jobs: list[str], systems: list[str], repeats: int) -> Iterator[tuple[int, str, str, bool]]:
    """Yield (repeat, job, system, paired); the order of the systems rotates from repeat to repeat."""
    for repeat in range(repeats):
        shift = repeat % len(systems)
        for name in jobs:
            for system in systems[shift:] + systems[:shift]:
                if system != "bare":
                    yield repeat, name, system, True
                yield repeat, name, system, False


def measure(jobs: dict[str, Job], systems: list[str], repeats: int, scratch: Path) -> dict[tuple[str, str, bool], list[Run]]:
    """Run all cells that are not there yet; return the runs by (job, system, paired)."""
    found: dict[tuple[str, str, bool], list[Run]] = {}
    todo = list(cells(list(jobs), systems, repeats))
    for number, (repeat, name, system, pair) in enumerate(todo, 1):
        kind = "paired" if pair else "whole"
        folder = scratch / name / system.replace(", ", "-").replace(" ", "_") / f"{kind}-{repeat}"
        kept = folder / "run.json"
        if not kept.is_file():
            say(f"{number}/{len(todo)} {name}: {system}, {kind}, repeat {repeat + 1} (load {load_average()})")
            run = run_system(SYSTEMS[system], jobs[name], pair, folder)
            kept.write_text(json.dumps(asdict(run)), encoding="utf-8")
        found.setdefault((name, system, pair), []).append(Run(**json.loads(kept.read_text(encoding="utf-8"))))
    return found


def steady(values: list[float]) -> float:
    """Return the median of all rounds but the first."""
    return statistics.median(values[1:])


def ratio_to_bare(run: Run) -> float:
    """Return a paired run's median over the rounds of its time over the bare loop's."""
    return statistics.median(ours / bare for ours, bare in zip(run.rounds[1:], run.bare[1:], strict=True))


def overhead_ms(ours: list[float], bare: list[float], clients: int) -> float:
    """Return the median over the rounds of the time beyond the bare loop's, ms per client-round."""
    return 1e3 * statistics.median(a - b for a, b in zip(ours[1:], bare[1:], strict=True)) / clients


def figures(system: str, job: Job, paired: list[Run], whole: list[Run]) -> dict[str, tuple[str, Spread]]:
    """Return a system's figures on a job, each with its unit."""
    found = {
        "client-round": ("ms", Spread.of([1e3 * steady(run.rounds) / job.clients for run in whole])),
        "start-up": ("s", Spread.of([run.start for run in whole])),
        "whole job": ("s", Spread.of([run.whole for run in whole])),
        "peak memory, process tree (PSS)": ("MiB", Spread.of([run.peak_pss for run in whole])),
    }
    if not paired:
        return found
    overhead = [overhead_ms(run.rounds, run.bare, job.clients) for run in paired]
    found["overhead over the bare loop"] = ("ms per client-round", Spread.of(overhead))
    found["time over the bare loop's"] = ("ratio", Spread.of([ratio_to_bare(run) for run in paired]))
    found["max difference of weights to the bare loop"] = ("", Spread.of([run.difference for run in paired]))
    if SYSTEMS[system].runner != "run_flower" and SYSTEMS[system].options.get("workers", 1) == 1:
        # One process does all the work: its processor time tells the overhead even while other jobs use the machine.
        cpu = [overhead_ms(run.cpu, run.bare_cpu, job.clients) for run in paired]
        found["overhead, processor time"] = ("ms per client-round", Spread.of(cpu))
        share = [statistics.median(a / b - 1 for a, b in zip(run.cpu[1:], run.bare_cpu[1:], strict=True)) for run in paired]
        found["overhead, share of processor time"] = ("%", Spread.of([100 * value for value in share]))
    return found


def ratios(runs: dict[tuple[str, str, bool], list[Run]], job: str) -> dict[str, Spread]:
    """Return how omnifm's time relates to the peers', repeat by repeat."""
    found: dict[str, Spread] = {}
    for peer in ("pfl", "flower, 1 actor", "flower, 2 actors"):
        ours = "omnifm, 2 workers" if peer == "flower, 2 actors" else "omnifm"
        if (job, peer, True) not in runs or (job, ours, True) not in runs:
            continue
        pairs = zip(runs[job, ours, True], runs[job, peer, True], strict=True)
        found[f"{ours} / {peer}, steady rounds"] = Spread.of([ratio_to_bare(a) / ratio_to_bare(b) for a, b in pairs])
        wholes = zip(runs[job, ours, False], runs[job, peer, False], strict=True)
        found[f"{ours} / {peer}, whole job"] = Spread.of([a.whole / b.whole for a, b in wholes])
    one, two = runs.get((job, "omnifm", True)), runs.get((job, "omnifm, 2 workers", True))
    if one and two:
        found["omnifm, 2 workers / omnifm, steady rounds"] = Spread.of(
            [ratio_to_bare(b) / ratio_to_bare(a) for a, b in zip(one, two, strict=True)]
        )
    half = runs.get((job, "omnifm, bf16 channels-last", False))
    full = runs.get((job, "omnifm", False))
    if half and full:
        found["omnifm, bf16 channels-last / omnifm, steady rounds"] = Spread.of(
            [steady(b.rounds) / steady(a.rounds) for a, b in zip(full, half, strict=True)]
        )
    return found


def goals(table: dict[str, Any], compared: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the goals that the measured jobs and systems can tell, and whether they were met."""
    found = []
    for job, systems in table.items():
        for system in ("omnifm", "omnifm, recorded", "omnifm, 2 workers"):
            if "max difference of weights to the bare loop" in systems.get(system, {}):
                worst = systems[system]["max difference of weights to the bare loop"]["high"]
                found.append(goal(f"{job}: {system}: max difference of weights to the bare loop", worst, 0.0))
        ours = systems.get("omnifm", {})
        if "overhead over the bare loop" in ours and job == "cnn282k":
            found.append(goal(f"{job}: overhead, ms per client-round", ours["overhead over the bare loop"]["median"], 1.0))
        if "time over the bare loop's" in ours and job == "resnet18":
            found.append(goal(f"{job}: time over the bare loop's", ours["time over the bare loop's"]["median"], 1.02))
        for name, limit in (
            ("omnifm / pfl, steady rounds", 1.0),
            ("omnifm / flower, 1 actor, steady rounds", 0.6),
            ("omnifm / flower, 1 actor, whole job", 0.35),
            ("omnifm, 2 workers / flower, 2 actors, steady rounds", 0.6),
            ("omnifm, 2 workers / flower, 2 actors, whole job", 0.35),
        ):
            if name in compared[job]:
                found.append(goal(f"{job}: {name}", compared[job][name]["median"], limit))
    return found


def report(runs: dict[tuple[str, str, bool], list[Run]], jobs: dict[str, Job], systems: list[str]) -> tuple[Any, list[Any]]:
    """Return the report and its rows."""
    table: dict[str, Any] = {}
    compared: dict[str, Any] = {}
    rows = []
    for name, job in jobs.items():
        table[name] = {}
        for system in systems:
            found = figures(system, job, runs.get((name, system, True), []), runs[name, system, False])
            table[name][system] = {figure: spread.to_json() for figure, (_, spread) in found.items()}
            rows += [row(name, system, figure, unit, spread) for figure, (unit, spread) in found.items()]
        between = ratios(runs, name)
        compared[name] = {key: spread.to_json() for key, spread in between.items()}
        rows += [row(name, "", key, "ratio", spread) for key, spread in between.items()]
    described = {name: asdict(job) for name, job in jobs.items()}
    return {"jobs": described, "systems": table, "ratios": compared, "goals": goals(table, compared)}, rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each system, interleaved [default: 5]")
    parser.add_argument("--jobs", default=",".join(JOBS), help="comma-separated [default: %(default)s]")
    parser.add_argument("--systems", default=";".join(SYSTEMS), help="semicolon-separated [default: %(default)s]")
    parser.add_argument("--clients", type=int, default=0, help="clients per round of every job [default: the job's own]")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of every job [default: the job's own]")
    parser.add_argument("--fresh", action="store_true", help="forget finished runs of an earlier call")
    parser.add_argument("--quick", action="store_true", help="tiny jobs, one repeat, nothing kept: does it work at all?")
    return parser.parse_args()


def main() -> None:
    args = parse()
    source = QUICK if args.quick else JOBS
    jobs = {name: source[name] for name in args.jobs.split(",")}
    if args.clients:
        jobs = {name: replace(job, clients=args.clients) for name, job in jobs.items()}
    if args.rounds:
        jobs = {name: replace(job, rounds=args.rounds) for name, job in jobs.items()}
    systems = [name.strip() for name in args.systems.split(";")]
    unknown = set(systems) - SYSTEMS.keys()
    if unknown:
        raise SystemExit(f"--systems: unknown {min(unknown)!r}; known are {'; '.join(SYSTEMS)}")
    shape = "-".join(f"{name}-{job.clients}x{job.rounds}" for name, job in jobs.items())
    scratch = scratch_folder("engine", quick=args.quick, fresh=args.fresh) / shape
    runs = measure(jobs, systems, 1 if args.quick else args.repeats, scratch)
    found, rows = report(runs, jobs, systems)
    finish("engine", found, rows, next(iter(jobs.values())).seed, quick=args.quick)


if __name__ == "__main__":
    main()
