"""How much memory a run took."""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def forget_peak() -> None:
    """Set the mark of this process's peak memory to what it holds now: the run before in this process had its own (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_rss_mib(workers: int) -> float:
    """Return the peak memory of this process and, with workers, of as many of its largest child, MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # getrusage speaks bytes on macOS, KiB elsewhere
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage starts from the peak of the process that forked this one; the kernel's own mark does not.
        marks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        own = int(marks[0]) if marks else own
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss if workers > 1 else 0
    return (own + workers * child) / unit
