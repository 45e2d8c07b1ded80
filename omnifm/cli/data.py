"""`omnifm data`: check, describe, import and simulate cohorts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Check, describe, import or simulate cohorts.")
import_app = typer.Typer(no_args_is_help=True, help="Turn other layouts into a cohort.")
make_app = typer.Typer(no_args_is_help=True, help="Simulate cohorts.")
app.add_typer(import_app, name="import")
app.add_typer(make_app, name="make")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="the cohort's folder")]
NewFolder = Annotated[Path, typer.Argument(metavar="DIR", help="the new cohort's folder, empty or not there yet")]


@contextmanager
def shown_progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while the block runs; the callback takes items done and items in all."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
def check(folder: Folder) -> None:
    """Print everything that is wrong with a cohort, one line each; exit 1 if there is anything."""
    from omnifm.data.cohort import Cohort
    from omnifm.data.manifest import SPLITS
    from omnifm.data.validate import validate

    with shown_progress("checking") as progress:
        problems = validate(folder, progress)
    for problem in problems:
        typer.echo(str(problem))
    if problems:
        typer.echo(f"{folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", err=True)
        raise typer.Exit(1)
    cohort = Cohort.read(folder)
    rows = ", ".join(f"{len(cohort.indices(split))} {split}" for split in SPLITS)
    typer.echo(f"{cohort.name}: fine; {cohort.spec.task}, {len(cohort.rows)} rows ({rows})")
    if unknown := sum(not row.patient for row in cohort.rows):
        typer.echo(f"note: {unknown} rows name no patient, so pictures of one person may be in both train and test", err=True)


@app.command()
def describe(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the contact sheet (PNG); default NAME-contact.png in the current folder")
    ] = None,
) -> None:
    """Print what a cohort holds and draw a contact sheet of a few images per class."""
    from rich.console import Console

    from omnifm.data.cohort import Cohort
    from omnifm.data.describe import contact_sheet, tables

    cohort = Cohort.read(folder)
    with shown_progress("reading images") as progress:
        found = tables(cohort, progress)
        sheet = contact_sheet(cohort, out or Path(f"{cohort.name}-contact.png"))
    typer.echo(f"{cohort.name}: {cohort.spec.title}")
    console = Console()
    for table in found:
        console.print(table)
    typer.echo(f"licence: {cohort.spec.licence}, redistribution: {cohort.spec.redistribution}")
    typer.echo(f"contact sheet: {sheet}")


@import_app.command("medmnist")
def import_medmnist(
    file: Annotated[Path, typer.Argument(metavar="FILE.npz", help="a MedMNIST file, such as pathmnist.npz")],
    folder: NewFolder,
    modality: Annotated[str | None, typer.Option(help="where the file's name does not tell the set")] = None,
) -> None:
    """Import a 2-D MedMNIST file with its official splits."""
    from omnifm.data.importers import medmnist

    with shown_progress("writing images") as progress:
        medmnist.import_medmnist(file, folder, modality, progress)
    typer.echo(f"cohort written: {folder}")


@import_app.command("folder")
def import_folder(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="SRC/class/* or SRC/{train,val,test}/class/*")],
    folder: NewFolder,
    modality: Annotated[str, typer.Option(help="MRI, CT, XR, US, PET, SPECT, HISTO, FLUO, FUNDUS, DERM, EM or OTHER")],
    task: Annotated[str, typer.Option(help="classification or super_resolution")] = "classification",
    patient: Annotated[str, typer.Option(help="regular expression that finds the patient in each path below SRC")] = "",
    title: Annotated[str, typer.Option(help="one line; default: the folder's name")] = "",
    licence: Annotated[str, typer.Option(help="SPDX name or unverified")] = "unverified",
    redistribution: Annotated[str, typer.Option(help="allowed, non-commercial or testing-only")] = "testing-only",
    origin: Annotated[str, typer.Option(help="where the pictures come from (key source)")] = "",
    citation: Annotated[str, typer.Option(help="whom to cite")] = "",
    notes: Annotated[str, typer.Option(help="known faults")] = "",
    slice_axis: Annotated[int | None, typer.Option(help="for volumes: the axis along which they are cut into slices")] = None,
) -> None:
    """Import pictures sorted into folders. They are copied; SRC stays as it is."""
    from omnifm.data.importers import Provenance
    from omnifm.data.importers import folder as importer

    provenance = Provenance(title or folder.resolve().name, licence, redistribution, origin, citation, notes)
    with shown_progress("copying images") as progress:
        importer.import_folder(
            source,
            folder,
            modality=modality,
            provenance=provenance,
            task=task,
            patient_pattern=patient,
            slice_axis=slice_axis,
            progress=progress,
        )
    typer.echo(f"cohort written: {folder}")


@make_app.command("atlas")
def make_atlas(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder below which the cohorts are written")],
    patients: Annotated[int, typer.Option(min=10, help="simulated patients per kind of picture")] = 80,
    seed: Annotated[int, typer.Option(help="another seed, other patients")] = 0,
    size: Annotated[int, typer.Option(min=32, help="side of an image in pixels")] = 128,
) -> None:
    """Simulate brain cohorts of several hospitals from the ICBM 152 atlas."""
    from omnifm.data import atlas

    with shown_progress("simulating") as progress:
        written = atlas.make_atlas(folder, patients, seed, size, progress)
    for path in written:
        typer.echo(f"cohort written: {path}")
