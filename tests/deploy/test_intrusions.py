"""Who should not be there: over a SuperLink with TLS and node keys. Everybody is refused, and the round goes on without them."""

import contextlib
import datetime
import json
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from omnifm.deploy.certs import Folder, make_certs, public_bytes
from omnifm.deploy.doctor import Finding, Patient, examine
from omnifm.deploy.hospital import Hospital
from omnifm.deploy.join import Member, make_member
from omnifm.deploy.processes import complaint, free_port
from omnifm.deploy.serve import Server, make_server
from omnifm.engines.calls import Call, pack, unpack
from omnifm.errors import ConfigError
from omnifm.federation.messages import Reply, decode, encode
from tests.engines.federation import ROOT
from tests.run import jobs

if find_spec("flwr") is None:
    pytest.skip("flwr is not installed: pip install 'omnifm[flower]'", allow_module_level=True)

pytestmark = pytest.mark.slow
PATIENCE = 300.0
"""Seconds that a step may take: many times what it takes on a machine that has nothing else to do."""
HONEST, LIAR = "scan-0", "scan-1"


class Turncoat(Hospital):
    """Has a key that is registered. First says that it is another hospital, then answers in another's name."""

    def __init__(self, *arguments: Any, **own: Any) -> None:
        super().__init__(*arguments, **own)
        self.told = 0

    def answer(self, blob: bytes) -> bytes:
        found = unpack(super().answer(blob))
        if found.kind == "introduction" and not self.told:
            self.told += 1
            return pack(Call("introduction", {**found.header, "client": HONEST}))
        reply = decode(found.body) if found.kind == "reply" else None
        if isinstance(reply, Reply) and reply.kind == "train":
            return pack(Call("reply", {}, encode(replace(reply, client=HONEST))))
        return pack(found)


@dataclass
class Siege:
    """A federation that is served, and threads that end with it."""

    folder: Path
    data: Path
    port: int
    said: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    seen: dict[str, list[Finding]] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)
    _threads: dict[str, threading.Thread] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self, name: str, run: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                run()
            except Exception as error:
                self.failed[name] = str(error)

        self._threads[name] = threading.Thread(target=guarded, daemon=True)
        self._threads[name].start()

    def member(self, name: str, client: str, certs: str | None) -> Member:
        folder = self.folder / certs if certs else None
        return make_member(self.address, self.data / "scan", client, folder, self.folder / f"state-{name}")

    def join(self, name: str, client: str, certs: str) -> None:
        member = self.member(name, client, certs)
        member.say = self.said.setdefault(name, []).append
        # A stranger that was told why it is refused goes; it would try again for ever.
        self.start(name, partial(member.run, lambda: self.over.is_set() or (certs != "certs" and bool(self.said[name]))))

    def running(self, name: str) -> bool:
        return self._threads[name].is_alive()

    def wait(self, until: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not until():
            logs = {p.name: complaint(p) for p in self.folder.rglob("*.log")}
            assert time.monotonic() < end and "serve" not in self.failed, f"{what}: {self.failed}, {self.said}, {logs}"
            time.sleep(0.2)

    def end(self) -> None:
        self.over.set()
        for thread in self._threads.values():
            thread.join(60)

    def log(self, name: str) -> str:
        path = self.run / "flower" / name
        return path.read_text(errors="replace") if path.is_file() else ""


def folder_of_certs(folder: Path, authority: Path, key: Path, client: str) -> None:
    """Put together what one hospital has."""
    (folder / "nodes").mkdir(parents=True)
    (folder / "ca.crt").write_bytes(authority.read_bytes())
    (folder / "nodes" / f"{client}.key").touch(mode=0o600)
    (folder / "nodes" / f"{client}.key").write_bytes(key.read_bytes())


def prepare(folder: Path, data: Path) -> tuple[Siege, Server]:
    make_certs(folder / "certs", ["localhost"], [HONEST, LIAR])
    make_certs(folder / "others", ["localhost"], [HONEST])
    true, other = Folder(folder / "certs"), Folder(folder / "others")
    folder_of_certs(folder / "unknown", true.authority, other.node_key(HONEST), HONEST)
    folder_of_certs(folder / "misled", other.authority, true.node_key(HONEST), HONEST)
    federation = {
        "cohorts": [{"path": str(data / "scan"), "clients": 2}],
        "rounds": 1,
        "participation": 1.0,
        "finetune_epochs": 0,
        "min_replies": 1,
        "deadline": 8.0,  # long enough for the false reply, which is waited for no longer than any other
    }
    config = jobs.config(data, "fedavg", federation=federation)
    siege = Siege(folder, data, free_port())
    server = make_server(config, siege.run, folder / "certs", "127.0.0.1", siege.port, [HONEST, LIAR], resume=False)
    server.say = siege.said.setdefault("serve", []).append
    return siege, server


def fleet(siege: Siege, authority: Path | None, key: Path, late: datetime.timedelta = datetime.timedelta()) -> Any:
    """Return Flower's own client of the SuperLink, which signs with a clock that is late."""
    from cryptography.hazmat.primitives import serialization
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supernode import node_auth_http_interceptor as auth
    from flwr.supernode.fleet_http_client import FleetHttpClient

    class Late(auth.NodeAuthHttpInterceptor):
        def intercept(self, *arguments: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(auth, "now", lambda: datetime.datetime.now(datetime.UTC) - late)
                return super().intercept(*arguments)

    private: Any = serialization.load_ssh_private_key(key.read_bytes(), None)
    interceptors = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), Late(private, private.public_key())]
    root = str(authority) if authority else None
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of httpx, at what Flower says to it
        return FleetHttpClient.from_server_address(siege.address, authority is None, root, interceptors=interceptors)


