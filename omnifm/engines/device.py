"""The device of a run, its threads and its determinism."""

import torch

from omnifm.config import Config
from omnifm.errors import ConfigError


def device_of(name: str) -> torch.device:
    """Return the device for `auto | cpu | cuda | mps`. Raises ConfigError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in there.items() if is_there))
    if not there[name]:
        raise ConfigError(f"engine.device = {name!r}: this machine has none (use 'auto')")
    return torch.device(name)


def prepare_process(config: Config) -> torch.device:
    """Set the threads and the determinism of this process; return its device."""
    torch.set_num_threads(config.engine.threads)
    device = device_of(config.engine.device)
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return device


def slow_precision(config: Config) -> str:
    """Return a line if the run asks for bfloat16 on a CPU whose convolutions have none (x86 without AVX-512); else nothing.

    torch computes it there without oneDNN: 5 times float32's time for the U-Net of configs/segmentation.toml on a Zen 3.
    """
    asked = config.engine.precision == "bf16" and device_of(config.engine.device).type == "cpu"
    if not asked or convolves_bf16():
        return ""
    return "engine.precision = 'bf16' is several times slower than 'fp32' on this CPU, which has no bfloat16 convolutions"


def convolves_bf16() -> bool:
    """Return whether oneDNN has bfloat16 convolutions for this CPU; without oneDNN nobody knows, and the answer is yes."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
