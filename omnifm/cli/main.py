"""The `omnifm` command. Heavy libraries are imported by the command that needs them, so that `--help` answers at once."""

import os
import sys

import typer

from omnifm import __version__
from omnifm.cli.interrupts import noting
from omnifm.errors import OmnifmError

# Libraries below us that would phone home or warn about it: switched off for this process and its children.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_INTERRUPTED = 130  # what typer makes of Ctrl-C, and shells expect
_LAST_WORDS = "omnifm: interrupted; what is finished is on disk (continue with --resume)"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"omnifm {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version.")) -> None:
    """Federated learning on heterogeneous medical images."""


def _register() -> None:
    import omnifm.cli.layouts  # noqa: F401  # its commands register themselves
    from omnifm.cli.compare import compare
    from omnifm.cli.data import app as data_app
    from omnifm.cli.deploy import certs, doctor, join, serve, status
    from omnifm.cli.listing import list_
    from omnifm.cli.predict import predict
    from omnifm.cli.report import report
    from omnifm.cli.run import run
    from omnifm.cli.tune import tune

    app.command()(run)
    app.command()(compare)
    app.command()(tune)
    app.command()(report)
    app.command()(predict)
    app.command("list")(list_)
    app.command()(certs)
    app.command()(serve)
    app.command()(join)
    app.command()(status)
    app.command()(doctor)
    app.add_typer(data_app, name="data")


def _line(error: Exception) -> str | None:
    """Return what there is to say of a mistake of the user's, None for one of ours."""
    if isinstance(error, OmnifmError):
        return " ".join(str(error).split())  # text from files (a cell of a manifest) may hold line breaks
    if isinstance(error, OSError):
        # A disk that is full, a folder that may not be read: nothing that a traceback would help with.
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    return None


def main() -> None:
    """Run the command; a mistake of the user's is one line on stderr and exit code 1, Ctrl-C one line and 130."""
    _register()
    with noting() as interrupts:
        try:
            app()
        except SystemExit as end:
            if end.code == _INTERRUPTED:
                typer.echo(_LAST_WORDS, err=True)
            raise
        except Exception as error:
            if interrupts:
                typer.echo(_LAST_WORDS, err=True)
                sys.exit(_INTERRUPTED)
            line = _line(error)
            if line is None:
                raise
            typer.echo(f"omnifm: {line}", err=True)
            sys.exit(1)


if __name__ == "__main__":
    main()
