"""The server's program, which Flower's ServerApp runs. Without data, it waits for the hospitals and runs the one round loop."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from omnifm import run, seeds
from omnifm.config import dump, load, one_line
from omnifm.deploy.board import Board
from omnifm.deploy.certs import Folder, public_bytes
from omnifm.deploy.data import data_apart
from omnifm.deploy.roster import Roster
from omnifm.engines.parcels import Carrier
from omnifm.engines.remote import Patience, RemoteEngine
from omnifm.errors import CheckpointError, FederationError, OmnifmError
from omnifm.federation.introduction import Introduction, read_introduction
from omnifm.track.folder import read_json, write_json
from omnifm.track.lock import is_locked, locked

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_ID_BYTES = 16
_TURN_SECONDS = 30.0
"""Time that `serve` may take to say which run it has started."""
_FORMAT = "%(asctime)s %(name)s %(message)s"
CONFIG = "config.toml"
JOB = "OMNIFM_SERVER"
"""Environment variable with the file that says what to serve."""


class Job(BaseModel):
    """What `serve` tells the server's program.

    Attributes:
        out: the run folder; its config.toml says what to run.
        clients: ids of those that are expected.
        certs: folder with their public keys; empty on one machine without keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: Path
    clients: tuple[str, ...]
    certs: Path | None

    @property
    def outcome(self) -> Path:
        """The file that says how it ended."""
        return self.out / "flower" / "outcome.json"

    @property
    def lock(self) -> Path:
        """The file that is locked while the program runs."""
        return self.out / "flower" / "server.lock"

    @property
    def log(self) -> Path:
        """What the program says: who came, who was refused and why, what was late."""
        return self.out / "flower" / "server.log"

    @property
    def introductions(self) -> Path:
        """What the clients said of themselves at the first start."""
        return self.out / "flower" / "introductions.json"

    @property
    def serving(self) -> Path:
        """The file that `serve` locks while it runs."""
        return self.out / "flower" / "serve.lock"

    @property
    def run(self) -> Path:
        """The file with the number of the run that `serve` has started."""
        return self.out / "flower" / "run"

    @property
    def ticket(self) -> Path:
        """The file that `serve` changes when it starts another SuperLink; programs of the one before are to end."""
        return self.out / "flower" / "ticket"


def read_job(path: Path) -> Job:
    """Read a job. Raises CheckpointError if it is none."""
    try:
        return Job.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None


def main_of_run(carrier: Carrier, number: int) -> None:
    """Run in place of the app of whichever run Flower was told to start; serve the one that `serve` started.

    Raises:
        FederationError: it is another one.
    """
    job = read_job(Path(os.environ[JOB]))
    end = time.monotonic() + _TURN_SECONDS
    while _text(job.run) != str(number):  # it is written once Flower's command has said it
        if time.monotonic() > end:
            refusal = f"run {number} is not the one that omnifm serve has started; refused"
            with _logged(job.log):
                log.warning("%s", refusal)
            raise FederationError(refusal)
        time.sleep(_TURN_SECONDS / 100)
    main(carrier)


def main(carrier: Carrier) -> None:
    """Serve the job that the environment names; leave an outcome in its folder."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=_FORMAT)
    job = read_job(Path(os.environ[JOB]))
    with locked(job.lock, "server"), _logged(job.log):
        threading.Thread(target=_end_with_serve, args=(job, _text(job.ticket)), daemon=True).start()
        try:
            serve_job(job, carrier)
            write_json(job.outcome, {"ok": True, "message": ""})
        except OmnifmError as error:
            write_json(job.outcome, {"ok": False, "message": " ".join(str(error).split())})
        except Exception as error:
            log.exception("the server's program failed")
            write_json(job.outcome, {"ok": False, "message": f"the server's program failed ({type(error).__name__}: {error})"})
            raise


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Append to a file what is logged. Standard output ends up in Flower's database, where nobody looks for who was refused."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _end_with_serve(job: Job, ticket: str) -> None:
    """End this process when `serve` is gone or has given up this SuperLink.

    Flower itself looks whether the parent's number is in use, which a process that nobody has reaped keeps.
    """
    while is_locked(job.serving) and _text(job.ticket) == ticket:
        time.sleep(_LOOK_SECONDS)
    log.warning("nobody serves this run any more; the last whole round is on disk")
    os._exit(1)


def _said_before(job: Job) -> list[Introduction]:
    """Return the introductions that an earlier start of this run has written."""
    found = read_json(job.introductions)["clients"] if job.introductions.is_file() else []
    return [read_introduction(json.dumps(one)) for one in found]


def _run_id(job: Job) -> str:
    """Return the name by which hospitals know this run's private state from any other's; empty for one begun without."""
    return str(read_json(job.introductions).get("run", "")) if job.introductions.is_file() else seeds.secret(_ID_BYTES).hex()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def serve_job(job: Job, carrier: Carrier) -> None:
    """Wait for the hospitals, train, evaluate; go on with what is in the run folder."""
    config = load(job.out / CONFIG)
    board = Board(job.out, list(job.clients))
    board.write()
    keys = {client: public_bytes(Folder(job.certs).node_public(client)) if job.certs else b"" for client in job.clients}
    roster = Roster(carrier, keys, dump(config), board.heard, _said_before(job))
    introductions = roster.gather()
    data = data_apart(config, introductions)  # before they are kept: what cannot be is asked for anew at the next start
    told = {"run": _run_id(job), "clients": [one.model_dump(mode="json") for one in introductions]}
    write_json(job.introductions, told)
    header = {"config": dump(config), "run": told["run"], "introductions": told["clients"]}
    patience = Patience(config.federation.min_replies, config.federation.deadline)
    engine = RemoteEngine(carrier, job.clients, roster.find, header, patience, board.accounts)
    board.state("training")
    run.execute(config, job.out, resume=True, watch=board.event, elsewhere=run.Elsewhere(data, engine))
    board.state("finished")
