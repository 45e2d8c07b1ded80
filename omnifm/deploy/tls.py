"""Whether the other end of a connection is who it should be, looked at before a program is started that trusts it."""

import socket
import ssl
from pathlib import Path

TIMEOUT_SECONDS = 5.0
_PLAIN_SECONDS = 1.0


def connect(host: str, port: int, authority: Path, timeout: float = TIMEOUT_SECONDS) -> ssl.SSLSocket:
    """Return a connection to a server that showed a certificate of `authority` for its name.

    Raises:
        OSError: nobody answers, or what answers is not to be trusted (`ssl.SSLError`).
    """
    context = ssl.create_default_context(cafile=str(authority))
    plain = socket.create_connection((host, port), timeout=timeout)
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def speaks_tls(host: str, port: int) -> bool:
    """Whether a server answers a TLS greeting, with whatever certificate. Raises OSError if nobody is there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, port), timeout=_PLAIN_SECONDS) as plain:
        try:
            context.wrap_socket(plain, server_hostname=host).close()
        except OSError:
            return False
    return True


def refusal(server: str, authority: Path | None) -> str:
    """Return why this machine must not talk to a server, in one line.

    Args:
        server: HOST:PORT.
        authority: certificate that the server's has to come from; None: without TLS.

    Returns:
        Nothing if nothing speaks against it, or if nobody answers: a server may start later than its hospitals.
    """
    host, _, port = server.rpartition(":")
    try:
        if authority is None:
            return f"{server} speaks TLS; name the folder of certificates with --certs" if speaks_tls(host, int(port)) else ""
        connect(host, int(port), authority).close()
    except ssl.SSLCertVerificationError as error:
        return f"{server}: its certificate is refused ({error.verify_message})"
    except ssl.SSLError as error:
        return f"{server} does not speak TLS ({error.reason or error})"
    except OSError:
        return ""
    return ""
