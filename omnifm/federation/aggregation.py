"""The one aggregation: a weighted mean as a running sum, theta = sum_i n_i theta_i / sum_i n_i (FedAvg).

The sums run, tensor by tensor, over the clients that hold the tensor: in a federation of several tasks not all do.

Sums are kept in float64. A product of a float32 weight and an example count is then exact, so one client's mean is that
client bit for bit, and equal models average to themselves. The server holds one accumulator, whatever the number of clients.
"""

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
