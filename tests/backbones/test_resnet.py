import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d

from omnifm.backbones.norms import replace_batch_norms
from omnifm.backbones.resnet import ResNet18Trunk
from omnifm.seeds import generator, scope


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with scope(0, "net"):
        yield


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_it_has_the_parameters_of_the_published_network(norm: str) -> None:
    """torchvision's ResNet-18 has 11,689,512; 513,000 are its classifier. MONAI's three shortcuts have a bias per channel."""
    net = ResNet18Trunk(3, 64, 2, norm)
    biases = sum(m.bias.numel() for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)
    assert biases == 128 + 256 + 512 and count(net) - biases == 11_689_512 - 513_000
    # One channel in place of three: 2 * 64 * 7 * 7 weights less.
    assert count(ResNet18Trunk(1, 64, 2, norm)) == count(net) - 6_272


def test_width_16_has_a_sixteenth_of_it() -> None:
    assert 0.69e6 < count(ResNet18Trunk(1, 16, 2, "group")) < 0.71e6


@pytest.mark.parametrize(("size", "stride", "tokens"), [(64, 2, 4), (64, 1, 16), (32, 2, 1), (96, 2, 9)])
def test_tokens_are_the_places_of_the_last_map(size: int, stride: int, tokens: int) -> None:
    net = ResNet18Trunk(2, 8, stride, "group")
    out = net(torch.rand(3, 2, size, size, generator=generator(0, "x")))
    assert out.shape == (3, tokens, 64) and net.token_dim == 64


def test_tokens_run_row_by_row() -> None:
    """A token is a place, its vector that place's channels: what is far from a place does not reach its token."""
    net = ResNet18Trunk(1, 4, 2, "batch").eval()
    x = torch.rand(1, 1, 128, 128, generator=generator(0, "x"))
    maps = net.layers(net.stem(x))
    assert maps.shape == (1, 32, 4, 4)
    assert torch.equal(net(x)[0, 6], maps[0, :, 1, 2])


def test_the_network_is_that_of_the_paper() -> None:
    net = ResNet18Trunk(1, 64, 2, "batch")
    strides = [m.stride for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(strides) == 20 and strides[0] == (2, 2) and strides.count((2, 2)) == 1 + 2 * 3
    kernels = [m.kernel_size for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert (kernels.count((7, 7)), kernels.count((3, 3)), kernels.count((1, 1))) == (1, 16, 3)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 20


def test_group_norm_leaves_no_batch_norm() -> None:
    net = ResNet18Trunk(1, 8, 2, "group")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    groups = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert len(groups) == 20 and all(m.num_groups == 8 for m in groups)
    assert not list(net.buffers())


def test_with_group_norm_an_image_does_not_see_its_batch() -> None:
    x = torch.rand(4, 1, 32, 32, generator=generator(0, "x"))
    group, batch = (ResNet18Trunk(1, 8, 2, norm).train() for norm in ("group", "batch"))
    torch.testing.assert_close(group(x)[:1], group(x[:1]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(batch(x)[:2], batch(x[:2]), atol=1e-3)


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (12, 6), (7, 7), (4, 4), (10, 5), (11, 1)])
def test_groups_divide_the_channels(channels: int, groups: int) -> None:
    net = nn.Sequential(nn.BatchNorm2d(channels), nn.Sequential(nn.BatchNorm2d(channels), nn.BatchNorm1d(3)))
    assert replace_batch_norms(net) == 2
    assert isinstance(net[0], nn.GroupNorm) and net[0].num_groups == groups and net[0].num_channels == channels
    assert isinstance(net[1][1], nn.BatchNorm1d)


def test_gradient_reaches_every_parameter() -> None:
    net = ResNet18Trunk(1, 8, 2, "group")
    out = net(torch.rand(4, 1, 64, 64, generator=generator(0, "x")))
    (out * torch.randn(out.shape, generator=generator(0, "w"))).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []


def shortcuts(net: nn.Module) -> list[nn.Conv2d]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]


@given(width=st.integers(1, 7), side=st.integers(1, 9), batch=st.integers(1, 3))
def test_a_narrow_shortcut_is_the_strided_convolution(width: int, side: int, batch: int) -> None:
    """torch's own kernels, which are wrong where the map is in channels-last order, are asked in the order they can do."""
    with scope(0, "net"):
        shortcut = shortcuts(ResNet18Trunk(1, width, 2, "group"))[0]
    assert shortcut.bias is not None
    start = torch.randn(batch, width, side, side, generator=generator(0, "x"))

    def gradients(x: Tensor, native: bool) -> list[Tensor]:
        x = x.requires_grad_()
        out = conv2d(x, shortcut.weight, shortcut.bias, stride=2) if native else shortcut(x)
        weights = torch.randn(out.shape, generator=generator(0, "w"))
        return [out, *torch.autograd.grad((out * weights).sum(), [x, shortcut.weight, shortcut.bias])]

    want = gradients(start.clone(), native=True)
    for order in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(gradients(start.clone(memory_format=order), native=False), want, atol=1e-5, rtol=1e-5)


def test_only_shortcuts_of_fewer_channels_than_a_block_are_mended() -> None:
    """The others keep torch's kernel, and with it the bits of what has been published."""
    assert [type(m) is nn.Conv2d for m in shortcuts(ResNet18Trunk(1, 4, 2, "group"))] == [False, True, True]
    assert [type(m) is nn.Conv2d for m in shortcuts(ResNet18Trunk(1, 7, 2, "group"))] == [False, True, True]
    assert all(type(m) is nn.Conv2d for m in shortcuts(ResNet18Trunk(1, 8, 2, "group")))


def test_mending_draws_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with scope(0, "net"):
        mended, after = ResNet18Trunk(1, 4, 2, "group"), torch.rand(1)
    monkeypatch.setattr("omnifm.backbones.resnet._BLOCK", 0)
    with scope(0, "net"):
        native, after_native = ResNet18Trunk(1, 4, 2, "group"), torch.rand(1)
    assert torch.equal(after, after_native)
    states = mended.state_dict(), native.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


_TRAIN = """
import torch
from omnifm.backbones.resnet import ResNet18Trunk
torch.manual_seed(0)
net = ResNet18Trunk(2, 4, 2, "group").to(memory_format=torch.channels_last)
for _ in range(10):
    x = torch.rand(8, 2, 48, 48).contiguous(memory_format=torch.channels_last)
    net(x).square().mean().backward()
assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
"""


def test_a_narrow_network_in_channels_last_order_keeps_the_heap_whole() -> None:
    """In a process whose allocator looks at every block, with the kernels of a CPU without AVX-512."""
    checker = next((path for path in Path("/lib").glob("*-linux-gnu/libc_malloc_debug.so.0")), None)
    if checker is None:
        pytest.skip("needs glibc's malloc checker, libc_malloc_debug.so.0")
    env = {**os.environ, "LD_PRELOAD": str(checker), "MALLOC_CHECK_": "3", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _TRAIN], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_mixed_precision_in_channels_last_differs_little() -> None:
    net = ResNet18Trunk(1, 8, 2, "group").eval()
    x = torch.rand(2, 1, 32, 32, generator=generator(0, "x"))
    plain = net(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        fast = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert fast.dtype == torch.bfloat16 and not torch.equal(fast.float(), plain)
    assert float((fast.detach().float() - plain).norm() / plain.norm()) < 0.05
