import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from omnifm.seeds import generator
from omnifm.tasks.augment import flip_shift


def reference(image: Tensor, stream: int, part: int = 8) -> Tensor:
    """The same draws, image by image: pad, cut, mirror."""
    g = generator(stream, "augment")
    b, _, h, w = image.shape
    dy, dx = h // part, w // part
    flip = torch.rand(b, generator=g) < 0.5
    down = torch.randint(0, 2 * dy + 1, (b, 1), generator=g).flatten()
    right = torch.randint(0, 2 * dx + 1, (b, 1), generator=g).flatten()
    found = []
    for i in range(b):
        padded = functional.pad(image[i : i + 1], (dx, dx, dy, dy), mode="replicate")[0]
        cut = padded[:, down[i] : down[i] + h, right[i] : right[i] + w]
        found.append(cut.flip(2) if flip[i] else cut)
    return torch.stack(found)


@given(st.integers(1, 6), st.sampled_from([1, 3]), st.integers(8, 20), st.integers(8, 20), st.integers(0, 50))
def test_it_is_pad_cut_mirror(b: int, c: int, h: int, w: int, stream: int) -> None:
    image = torch.rand(b, c, h, w, generator=generator(stream, "image"))
    before = image.clone()
    found = flip_shift(image, generator(stream, "augment"))
    assert torch.equal(found, reference(image, stream)) and found.is_contiguous()
    assert torch.equal(image, before)


def test_all_mirrors_and_shifts_occur() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8).expand(400, -1, -1, -1)
    kinds = {tuple(x.flatten().tolist()) for x in flip_shift(image, generator(0, "augment"))}
    assert len(kinds) == 2 * 3 * 3


def test_small_images_are_mirrored_alone() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4).expand(50, -1, -1, -1)
    kinds = {tuple(x.flatten().tolist()) for x in flip_shift(image, generator(0, "augment"))}
    assert kinds == {tuple(image[0].flatten().tolist()), tuple(image[0].flip(2).flatten().tolist())}
