"""MONAI is imported without transformers, and both still work."""

import subprocess
import sys

import pytest

_CODE = """
import sys
{before}
from omnifm.backbones.resnet import ResNet18Trunk
ResNet18Trunk(3, 4, 2, "group")
print("transformers" in sys.modules)
from transformers import CLIPVisionConfig
from monai.losses.dice import DiceLoss
from monai.networks.nets.transchex import Transchex
print(CLIPVisionConfig.__name__, DiceLoss.__name__)
"""


@pytest.mark.parametrize(("before", "imported"), [("", "False"), ("import transformers", "True"), ("import monai", "True")])
def test_a_model_imports_no_transformers_and_they_can_be_imported_afterwards(before: str, imported: str) -> None:
    pytest.importorskip("transformers")
    code = _CODE.format(before=before)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.split()) == (0, [imported, "CLIPVisionConfig", "DiceLoss"]), done.stderr
