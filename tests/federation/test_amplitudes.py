from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from omnifm.errors import FederationError
from omnifm.federation.amplitudes import check_windows, shape_name, windows_of

PREFIX = "x/"
IMAGES = torch.rand(4, 3, 8, 6, generator=torch.Generator().manual_seed(0))
Change = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def test_windows_are_named_by_the_images_and_pass_their_check() -> None:
    windows = windows_of(IMAGES, 0.2)
    assert shape_name(IMAGES) == "3x8x6" and windows.shape == (4, 3, 3, 2)
    name, found = check_windows("c", "its bank", {"x/3x8x6": windows}, PREFIX, 0.2, 1)
    assert name == "x/3x8x6" and torch.equal(found, windows)
    assert check_windows("c", "its mean", {"x/3x8x6": windows.mean(0)}, PREFIX, 0.2, 0)[1].shape == (3, 3, 2)


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {}, "is missing"),
        (lambda x: {**x, "x/1x8x6": torch.ones(1)}, "more than one"),
        (lambda x: {n: t[..., 1:] for n, t in x.items()}, "has shape"),
        (lambda x: {n: t[:0] for n, t in x.items()}, "has shape"),
        (lambda x: {n: t.unsqueeze(0) for n, t in x.items()}, "has shape"),
        (lambda x: {n: t * float("nan") for n, t in x.items()}, "is not finite"),
        (lambda x: {n: -t for n, t in x.items()}, "negative"),
        (lambda x: {"x/big": x["x/3x8x6"]}, "no known shape"),
        (lambda x: {"x/3xbigx6": x["x/3x8x6"]}, "no known shape"),
    ],
)
def test_what_does_not_fit_names_the_client(change: Change, message: str, lead: int) -> None:
    sent = {"x/3x8x6": windows_of(IMAGES, 0.2) if lead else windows_of(IMAGES, 0.2).mean(0)}
    with pytest.raises(FederationError, match=rf"^client c, round 0: its bank .*{message}") as caught:
        check_windows("c", "its bank", change(sent), PREFIX, 0.2, lead)
    assert "\n" not in str(caught.value)
