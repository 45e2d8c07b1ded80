"""`omnifm report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="A run folder, or the folder of a comparison.")]) -> None:
    """Write report.html anew."""
    from omnifm.report.html import write_comparison, write_report

    write = write_comparison if (folder / "table.csv").is_file() else write_report
    typer.echo(f"report: {write(folder)}")
