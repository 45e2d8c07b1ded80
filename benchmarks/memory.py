"""Does memory grow with the number of clients? A run with 200 clients against one with 10, and 1,000 clients in one round.

All runs train ten clients per round. The question is put twice: with the same images cut into 10 or 200 clients, and with twenty
rows for each client, so that the larger run has twenty times the images (its resident size then counts the cached pages of the
memory-mapped image file; "without files" leaves them out). Peak memory is the largest resident size of a fresh `omnifm run`
process, from start to report.
"""

import argparse
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import ONE_THREAD, Spread, finish, goal, row, run_process, say, scratch_folder
from runs import noise_cohort, run_omnifm

ROWS_PER_CLIENT = 20
PER_ROUND = 10


def many_clients(clients: int, images: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Return the config of a run that cuts `images` images into `clients` clients, ten of them per round."""
    cohort = noise_cohort(scratch / f"noise_{images}", images)
    return {
        "strategy": "omnifm",
        "federation": {
            "cohorts": [{"path": str(cohort), "clients": clients}],
            "partition": "iid",
            "rounds": rounds,
            "participation": PER_ROUND / clients,
            "evaluate_every": rounds,
        },
        "data": {"image_size": 64, "cache": str(scratch / "cache")},
        "model": {"width": 16},
        "optimiser": {"batch_size": 16},
    }


def atlas(patients: int, scratch: Path) -> list[Path]:
    """Return the five classification cohorts of a simulated atlas, made by the command a user would give."""
    folder = scratch / f"atlas-{patients}"
    if not folder.is_dir():
        partial = scratch / f"atlas-{patients}.part"
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "omnifm", "data", "make", "atlas", str(partial)]
        command += ["--patients", str(patients), "--seed", "0", "--size", "32"]
        run_process(command, ONE_THREAD, scratch / "atlas.log", watch_memory=False)
        partial.rename(folder)
    return sorted(folder.glob("atlas_cls_*"))


def one_round(clients: int, patients: int, scratch: Path) -> dict[str, Any]:
    """Return the config of one round in which all of `clients` clients train on the atlas, a patient or two each."""
    cohorts = [{"path": str(path), "clients": clients // 5} for path in atlas(patients, scratch)]
    return {
        "strategy": "omnifm",
        "federation": {"cohorts": cohorts, "partition": "iid", "min_examples": 1, "rounds": 1, "finetune_epochs": 0},
        "data": {"image_size": 32, "cache": str(scratch / "cache")},
        "model": {"width": 16, "stem_stride": 1},
        "strategies": {"omnifm": {"band": 8}},
    }


@dataclass(frozen=True)
class Peaks:
    """Peak memory of runs of one kind, MiB: resident, and without files."""

    resident: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)


def compare(repeats: int, shapes: list[tuple[int, int]], rounds: int, scratch: Path) -> dict[tuple[int, int], Peaks]:
    """Return the peaks of runs of each shape (clients, images), interleaved."""
    peaks = {shape: Peaks() for shape in shapes}
    for repeat in range(repeats):
        for clients, images in shapes:
            say(f"{clients} clients, {images} images, repeat {repeat + 1}/{repeats}")
            config = many_clients(clients, images, rounds, scratch)
            _, finished = run_omnifm(config, scratch / f"clients-{clients}-{images}-{repeat}")
            peaks[clients, images].resident.append(finished.peak_rss_mib)
            peaks[clients, images].own.append(finished.peak_own_mib)
    return peaks


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each size, interleaved [default: 3]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a run [default: 3]")
    parser.add_argument("--patients", type=int, default=320, help="simulated patients for the 1,000 clients [default: 320]")
    parser.add_argument("--fresh", action="store_true", help="forget cohorts and finished runs of an earlier call")
    parser.add_argument("--quick", action="store_true", help="few clients, one repeat, nothing kept: does it work at all?")
    return parser.parse_args()


def main() -> None:
    args = parse()
    scratch = scratch_folder("memory", quick=args.quick, fresh=args.fresh)
    (few, many), crowd, patients = ((10, 20), 20, 10) if args.quick else ((10, 200), 1000, args.patients)
    small, large = few * ROWS_PER_CLIENT, many * ROWS_PER_CLIENT
    shapes = [(few, small), (few, large), (many, large)]
    found = compare(1 if args.quick else args.repeats, shapes, 1 if args.quick else args.rounds, scratch)
    rows, goals = judge(found, (many, large), {"same images": (few, large), "same rows per client": (few, small)})
    say(f"{crowd} clients on the atlas, one round")
    metrics, finished = run_omnifm(one_round(crowd, patients, scratch), scratch / f"round-{crowd}")
    seconds = metrics["seconds"]["train"] + metrics["seconds"]["aggregate"]
    rows.append(row("atlas 32 px", f"{crowd} clients", "one round", "s", seconds))
    rows.append(row("atlas 32 px", f"{crowd} clients", "peak memory", "MiB", finished.peak_rss_mib))
    goals.append(goal("clients that finished a round on the atlas", len(metrics["clients"]), crowd, at_least=True))
    peaks = {f"{clients} clients, {images} images": vars(found[clients, images]) for clients, images in shapes}
    whole = {"clients": len(metrics["clients"]), "round_seconds": seconds, "whole_seconds": finished.end - finished.begin}
    report = {"peaks_mib": peaks, "one_round": {**whole, "peak_rss_mib": finished.peak_rss_mib}, "goals": goals}
    finish("memory", report, rows, 0, quick=args.quick)


def judge(
    found: dict[tuple[int, int], Peaks], large: tuple[int, int], others: dict[str, tuple[int, int]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows, and the goals: the peak of the `large` shape over that of each of the `others`."""
    rows = []
    for (clients, images), peaks in found.items():
        system = f"{clients} clients, {images} images"
        rows.append(row("noise 64 px", system, "peak memory", "MiB", Spread.of(peaks.resident)))
        rows.append(row("noise 64 px", system, "peak memory without files", "MiB", Spread.of(peaks.own)))
    goals = []
    for name, shape in others.items():
        ratio = Spread.of([a / b for a, b in zip(found[large].resident, found[shape].resident, strict=True)])
        system = f"{large[0]} against {shape[0]} clients, {name}"
        rows.append(row("noise 64 px", system, "peak memory", "ratio", ratio))
        goals.append(goal(f"peak memory, {system}", ratio.median, 1.1))
    return rows, goals


if __name__ == "__main__":
    main()
