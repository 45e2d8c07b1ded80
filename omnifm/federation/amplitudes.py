"""Low-frequency amplitudes as messages: named by the images' shape, which sets their scale, and checked at the server."""

from collections.abc import Mapping

from torch import Tensor

from omnifm.errors import FederationError
from omnifm.spectral.fft import window_amplitude, window_radius


def shape_name(image: Tensor) -> str:
    """Return `CxHxW` of images `(n, c, h, w)`."""
    return "x".join(map(str, image.shape[1:]))


def windows_of(image: Tensor, window: float) -> Tensor:
    """Return the amplitudes `(n, c, 2b + 1, b + 1)` in a window of radius b = floor(window * min(h, w))."""
    return window_amplitude(image, window_radius(window, *image.shape[-2:]))


def check_windows(
    client: str, what: str, found: Mapping[str, Tensor], prefix: str, window: float, lead: int
) -> tuple[str, Tensor]:
    """Return the one entry of `found`, checked.

    Args:
        client: who sent it.
        what: what it is, for the complaint: "its mean amplitude".
        found: by name, `prefix` and the shape of the images.
        prefix: of the names.
        window: radius of the window as a share of the image's side.
        lead: how many dimensions stand before `(c, 2b + 1, b + 1)`.

    Raises:
        FederationError: it is missing, not alone, not of the shape that its name asks for, empty, negative or not finite.
    """
    who = f"client {client}, round 0: {what}"
    if len(found) != 1:
        raise FederationError(f"{who} is missing, or there is more than one")
    ((name, tensor),) = found.items()
    sides = name.removeprefix(prefix).split("x")
    if len(sides) != 3 or not all(side.isdecimal() for side in sides):
        raise FederationError(f"{who} is of images of no known shape")
    channels, height, width = map(int, sides)
    radius = window_radius(window, height, width)
    shape = (channels, 2 * radius + 1, radius + 1)
    if tensor.dim() != lead + 3 or tensor.shape[lead:] != shape or not tensor.numel():
        raise FederationError(f"{who} has shape {tuple(tensor.shape)}, not {('n',) * lead + shape}")
    if not bool(tensor.isfinite().all()) or bool((tensor < 0).any()):
        raise FederationError(f"{who} is not finite, or negative")
    return name, tensor
