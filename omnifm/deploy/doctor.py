"""`omnifm doctor`: what would keep a hospital or a server from working, each with its mend. Looks, and changes nothing."""

import datetime
import email.utils
import os
import shutil
import socket
import ssl
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from omnifm.deploy.certs import Folder
from omnifm.deploy.tls import TIMEOUT_SECONDS, connect, refusal
from omnifm.engines.quiet import QUIET
from omnifm.errors import OmnifmError

_SOON = datetime.timedelta(days=30)
_LEAST_DISK = 5 * 2**30
_LEAST_MEMORY = 2 * 2**30
_MOST_SKEW_SECONDS = 60.0
Level = Literal["fine", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        level: `problem` keeps it from working, `warning` may soon.
        what: was looked at, and what was found.
        mend: what to do; empty where nothing is to be done.
    """

    level: Level
    what: str
    mend: str = ""


@dataclass(frozen=True)
class Patient:
    """What is to be looked at; what is not given is left out.

    Attributes:
        server: HOST:PORT to reach.
        port: to listen on.
        certs: folder of certificates.
        client: a hospital's id.
        cohort: a hospital's data.
        state: folder that will be written to.
    """

    server: str = ""
    port: int = 0
    certs: Path | None = None
    client: str = ""
    cohort: Path | None = None
    state: Path = Path()


def examine(patient: Patient) -> list[Finding]:
    """Return all findings."""
    looks: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
        _versions,
        _quiet,
        _disk,
        _memory,
        _certs,
        _cohort,
        _port,
        _server,
    )
    return [finding for look in looks for finding in look(patient)]


def _versions(patient: Patient) -> Iterator[Finding]:
    del patient
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("fine", f"Python {python}, omnifm {version('omnifm') if _has('omnifm') else 'from a checkout'}")
    for package, low, high in (("flwr", (1, 41), (1, 43)), ("cryptography", (45,), (1000,))):
        mend = "pip install 'omnifm[flower]'"
        if not _has(package):
            yield Finding("problem", f"{package} is not installed", mend)
            continue
        numbers = tuple(int(part) for part in version(package).split(".")[:2] if part.isdigit())
        known = low <= numbers < high
        yield Finding("fine" if known else "problem", f"{package} {version(package)}", "" if known else mend)


def _has(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _quiet(patient: Patient) -> Iterator[Finding]:
    """Programs that `serve` and `join` start have these switches whatever the environment says; others have not."""
    del patient
    loud = [name for name, value in QUIET.items() if os.environ.get(name, value) != value]
    for name in loud:
        mend = f"export {name}={QUIET[name]}; serve and join set it for their own programs"
        yield Finding("warning", f"{name}={os.environ[name]}: a library may phone home", mend)
    if not loud:
        yield Finding("fine", "nothing is asked to phone home")


def _disk(patient: Patient) -> Iterator[Finding]:
    folder = patient.state.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    mend = "free some, or name another folder with --state or --out"
    if not os.access(folder, os.W_OK):
        yield Finding("problem", f"{folder} cannot be written to", "change its owner, or name another folder")
    yield Finding(
        "fine" if free >= _LEAST_DISK else "warning",
        f"{free / 2**30:.1f} GiB free in {folder}",
        "" if free >= _LEAST_DISK else mend,
    )


def _memory(patient: Patient) -> Iterator[Finding]:
    del patient
    path = Path("/proc/meminfo")
    if path.is_file():
        line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 2**10
        enough = free >= _LEAST_MEMORY
        mend = "" if enough else "end other programs; a model and its images need about 2 GiB"
        yield Finding("fine" if enough else "warning", f"{free / 2**30:.1f} GiB of memory are free", mend)


def _certs(patient: Patient) -> Iterator[Finding]:
    if patient.certs is None:
        yield Finding("warning", "no certificates: this machine alone", "make some with omnifm certs, and name them with --certs")
        return
    files = Folder(patient.certs)
    if find_spec("cryptography") is not None:
        yield from _certificate(files.authority, "omnifm certs DIR --host NAME at the server; hospitals get ca.crt")
        if files.certificate.exists() or not patient.client:
            yield from _certificate(files.certificate, "omnifm certs DIR --host NAME")
    for key in [files.authority_key, files.key, *sorted((patient.certs / "nodes").glob("*.key"))]:
        if key.exists() and stat.S_IMODE(key.stat().st_mode) & 0o077:
            yield Finding("problem", f"{key}: others can read it", f"chmod 600 {key}")
    if patient.client:
        key = files.node_key(patient.client)
        mend = f"omnifm certs {patient.certs} --client {patient.client}, and give the server {patient.client}.pub"
        yield Finding("fine", f"{key} is there") if key.is_file() else Finding("problem", f"{key} is missing", mend)
    if files.authority_key.exists() and patient.client:
        yield Finding(
            "warning", f"{files.authority_key}: a hospital needs no authority's key", "keep it where certificates are made"
        )


def _certificate(path: Path, mend: str) -> Iterator[Finding]:
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        yield Finding("problem", f"{path} is missing or no certificate", mend)
        return
    now, end = datetime.datetime.now(datetime.UTC), certificate.not_valid_after_utc
    said = f"{path} is valid until {end:%Y-%m-%d}"
    if certificate.not_valid_before_utc > now:
        yield Finding(
            "problem",
            f"{path} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            "set this machine's clock",
        )
    elif end < now:
        yield Finding("problem", f"{path} expired on {end:%Y-%m-%d}", f"make new ones in another folder: {mend}")
    else:
        yield Finding("warning", said, f"make new ones before that day: {mend}") if end - now < _SOON else Finding("fine", said)


def _cohort(patient: Patient) -> Iterator[Finding]:
    if patient.cohort is None:
        return
    from omnifm.data.cohort import Cohort
    from omnifm.data.validate import validate

    try:
        problems = validate(patient.cohort)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            yield Finding("problem", f"cohort {patient.cohort}: {problems[0]}{more}", f"omnifm data check {patient.cohort}")
            return
        cohort = Cohort.read(patient.cohort)
    except OmnifmError as error:
        yield Finding("problem", str(error), f"omnifm data check {patient.cohort}")
        return
    yield Finding("fine", f"cohort {cohort.name}: {cohort.spec.task}, {len(cohort.rows)} rows")


def _port(patient: Patient) -> Iterator[Finding]:
    if not patient.port:
        return
    try:
        with socket.create_server(("127.0.0.1", patient.port)):
            yield Finding("fine", f"port {patient.port} is free")
    except OSError as error:
        yield Finding(
            "problem", f"port {patient.port}: {error.strerror}", "end the program that listens there, or choose another --port"
        )


def _server(patient: Patient) -> Iterator[Finding]:
    if not patient.server:
        return
    host, _, port = patient.server.rpartition(":")
    authority = Folder(patient.certs).authority if patient.certs else None
    try:
        if said := refusal(patient.server, authority):
            mend = "compare ca.crt with the server's, and the name with those of omnifm certs --host"
            yield Finding("problem", said, mend if authority else "--certs DIR, with the server's ca.crt in it")
        elif authority is None:
            with socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS):
                yield Finding("fine", f"{patient.server} answers, without TLS")
        else:
            with connect(host, int(port), authority) as connection:
                yield Finding("fine", f"{patient.server} answers, and its certificate is the authority's")
                yield from _clock(connection, host)
    except (OSError, ValueError) as error:
        mend = "is omnifm serve running there, and does the firewall let this machine reach the port?"
        yield Finding("problem", f"{patient.server} does not answer ({error})", mend)


def _clock(connection: ssl.SSLSocket, host: str) -> Iterator[Finding]:
    """Compare this machine's clock with the date in the server's answer: certificates and heartbeats go by it."""
    connection.settimeout(TIMEOUT_SECONDS)
    connection.sendall(f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    lines = connection.recv(4096).decode("latin-1").split("\r\n")
    date = next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("date:")), "")
    if date:
        skew = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
        close = abs(skew) <= _MOST_SKEW_SECONDS
        mend = "" if close else "let both machines set their clocks by NTP"
        yield Finding("fine" if close else "problem", f"this clock and the server's differ by {abs(skew):.0f} s", mend)
