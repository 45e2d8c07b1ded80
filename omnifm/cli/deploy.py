"""`omnifm certs`, `serve`, `join`, `status`: a federation across machines."""

from pathlib import Path
from typing import Annotated

import typer

from omnifm.cli.run import Config, Set

Certs = Annotated[
    Path | None, typer.Option("--certs", metavar="DIR", help="Folder that omnifm certs made; without it, this machine alone.")
]
Hosts = Annotated[list[str], typer.Option("--host", metavar="NAME", help="Name or address of the server. May be repeated.")]
Clients = Annotated[list[str], typer.Option("--client", metavar="ID", help="Hospital to make a key for. May be repeated.")]


def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the certificates.")],
    host: Hosts = [],  # noqa: B006  # typer copies it
    client: Clients = [],  # noqa: B006
    days: Annotated[int, typer.Option(min=1, help="Days until they expire.")] = 365,
) -> None:
    """Make an authority with the server's certificate (--host), and keys of hospitals (--client). Replaces nothing."""
    from omnifm.deploy.certs import make_certs

    for path in make_certs(folder, host, client, days):
        typer.echo(f"written: {path}")


def serve(
    config: Config,
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder of the run.")],
    certs: Certs = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port that hospitals reach.")] = 9443,
    clients: Annotated[
        str, typer.Option(help="Ids that are waited for, with commas between; default: all keys in --certs.")
    ] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    set_: Set = [],  # noqa: B006
) -> None:
    """Serve a federation to hospitals that join: no data here. Ends with the run, leaving what omnifm run leaves."""
    from omnifm.cli.run import print_scores
    from omnifm.config import load
    from omnifm.deploy.serve import clients_in, make_server
    from omnifm.track.folder import read_json

    server = make_server(load(config, set_), out, certs, host, port, clients_in(clients), resume=resume)
    _end_well()
    server.say = lambda line: typer.echo(line, err=True)
    server.run()
    print_scores(read_json(out / "metrics.json"))
    typer.echo(f"report: {out / 'report.html'}")


def join(
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where omnifm serve listens.")],
    cohort: Annotated[Path, typer.Option("--cohort", metavar="DIR", help="Folder of this hospital's cohort. It stays here.")],
    client: Annotated[str, typer.Option("--client", metavar="ID", help="This hospital's id.")],
    certs: Certs = None,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="DIR", help="Folder of private state.", show_default="hospital-ID")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", metavar="FILE", help="What this hospital insists on; see docs/privacy.md.")
    ] = None,
    answers_least: Annotated[
        int | None,
        typer.Option(
            min=1, help="Questions: answers that fewer training rows have are not told, and such rows left out.", show_default="5"
        ),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answers that may be told however rare they are, one a line.")
    ] = None,
) -> None:
    """Join a federation with a cohort; runs until interrupted. The config comes from the server, paths never do."""
    import logging
    import os

    from omnifm.data.words import read_discretion
    from omnifm.deploy.join import make_member

    _end_well()
    os.umask(0o077)  # whatever is written here, and by the programs it starts, is this user's alone
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    member = make_member(server, cohort, client, certs, state or Path(f"hospital-{client}"), policy)
    member.discretion = read_discretion(answers_least, answers)
    member.say = lambda line: typer.echo(line, err=True)
    typer.echo(f"{client} joins {server}; interrupt to leave", err=True)
    member.run()


def doctor(
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="A server to reach.")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="A port to listen on.")] = 0,
    certs: Certs = None,
    client: Annotated[str, typer.Option("--client", metavar="ID", help="This hospital's id.")] = "",
    cohort: Annotated[Path | None, typer.Option("--cohort", metavar="DIR", help="This hospital's cohort.")] = None,
    state: Annotated[Path, typer.Option("--state", metavar="DIR", help="Folder that will be written to.")] = Path(),
) -> None:
    """Look for what would keep serve or join from working, and say how to mend it; exit 1 if there is a problem."""
    from omnifm.deploy.doctor import Patient, examine

    findings = examine(Patient(server, port, certs, client, cohort, state))
    for finding in findings:
        typer.echo(f"{finding.level}: {finding.what}" + (f"\n    {finding.mend}" if finding.mend else ""))
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def _end_well() -> None:
    """Let a request to end (systemd's, a container's) do what Ctrl-C does."""
    import signal

    from omnifm.cli.interrupts import note

    signal.signal(signal.SIGTERM, note)


def status(run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that is or was served.")]) -> None:
    """Show who is connected, who is waited for and why, round, scores and bytes."""
    from rich.console import Console

    from omnifm.deploy.status import read_status, table

    found = read_status(run)
    console = Console()
    console.print(found.headline, highlight=False)
    console.print(table(found))
