"""Language libraries that may not speak: transformers, peft and tokenizers load from local folders and from nowhere else."""

import os

_SWITCHES = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    # Its threads and our worker processes would fight for cores, and it warns after a fork.
    "TOKENIZERS_PARALLELISM": "false",
}


def go_offline() -> None:
    """Set the libraries' switches in the environment, where it does not set them itself. Call it before importing one of them."""
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
