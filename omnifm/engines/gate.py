"""What of Flower's SuperLink is open to other machines: the paths that nodes call, and no others.

Flower has one port for everything. Behind it are the nodes' paths, which ask for a node's key, and two that ask for nothing:
`control`, which starts and stops runs, and `runtime`, by which the server's own program takes its work and speaks to the nodes.
Both are for programs of this machine alone.
"""

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN = ("/v1/fleet/", "/health")
_REFUSAL = b"omnifm: open to programs of this machine alone\n"


class Gate:
    """An ASGI application in front of another; what it does not let through is answered with 403.

    Args:
        app: the SuperLink.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a call through, or answer it."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and is_admitted(scope)):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "http":
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(_REFUSAL)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})
        else:
            await send({"type": "websocket.close", "code": 1008})


def is_admitted(scope: Scope) -> bool:
    """Whether a call is a node's, or comes from this machine."""
    return scope["path"].startswith(_OPEN) or _is_here(scope)


def _is_here(scope: Scope) -> bool:
    """Whether the caller's address is one of this machine: loopback, or the very one it was called at."""
    if not scope.get("client"):
        return False
    caller = _address(scope["client"][0])
    own = _address(scope["server"][0]) if scope.get("server") else None
    return caller is not None and (caller.is_loopback or caller == own)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
