"""Keys and certificates of a federation: an authority of its own, the server's certificate, a key for each hospital.

    DIR/ca.crt, ca.key            the authority; hospitals get ca.crt, ca.key stays with whoever makes certificates
    DIR/server.crt, server.key    the server's
    DIR/nodes/ID.key, ID.pub      a hospital's; the server needs ID.pub alone

Keys are ECDSA on P-384; private ones are readable by their owner alone.
"""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omnifm.errors import CheckpointError, ConfigError
from omnifm.federation.wire import CLIENT

if TYPE_CHECKING:
    from cryptography.x509 import GeneralName

if TYPE_CHECKING:
    from cryptography.x509 import GeneralName

DAYS = 365
_HERE = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Folder:
    """Where the files of a certificate folder are."""

    path: Path

    @property
    def authority(self) -> Path:
        """The authority's certificate."""
        return self.path / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """The authority's key."""
        return self.path / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.path / "server.crt"

    @property
    def key(self) -> Path:
        """The server's key."""
        return self.path / "server.key"

    def node_key(self, client: str) -> Path:
        """A hospital's private key."""
        return self.path / "nodes" / f"{client}.key"

    def node_public(self, client: str) -> Path:
        """A hospital's public key."""
        return self.path / "nodes" / f"{client}.pub"

    def clients(self) -> list[str]:
        """Return the clients whose public keys are here, sorted."""
        return sorted(path.stem for path in (self.path / "nodes").glob("*.pub"))


def make_certs(path: Path, hosts: Sequence[str], clients: Sequence[str], days: int = DAYS) -> list[Path]:
    """Make what is asked for and is not there yet; return the new files.

    Args:
        path: the folder.
        hosts: names and addresses by which hospitals reach the server; with any, authority and server certificate are made.
        clients: ids of hospitals to make keys for.
        days: until the certificates expire.

    Raises:
        ConfigError: nothing is asked for, an id is none, or the extra `flower` is missing.
        CheckpointError: a file is there already, or cannot be written.
    """
    require_cryptography()
    if not hosts and not clients:
        raise ConfigError("nothing to make: give --host for the server's certificate, or --client for a hospital's key")
    if strange := [client for client in clients if not CLIENT.fullmatch(client)]:
        raise ConfigError(f"--client {strange[0]!r}: an id has letters, digits, '_', '-' and '.' only")
    folder = Folder(path)
    wanted = [folder.authority, folder.authority_key, folder.certificate, folder.key] if hosts else []
    wanted += [file for client in clients for file in (folder.node_key(client), folder.node_public(client))]
    if there := [file for file in wanted if file.exists()]:
        raise CheckpointError(f"{there[0]}: is there already, and is not replaced; name another folder or remove it first")
    if hosts:
        _make_server(folder, hosts, days)
    for client in clients:
        _make_node(folder, client)
    return wanted


def require_cryptography() -> None:
    """Raise ConfigError unless the package that makes and reads keys is installed."""
    from importlib.util import find_spec

    if find_spec("cryptography") is None:
        raise ConfigError("keys need the extra flower: pip install 'omnifm[flower]'")


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
            file.write(content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None


def _make_node(folder: Folder, client: str) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    formats = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    _write(folder.node_key(client), key.private_bytes(*formats), secret=True)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(folder.node_public(client), public + b"\n")


def _make_server(folder: Folder, hosts: Sequence[str], days: int) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    # An hour back: clocks of hospitals differ.
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)

    def certificate(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("omnifm authority"))
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        return builder.not_valid_before(start).not_valid_after(start + datetime.timedelta(days=days))

    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    root = certificate("omnifm authority", authority).add_extension(x509.BasicConstraints(True, 0), True)
    root = root.add_extension(usage, True)
    root = root.add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), False)
    leaf = certificate(hosts[0], server).add_extension(x509.BasicConstraints(False, None), True)
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *_HERE])]
    leaf = leaf.add_extension(x509.SubjectAlternativeName(names), False)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    leaf = leaf.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False)
    formats = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    _write(folder.authority_key, authority.private_bytes(*formats), secret=True)
    _write(folder.key, server.private_bytes(*formats), secret=True)
    for path, builder in ((folder.authority, root), (folder.certificate, leaf)):
        _write(path, builder.sign(authority, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def _general_name(host: str) -> "GeneralName":
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def public_bytes(path: Path) -> bytes:
    """Return a hospital's public key as Flower names it. Raises CheckpointError if the file holds none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise CheckpointError(f"{path}: holds no public key ({error})") from None
    found: bytes = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return found
