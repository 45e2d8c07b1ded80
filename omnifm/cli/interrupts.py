"""Ctrl-C, kept in mind: a library that is interrupted in its middle may answer with an error of its own.

safetensors does: a KeyboardInterrupt inside it comes out as "could not determine the shape", which reads like a damaged file.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_noted: list[int] = []


def note(number: int, frame: FrameType | None) -> None:
    """Handle a signal that asks the program to end.

    Raises:
        KeyboardInterrupt: always.
    """
    _noted.append(number)
    raise KeyboardInterrupt


@contextmanager
def noting() -> Iterator[Sequence[int]]:
    """Yield the signals that asked the program to end, as they come.

    Where Ctrl-C is ignored, as in a shell's background job, it stays so.
    """
    _noted.clear()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    try:
        yield _noted
    finally:
        signal.signal(signal.SIGINT, before)
