"""Names planted in DICOM headers, and a search of every byte that leaves a client, every log line and everything a run leaves."""

import base64
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from omnifm.data.importers import Provenance
from omnifm.data.importers.folder import import_folder
from omnifm.data.validate import validate
from omnifm.engines.inprocess import InProcessEngine
from omnifm.federation.messages import Reply, Request, encode
from omnifm.run import execute
from tests.run import jobs

MARK = "Zzyzxplanted"
BIRTH = "18770430"
# Attributes in which a person, or somebody who knows one, can be named; text, codes and a date.
PLANTED = (
    *("PatientName", "PatientID", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "PatientAddress"),
    *("PatientComments", "PatientTelephoneNumbers", "AdditionalPatientHistory", "Occupation", "EthnicGroup", "MilitaryRank"),
    *(
        "ReferringPhysicianName",
        "PerformingPhysicianName",
        "OperatorsName",
        "NameOfPhysiciansReadingStudy",
        "RequestingPhysician",
    ),
    *("InstitutionName", "InstitutionAddress", "StationName", "InstitutionalDepartmentName", "AccessionNumber", "StudyID"),
    *(
        "StudyDescription",
        "SeriesDescription",
        "ProtocolName",
        "ImageComments",
        "DeviceSerialNumber",
        "RequestAttributesSequence",
    ),
)
COUNTS = {"train": 8, "val": 4, "test": 4}


def planted(path: Path, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Path:
    """Write an image whose header names somebody in every way."""
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    file.SOPClassUID, file.SOPInstanceUID = SecondaryCaptureImageStorage, file.file_meta.MediaStorageSOPInstanceUID
    for name in PLANTED:
        setattr(file, name, [inner()] if name.endswith("Sequence") else MARK)
    file.PatientBirthDate = BIRTH
    file.add_new(0x00110010, "LO", f"{MARK} private")
    file.add_new(0x00111001, "UT", f"{MARK} in a private element")
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.Rows, file.Columns = pixels.shape
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 0
    file.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def inner() -> Dataset:
    item = Dataset()
    item.RequestedProcedureDescription = f"{MARK} in a sequence"
    return item


def write_hospital(folder: Path, source: Path, stream: int) -> Path:
    rng = np.random.default_rng(stream)
    for split, count in COUNTS.items():
        for number in range(count):
            pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
            planted(source / split / "ab"[number % 2] / f"{number}.dcm", pixels)
    provenance = Provenance(title="Planted", licence="CC0-1.0", redistribution="allowed", source="test")
    return import_folder(source, folder, modality="CT", provenance=provenance)


FORMS = [
    form
    for text in (MARK, BIRTH)
    for form in (text.encode(), text.lower().encode(), text.upper().encode(), text.encode("utf-16-le"))
]


def found(blob: bytes) -> list[bytes]:
    """Return the planted texts that are in some bytes, plain or as base64."""
    # A length of 4 k + 1 is no base64; two signs of padding are enough for all others.
    texts = (text[: len(text) - (len(text) % 4 == 1)] for text in re.findall(rb"[A-Za-z0-9+/]{24,}", blob))
    hidden = [base64.b64decode(text + b"==") for text in texts]
    return [form for form in FORMS for part in (blob, *hidden) if form in part]


def test_the_search_finds(tmp_path: Path) -> None:
    path = planted(tmp_path / "x.dcm", np.zeros((4, 4), np.uint8))
    assert found(path.read_bytes()) and path.read_bytes().count(MARK.encode()) >= len(PLANTED)
    assert found(base64.b64encode(b"some more bytes and " + MARK.encode())) and found(BIRTH.encode())
    assert not found(b"nothing of the kind")


@pytest.mark.parametrize("strategy", ["omnifm", "feddg"])
def test_no_byte_that_leaves_a_client_names_a_patient(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for stream, name in enumerate(jobs.MODALITIES):
        write_hospital(tmp_path / "data" / name, tmp_path / "source" / name, stream)
    blobs: list[bytes] = []
    exchange = InProcessEngine.exchange

    def listen(engine: InProcessEngine, requests: Iterable[Request]) -> Iterator[Reply]:
        for request in requests:
            blobs.append(encode(request))
            for reply in exchange(engine, [request]):
                blobs.append(encode(reply))
                yield reply

    monkeypatch.setattr(InProcessEngine, "exchange", listen)
    with caplog.at_level(logging.DEBUG):
        settings = {"rounds": 1, "participation": 1.0, "finetune_epochs": 0, "min_examples": 4}
        execute(jobs.config(tmp_path / "data", strategy, federation=settings), tmp_path / "run")
    assert len(blobs) > 2 * 4 * 2 and sum(map(len, blobs)) > 10**5
    assert [hit for blob in blobs for hit in found(blob)] == []
    assert found(caplog.text.encode()) == []
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"report.html", "events.jsonl", "metrics.json", "split.json"} <= {path.name for path in left}
    assert [path.name for path in left if found(path.read_bytes()) or found(path.name.encode())] == []


def test_a_damaged_file_is_complained_of_without_its_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_hospital(tmp_path / "cohort", tmp_path / "source", 0)
    pictures = sorted((folder / "images").rglob("*.dcm"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:-700])
    pictures[1].write_bytes(pictures[1].read_bytes()[:400])
    pictures[2].write_bytes(pictures[2].read_bytes().replace(b"MONOCHROME2", MARK[:11].encode()))
    with caplog.at_level(logging.DEBUG):
        lines = [str(line) for line in validate(folder)]
    assert len(lines) >= 3 and not any("\n" in line for line in lines)
    assert found("\n".join(lines).encode()) == [] and found(caplog.text.encode()) == []
