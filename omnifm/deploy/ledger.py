"""What a hospital has given away, by its own count: every training answer and every release, whatever the server says of rounds.

The epsilon in `metrics.json` follows from the config: so many rounds, so many steps. A server can ask for more, or for one round
again and again. The ledger counts what was answered. It is on the hospital's disk before an answer leaves.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omnifm.config import Config
from omnifm.errors import CheckpointError
from omnifm.federation.effort import Effort, steps_of
from omnifm.federation.messages import Reply, Request
from omnifm.federation.release import Passed
from omnifm.privacy.accounting import NO_RELEASES, Releases, Steps, epsilon_of_all
from omnifm.track.folder import read_json, sync_folder, write_json

_MASKS = "secagg/"
_NOTHING = Steps(math.inf, 1.0, 0)


@dataclass(frozen=True)
class Answer:
    """What one answer is worth: steps of training, and what is told besides the weights."""

    steps: Steps = _NOTHING
    releases: Releases = NO_RELEASES

    @classmethod
    def to(cls, request: Request, config: Config, examples: int, reply: Reply, passed: Passed) -> "Answer":
        """Return what a reply gives away. Scores and masks give nothing that has an epsilon: docs/privacy.md, *not covered*.

        Args:
            request: the server's.
            config: that came with it.
            examples: the client's training examples.
            reply: what is about to leave.
            passed: what of it went through a noisy release. What did not has no noise, whatever the config says of noise.
        """
        privacy, steps = config.privacy, _NOTHING
        secret = privacy.noise == "secret"  # the server knows the seed of any other, and can take it off
        if request.kind == "train":
            size = config.optimiser.batch_size
            noise = privacy.example_noise if privacy.example_clip and secret else 0.0
            steps = Steps(noise, min(1.0, size / examples), steps_of(Effort.of(request.settings), examples, size))
        return cls(steps, _told(reply, passed, secret) if request.kind in ("train", "describe") else NO_RELEASES)


def _told(reply: Reply, passed: Passed, secret: bool) -> Releases:
    """Return what leaves besides the weights; one release without noise if any of it has none that is secret."""
    told = {name for name in reply.extra if not name.startswith(_MASKS)}
    if not told:
        return NO_RELEASES
    noisy = secret and passed.noises and told <= passed.names
    return Releases(min(passed.noises), len(passed.noises)) if noisy else Releases(0.0, 1)


class Ledger:
    """All that has left this hospital.

    Args:
        path: its file; made with the first entry.

    Raises:
        CheckpointError: the file is damaged; without it nobody knows what has left.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        found = read_json(path) if path.is_file() else {}
        try:
            self._steps = [Steps(**entry) for entry in found.get("steps", [])]
            self._releases = [Releases(**entry) for entry in found.get("releases", [])]
        except TypeError as error:
            raise CheckpointError(f"{path}: damaged ({error})") from None

    def epsilon(self, delta: float, more: Answer | None = None) -> float:
        """Return what has left is worth, at this delta, and with one answer more. Infinite if anything left without noise."""
        more = more or Answer()
        return epsilon_of_all(delta, [*self._steps, more.steps], [*self._releases, more.releases])

    def add(self, answer: Answer) -> None:
        """Note an answer that is about to leave. Raises CheckpointError if the disk refuses; then it must not leave."""
        steps = _summed([*map(asdict, self._steps), asdict(answer.steps)])
        releases = _summed([*map(asdict, self._releases), asdict(answer.releases)])
        write_json(self._path, {"steps": steps, "releases": releases})
        sync_folder(self._path.parent)
        self._steps, self._releases = [Steps(**s) for s in steps], [Releases(**r) for r in releases]


def _summed(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return entries with those of one kind as one; what counts nothing is left out."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in entries:
        kind = tuple(value for name, value in entry.items() if name != "count")
        kept = found.setdefault(kind, {**entry, "count": 0})
        kept["count"] += entry["count"]
    return [entry for entry in found.values() if entry["count"]]
