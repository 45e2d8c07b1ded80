"""The simulated atlas: a brain cohort of several hospitals, scanners and modalities, made on the spot for all five tasks."""

from omnifm.data.atlas.write import make_atlas

__all__ = ["make_atlas"]
