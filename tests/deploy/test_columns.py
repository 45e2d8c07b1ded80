"""What a server can make a hospital tell of its manifest: no value of a column that the hospital does not allow."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnifm.config import dump, parse
from omnifm.data.cohort import Row, write_cohort
from omnifm.deploy import hospital as module
from omnifm.deploy.data import public
from omnifm.deploy.hospital import Hospital
from omnifm.deploy.policy import Policy
from omnifm.engines.calls import Call, pack, unpack
from omnifm.federation.messages import Request, encode
from tests.data.builders import save_png, spec
from tests.run import jobs

PLANTED = ("MUELLER", "row17", "scanner9", "folder3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one cohort whose columns, ids and files name somebody; one row has no scanner."""
    folder, rng, rows = tmp_path_factory.mktemp("columns"), np.random.default_rng(0), []
    for number in range(40):
        split = "train" if number < 24 else "val" if number < 32 else "test"
        image = f"folder3/{number}.png"
        save_png(folder / "scan" / image, rng.integers(0, 256, (32, 32)).astype(np.uint8))
        own = {"id": f"row17-{number}", "patient": f"MUELLER-{number}", "site": f"ward_{number % 2}", "label": "ab"[number % 2]}
        rows.append(Row(split=split, image=image, extra={"scanner": f"scanner9-{number % 2}" if number else ""}, **own))
    write_cohort(folder / "scan", spec(name="scan", modality="MRI"), rows)
    return folder


def header(data: Path, partition: str, **entry: Any) -> dict[str, Any]:
    raw = jobs.raw_config(data, "fedavg")
    raw["federation"] |= {"partition": partition, "cohorts": [{"path": str(data / "scan"), **entry}]}
    return {"config": dump(public(parse(raw)))}


def hospital(data: Path, folder: Path, client: str = "scan-0", **policy: Any) -> Hospital:
    return Hospital(data / "scan", client, folder, str(data / "cache"), policy=Policy(**policy))


@pytest.mark.parametrize(
    ("partition", "entry", "line"),
    [
        ("by_column", {"column": "patient"}, "to be parted by column 'patient', allowed: site, modality"),
        ("by_column", {"column": "id"}, "to be parted by column 'id', allowed"),
        ("by_column", {"column": "image"}, "to be parted by column 'image', allowed"),
        ("by_column", {"column": "scanner"}, "to be parted by column 'scanner', allowed"),
        ("dirichlet", {"column": "patient", "clients": 2}, "to be parted by column 'patient', allowed"),
        ("dirichlet", {"clients": 30}, "its data cannot be used as the config asks; the hospital's own log says why"),
        ("natural", {}, "its data cannot be used as the config asks; the hospital's own log says why"),  # no such client
    ],
)
def test_no_value_of_a_column_gets_into_an_answer(
    partition: str, entry: dict[str, Any], line: str, data: Path, tmp_path: Path
) -> None:
    asked = header(data, partition, **entry)
    for call in (
        Call("introduce", asked),
        Call("answer", {**asked, "introductions": []}, encode(Request("train", 0, "scan-0", settings={"epochs": 1}))),
    ):
        blob = hospital(data, tmp_path).answer(pack(call))
        answer = unpack(blob)
        assert answer.kind == "mistake" and line in answer.header["message"] and "\n" not in answer.header["message"]
        assert not [word for word in (*PLANTED, "ward_") if word.encode() in blob]


def test_a_hospital_names_the_columns_that_may_part_it(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    by_site = Call("introduce", header(data, "natural"))
    assert unpack(hospital(data, tmp_path, "scan-ward_0").answer(pack(by_site))).header["client"] == "scan-ward_0"
    refused = unpack(hospital(data, tmp_path, "scan-ward_0", columns=["modality"]).answer(pack(by_site)))
    assert "to be parted by column 'site', allowed: modality" in refused.header["message"]
    by_scanner = Call("introduce", header(data, "by_column", column="scanner"))
    with caplog.at_level(logging.WARNING):
        answer = unpack(hospital(data, tmp_path, columns=["scanner"]).answer(pack(by_scanner)))
    assert (
        answer.header["message"] == "client scan-0: its data cannot be used as the config asks; the hospital's own log says why"
    )
    assert "row 'row17-0' has no value in column 'scanner'" in caplog.text, "the hospital itself is not told"


def test_a_crash_tells_the_server_nothing(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyError("MUELLER-3")

    monkeypatch.setattr(module, "own_client", crash)
    answer = unpack(hospital(data, tmp_path).answer(pack(Call("introduce", header(data, "iid")))))
    assert (answer.kind, dict(answer.header)) == ("crash", {"message": "the hospital's own log says why"})
    assert "MUELLER-3" in caplog.text