def attempt(siege: Siege, name: str, call: Callable[[], object]) -> None:
    """Note how a call is refused."""
    try:
        call()
    except Exception as error:
        siege.refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"


def attack(siege: Siege) -> None:
    """Do what a stranger can do who reaches the port: with other certificates, another's node, other signatures."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
    from flwr.proto.node_pb2 import Node

    true, other = Folder(siege.folder / "certs"), Folder(siege.folder / "others")
    text = (siege.folder / "state-liar" / "supernode.log").read_text()
    own = int(text.rpartition("SuperNode ID: ")[2].split()[0])
    pull = PullMessagesRequest(node=Node(node_id=own))
    public = public_bytes(true.node_public(LIAR))
    with fleet(siege, true.authority, true.node_key(LIAR)) as client:
        client.PullMessages(pull)  # whose node it is may look for messages: the rest is refused for what it is
    with fleet(siege, true.authority, true.node_key(HONEST)) as client:
        attempt(siege, "another's messages", lambda: client.PullMessages(pull))
        claim = ActivateNodeRequest(public_key=public, heartbeat_interval=30.0)
        attempt(siege, "another's key", lambda: client.ActivateNode(claim))
    with fleet(siege, true.authority, true.node_key(LIAR), late=datetime.timedelta(minutes=6)) as client:
        attempt(siege, "an old signature", lambda: client.PullMessages(pull))
    with fleet(siege, other.authority, true.node_key(LIAR)) as client:
        attempt(siege, "another authority", lambda: client.PullMessages(pull))
    with fleet(siege, None, true.node_key(LIAR)) as client:
        attempt(siege, "plain text", lambda: client.PullMessages(pull))
    attempt(siege, "another authority, join", lambda: siege.member("misled", HONEST, "misled").run())
    attempt(siege, "plain text, join", lambda: siege.member("plain", HONEST, None).run())
    for name, certs in (("another authority", "misled"), ("plain text", None)):
        patient = Patient(server=siege.address, certs=siege.folder / certs if certs else None)
        siege.seen[name] = [f for f in examine(patient) if siege.address in f.what]


def open_hospital(cohort: Path, client: str, *rest: Any, **own: Any) -> Hospital:
    return (Turncoat if client == LIAR else Hospital)(cohort, client, *rest, **own)


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    """One SuperLink for all: first those who should not be there, then the hospitals; the run is over when a test looks."""
    siege, server = prepare(tmp_path_factory.mktemp("siege"), jobs.data_folder(tmp_path_factory.getbasetemp()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("omnifm.deploy.join.Hospital", open_hospital)
        try:
            siege.start("serve", server.run)
            siege.wait(lambda: bool(siege.said["serve"]), "the SuperLink")
            siege.join("unknown", HONEST, "unknown")
            siege.join("liar", LIAR, "certs")
            siege.wait(lambda: bool(siege.said["unknown"]) and "introduces itself as" in siege.log("server.log"), "two refusals")
            attack(siege)
            siege.join("honest", HONEST, "certs")
            siege.wait(lambda: not siege.running("serve"), "the end of the run")
        finally:
            siege.end()
    yield siege


def test_a_node_with_an_unknown_key_is_told_and_the_server_logs_it(siege: Siege) -> None:
    line = siege.said["unknown"][0]
    assert line.startswith(f"the SuperNode ended (the server does not have the key of {HONEST}, or still waits")
    assert "trying again in" in line and "\n" not in line
    assert "Attempted to register SuperNode with public key" in siege.log("superlink.log")


def test_a_node_that_says_it_is_another_is_refused_by_its_key(siege: Siege) -> None:
    (line,) = (line for line in siege.log("server.log").splitlines() if "introduces itself" in line)
    assert line.endswith(f"client {LIAR}: introduces itself as {HONEST}, and is refused")


def test_a_reply_in_anothers_name_does_not_count_and_the_round_goes_on(siege: Siege) -> None:
    assert siege.failed == {} and json.loads((siege.run / "flower" / "outcome.json").read_text()) == {"ok": True, "message": ""}
    events = jobs.lines(siege.run / "events.jsonl")
    assert [e["client"] for e in events if e["event"] == "client"] == [HONEST]
    assert [e["missing"] for e in events if e["event"] == "round"] == [[LIAR]]
    (line,) = (line for line in siege.log("server.log").splitlines() if "the reply is" in line)
    assert line.endswith(f"client {LIAR}: the reply is {HONEST}'s, for train in round 0")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("another's messages", "HTTPStatusError: Client error '401 Unauthorized'"),
        ("another's key", "HTTPStatusError: Client error '401 Unauthorized'"),
        ("an old signature", "HTTPStatusError: Client error '401 Unauthorized'"),
        ("another authority", "ConnectError: [SSL: CERTIFICATE_VERIFY_FAILED]"),
        ("plain text", "RemoteProtocolError: "),
        ("another authority, join", "ConfigError: {address}: its certificate is refused ("),
        ("plain text, join", "ConfigError: {address} speaks TLS; name the folder of certificates with --certs"),
    ],
)
def test_who_does_not_prove_who_it_is_gets_nothing(siege: Siege, name: str, line: str) -> None:
    assert siege.refused[name].startswith(line.format(address=siege.address))


@pytest.mark.parametrize(("name", "line"), [("another authority", "its certificate is refused"), ("plain text", "speaks TLS")])
def test_the_doctor_says_so_too(siege: Siege, name: str, line: str) -> None:
    (found,) = siege.seen[name]
    assert found.level == "problem" and line in found.what and ("--certs" in found.mend or "ca.crt" in found.mend)


@pytest.fixture
def expired(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server whose certificate was valid until an hour after it was made, an hour ago."""
    make_certs(tmp_path / "certs", ["localhost"], [HONEST], days=0)
    folder = Folder(tmp_path / "certs")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder.certificate, folder.key)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with contextlib.suppress(OSError), connection, context.wrap_socket(connection, server_side=True) as safe:
                        safe.recv(1)

        threading.Thread(target=listen, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", folder.path
        server.shutdown(socket.SHUT_RDWR)


def test_an_expired_certificate_is_refused_in_one_line(expired: tuple[str, Path], tmp_path: Path) -> None:
    address, certs = expired
    data = jobs.write_federation(tmp_path / "data")
    member = make_member(address, data / "scan", HONEST, certs, tmp_path / "state")
    with pytest.raises(ConfigError, match=rf"^{address}: its certificate is refused \(certificate has expired\)$"):
        member.run()
    assert not (tmp_path / "state").exists(), "something was started"
    found = [f for f in examine(Patient(server=address, certs=certs)) if address in f.what]
    assert [f.level for f in found] == ["problem"] and "certificate has expired" in found[0].what
