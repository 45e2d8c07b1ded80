"""The one aggregation: a weighted mean as a running sum, theta = sum_i n_i theta_i / sum_i n_i (FedAvg).

The sums run, tensor by tensor, over the clients that hold the tensor: in a federation of several tasks not all do.

Sums are kept in float64. A product of a float32 weight and an example count is then exact, so one client's mean is that
client bit for bit, and equal models average to themselves. The server holds one accumulator, whatever the number of clients.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class RunningMean:
    """Weighted mean of named tensors, added one reply at a time. Whole-number buffers take the maximum."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._weights: dict[str, float] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Add one client's tensors with `weight` (its number of examples, or a share of it)."""
        if weight <= 0:
            return
        for name, tensor in tensors.items():
            known = self._sums.get(name)
            self._weights[name] = self._weights.get(name, 0.0) + weight
            self._dtypes[name] = tensor.dtype
            if not tensor.is_floating_point():
                # A step counter has no mean; an average truncated to int would count backwards.
                self._sums[name] = tensor.clone() if known is None else torch.maximum(known, tensor)
            elif known is None:
                self._sums[name] = tensor.double().mul_(weight)
            else:
                known.add_(tensor, alpha=weight)  # promoted to float64 before the product

    def shift(self, offsets: Mapping[str, Tensor]) -> None:
        """Move the means of floating-point tensors by `offsets`, before they are rounded to their own type."""
        for name, offset in offsets.items():
            self._sums[name].add_(offset, alpha=self._weights[name])

    def value(self) -> dict[str, Tensor]:
        """Return the means in the dtypes of the first reply; no entry for a tensor that nobody sent."""
        return {
            name: (total / self._weights[name]).to(self._dtypes[name]) if self._dtypes[name].is_floating_point else total
            for name, total in self._sums.items()
        }


def step_towards(old: Mapping[str, Tensor], mean: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
    """Return old + step * (mean - old) per tensor; exactly `mean` for step 1, and counters as they are in `mean`."""
    if step == 1.0:
        return dict(old) | dict(mean)
    moved = {n: torch.lerp(old[n], t, step) if t.is_floating_point() else t for n, t in mean.items()}
    return dict(old) | moved


def update_norm(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Return || theta_i - theta^t ||_2 over all floating-point tensors, summed in float64."""
    moved = (float((t.double() - start[n].double()).square().sum()) for n, t in tensors.items() if t.is_floating_point())
    return math.sqrt(math.fsum(moved))


def shortened(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], bound: float) -> Mapping[str, Tensor]:
    """Return theta^t + Delta min(1, bound / || Delta ||_2), Delta = theta_i - theta^t; as they are if they are short enough."""
    norm = update_norm(tensors, start)
    if norm <= bound:
        return tensors
    return {
        n: start[n].double().lerp(t.double(), bound / norm).to(t.dtype) if t.is_floating_point() else t
        for n, t in tensors.items()
    }


def trained(changes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a round's mean changes without those of tensors that stood still while others moved: they were frozen in it."""
    moved = {name: change for name, change in changes.items() if change.any()}
    return moved or changes
