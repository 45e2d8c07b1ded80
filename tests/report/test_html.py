"""The written reports, as text and as headless Chromium shows them."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from omnifm.errors import CheckpointError, ConfigError
from omnifm.report import write_comparison, write_report
from omnifm.report.html import render
from omnifm.report.page import Figure, Page, Section
from tests.report.folders import client_ids, write_compare, write_json, write_run

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
HOSTILE = "</script><img src=x onerror=document.body.dataset.owned=1><b>{{ 7*7 }}"

# Collects what goes wrong from before the first script on; a blocked request is a securitypolicyviolation.
COLLECTOR = """<script>
const faults = [];
addEventListener("error", (e) => faults.push("error: " + (e.message || e.target.src)), true);
addEventListener("unhandledrejection", (e) => faults.push("rejection: " + e.reason));
addEventListener("securitypolicyviolation", (e) => faults.push("blocked: " + e.blockedURI));
console.error = (...words) => faults.push("console: " + words.join(" "));
let looks = 0;
const look = () => {
  const waiting = document.readyState !== "complete" || document.querySelector(".plot:not([data-drawn])");
  if (waiting && looks++ < 100) { setTimeout(look, 200); return; }
  const resources = performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:"));
  const drawn = {};
  for (const place of document.querySelectorAll(".plot")) {
    drawn[place.id] = place.dataset.drawn === "yes" ? place.querySelectorAll("svg.main-svg").length : 0;
  }
  const wide = document.documentElement.scrollWidth > innerWidth;
  const seen = { faults, resources, drawn, wide, images: document.images.length, owned: document.body.dataset.owned || "" };
  document.body.replaceChildren("SEEN" + JSON.stringify(seen) + "END");
  document.querySelectorAll("script, style").forEach((e) => e.remove());
};
setTimeout(look, 500);
</script>"""


class Resources(HTMLParser):
    """Collect what a page would fetch or link to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]


def resources(report: Path) -> list[str]:
    parser = Resources()
    parser.feed(report.read_text(encoding="utf-8"))
    return parser.found


def dump_dom(command: list[str], target: Path) -> str:
    """Return what Chromium prints; nothing if it had to be ended, which happens to a headless one on a crowded machine."""
    with target.open("w") as output:
        # A session of its own, and a file instead of a pipe: Chromium's children outlive it and would hold a pipe open.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return ""
    return target.read_text(encoding="utf-8")


