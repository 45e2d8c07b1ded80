"""The `omnifm` command. Heavy libraries are imported by the command that needs them, so that `--help` answers at once."""

import os
import sys

import typer

from omnifm import __version__
from omnifm.errors import OmnifmError

# Libraries below us that would phone home or warn about it: switched off for this process and its children.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_INTERRUPTED = 130  # what typer makes of Ctrl-C, and shells expect

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


def main() -> None:
    """Run the command; a mistake of the user's is one line on stderr and exit code 1."""
    _register()
    try:
        app()
    except OmnifmError as error:
        # Text from files (a cell of a manifest) may hold line breaks.
        typer.echo(f"omnifm: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    except OSError as error:
        # A disk that is full, a folder that may not be read: nothing that a traceback would help with.
        place = f"{error.filename}: " if error.filename else ""
        typer.echo(f"omnifm: {place}{error.strerror or error}", err=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            typer.echo("omnifm: interrupted; what is finished is on disk (continue with --resume)", err=True)
        raise


if __name__ == "__main__":
    main()
