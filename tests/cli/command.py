"""`omnifm ...` in this process: what it prints and how it ends."""

import sys
from dataclasses import dataclass
from typing import Any

import pytest

from omnifm.cli.main import main


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: Any
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr of a command that failed."""
        assert self.code == 1, (self.code, self.err)
        assert self.err.endswith("\n")
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("omnifm: ")
        assert "Traceback" not in self.err
        return lines[0].removeprefix("omnifm: ")


class Command:
    """Calls `main` with arguments; every other exception than SystemExit is the test's failure, as it would be the user's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["omnifm", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = self._capsys.readouterr()
        return Ended(ended.value.code or 0, shown.out, shown.err)
