"""Makes a peer its own environment below benchmarks/environments, once, with pinned versions."""

import subprocess
import sys
from pathlib import Path

ENVIRONMENTS = Path(__file__).resolve().parents[1] / "environments"
TORCH = "2.13.0"
PEERS = {"pfl": ("pfl[pytorch]==0.6.0",), "flower": ("flwr[simulation]==1.41.0",)}


def python_of(peer: str) -> Path:
    """Return the interpreter of the peer's environment, made if it is not there.

    Raises:
        RuntimeError: the installation failed; says how.
    """
    folder = ENVIRONMENTS / peer
    python = folder / "bin" / "python"
    wanted = " ".join((f"torch=={TORCH}", *PEERS[peer]))
    stamp = folder / "installed.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making the environment of {peer}: {wanted}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    # The CPU build is a tenth of the size; where no index has it under this name, the plain one does as well.
    if subprocess.run([*pip, f"torch=={TORCH}+cpu"], capture_output=True).returncode:
        _run([*pip, f"torch=={TORCH}"])
    _run([*pip, "numpy", *PEERS[peer]])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
