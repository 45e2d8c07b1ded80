from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from omnifm import seeds
from omnifm.backbones.build import build_trunk
from omnifm.config import ModelConfig
from omnifm.errors import ConfigError

WIDTH = 8


def build(weights: Path | str = "", seed: int = 0, **values: object) -> torch.nn.Module:
    with seeds.scope(seed, "net"):
        config = ModelConfig.model_validate({"width": WIDTH, "weights": str(weights), **values})
        return build_trunk(config, 1)[0]


def test_the_config_says_which_network() -> None:
    trunk, dim = build_trunk(ModelConfig(width=WIDTH, stem_stride=1, norm="batch"), 3)
    assert dim == 64 and trunk(torch.rand(2, 3, 32, 32)).shape == (2, 4, 64)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in trunk.modules())


@pytest.mark.parametrize("prefix", ["", "backbone.trunk."])
def test_weights_come_from_a_file_of_the_trunk_or_of_a_whole_model(prefix: str, tmp_path: Path) -> None:
    source = build(seed=1)
    path = tmp_path / "w.safetensors"
    extra = {"head.linear.bias": torch.ones(3)} if prefix else {}
    save_file({prefix + n: t.contiguous() for n, t in source.state_dict().items()} | extra, path)
    found, fresh = build(path).state_dict(), build().state_dict()
    assert all(torch.equal(found[n], t) for n, t in source.state_dict().items())
    assert any(not torch.equal(found[n], t) for n, t in fresh.items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != "stem.0.weight"}, r"lacks tensor stem\.0\.weight"),
        (lambda t: {n: v[:1] for n, v in t.items()}, "or it has another shape"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(spoil: object, message: str, tmp_path: Path) -> None:
    assert callable(spoil)
    path = tmp_path / "w.safetensors"
    save_file({n: t.contiguous() for n, t in spoil(build().state_dict()).items()}, path)
    with pytest.raises(ConfigError, match=message) as caught:
        build(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_file_that_is_none_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        build(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
