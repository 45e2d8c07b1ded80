"""What is known of a run across machines while it runs: `status.json` and `status.html` in its folder, replaced as a whole."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omnifm.deploy.words import page
from omnifm.engines.remote import Account
from omnifm.track.folder import write_json, write_text

STATUS_FILE = "status.json"
_LEAST_SECONDS = 0.5


class Board:
    """Collects facts and writes them, at most twice a second.

    Args:
        out: the run folder.
        clients: ids of those that are expected.
        clock: seconds since 1970; for people to read, it may jump.
        steady: seconds; never runs backwards.
    """

    def __init__(
        self,
        out: Path,
        clients: list[str],
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._clock, self._steady, self._written = out / STATUS_FILE, clock, steady, -_LEAST_SECONDS
        blank = {"connected": False, "said": "", **asdict(Account())}
        self._clients: dict[str, dict[str, Any]] = {client: dict(blank) for client in clients}
        self._facts: dict[str, Any] = {"state": "waiting for hospitals", "round": 0, "rounds": 0, "loss": None, "score": None}

    def state(self, text: str) -> None:
        """Say in words what the server does."""
        self._facts["state"] = text
        self.write()

    def heard(self, client: str, *, connected: bool, said: str = "") -> None:
        """Note whether a client is connected, and what it said last if that is worth knowing."""
        if client in self._clients and self._clients[client] | {"connected": connected, "said": said} != self._clients[client]:
            self._clients[client] |= {"connected": connected, "said": said}
            self.write()

    def accounts(self, accounts: Mapping[str, Account]) -> None:
        """Take the engine's accounts."""
        for client, account in accounts.items():
            self._clients[client] |= asdict(account)
        if self._steady() - self._written >= _LEAST_SECONDS:
            self.write()

    def event(self, record: Mapping[str, Any]) -> None:
        """Take an event of the run."""
        kind = record["event"]
        if kind == "start":
            self._facts |= {"round": record["completed"], "rounds": record["rounds"], "primary": record["primary"]}
        elif kind == "round":
            self._facts |= {"round": record["round"] + 1, "loss": record["loss"]}
        elif kind == "evaluation":
            self._facts["score"] = record["personal"].get(self._facts.get("primary", ""))
        else:
            return
        self.write()

    def write(self) -> None:
        """Write now."""
        self._written = self._steady()
        facts = {**self._facts, "written": self._clock(), "clients": self._clients}
        write_json(self._path, facts)
        write_text(self._path.with_suffix(".html"), page(facts))
