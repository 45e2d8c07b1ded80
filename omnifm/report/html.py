"""Write the reports: one self-contained HTML file each, which asks nothing of the network."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from omnifm.report.comparison_page import comparison_page, write_summary
from omnifm.report.load import read_comparison, read_run
from omnifm.report.page import Page
from omnifm.report.run_page import SIMULATED, run_page
from omnifm.report.writing import write

REPORT_NAME = "report.html"


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        CheckpointError: the folder lacks a file, one is malformed, or the disk refuses; the message names it.
    """
    return write(run / REPORT_NAME, render(run_page(read_run(run))))


def write_comparison(folder: Path, reference: str | None = None) -> Path:
    """Write `report.html` and `summary.csv` into a comparison folder and return the report's path.

    Args:
        folder: holds `table.csv` and the cells' run folders under `cells/`.
        reference: the method that the others are compared with, as in `statistics.method_of`; by default the first `omnifm`
            row's, or the table's first.

    Raises:
        CheckpointError: the table or a finished cell is malformed, or the disk refuses; the message names the file.
        ConfigError: the reference is not in the table.
    """
    comparison = read_comparison(folder)
    page = comparison_page(comparison, reference)
    write_summary(comparison, reference)
    return write(folder / REPORT_NAME, render(page))


def render(page: Page) -> str:
    """Return the page as HTML. Every text is escaped: client ids and labels come from outside."""
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = _script_json
    template = environment.get_template("report.html.j2")
    figures = any(block.kind == "figure" for section in page.sections for block in section.blocks)
    plotly = Markup(get_plotlyjs()) if figures else ""
    return template.render(page=page, plotly=plotly, simulated=SIMULATED)


def _script_json(value: object) -> Markup:
    """Write JSON that may stand inside a script element: no `<`, so no client id can close the element."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
