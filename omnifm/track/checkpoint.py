"""The server's side of a checkpoint: one file of tensors and one small file that names it, for `last` and for `best`.

    checkpoint/last.json            rounds completed, the tensor file, the clients' files, their SHA-256, where events.jsonl ended
    checkpoint/best.json            the same for the round that was best on validation
    checkpoint/server-000012.safetensors
    checkpoint/clients/ID/000012.safetensors    written by the clients' sites (`federation.store`)
    checkpoint/clients/ID/released              the rounds in which it sent noisy prototypes; no checkpoint names it

The tensor file is written first, then `last.json` is replaced: a crash between the two leaves the round before.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from omnifm.errors import CheckpointError
from omnifm.federation.state import ServerState
from omnifm.federation.store import ClientStore, read_tensors, write_tensors
from omnifm.track.folder import read_json, write_json

_SHARED, _EXTRA = "shared:", "extra:"
_KEYS = {"rounds_completed", "file", "sha256", "meta", "clients", "events_bytes", "seconds", "best"}


class Checkpoint:
    """Saves and loads `ServerState` below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: dict[str, str] = {}

    @property
    def clients(self) -> Path:
        """Folder of the clients' private states."""
        return self.folder / "clients"

    def exists(self, name: str = "last") -> bool:
        """Whether there is a saved state called `name`.

        Raises:
            CheckpointError: last.json is gone, though other files say that rounds were completed.
        """
        found = (self.folder / f"{name}.json").is_file()
        # A start that was killed in its first commit has the tensors of round 1 and nothing else.
        later = [path for path in self.folder.glob("server-*.safetensors") if path != self._path(1)]
        if name == "last" and not found and (later or (self.folder / "best.json").is_file()):
            raise CheckpointError(f"{self.folder / 'last.json'}: missing, though other files of the checkpoint are there")
        return found

    def save(self, server: ServerState, completed: int, facts: dict[str, Any]) -> None:
        """Save the state after `completed` rounds as `last`, with `facts`: events_bytes, seconds, best."""
        path = self._path(completed)
        tensors = {_SHARED + n: t for n, t in server.shared.items()} | {_EXTRA + n: t for n, t in server.extra.items()}
        # Tensors may share memory (a neighbourhood that still equals the global model); safetensors wants them apart.
        write_tensors(path, {name: tensor.clone() for name, tensor in tensors.items()}, {"meta": json.dumps(server.meta)})
        clients = self._client_files(server, completed)
        named = {"file": path.name, "sha256": _sha256(path), "clients": clients}
        write_json(self.folder / "last.json", {"rounds_completed": completed, **named, "meta": server.meta, **facts})
        self._prune()

    def pin_best(self) -> None:
        """Let `best` name what `last` names."""
        write_json(self.folder / "best.json", read_json(self.folder / "last.json"))
        self._prune()

    def load(self, name: str = "last") -> tuple[ServerState, dict[str, Any]]:
        """Return the state called `name` and its facts.

        Raises:
            CheckpointError: a file is missing, cut short, or not the one that was written.
        """
        record = read_json(self.folder / f"{name}.json")
        if lost := _KEYS - record.keys():
            raise CheckpointError(f"{self.folder / name}.json: lacks {min(lost)}")
        path = self.folder / record["file"]
        _require_unchanged(path, record["sha256"], f"{name}.json")
        for client, digest in record["clients"].items():
            _require_unchanged(self.clients / client, digest, f"{name}.json")
        tensors = read_tensors(path)
        shared = {n.removeprefix(_SHARED): t for n, t in tensors.items() if n.startswith(_SHARED)}
        extra = {n.removeprefix(_EXTRA): t for n, t in tensors.items() if n.startswith(_EXTRA)}
        return ServerState(shared, extra, record["meta"]), record

    def _client_files(self, server: ServerState, completed: int) -> dict[str, str]:
        """Return the SHA-256 of the private state each client has at this moment, by file; only new files are read."""
        store = ClientStore(self.clients)
        paths = [path for c in store.clients() if (path := store.path_at(c, completed, server.told(c).get("void", ())))]
        names = {f"{path.parent.name}/{path.name}": path for path in paths}
        self._digests = {name: self._digests.get(name) or _sha256(path) for name, path in names.items()}
        return self._digests

    def _path(self, completed: int) -> Path:
        return self.folder / f"server-{completed:06d}.safetensors"

    def _prune(self) -> None:
        named = {read_json(self.folder / f"{n}.json")["file"] for n in ("last", "best") if self.exists(n)}
        for path in self.folder.glob("server-*.safetensors"):
            if path.name not in named:
                path.unlink()


def _require_unchanged(path: Path, digest: str, record: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, though {record} names it")
    if _sha256(path) != digest:
        raise CheckpointError(f"{path}: damaged or cut short (its SHA-256 is not the one in {record})")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
