"""Runs a program that must not outlive who started it: `python -m omnifm.deploy.leash PROGRAM ARGUMENT...`.

Standard input is the leash: when it ends, because whoever holds the other end closed it or was killed, the program and all that
it started are ended too. This process has to lead a group of its own, and ends with the group.
"""

import os
import signal
import subprocess
import sys
import threading
import time

_GRACE_SECONDS = 8.0
_LAST_SECONDS = 0.5


def main(command: list[str]) -> None:
    """Run `command` to its end, or to the end of standard input; then end the whole group."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_wait_for_the_end, args=(process,), daemon=True).start()
    process.wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    time.sleep(_LAST_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _wait_for_the_end(process: subprocess.Popen[bytes]) -> None:
    # Not through sys.stdin, whose lock would stand in the way of the interpreter's end.
    while os.read(0, 4096):
        pass
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
