"""How much each layer of a model matters to a client's examples, by its neural tangent kernel."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from omnifm.tasks.base import Batch, Output


def kernels(
    layers: Sequence[Sequence[Tensor]], examples: Iterable[Batch], passes: Callable[[Batch], tuple[Output, Tensor]]
) -> Tensor:
    """Return K `(L, B, B)` in float64, the products of the examples' gradients with respect to each layer's parameters.

    Args:
        layers: the parameters of each layer; those that do not train have no gradient.
        examples: batches of one.
        passes: gives the loss of a batch.
    """
    trained = [[p for p in layer if p.requires_grad] for layer in layers]
    flat = [p for layer in trained for p in layer]
    rows: list[list[Tensor]] = [[] for _ in layers]
    for example in examples:
        _, loss = passes(example)
        found = iter(torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True) if flat else ())
        for row, layer in zip(rows, trained, strict=True):
            row.append(torch.cat([next(found).detach().double().flatten().cpu() for _ in layer] or [torch.zeros(1).double()]))
    return torch.stack([torch.stack(row) @ torch.stack(row).t() for row in rows])


def shares(kernels: Tensor) -> Tensor:
    """Return by layer the largest eigenvalue of K as a share of their sum; equal shares where all are 0."""
    if not bool(kernels.isfinite().all()):
        return torch.full((len(kernels),), torch.nan)
    first = torch.linalg.eigvalsh(kernels)[:, -1].clamp_min(0)
    total = first.sum()
    return (first / total if total > 0 else torch.full_like(first, 1 / len(first))).float()