def look_at(report: Path, folder: Path, width: int = 1280) -> dict:  # type: ignore[type-arg]
    """Open the report in Chromium; return what the collector saw."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    copy = folder / "watched.html"
    copy.write_text(report.read_text(encoding="utf-8").replace("<head>", "<head>" + COLLECTOR, 1), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1200", "--virtual-time-budget=40000"]
    command = [CHROMIUM, *options, "--dump-dom", copy.as_uri()]
    page = dump_dom(command, folder / "dom.html") or dump_dom(command, folder / "dom.html")
    found = re.search("SEEN(.*)END", page, re.DOTALL)
    assert found, page[-2000:]
    return json.loads(found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def run_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("run"), rounds=6))


@pytest.fixture(scope="module")
def comparison_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_compare(
        tmp_path_factory.mktemp("comparison"), methods=("local", "fedavg", "omnifm"), seeds=(0, 1, 2), rounds=3
    )
    write_report(folder / "cells/local-p0.2-s0")
    return write_comparison(folder)


def assert_clean(seen: dict) -> None:  # type: ignore[type-arg]
    assert seen["faults"] == []
    assert seen["resources"] == []
    assert seen["wide"] is False
    assert min(seen["drawn"].values()) >= 1


@pytest.mark.browser
def test_a_run_report_draws_its_figures_without_a_fault(run_report: Path, tmp_path: Path) -> None:
    seen = look_at(run_report, tmp_path)
    assert_clean(seen)
    expected = {"scores", "loss", "clients", "sizes", "traffic", "bank-map", "bank-rows", "retrieval", "effective-rank", "spread"}
    assert set(seen["drawn"]) == expected
    assert seen["images"] == 8


@pytest.mark.browser
def test_a_comparison_report_draws_its_figures_without_a_fault(comparison_report: Path, tmp_path: Path) -> None:
    seen = look_at(comparison_report, tmp_path, width=500)
    assert_clean(seen)
    assert set(seen["drawn"]) == {"differences-figure", "curves-20", "curves-100", "clients-20", "clients-100", "bytes-score"}


@pytest.mark.browser
def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds=2, clients=[HOSTILE, *client_ids(1)])
    seen = look_at(write_report(run), tmp_path)
    assert_clean(seen)
    assert (seen["images"], seen["owned"]) == (6, "")


@pytest.mark.browser
def test_the_collector_sees_a_fault_and_a_request(run_report: Path, tmp_path: Path) -> None:
    text = run_report.read_text(encoding="utf-8").replace(
        "</main>", "</main><script>none()</script><img src='http://127.0.0.1/a.png'>"
    )
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    faults = " ".join(look_at(tmp_path / "report.html", tmp_path)["faults"])
    assert "none is not defined" in faults and "blocked: http://127.0.0.1/a.png" in faults


def test_nothing_in_the_files_is_fetched(run_report: Path, comparison_report: Path) -> None:
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in resources(run_report))
    assert all(r.startswith(("#", "cells/")) for r in resources(comparison_report))
    assert "default-src 'none'" in run_report.read_text(encoding="utf-8")


def test_a_hostile_name_is_escaped_in_the_file(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path, rounds=2, clients=[HOSTILE])).read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text and "{{ 7*7 }}" in text


def test_a_figure_cannot_close_its_script_element() -> None:
    figure = Figure("f", "", {"data": [{"name": "</script><p>"}], "layout": {"height": 100}})
    page = Page("", "", (), (Section("s", "", (figure,)),), simulated=False)
    assert '[{"name":"\\u003c/script>\\u003cp>"}]' in render(page)


def test_a_run_report_says_what_a_reader_needs(run_report: Path) -> None:
    text = run_report.read_text(encoding="utf-8")
    for words in (
        "Simulated data.",
        "abc1234def",
        "0123abcd4567",
        "own models",
        "At round 4, the best on validation",
        "undefined",
    ):
        assert words in text
    assert "On the test split, which no model was trained on." in text and "images that no model" not in text
    assert text.count("✓ correct") == 5 and text.count("✗ wrong") == 3


def test_real_images_carry_no_banner(tmp_path: Path) -> None:
    assert "Simulated data." not in write_report(write_run(tmp_path, rounds=1, simulated=False)).read_text(encoding="utf-8")


@pytest.mark.parametrize("strategy", ["local", "omnifm"])
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_short_run_of_one_client_is_still_a_report(strategy: str, rounds: int, tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path, strategy=strategy, rounds=rounds, clients=["ct-0"])).read_text(encoding="utf-8")
    assert ("no curve to draw" in text) == (rounds == 0)


def test_a_run_without_optional_parts_is_still_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path, rounds=1)
    shutil.rmtree(run / "bank")
    shutil.rmtree(run / "examples")
    bare = {"task": "classification", "strategy": "fedavg", "seed": 0, "rounds": 1, "clients": []}
    write_json(run / "metrics.json", bare)
    write_json(run / "split.json", {})
    (run / "events.jsonl").write_text("")
    assert "an undefined accuracy" in write_report(run).read_text(encoding="utf-8")


def test_a_picture_of_several_panels_is_wide_and_a_question_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, rounds=1)
    path = run / "examples" / "examples.json"
    rows = json.loads(path.read_text())
    for row, panels in zip(rows, (["image"], ["is there a fracture?"], ["MRI", "CT", "fused"], list("abcde")), strict=False):
        row["panels"] = panels
    write_json(path, rows[:4])
    text = write_report(run).read_text(encoding="utf-8")
    kinds = re.findall(r'<div class="picture panels-(\d)', text)
    assert kinds == ["1", "1", "3", "4"], "the page has no wider column than four"
    assert "<p>is there a fracture?</p>" in text and "<p>image</p>" not in text
    assert "<p>left to right: MRI, CT, fused</p>" in text


def test_an_undefined_or_nan_score_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, rounds=2)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["test"]["worst"] = {"accuracy": None, "auc": float("nan")}
    write_json(run / "metrics.json", metrics)
    text = write_report(run).read_text(encoding="utf-8")
    assert re.search(r"worst client</td>\s*<td class=\"num muted\">undefined</td>\s*<td class=\"num \">NaN</td>", text)


def test_a_failed_report_leaves_the_old_one(tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path, rounds=1))
    before = report.read_bytes()
    (tmp_path / "split.json").unlink()
    with pytest.raises(CheckpointError, match=r"split\.json: the file is missing"):
        write_report(tmp_path)
    assert report.read_bytes() == before


def test_summary_holds_means_and_paired_differences(comparison_report: Path) -> None:
    folder = comparison_report.parent
    with (folder / "summary.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    with (folder / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))

    def scores(strategy: str) -> list[float]:
        chosen = [r for r in table if r["strategy"] == strategy and r["participation"] == "0.2"]
        return [float(r["personal_accuracy"]) for r in chosen]

    (line,) = [r for r in lines if (r["method"], r["participation"], r["metric"]) == ("fedavg", "0.2", "personal_accuracy")]
    assert float(line["mean"]) == pytest.approx(sum(scores("fedavg")) / 3)
    expected = (sum(scores("omnifm")) - sum(scores("fedavg"))) / 3
    assert float(line["reference_minus_method"]) == pytest.approx(expected)
    assert float(line["student_low"]) < expected < float(line["student_high"])
    assert (line["reference"], line["count"], line["wilcoxon_p"]) == ("omnifm", "3", "")
    (missing,) = [r for r in lines if (r["method"], r["participation"], r["metric"]) == ("local", "1.0", "global_accuracy")]
    assert (missing["mean"], missing["undefined"]) == ("", "3")
    (pooled,) = [r for r in lines if (r["method"], r["participation"], r["metric"]) == ("local", "", "personal_accuracy")]
    assert (pooled["pairs"], float(pooled["wilcoxon_p"]), float(pooled["holm_p"])) == (
        "6",
        pytest.approx(2 / 64),
        pytest.approx(4 / 64),
    )


def test_a_comparison_links_to_the_reports_that_are_there(comparison_report: Path) -> None:
    assert [r for r in resources(comparison_report) if r.startswith("cells/")] == ["cells/local-p0.2-s0/report.html"]


def test_a_comparison_says_what_is_undefined(comparison_report: Path) -> None:
    text = comparison_report.read_text(encoding="utf-8")
    # Local training has no global model, at neither of the two participations.
    assert text.count('<td class="num muted">undefined</td>') >= 2


def test_a_comparison_can_have_another_reference(tmp_path: Path) -> None:
    folder = write_compare(tmp_path, methods=("local", "omnifm"), seeds=(0, 1), participations=(0.2,), rounds=2)
    assert "local minus each other method" in write_comparison(folder, "local").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="'nobody' is not in the table"):
        write_comparison(folder, "nobody")


def test_a_failed_cell_is_shown_and_does_not_count(tmp_path: Path) -> None:
    folder = write_compare(tmp_path, methods=("local", "omnifm"), seeds=(0, 1), participations=(0.2,), rounds=2)
    with (folder / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    scores = ("personal_", "global_", "worst_", "finetuned_", "best_", "bytes_", "bank_", "seconds", "peak_")
    table[-1] |= {name: "" for name in table[-1] if name.startswith(scores)} | {"status": "client ct-0:\nthe loss is NaN"}
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    text = write_comparison(folder).read_text(encoding="utf-8")
    assert "Failed: omnifm: client ct-0:" in text and "3 finished, 1 failed" in text and "(1 undefined)" in text


@pytest.mark.parametrize("keep_cells", [True, False])
def test_a_comparison_of_one_cell_is_still_a_report(keep_cells: bool, tmp_path: Path) -> None:
    folder = write_compare(tmp_path, methods=("local",), seeds=(0,), participations=(1.0,), rounds=2)
    if not keep_cells:
        shutil.rmtree(folder / "cells")
    text = write_comparison(folder).read_text(encoding="utf-8")
    assert "Nothing to compare" in text
    assert ("no folder" in text) != keep_cells


def test_a_count_has_no_best_method(tmp_path: Path) -> None:
    folder = write_compare(tmp_path, methods=("local", "omnifm"), seeds=(0,), participations=(0.2,), rounds=2)
    lines = (folder / "table.csv").read_text().splitlines()
    columns = [f"{lines[0]},personal_auc_classes_skipped", f"{lines[1]},2.0", f"{lines[2]},4.0"]
    (folder / "table.csv").write_text("\n".join(columns) + "\n")
    text = write_comparison(folder).read_text(encoding="utf-8")
    assert '<td class="num ">4.000</td>' in text and '<td class="num good">4.000</td>' not in text
