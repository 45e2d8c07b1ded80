"""FedDAT: two adapters teach each other, one of the client's own and one of everybody's; the backbone stays as it came.

    a(x) = U relu(D x + d) + u         D: d -> d / 16;   a_0 own,  a_1 shared,  a_2 = a_1 as received, frozen
    teacher  x + a_0(x) / 2 + a_2(x) / 2  -> z_T           student  x + a_1(x)  -> z_1
    a_1      min [ L(z_1) + 9 KL(p_T || p_1) ] / 2          p_T = softmax(z_T / 3), as a constant
    a_0      min [ L(z_T) + 9 KL(p_1 || p_T) ] / 2          p_1 = softmax(z_1 / 3), as a constant

Chen et al., "FedDAT: An approach for foundation model finetuning in multi-modal heterogeneous federated learning", AAAI 2024, and
the authors' code: reduction 16, weights drawn from N(0, .02), the gate fixed at 1/2, temperature 3. The mean over clients is
plain, whatever `federation.weighting` says. Scores are of the teacher's path, where a_2 is a_1 as received.

private  a_0, and the head's last layers
traffic  a_1, what else of the head the task has, and running statistics

Adaptations. There is a pair after every transformer block of a backbone that has blocks (CLIP's tower); any other backbone has
one pair, on its tokens. Both losses are of one place, in one step of one optimiser, where the code steps for a_1, then for a_0:
a_1 gets no gradient from the teacher nor a_0 from the student, the head gets both. Where targets are no classes the divergence is
the mean squared difference of the answers.
"""

import copy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from omnifm.federation.card import Card
from omnifm.federation.sharing import names_under
from omnifm.federation.state import Context, LocalJob
from omnifm.federation.strategy import Step, Strategy, StrategyOptions
from omnifm.tasks.base import Batch, Model

_ANSWER = "answer"
"""Where a task that answers with several tokens puts their numbers."""


class FedDATOptions(StrategyOptions):
    """Size of the adapters, and how much they teach each other."""

    reduction: int = Field(16, ge=1, description="An adapter's inner width is the tokens' over this.")
    temperature: float = Field(3.0, gt=0, description="Of both distributions; the divergence is scaled by its square.")


class Adapter(nn.Sequential):
    """a."""

    def __init__(self, width: int, reduction: int) -> None:
        inner = max(1, width // reduction)
        layers = nn.Linear(width, inner), nn.Linear(inner, width)
        super().__init__(layers[0], nn.ReLU(), layers[1])
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class Pair(nn.Module):
    """a_0 and a_1, and a_2 once `keep` was called. a_2 is no part of the model's state."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.own, self.shared = Adapter(width, reduction), Adapter(width, reduction)
        self.student = False
        self._kept: tuple[nn.Module, ...] = ()

    def keep(self) -> None:
        """Make a_2 of a_1 as it is now."""
        self._kept = (copy.deepcopy(self.shared).requires_grad_(False),)

    @property
    def kept(self) -> nn.Module:
        """a_2; a_1 before there was a round."""
        return self._kept[0] if self._kept else self.shared

    def forward(self, tokens: Tensor) -> Tensor:
        """Add what the student's or the teacher's adapters make of tokens `(b, l, d)`."""
        x = tokens.float()
        change = self.shared(x) if self.student else 0.5 * self.own(x) + 0.5 * self.kept(x)
        return torch.add(tokens, change.to(tokens.dtype))


class AdapterPath(nn.Module):
    """All pairs: after the backbone's blocks, or on its tokens where it has none."""

    def __init__(self, model: Model, reduction: int) -> None:
        super().__init__()
        blocks, width = model.backbone.blocks, model.backbone.token_dim
        self._on_tokens = not blocks
        pairs = [Pair(width, reduction) for _ in range(len(blocks) or 1)]
        self.pairs = nn.ModuleList(pairs)
        for block, pair in zip(blocks, pairs, strict=False):
            block.register_forward_hook(_adapted_by(pair))

    def every(self) -> list[Pair]:
        """The pairs."""
        return [pair for pair in self.pairs if isinstance(pair, Pair)]

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        """Return the tokens, adapted if nothing did it before."""
        del image
        return (self.pairs[0](tokens) if self._on_tokens else tokens), None

    def content(self, tokens: Tensor, length: int) -> Tensor:
        """All tokens."""
        del length
        return tokens


def _adapted_by(pair: Pair) -> Any:
    def adapted(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        del module, inputs
        found: Tensor = pair(output)
        return found

    return adapted


class FedDAT(Strategy):
    """Dual adapters with mutual distillation on a frozen backbone."""

    card: ClassVar[Card] = Card(
        paper="Chen et al., AAAI 2024",
        private="head, adapter a_0",
        search={"reduction": (4, 16), "temperature": (1.0, 3.0)},
    )
    Options: ClassVar[type[StrategyOptions]] = FedDATOptions
    options: FedDATOptions
    mean_suffices: ClassVar[bool] = True

    def __init__(self, options: FedDATOptions, context: Context) -> None:
        super().__init__(options, replace(context, weighting="equal"))

    def setup(self, model: Model) -> None:
        """Freeze the backbone and add the adapters."""
        model.backbone.requires_grad_(False)
        model.path = AdapterPath(model, self.options.reduction)

    def private(self, model: Model) -> frozenset[str]:
        """a_0 and the head."""
        names = (names_under(model, pair.own) for pair in _path(model).every())
        return names_under(model, model.head.own).union(*names)

    def begin(self, job: LocalJob) -> None:
        """Make a_2 of a_1 as received."""
        for pair in _path(job.model).every():
            pair.student = False
            pair.keep()

    def penalty(self, step: Step) -> Tensor:
        """The student's loss, and what each makes of the other's answer."""
        pairs = _path(step.job.model).every()
        for pair in pairs:
            pair.student = True
        output, loss = step.again(step.batch)
        for pair in pairs:
            pair.student = False
        student, teacher = output.prediction.float(), step.output.prediction.float()
        temperature = self.options.temperature
        learned = divergence(student, teacher.detach(), step.batch, temperature)
        return loss + learned + divergence(teacher, student.detach(), step.batch, temperature)

    def correct(self, step: Step) -> None:
        """Half of each sum."""
        for parameter in step.job.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


def _path(model: Model) -> AdapterPath:
    assert isinstance(model.path, AdapterPath)
    return model.path


def divergence(prediction: Tensor, wanted: Tensor, batch: Batch, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(wanted / T) || softmax(prediction / T)), the mean over what has a class.

    Classes are in the last or in the second dimension, wherever the batch's class numbers have none. Numbers below 0 are padding.
    Where there are no class numbers: the mean squared difference.
    """
    for numbers in (batch.target, batch.side.get(_ANSWER)):
        if numbers is None or numbers.is_floating_point():
            continue
        for axis in (-1, 1):
            if numbers.dim() + 1 == prediction.dim() and numbers.shape == prediction.select(axis, 0).shape:
                learned, goal = (torch.log_softmax(z / temperature, dim=axis) for z in (prediction, wanted))
                found = (goal.exp() * (goal - learned)).sum(dim=axis)[numbers >= 0]
                return temperature**2 * found.mean()
    return functional.mse_loss(prediction, wanted)
