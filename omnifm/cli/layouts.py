"""`omnifm data import`: published layouts as they come."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from omnifm.cli.data import NewFolder, import_app, shown_progress

Source = Annotated[Path, typer.Argument(metavar="SRC", help="the unpacked folder; it stays as it is")]
NewFolders = Annotated[Path, typer.Argument(metavar="DIR", help="a new folder; the cohorts are made below it")]


def _written(*folders: Path) -> None:
    for folder in folders:
        typer.echo(f"cohort written: {folder}")


@import_app.command("brats")
def import_brats(
    source: Source,
    folder: NewFolders,
    sequences: Annotated[str, typer.Option(help="which of t1,t1ce,t2,flair, with commas between")] = "t1,t1ce,t2,flair",
    institutions: Annotated[int, typer.Option(min=0, max=2, help="1 or 2: partitioning_N.csv gives the sites; 0: none")] = 0,
) -> None:
    """Import a BraTS folder: one cohort per sequence, labels NCR, ED, ET."""
    from omnifm.data.importers import brats

    names = [name.strip() for name in sequences.split(",") if name.strip()]
    with shown_progress("copying subjects") as progress:
        written = brats.import_brats(source, folder, sequences=names, partition=institutions or None, progress=progress)
    _written(*written)


@import_app.command("fets")
def import_fets(
    source: Source,
    folder: NewFolders,
    sequences: Annotated[str, typer.Option(help="which of t1,t1ce,t2,flair, with commas between")] = "t1,t1ce,t2,flair",
    institutions: Annotated[int, typer.Option(min=1, max=2, help="which official table: partitioning_N.csv")] = 1,
) -> None:
    """Import a FeTS folder: as brats, with the official institutions as sites."""
    import_brats(source, folder, sequences, institutions)


@import_app.command("harvard")
def import_harvard(
    source: Source,
    folder: NewFolders,
    block: Annotated[
        int, typer.Option(min=1, help="neighbouring file numbers taken for one subject where names do not tell")
    ] = 20,
) -> None:
    """Import registered pairs of the Whole Brain Atlas (CT-MRI, PET-MRI, SPECT-MRI)."""
    from omnifm.data.importers import harvard

    with shown_progress("copying pairs") as progress:
        written = harvard.import_harvard(source, folder, block=block, progress=progress)
    _written(*written)


@import_app.command("breakhis")
def import_breakhis(
    source: Source,
    folder: NewFolder,
    task: Annotated[str, typer.Option(help="classification or super_resolution")] = "classification",
    classes: Annotated[Literal["subtypes", "tumours"], typer.Option(help="eight subtypes, or benign and malignant")] = "subtypes",
    magnifications: Annotated[str, typer.Option(help="which of 40X,100X,200X,400X, with commas between")] = "40X,100X,200X,400X",
) -> None:
    """Import BreaKHis, split by patient; column magnification is a client axis (partition by_column)."""
    from omnifm.data.importers import breakhis

    wanted = [name.strip() for name in magnifications.split(",") if name.strip()]
    with shown_progress("copying images") as progress:
        breakhis.import_breakhis(source, folder, task=task, classes=classes, magnifications=wanted, progress=progress)
    _written(folder)


@import_app.command("slake")
def import_slake(
    source: Source,
    folder: NewFolder,
    language: Annotated[Literal["en", "zh"], typer.Option(help="questions in the other language are left out")] = "en",
) -> None:
    """Import SLAKE with its official split."""
    from omnifm.data.importers import vqa

    with shown_progress("copying images") as progress:
        _written(vqa.import_slake(source, folder, language=language, progress=progress))


@import_app.command("vqa_rad")
def import_vqa_rad(
    source: Source,
    folder: NewFolder,
    paraphrases: Annotated[bool, typer.Option("--paraphrases", help="train on rephrased questions too")] = False,
) -> None:
    """Import VQA-RAD with its official split; column image_disjoint marks test rows on unseen images."""
    from omnifm.data.importers import vqa

    with shown_progress("copying images") as progress:
        _written(vqa.import_vqa_rad(source, folder, paraphrases=paraphrases, progress=progress))


@import_app.command("vqa_med")
def import_vqa_med(source: Source, folder: NewFolder) -> None:
    """Import the questions of one year of VQA-Med (2019 to 2021)."""
    from omnifm.data.importers import vqa_med

    with shown_progress("copying images") as progress:
        _written(vqa_med.import_vqa_med(source, folder, progress=progress))
