"""A client's private state on its own disk: one file per client and round, so that a crash never mixes two rounds.

The state a client has after its training in round r is version r + 1. A request of round r is answered from the newest
version that is at most r. A server that was killed and asks for round r again therefore gets the state from before r,
whatever was written in the meantime. Of rounds that did not count (the reply was refused, or late) the client hears with its
next request; their versions are passed over, so that client and server remember the same rounds. What left in them has left all
the same: the rounds of releases that a budget pays for are in a file beside the versions, from which nothing is taken back.
"""

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnifm.errors import CheckpointError, FederationError
from omnifm.federation.wire import CLIENT

_RELEASED, _ROUNDS = "released", "rounds"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file so that `path` is either the old file or the whole new one.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=dict(metadata or {}))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            partial.unlink()  # on a full disk it is the last thing anybody wants
        raise CheckpointError(f"{path}: cannot be written ({error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises CheckpointError naming the file when it is missing or cut short."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read, it is missing or damaged ({error})") from None


class ClientStore:
    """Versioned private state below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _client_folder(self, client: str) -> Path:
        if not CLIENT.fullmatch(client):
            raise FederationError(f"client {client!r}: an id has letters, digits, '_', '-' and '.' only")
        return self._folder / client

    def versions(self, client: str) -> list[int]:
        """Return the versions on disk, oldest first."""
        folder = self._client_folder(client)
        return sorted(int(p.stem) for p in folder.glob("*.safetensors") if p.stem.isdigit()) if folder.is_dir() else []

    def clients(self) -> list[str]:
        """Return the clients that have a folder here, sorted."""
        return sorted(p.name for p in self._folder.iterdir() if p.is_dir()) if self._folder.is_dir() else []

    def path_at(self, client: str, round_index: int, void: Collection[int] = ()) -> Path | None:
        """Return the file with the client's state before round `round_index`; None if it never trained before.

        Args:
            client: whose state.
            round_index: the round.
            void: rounds that did not count.
        """
        past = [version for version in self.versions(client) if version <= round_index and version - 1 not in void]
        return self._path(client, past[-1]) if past else None

    def load(self, client: str, round_index: int, void: Collection[int] = ()) -> dict[str, Tensor]:
        """Return the client's state before round `round_index`, without `void` ones; empty if it never trained before."""
        path = self.path_at(client, round_index, void)
        return read_tensors(path) if path else {}

    def save(
        self,
        client: str,
        round_index: int,
        tensors: Mapping[str, Tensor],
        keep: Collection[int] = (),
        void: Collection[int] = (),
    ) -> None:
        """Write the state after round `round_index`, then delete versions that nobody can ask for any more.

        Args:
            client: whose state.
            round_index: the round just trained.
            tensors: the whole private state.
            keep: further points in time (in completed rounds) whose state must survive, e.g. the best round.
            void: rounds that did not count, whose versions may go.
        """
        write_tensors(self._path(client, round_index + 1), tensors)
        versions = self.versions(client)
        needed = {round_index + 1}
        for moment in (round_index, *keep):
            needed |= set([v for v in versions if v <= moment and v - 1 not in void][-1:])
        for version in versions:
            if version not in needed and version <= round_index + 1:
                self._path(client, version).unlink()

    def released(self, client: str) -> frozenset[int]:
        """Return the rounds in which something that a budget pays for left the client, whether they counted or not."""
        path = self._client_folder(client) / _RELEASED
        return frozenset(read_tensors(path)[_ROUNDS].tolist()) if path.is_file() else frozenset()

    def note_release(self, client: str, round_index: int) -> None:
        """Note such a round before its answer leaves; one that is done again after a crash is the same round."""
        rounds = self.released(client)
        if round_index in rounds:
            return
        path = self._client_folder(client) / _RELEASED
        write_tensors(path, {_ROUNDS: torch.tensor(sorted({*rounds, round_index}))})
        place = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(place)  # a power cut would bring back the old file
        finally:
            os.close(place)

    def _path(self, client: str, version: int) -> Path:
        return self._client_folder(client) / f"{version:06d}.safetensors"
