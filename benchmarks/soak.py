"""Does memory grow over hundreds of rounds? A tiny job over the SuperLink, three nodes, sampled every round.

Memory is what processes hold of their own, MiB: pages that are no file's, in memory or swapped out. Pages of libraries come and
go with what else runs, and their share (PSS) falls when any other program maps the same library. Told apart are the server's
program, the SuperLink with all its other programs, and each hospital's worker; `nodes` is all that Flower runs at the hospitals.
What is younger than 20 seconds serves one message, ends, and is left out: whether one happens to live is no growth.
A row per ten rounds with the medians goes to results/soak_rounds.csv. The verdict is the slope of memory over the second half of
the rounds, by least squares: beyond `LIMIT` MiB per 100 rounds it grows.
"""

import argparse
import csv
import json
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from deployments import Members, Place, place, start_ours

from omnifm.config import digest, parse

from measure import RESULTS, commit, finish, goal, machine, row, say, scratch_folder
from runs import noise_cohort

LIMIT = 5.0
PER_ROW = 10
_LOOK_SECONDS = 0.2
_YOUNG_SECONDS = 20.0
_SERVER_PROGRAM = "flwr-serverapp"
_OWN = re.compile(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB$", re.MULTILINE)


def job(scratch: Path, rounds: int) -> dict[str, Any]:
    """Return the config: three small hospitals, two steps a round."""
    cohorts = [{"path": str(noise_cohort(scratch / f"hospital_{n}", 60 + 20 * n, 32))} for n in range(3)]
    return {
        "strategy": "omnifm",
        "federation": {"cohorts": cohorts, "rounds": rounds, "local_steps": 2, "evaluate_every": PER_ROW, "finetune_epochs": 0},
        "data": {"image_size": 32, "cache": str(scratch / "cache")},
        "model": {"width": 8},
        "optimiser": {"lr": 0.005, "batch_size": 16},
        "engine": {"device": "cpu"},
    }


def held(processes: Sequence[psutil.Process]) -> float:
    """Return what processes hold of their own, MiB; those that have ended meanwhile hold nothing, nor do young ones."""
    total = 0
    for process in processes:
        try:
            if time.time() - process.create_time() < _YOUNG_SECONDS:
                continue
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
            continue
        total += sum(int(kib) for kib in _OWN.findall(status))
    return total / 2**10


def words(process: psutil.Process) -> str:
    """Return a process's command; nothing if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def sample(members: Members) -> dict[str, float]:
    """Return who holds how much now."""
    found: dict[str, float] = {}
    below = psutil.Process(members.server.pid).children(recursive=True)
    program = [p for p in below if _SERVER_PROGRAM in words(p)]
    found["server"] = held(program)
    found["superlink"] = held([p for p in below if p not in program])
    nodes: list[psutil.Process] = []
    for number, (_, hospital) in enumerate(sorted(members.hospitals.items())):
        found[f"worker {number}"] = held([psutil.Process(hospital.pid)])
        nodes += psutil.Process(hospital.pid).children(recursive=True)
    found["nodes"] = held(nodes)
    return found


def watch(where: Place, members: Members) -> list[tuple[int, dict[str, float]]]:
    """Sample memory whenever a round has been committed, until the run is over. Raises RuntimeError if it ends badly."""
    samples: list[tuple[int, dict[str, float]]] = []
    last = where.folder / "run" / "checkpoint" / "last.json"
    while members.server.poll() is None:
        found = re.search(r'"rounds_completed": (\d+)', last.read_text(encoding="utf-8")) if last.is_file() else None
        done = int(found.group(1)) if found else 0
        if done > (samples[-1][0] if samples else 0):
            samples.append((done, sample(members)))
            if done % PER_ROW == 0:
                say(f"round {done}: " + ", ".join(f"{who} {value:.0f}" for who, value in samples[-1][1].items()))
        time.sleep(_LOOK_SECONDS)
    where.wait(members.server, where.folder / "nowhere")
    return samples


def slope(samples: Sequence[tuple[int, Mapping[str, float]]], who: str) -> float:
    """Return MiB per 100 rounds over the second half of the samples, by least squares."""
    half = [(rounds, values[who]) for rounds, values in samples[len(samples) // 2 :]]
    return 100 * statistics.linear_regression(*zip(*half, strict=True)).slope


def table(samples: Sequence[tuple[int, Mapping[str, float]]]) -> list[dict[str, float]]:
    """Return a row per ten rounds: the last of them, and medians."""
    blocks: dict[int, list[Mapping[str, float]]] = {}
    for rounds, values in samples:
        blocks.setdefault(-(-rounds // PER_ROW) * PER_ROW, []).append(values)
    return [
        {"round": rounds, "samples": len(found)} | {who: round(statistics.median(v[who] for v in found), 1) for who in found[0]}
        for rounds, found in sorted(blocks.items())
    ]


def write_table(path: Path, rows: Sequence[Mapping[str, float]], config_hash: str) -> None:
    """Write the rows of one soak, in place of those of the last."""
    facts = {"commit": commit(), "machine": machine(), "config_hash": config_hash}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows({**values, **facts} for values in rows)


def check(where: Place, rounds: int) -> None:
    """Raise RuntimeError unless every client answered in every round."""
    events = [json.loads(line) for line in (where.folder / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    replies = sum(event["event"] == "client" for event in events)
    if replies != 3 * rounds:
        raise RuntimeError(f"{replies} of {3 * rounds} replies")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="rounds [default: 200]")
    parser.add_argument("--quick", action="store_true", help="eight rounds, nothing kept: does it work at all?")
    args = parser.parse_args()
    rounds = 8 if args.quick else args.rounds
    scratch = scratch_folder("soak", quick=args.quick, fresh=True)
    config = job(scratch, rounds)
    config_hash = digest(parse(config))
    with place(scratch / "run") as where:
        samples = watch(where, start_ours(where, config))
        seconds = time.monotonic() - where.begin
        check(where, rounds)
    slopes = {who: slope(samples, who) for who in samples[0][1]}
    name = f"omnifm, resnet18 width 8, 32 px, 3 nodes, {rounds} rounds, config {config_hash}"
    rows = [row(name, who, "growth over the second half", "MiB per 100 rounds", value) for who, value in slopes.items()]
    rows += [row(name, who, "memory of its own at the end", "MiB", value) for who, value in samples[-1][1].items()]
    rows.append(row(name, "all", "whole job", "s", seconds))
    if not args.quick:
        write_table(RESULTS / "soak_rounds.csv", table(samples), config_hash)
    print("\n".join(map(str, table(samples))), file=sys.stderr)
    goals = [goal(f"{who}: growth, MiB per 100 rounds", value, LIMIT) for who, value in slopes.items()]
    finish("soak", {"config": config, "rounds": rounds, "sampled": len(samples), "goals": goals}, rows, 0, quick=args.quick)


if __name__ == "__main__":
    main()
