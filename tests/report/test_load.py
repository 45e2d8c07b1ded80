import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from omnifm.errors import CheckpointError
from omnifm.report import load
from tests.report.folders import write_compare, write_run


def edit_json(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return edit


def truncate(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


def bad_bank_name(folder: Path) -> None:
    tensors = {"vectors": np.zeros((1, 2), np.float32), "client": np.array([3]), "modality": np.array([0])}
    save_file(tensors, folder / "bank/round-0001.safetensors", metadata={"clients": '["a"]', "modalities": '["CT"]'})


def nan_in_bank(folder: Path) -> None:
    tensors = {"vectors": np.full((1, 2), np.nan, np.float32), "client": np.array([0]), "modality": np.array([0])}
    save_file(tensors, folder / "bank/round-0001.safetensors", metadata={"clients": '["a"]', "modalities": '["CT"]'})


def example_outside(folder: Path) -> None:
    rows = json.loads((folder / "examples/examples.json").read_text())
    rows[0]["file"] = "../../secret.png"
    (folder / "examples/examples.json").write_text(json.dumps(rows))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no metrics": (lambda f: (f / "metrics.json").unlink(), "metrics.json: the file is missing"),
    "no config": (lambda f: (f / "config.toml").unlink(), "config.toml: the file is missing"),
    "cut metrics": (truncate("metrics.json"), "metrics.json: not JSON: line 1"),
    "cut split": (truncate("split.json"), "split.json: not JSON"),
    "cut events": (truncate("events.jsonl"), "events.jsonl: line "),
    "no strategy": (edit_json("metrics.json", lambda v: v.pop("strategy")), "metrics.json: strategy: Field required"),
    "text for a number": (
        edit_json("metrics.json", lambda v: v["clients"][1].update(num_test="many")),
        "metrics.json: clients.1.num_test",
    ),
    "not an object": (lambda f: (f / "environment.json").write_text("[]"), "environment.json: expected an object"),
    "not text": (lambda f: (f / "config.toml").write_bytes(b"\xff\xfe\xff"), "config.toml: cannot be read"),
    "cut bank": (truncate("bank/round-0001.safetensors"), "round-0001.safetensors: not a snapshot of the bank"),
    "unnamed client": (bad_bank_name, "round-0001.safetensors: not a snapshot of the bank"),
    "NaN in the bank": (nan_in_bank, "round-0001.safetensors: a vector of the bank is not finite"),
    "no image": (lambda f: (f / "examples/0.png").unlink(), "0.png: the example's image cannot be read"),
    "not a PNG": (lambda f: (f / "examples/0.png").write_bytes(b"<svg/>"), "0.png: not a PNG file"),
    "image elsewhere": (example_outside, "is not a plain file name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_folder_is_one_line_that_names_the_file(fault: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds=3)
    spoil, message = FAULTS[fault]
    spoil(run)
    with pytest.raises(CheckpointError) as caught:
        found = load.read_run(run)
        _ = found.bank, found.examples
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: there is no such run folder"):
        load.read_run(tmp_path / "nowhere")


def test_a_run_reads_back_what_was_written(tmp_path: Path) -> None:
    run = load.read_run(write_run(tmp_path / "run", rounds=4))
    assert [event.round for event in run.round_events] == [0, 1, 2, 3]
    assert [snapshot.round for snapshot in run.bank] == [0, 1, 2, 3]
    assert run.bank[0].vectors.shape == (10, 16)
    assert run.bank[0].clients[2] == "ct-0" and run.bank[0].modalities[2] == "CT"
    assert run.metrics.clients[0].test.personal is not None
    assert run.metrics.clients[0].test.personal["auc"] is None
    assert run.modality["us-1"] == "ultrasound"
    assert run.simulated


def test_a_round_run_twice_counts_once_and_unknown_events_are_ignored(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=2)
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "resumed", "round": 1}\n{"event": "round", "round": 1, "loss": 9.5}\n')
    run = load.read_run(folder)
    assert [(event.round, event.loss == 9.5) for event in run.round_events] == [(0, False), (1, True)]


def test_cells_are_found_by_their_config_hash(tmp_path: Path) -> None:
    folder = write_compare(tmp_path, methods=("local", "omnifm"), seeds=(0,), participations=(0.2,), rounds=2)
    (folder / "cells/unfinished").mkdir()
    found = load.read_comparison(folder)
    assert found.cells == ("local-p0.2-s0", "omnifm-p0.2-s0")
    text = (folder / "table.csv").read_text().replace("hash-local", "hash-other")
    (folder / "table.csv").write_text(text)
    assert load.read_comparison(folder).cells == (None, "omnifm-p0.2-s0")


def test_a_line_is_not_shown_with_another_run_that_lies_in_its_cell(tmp_path: Path) -> None:
    """The cell failed because an older run of another config is in its folder, or a line is of another config than the folder."""
    folder = write_compare(tmp_path, methods=("local", "omnifm"), seeds=(0, 1), participations=(0.2,), rounds=2)
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = load.read_comparison(folder).cells
    rows = [{"cell": str(name), **row} for row, name in zip(rows, names, strict=True)]
    rows[0] |= {"status": "config.toml: the run was started with another config"}
    rows[1] |= {"config_hash": "another"}
    (folder / "cells" / str(names[0]) / "events.jsonl").write_text("damaged")
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    found = load.read_comparison(folder)
    assert found.cells == (None, None, *names[2:]) and list(found.runs) == list(names[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:1], "table.csv: no finished cell"),
        (lambda lines: [lines[0].replace("seed", "sead"), *lines[1:]], "table.csv: no column seed"),
        (lambda lines: [*lines, lines[1]], "table.csv: line 4 is the same cell as line 2: local, , 0.2, 0"),
        (lambda lines: [*lines[:2], "omnifm,x"], "table.csv: line 3 has not as many fields"),
        (lambda lines: [lines[0], lines[1].replace("0.2", "some", 1)], "line 2: participation is not a number: 'some'"),
        (lambda lines: [lines[0], lines[1].replace("812.4", "much", 1)], "line 2: peak_rss_mib is not a number: 'much'"),
    ],
)
def test_a_malformed_table_is_named(change: Callable[[list[str]], list[str]], message: str, tmp_path: Path) -> None:
    folder = write_compare(tmp_path, methods=("local", "omnifm"), seeds=(0,), participations=(0.2,), rounds=2)
    lines = (folder / "table.csv").read_text().splitlines()
    (folder / "table.csv").write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(CheckpointError) as caught:
        load.read_comparison(folder)
    assert message in str(caught.value)
