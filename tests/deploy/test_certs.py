"""Keys and certificates: what is made, for whom, and that nothing is replaced."""

import datetime
import ssl
import stat
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="cryptography is not installed: pip install 'omnifm[flower]'")

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from omnifm.deploy.certs import Folder, make_certs, public_bytes
from omnifm.deploy.doctor import Patient, examine
from omnifm.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("certs") / "certs"
    make_certs(path, ["fl.example.org", "192.0.2.7"], ["a", "b"], 90)
    return Folder(path)


def test_the_server_is_known_by_all_its_names_until_the_day_asked_for(folder: Folder) -> None:
    found = x509.load_pem_x509_certificate(folder.certificate.read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "127.0.0.1"]
    left = found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=89, hours=22) < left <= datetime.timedelta(days=90)
    authority = x509.load_pem_x509_certificate(folder.authority.read_bytes())
    found.verify_directly_issued_by(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def handshake(folder: Folder, authority: Path, name: str) -> None:
    """Shake hands in memory, strictly, as OpenSSL does it over a network."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server.load_cert_chain(folder.certificate, folder.key)
    wires = [ssl.MemoryBIO() for _ in range(2)]
    sides = [
        client.wrap_bio(wires[0], wires[1], server_hostname=name),
        server.wrap_bio(wires[1], wires[0], server_side=True),
    ]
    done = [False, False]
    while not all(done):
        for number, side in enumerate(sides):
            try:
                side.do_handshake()
                done[number] = True
            except ssl.SSLWantReadError:
                continue


def test_openssl_takes_it_for_its_names_and_this_authority_alone(folder: Folder, tmp_path: Path) -> None:
    for name in ("fl.example.org", "192.0.2.7", "localhost"):
        handshake(folder, folder.authority, name)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(folder, folder.authority, "other.example.org")
    make_certs(tmp_path, ["fl.example.org"], [])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(folder, Folder(tmp_path).authority, "fl.example.org")


def test_an_expired_certificate_is_refused_and_the_doctor_says_so(tmp_path: Path) -> None:
    make_certs(tmp_path, ["localhost"], [], days=0)  # an hour back, and no day on from there
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(Folder(tmp_path), Folder(tmp_path).authority, "localhost")
    found = [f for f in examine(Patient(certs=tmp_path)) if "expired" in f.what]
    assert len(found) == 2 and all(f.level == "problem" and "omnifm certs" in f.mend for f in found)


def test_private_keys_are_their_owners_alone_and_of_the_curve_that_flower_takes(folder: Folder) -> None:
    for path in (folder.authority_key, folder.key, folder.node_key("a"), folder.node_key("b")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = serialization.load_ssh_private_key(folder.node_key("a").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert public_bytes(folder.node_public("a")) == public
    assert folder.clients() == ["a", "b"]


@pytest.mark.parametrize(("hosts", "clients"), [(["x"], []), ([], ["b"]), ([], ["c", "a"])])
def test_nothing_is_replaced(folder: Folder, hosts: list[str], clients: list[str]) -> None:
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="is there already, and is not replaced"):
        make_certs(folder.path, hosts, clients)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_a_hospital_makes_its_own_key_alone(tmp_path: Path) -> None:
    made = make_certs(tmp_path, [], ["clinic"])
    assert [path.name for path in made] == ["clinic.key", "clinic.pub"] and not Folder(tmp_path).authority.exists()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to make"):
        make_certs(tmp_path, [], [])
    with pytest.raises(ConfigError, match=r"--client '\.\./x'"):
        make_certs(tmp_path, [], ["../x"])
    (tmp_path / "bad.pub").write_text("nonsense")
    with pytest.raises(CheckpointError, match=r"bad\.pub: holds no public key"):
        public_bytes(tmp_path / "bad.pub")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        make_certs(tmp_path / "file", [], ["a"])
