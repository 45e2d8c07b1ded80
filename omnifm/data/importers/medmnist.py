"""MedMNIST v2 files (J. Yang et al., Scientific Data 10 (2023) 41): one .npz of uint8 images in official splits, 2-D sets."""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifm.data.importers import Progress, Provenance, finish, make_spec, new_folder
from omnifm.data.manifest import SPLITS, Row
from omnifm.errors import DataError

_CITATION = "J. Yang et al., MedMNIST v2, Scientific Data 10 (2023) 41"
_ORGANS = "bladder|femur-left|femur-right|heart|kidney-left|kidney-right|liver|lung-left|lung-right|pancreas|spleen"


@dataclass(frozen=True)
class _Set:
    modality: str
    classes: tuple[str, ...]
    title: str
    commercial: bool = True


def _set(modality: str, classes: str, title: str, commercial: bool = True) -> _Set:
    return _Set(modality, tuple(classes.split("|")), title, commercial)


# Names, classes (one shortened) and licences as the MedMNIST v2 paper and its `info.py` state them.
KNOWN_SETS: Mapping[str, _Set] = {
    "pathmnist": _set(
        "HISTO",
        "adipose|background|debris|lymphocytes|mucus|smooth muscle|normal colon mucosa|cancer-associated stroma"
        "|colorectal adenocarcinoma epithelium",
        "PathMNIST: tissue in colon histology",
    ),
    "chestmnist": _set(
        "XR",
        "atelectasis|cardiomegaly|effusion|infiltration|mass|nodule|pneumonia|pneumothorax|consolidation|edema|emphysema"
        "|fibrosis|pleural|hernia",
        "ChestMNIST: findings on chest radiographs",
    ),
    "dermamnist": _set(
        "DERM",
        "actinic keratoses and intraepithelial carcinoma|basal cell carcinoma|benign keratosis-like lesions|dermatofibroma"
        "|melanoma|melanocytic nevi|vascular lesions",
        "DermaMNIST: skin lesions in dermoscopy",
        commercial=False,
    ),
    "octmnist": _set(
        "OTHER", "choroidal neovascularization|diabetic macular edema|drusen|normal", "OCTMNIST: retinal diseases in OCT"
    ),
    "pneumoniamnist": _set("XR", "normal|pneumonia", "PneumoniaMNIST: pneumonia in children's chest radiographs"),
    "retinamnist": _set("FUNDUS", "0|1|2|3|4", "RetinaMNIST: grades of diabetic retinopathy"),
    "breastmnist": _set("US", "malignant|normal, benign", "BreastMNIST: breast tumours in ultrasound"),
    "bloodmnist": _set(
        "OTHER",
        "basophil|eosinophil|erythroblast|immature granulocytes|lymphocyte|monocyte|neutrophil|platelet",
        "BloodMNIST: blood cells under the microscope",
    ),
    "tissuemnist": _set(
        "FLUO",
        "Collecting Duct, Connecting Tubule|Distal Convoluted Tubule|Glomerular endothelial cells"
        "|Interstitial endothelial cells|Leukocytes|Podocytes|Proximal Tubule Segments|Thick Ascending Limb",
        "TissueMNIST: kidney cortex cells",
    ),
    "organamnist": _set("CT", _ORGANS, "OrganAMNIST: abdominal organs, axial CT"),
    "organcmnist": _set("CT", _ORGANS, "OrganCMNIST: abdominal organs, coronal CT"),
    "organsmnist": _set("CT", _ORGANS, "OrganSMNIST: abdominal organs, sagittal CT"),
}


def import_medmnist(file: Path, folder: Path, modality: str | None = None, progress: Progress | None = None) -> Path:
    """Write the cohort that a MedMNIST file holds: PNG images under their official splits.

    The file's name (`pathmnist.npz`, `pathmnist_128.npz`) tells the set and with it modality, classes and licence; of other
    files of the same layout the classes become class_0, class_1, ... MedMNIST publishes no patient ids, so `patient` is empty.

    Args:
        file: the .npz.
        folder: the new cohort.
        modality: needed where the name is not one of the 12 2-D sets.
        progress: called with images written and images in all.

    Raises:
        DataError: the file is not of this layout or multi-label, or `folder` is not empty.
    """
    arrays = _read(file)
    known = KNOWN_SETS.get(re.sub(r"_\d+$", "", file.stem.lower()))
    labels = {split: arrays[f"{split}_labels"] for split in SPLITS}
    classes = known.classes if known else _numbered_classes(labels)
    for split, values in labels.items():
        if values.size and not 0 <= values.min() <= values.max() < len(classes):
            raise DataError(f"{file}: {split}_labels hold {values.min()} to {values.max()}, the set has {len(classes)} classes")
    spec = make_spec(
        {
            "name": re.sub(r"[^A-Za-z0-9_-]+", "_", file.stem),
            "task": "classification",
            "modality": modality or (known.modality if known else "OTHER"),
            "classes": classes,
        },
        _provenance(file, known),
    )
    new_folder(folder)
    rows: list[Row] = []
    total = sum(len(values) for values in labels.values())
    for split in SPLITS:
        for index, (pixels, label) in enumerate(zip(arrays[f"{split}_images"], labels[split], strict=True)):
            rows.append(_write_png(folder, split, index, pixels, classes[int(label)]))
            if progress is not None:
                progress(len(rows), total)
    return finish(folder, spec, rows)


def _read(file: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the six arrays, labels as `(n,)`."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: cannot be read as .npz ({type(error).__name__})") from error
    for split in SPLITS:
        images, labels = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
        if images is None or labels is None:
            raise DataError(f"{file}: no {split}_images and {split}_labels: not a MedMNIST file")
        if labels.ndim == 2 and labels.shape[1] > 1:
            raise DataError(f"{file}: multi-label ({labels.shape[1]} labels per image); a cohort has one class per image")
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
            raise DataError(f"{file}: {split}_images are {images.dtype} {images.shape}, not uint8 (n, h, w) or (n, h, w, 3)")
        if labels.size != len(images) or labels.dtype.kind not in "iu":
            raise DataError(f"{file}: {len(images)} {split}_images, but {labels.size} {split}_labels of type {labels.dtype}")
        arrays[f"{split}_labels"] = labels.reshape(-1)
    return arrays


def _numbered_classes(labels: Mapping[str, npt.NDArray[Any]]) -> tuple[str, ...]:
    return tuple(f"class_{k}" for k in range(1 + max(int(values.max(initial=1)) for values in labels.values())))


def _provenance(file: Path, known: _Set | None) -> Provenance:
    if known is None:
        return Provenance(title=f"{file.stem}, a file in MedMNIST's layout", source=f"file {file.name}")
    return Provenance(
        title=known.title,
        licence="CC-BY-4.0" if known.commercial else "CC-BY-NC-4.0",
        redistribution="allowed" if known.commercial else "non-commercial",
        source=f"MedMNIST v2, file {file.name}",
        citation=_CITATION,
        notes="Official splits. No patient ids are published. Cite the set's own source as well.",
    )


def _write_png(folder: Path, split: str, index: int, pixels: npt.NDArray[np.uint8], label: str) -> Row:
    from PIL import Image

    path = f"images/{split}/{split}_{index:06d}.png"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / path)
    return Row(id=f"{split}_{index:06d}", split=split, image=path, label=label)
