"""Runs a program that must not outlive who started it: `python -m omnifm.deploy.leash PROGRAM ARGUMENT...`.

Standard input is the leash: when it ends, because whoever holds the other end closed it or was killed, the program and all that
it started are ended too.
"""

import os
import signal
import subprocess
import sys
import threading
import time

_GRACE_SECONDS = 8.0


def main(command: list[str]) -> int:
    """Run `command` in this process's group; return its exit code."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_wait_for_the_end, args=(process,), daemon=True).start()
    code = process.wait()
    _end_group()
    return code


def _wait_for_the_end(process: subprocess.Popen[bytes]) -> None:
    # Not through sys.stdin, whose lock would stand in the way of the interpreter's end.
    while os.read(0, 4096):
        pass
    process.terminate()
    for _ in range(int(10 * _GRACE_SECONDS)):
        if process.poll() is not None:
            return
        time.sleep(0.1)
    process.kill()


def _end_group() -> None:
    """End what the program left behind. This process leads the group and must not end with it before it says the code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.5)


if __name__ == "__main__":
    outcome = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(outcome if outcome >= 0 else 128 - outcome)
