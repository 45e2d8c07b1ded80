"""The SuperLink's one port: nodes from anywhere, everything else from this machine alone."""

import asyncio
from collections.abc import MutableMapping
from importlib.util import find_spec
from typing import Any

import pytest

from omnifm.engines.gate import Gate, is_admitted

HERE, THERE = ("127.0.0.1", 5), ("10.0.0.7", 5)
CLOSED = ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/", "/v1/fleet", "//v1/fleet/get-run")


def scope(path: str, client: object, server: object = ("10.0.0.1", 9443), kind: str = "http") -> MutableMapping[str, Any]:
    return {"type": kind, "path": path, "client": client, "server": server}


@pytest.mark.parametrize("path", CLOSED)
def test_what_is_no_node_s_is_for_this_machine_alone(path: str) -> None:
    for client in (HERE, ("::1", 5), ("::ffff:127.0.0.1", 5), ("10.0.0.1", 5)):
        assert is_admitted(scope(path, client)), "also where the SuperLink is called by an address of its own"
    for client in (THERE, ("10.0.0.1.evil", 5), ("", 0), None):
        assert not is_admitted(scope(path, client))
    assert not is_admitted(scope(path, THERE, None)) and not is_admitted(scope(path, ("x", 0), ("x", 0)))


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/health"])
def test_nodes_call_from_anywhere(path: str) -> None:
    assert is_admitted(scope(path, THERE))


@pytest.mark.parametrize(("kind", "answered"), [("http", "http.response.start"), ("websocket", "websocket.close")])
def test_what_is_refused_never_reaches_the_superlink(kind: str, answered: str) -> None:
    reached, sent = [], []

    async def app(found: Any, receive: Any, send: Any) -> None:
        reached.append(found["path"])

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def call(*given: Any) -> None:
        await Gate(app)(scope(*given, kind=kind), None, send)  # type: ignore[arg-type]

    asyncio.run(call("/v1/control/start-run", THERE))
    assert reached == [] and sent[0]["type"] == answered and sent[0].get("status", 403) == 403
    if kind == "http":
        asyncio.run(call("/v1/control/start-run", HERE))
        assert reached == ["/v1/control/start-run"]


@pytest.mark.skipif(find_spec("flwr") is None, reason="flwr is not installed: pip install 'omnifm[flower]'")
def test_flower_s_own_application_is_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's application as `serve` starts it, without a port: a run can be started from here, and from nowhere else."""
    import flwr.superlink.cli as cli
    import flwr.superlink.extensions as extensions
    import flwr.superlink.main as superlink
    import httpx

    from omnifm.engines.flower import superlink_program

    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)  # put back at the end
    monkeypatch.setattr(cli, "flower_superlink", lambda: None)
    monkeypatch.setattr("sys.argv", ["-c", "flower-superlink"])
    superlink_program()
    app = superlink.create_app()

    def status(path: str, client: tuple[str, int]) -> int:
        async def post() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
            async with httpx.AsyncClient(transport=transport, base_url="http://10.0.0.1:9443") as caller:
                return await caller.post(path, content=b"")

        return asyncio.run(post()).status_code

    for path in ("/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/acquire-task"):
        assert status(path, THERE) == 403 != status(path, HERE)
    assert status("/v1/fleet/pull-messages", THERE) not in (403, 404)
