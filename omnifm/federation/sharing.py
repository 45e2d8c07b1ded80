"""Which tensors of a model are shared, private, or frozen. Always by module or module type, never by a piece of a name."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnifm.errors import ConfigError, FederationError, NotFiniteError

BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS: tuple[type[nn.Module], ...] = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)
PREDICTION = "a prediction is not finite"


def names_under(model: nn.Module, part: nn.Module) -> frozenset[str]:
    """Return the names, in `model`'s state, of all tensors of the submodule `part`.

    Raises:
        ConfigError: `part` is not inside `model` or holds no tensor.
    """
    for prefix, module in model.named_modules():
        if module is part:
            names = frozenset(f"{prefix}.{name}" if prefix else name for name in part.state_dict())
            if names:
                return names
    raise ConfigError(f"a sharing rule selects nothing: {type(part).__name__} holds no tensor of the model")


def names_of_type(model: nn.Module, types: tuple[type[nn.Module], ...], what: str) -> frozenset[str]:
    """Return the names of all tensors that belong to modules of `types`.

    Raises:
        ConfigError: the model has no such module; a rule that selects nothing would silently be FedAvg.
    """
    parts = [module for module in model.modules() if isinstance(module, types)]
    names = frozenset[str]().union(*(names_under(model, part) for part in parts if part.state_dict()))
    if not names:
        raise ConfigError(f"a sharing rule selects nothing: the model has no {what}")
    return names


@dataclass(frozen=True)
class Sharing:
    """The state of a model, split. The four sets are disjoint; together they are the whole state.

    Attributes:
        shared: travel to the server and back, averaged.
        private: never leave the client.
        frozen: parameters that nothing trains; every site builds them from the seed.
        dropped: buffers that start anew each round; `settle` fills them before a score.
    """

    shared: tuple[str, ...]
    private: tuple[str, ...]
    frozen: tuple[str, ...]
    dropped: tuple[str, ...]


def split_state(model: nn.Module, private: Iterable[str], buffers: str) -> Sharing:
    """Split `model`'s state by the names a strategy declares private and the buffer policy.

    Args:
        model: the model.
        private: names that never leave the client.
        buffers: `average | local | drop`, for buffers that are not private anyway.
    """
    keep = frozenset(private)
    state = model.state_dict()
    unknown = sorted(keep - state.keys())
    if unknown:
        raise ConfigError(f"private tensors that the model does not have: {unknown[0]}")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    moving = {name for name, _ in model.named_buffers() if name in state}
    groups: dict[str, list[str]] = {"shared": [], "private": [], "frozen": [], "dropped": []}
    for name in state:
        if name in keep:
            groups["private"].append(name)
        elif name in frozen:
            groups["frozen"].append(name)
        elif name in moving and buffers != "average":
            groups["private" if buffers == "local" else "dropped"].append(name)
        else:
            groups["shared"].append(name)
    return Sharing(**{key: tuple(names) for key, names in groups.items()})


def read(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copy the named tensors out of `model`, contiguous, on the CPU."""
    wanted = tuple(names)
    if not wanted:
        return {}  # most clients keep nothing private, and listing a model's state costs as much as copying a small one
    state = model.state_dict()
    with torch.no_grad():
        return {n: state[n].detach().to("cpu").clone(memory_format=torch.contiguous_format) for n in wanted}


def write(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into `model` in place.

    Raises:
        FederationError: a name or shape does not fit.
    """
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in state:
                raise FederationError(f"tensor {name} is not in the model")
            if state[name].shape != tensor.shape:
                raise FederationError(
                    f"tensor {name} has shape {tuple(tensor.shape)}, the model wants {tuple(state[name].shape)}"
                )
            state[name].copy_(tensor)


def require_finite(tensors: Mapping[str, Tensor], who: str, complaint: str) -> None:
    """Raise NotFiniteError if a value is not: what stays at the client or becomes a score is seen by no later check."""
    # A sum is not finite if any element is not, and quick; of finite elements it may overflow.
    if not all(bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise NotFiniteError(f"{who}: {complaint}")


@contextmanager
def finite_predictions(model: nn.Module, who: str) -> Iterator[None]:
    """Raise NotFiniteError where `model` predicts what is not finite.

    What a task makes of it would hide that: of NaN the most probable class is the first, and as a mask it is background.
    """

    def check(module: nn.Module, inputs: object, output: Any) -> None:
        require_finite({"": output.prediction}, who, PREDICTION)

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are; in training it still normalises with those of the batch."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    moving = [m for m in norms if m.track_running_stats]
    for module in moving:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in moving:
            module.track_running_stats = True


@torch.no_grad()
def settle(model: nn.Module, dropped: Collection[str], client: str, passes: Iterable[Callable[[], object]]) -> None:
    """Give the BatchNorms whose statistics are `dropped` the mean of those of all batches that pass. Nothing else moves.

    Every site takes its own images for it (the "static" BatchNorm of HeteroFL, Diao et al., ICLR 2021, without its exchange).

    Args:
        model: the model; it is left as for prediction.
        dropped: `Sharing.dropped`; without any, nothing passes.
        client: whose images they are.
        passes: each call passes one batch.

    Raises:
        FederationError: no batch passes.
    """
    model.eval()
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    # What a strategy has put in their place (Ditto's own model has some) stays.
    new = [(name, part) for name, part in parts if part.num_batches_tracked is not None and not int(part.num_batches_tracked)]
    norms = [(part, part.momentum) for name, part in new if f"{name}.running_mean" in dropped]
    if not norms:
        return
    for norm, _ in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    passed = sum(1 for run in passes if (run(), True))
    for norm, momentum in norms:
        norm.momentum, norm.training = momentum, False
    if not passed:
        raise FederationError(f"client {client}: model.buffers = 'drop' scores with statistics of two training images or more")
