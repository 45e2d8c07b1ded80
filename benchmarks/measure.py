"""What the benchmark scripts share: running a process and its memory, medians, the machine, and the rows of a results file."""

import csv
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "runs" / "benchmarks"
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
_LOOK_SECONDS = 0.1
_LOOKS_PER_PSS = 5
_FIELDS = ("date", "commit", "machine", "load", "seed", "job", "system", "figure", "value", "low", "high", "repeats", "unit")


def scratch_folder(name: str, *, quick: bool, fresh: bool) -> Path:
    """Return the folder of a script's runs at this commit, where finished ones wait for the next call; emptied if asked for."""
    folder = SCRATCH / (f"{name}-quick" if quick else name) / commit()
    if quick or fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def say(text: str) -> None:
    """Show progress on stderr; stdout is for the result."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Spread:
    """A median with the lowest and the highest of its values."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def to_json(self) -> dict[str, float]:
        """Return it as plain numbers of six digits."""
        rounded = {key: float(f"{value:.6g}") for key, value in vars(self).items() if key != "repeats"}
        return {**rounded, "repeats": self.repeats}


@cache
def commit() -> str:
    """Return the commit that is measured, with `+` when files differ from it. Looked up once: others may commit meanwhile."""
    found = _git("rev-parse", "--short", "HEAD")
    return (found + ("+" if _git("status", "--porcelain", "--", "omnifm", "benchmarks/*.py") else "")) if found else "none"


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> str:
    """Return processor, cores and memory in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} CPUs, {memory:.0f} GiB"


def load_average() -> float:
    """Return the one-minute load: a number that says whether the machine was idle."""
    return round(os.getloadavg()[0], 2)


def tree_pss_mib(pid: int) -> float:
    """Return the proportional set size of a process and all its descendants, MiB."""
    import psutil

    total = 0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended between the listing and the look
    return total / 2**20


def resident_mib(pid: int) -> tuple[float, float]:
    """Return the largest resident size a process has had since it was started, and its own part now (no files), MiB.

    Both are 0 when it has ended. The first counts the pages of memory-mapped files that happen to be cached.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    sizes = {line.partition(":")[0]: int(line.split()[1]) / 2**10 for line in lines if line.startswith(("VmHWM:", "RssAnon:"))}
    return sizes.get("VmHWM", 0.0), sizes.get("RssAnon", 0.0)


@dataclass(frozen=True)
class Finished:
    """A process that ended well: begin and end on the monotonic clock, and the peaks of its memory."""

    begin: float
    end: float
    peak_pss_mib: float
    peak_rss_mib: float
    peak_own_mib: float


def run_process(command: Sequence[str], environment: Mapping[str, str], log: Path, *, watch_memory: bool) -> Finished:
    """Run a command to its end; its output goes to `log`.

    Args:
        command: the command.
        environment: added to this process's environment.
        log: a file, overwritten.
        watch_memory: also sample the PSS of the process tree, twice a second.

    Raises:
        RuntimeError: the command failed; the message ends with the last lines of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        begin = time.monotonic()
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=file, stderr=file, cwd=ROOT)
        memory = _Memory(process.pid, tree=watch_memory)
        with memory:
            status = process.wait()
            end = time.monotonic()
    if status:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)[:200]} ended with {status}; {log}:\n{tail}")
    return Finished(begin, end, memory.peak_pss, memory.peak_rss, memory.peak_own)


class _Memory:
    """Watches a process from a thread. `getrusage` would not do: a child starts with the peak of the process that forked it."""

    def __init__(self, pid: int, *, tree: bool) -> None:
        self._pid, self._tree = pid, tree
        self.peak_rss, self.peak_own, self.peak_pss = 0.0, 0.0, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *problem: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        looks = 0
        while not self._done.wait(_LOOK_SECONDS):
            looks += 1
            highest, own = resident_mib(self._pid)
            self.peak_rss, self.peak_own = max(self.peak_rss, highest), max(self.peak_own, own)
            if self._tree and looks % _LOOKS_PER_PSS == 0:
                self.peak_pss = max(self.peak_pss, tree_pss_mib(self._pid))


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]], seed: int) -> None:
    """Append one line per figure to a CSV file, with date, commit, machine, its load and the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "load": load_average(),
        "seed": seed,
    }
    is_new = not path.is_file()
    if not is_new and path.read_text(encoding="utf-8").partition("\n")[0] != ",".join(_FIELDS):
        raise RuntimeError(f"{path}: has other columns than {', '.join(_FIELDS)}; move it away")
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _FIELDS, restval="")
        if is_new:
            writer.writeheader()
        writer.writerows({**shared, **row} for row in rows)


def row(job: str, system: str, figure: str, unit: str, value: Spread | float) -> dict[str, Any]:
    """Return one figure as a row for `append_rows`."""
    numbers = value.to_json() if isinstance(value, Spread) else {"median": float(f"{value:.6g}"), "repeats": 1}
    found = {"value": numbers.pop("median"), **numbers}
    return {"job": job, "system": system, "figure": figure, "unit": unit, **found}


def goal(name: str, value: float, limit: float, *, at_least: bool = False) -> dict[str, Any]:
    """Return a goal and whether it was met."""
    met = value >= limit if at_least else value <= limit
    return {"goal": name, "value": float(f"{value:.6g}"), "limit": limit, "sense": ">=" if at_least else "<=", "met": met}


def without_places(value: Any) -> Any:
    """Return a JSON value in which a file's place on this machine has given way to its name: reports are read elsewhere."""
    if isinstance(value, Mapping):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def finish(name: str, report: dict[str, Any], rows: Sequence[Mapping[str, Any]], seed: int, *, quick: bool) -> None:
    """Write results/NAME.json and .csv (not for a quick look) and print the report as the last line of stdout."""
    whole = {
        "benchmark": name,
        "commit": commit(),
        "machine": machine(),
        "load": load_average(),
        "quick": quick,
        **without_places(report),
    }
    if not quick:
        append_rows(RESULTS / f"{name}.csv", rows, seed)
        (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for item in whole.get("goals", ()):
        say(f"{'met   ' if item['met'] else 'MISSED'} {item['goal']}: {item['value']} ({item['sense']} {item['limit']})")
    print(json.dumps(whole))
