"""The simulated atlas in the smallest size, made once per process that needs it."""

from pathlib import Path

import pytest

from omnifm.data.atlas import make_atlas

COHORTS = ("atlas_cls_t1", "atlas_seg_tissue_t1", "atlas_sr_t1", "atlas_vqa_t1", "atlas_fusion_ct")
PATIENTS, SIDE = 10, 64


def make_cohorts(factory: pytest.TempPathFactory) -> Path:
    """Return a folder with cohorts of all five tasks."""
    folder = factory.getbasetemp() / "atlas"
    if not folder.is_dir():
        make_atlas(folder, PATIENTS, seed=0, size=SIDE)
    return folder
