"""The one door to MONAI.

`import monai` imports all of it, and for one network that nothing here uses (TransCheX) it imports transformers too, where that
is installed (the extra `vqa`): half of the time that a process takes to make its first model.
"""

import sys
from importlib import import_module
from types import ModuleType

_UNUSED = "transformers"


def monai_part(name: str) -> ModuleType:
    """Import and return a module of MONAI, without transformers. What asks for transformers itself still gets it.

    Args:
        name: e.g. `monai.networks.nets.resnet`.
    """
    if "monai" not in sys.modules and _UNUSED not in sys.modules:
        # A module that is None cannot be imported, and MONAI goes on without it: for MONAI it is optional.
        sys.modules[_UNUSED] = None  # type: ignore[assignment]
        try:
            return import_module(name)
        finally:
            del sys.modules[_UNUSED]
    return import_module(name)
