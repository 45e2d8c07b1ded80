"""`omnifm predict`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Files = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="Images, folders of images, or folders of one DICOM series each.")
]
Client = Annotated[str, typer.Option("--client", metavar="ID", help="Whose model answers.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the answers.")]
With = Annotated[list[Path], typer.Option("--with", metavar="FILE", help="Second image of a pair; once for each FILE, in order.")]
Question = Annotated[str, typer.Option("--question", metavar="TEXT", help="What to ask of every image.")]
Best = Annotated[bool, typer.Option("--best", help="The round that was best on validation, not the last one.")]
Force = Annotated[bool, typer.Option("--force", help="Replace answers that are in --out already.")]


def predict(
    run: Run,
    files: Files,
    client: Client,
    out: Out,
    with_: With = [],  # noqa: B006  # typer copies it
    question: Question = "",
    best: Best = False,
    force: Force = False,
) -> None:
    """Answer for images with a client's model, without a server; exit 1 if any image could not be answered."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from omnifm.predict.batch import predict_cases
    from omnifm.predict.cases import Case, find_cases
    from omnifm.predict.session import open_run
    from omnifm.predict.writers import OutFolder

    folder = OutFolder(out, force)
    cases = find_cases(files, with_, out)
    session = open_run(run, client, best=best)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("images", total=len(cases))

        def show(case: Case, problem: str) -> None:
            progress.update(bar, advance=1)
            if problem:
                # Not through a table of a terminal's width: one line is one line.
                console.print(f"omnifm: {problem}", highlight=False, markup=False, soft_wrap=True)

        summary = predict_cases(session, cases, folder, question=question, show=show)
    failed = len(summary["failed"])
    typer.echo(f"{len(cases) - failed} of {len(cases)} answered: {out / 'predictions.json'}")
    if failed:
        sys.exit(1)
