"""A request to end stays one, whatever a library that was interrupted in its middle makes of it."""

import signal
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from omnifm.cli import deploy, main
from omnifm.errors import CheckpointError
from tests.cli.command import Command

LAST_WORDS = "omnifm: interrupted; what is finished is on disk (continue with --resume)\n"


def interrupted(number: signal.Signals, error: Exception) -> Callable[[], None]:
    """Return a command that is asked to end inside a library which turns that into `error`."""

    def command() -> None:
        deploy._end_well()
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise error from None

    return command


@pytest.fixture(autouse=True)
def _sigterm() -> object:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("error", [ValueError("could not determine the shape"), CheckpointError("damaged"), OSError("odd")])
def test_an_error_that_is_an_interruption_is_said_to_be_one(
    number: signal.Signals, error: Exception, omnifm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "app", interrupted(number, error))
    monkeypatch.setattr(main, "_register", lambda: None)
    ended = omnifm("run")
    assert (ended.code, ended.err) == (130, LAST_WORDS)


def test_an_error_after_an_earlier_command_was_interrupted_is_an_error(omnifm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_register", lambda: None)
    monkeypatch.setattr(main, "app", interrupted(signal.SIGINT, ValueError()))
    assert omnifm("run").code == 130

    def damaged() -> None:
        raise CheckpointError("run/last.json: damaged")

    monkeypatch.setattr(main, "app", damaged)
    assert omnifm("run").complaint == "run/last.json: damaged"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_where_ctrl_c_is_ignored_it_stays_so(omnifm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SimpleNamespace(handler=None)

    def command() -> None:
        seen.handler = signal.getsignal(signal.SIGINT)
        raise SystemExit(0)

    monkeypatch.setattr(main, "app", command)
    monkeypatch.setattr(main, "_register", lambda: None)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert omnifm("run").code == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen.handler is signal.SIG_IGN
