"""F3OCUS: the server says which of its layers each client trains: those that matter to it, spread over the federation.

    client  S_i^l = lambda_1(K_i^l) / sum_k lambda_1(K_i^k),   K_i^l = J J^T,   row b of J: grad_l of the loss of example b of B
    server  max_M sum_il S_i^l M_il  and  min_M Var_l( sum_i M_il ),   sum_l M_il = `layers`             M_il in {0, 1}
            theta_l <- sum_i M_il n_i theta_il / sum_i M_il n_i;   a layer that nobody trained stays

Saha et al., "F3OCUS: Federated finetuning of vision-language foundation models with optimal client layer updating strategy via
multi-objective meta-heuristics", CVPR 2025. `search = "nsga2"`: the knee of the front that NSGA-II finds (population 64, 100
generations; nsga2.py), one of the paper's five meta-heuristics. `search = "greedy"`: clients choose in turn, a layer at a time,
the largest S_i^l - spread * (share of the clients that have chosen l). The paper has 2 to 8 of 28 layers; 4 here. B = 16. A layer
is trained by way of its low-rank change (lora.py), whose A and B are the l in grad_l; the head is trained by everybody.

traffic  up: S_i, a number for each layer; down: M_i, a bit for each, once the client has sent S_i
         and A, B of all layers and the head each way: what a client did not train goes back as it came
state    the latest S_i and M_i of every client, at the server

There is no public code. Adaptations. S_i is that of the client's model after its training and serves the next round, so that it
costs B backward passes and no exchange of its own; examples are drawn anew each round, without augmentation, and pass one by one
in evaluation mode. lambda_1 of a B x B matrix is computed exactly instead of by power iteration. M is chosen for all clients that
have sent S_i, whoever is sampled next. A client trains all layers in its first round, so round 0 is LoRA's. In a federation of
several tasks a client chooses among the layers it has; where no gradient is left, all layers matter the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from omnifm import seeds
from omnifm.errors import FederationError
from omnifm.federation import nsga2
from omnifm.federation.card import Card
from omnifm.federation.effort import Effort, Phase
from omnifm.federation.low_rank import DOWN, UP, add_changes, changed_layers
from omnifm.federation.messages import Reply
from omnifm.federation.state import LocalJob, ServerState
from omnifm.federation.strategy import OneMeanOptions, Step, Strategy, StrategyOptions, Upload
from omnifm.federation.tangent import kernels, shares
from omnifm.tasks.base import Model

_SCORES, _MASK = "f3ocus/scores", "f3ocus/mask"
_EXAMPLES = 16


class F3OCUSOptions(OneMeanOptions):
    """The size of the changes, and how layers are chosen."""

    rank: int = Field(8, ge=1, description="r of a layer's change.")
    alpha: float = Field(8.0, gt=0, description="The change is scaled by alpha / r.")
    layers: int = Field(4, ge=1, description="L_i, layers that a client trains in a round.")
    search: Literal["nsga2", "greedy"] = Field("nsga2", description="How layers are chosen.")
    spread: float = Field(0.1, ge=0, description="How much `greedy` avoids what others have chosen.")


class F3OCUS(Strategy):
    """LoRA, a few layers of it at each client."""

    card: ClassVar[Card] = Card(
        paper="Saha et al., CVPR 2025",
        up="a score of each layer",
        down="which layers to train",
        server="scores, choices",
        search={"layers": (4, 8), "rank": (8, 32)},
    )
    Options: ClassVar[type[StrategyOptions]] = F3OCUSOptions
    predicts_with_extra: ClassVar[bool] = False
    options: F3OCUSOptions

    def setup(self, model: Model) -> None:
        """Freeze the backbone and give every layer a change."""
        add_changes(model, self.options.rank, self.options.alpha)

    def outdates(self) -> str:
        """What a client held back of a layer that is not its to train would be lost."""
        return "leaves out a part of what a client sends"

    # ------------------------------------------------------------------ the client
    def phases(self, job: LocalJob, effort: Effort) -> Sequence[Phase]:
        """Leave out the layers that are not chosen."""
        rest = left_out(job.anchor, job.received.get(_MASK))
        return (Phase(effort, frozenset(n for n, _ in job.model.named_parameters() if n not in rest)),)

    def penalty(self, step: Step) -> Tensor | None:
        """Remember how a batch passes."""
        self._again = step.again
        return None

    def finish(self, job: LocalJob) -> Upload:
        """Send how much each layer matters."""
        train, generator = job.data.train, seeds.generator(job.seed, "f3ocus", job.round, job.client)
        index = torch.randperm(len(train), generator=generator)[:_EXAMPLES]
        examples = (train.batch(one).to(job.device, torch.contiguous_format) for one in index.split(1))
        parameters = dict(job.model.named_parameters())
        layers = [[parameters[layer + end] for end in (DOWN, UP)] for layer in changed_layers(job.anchor)]
        job.model.eval()
        scores = shares(kernels(layers, examples, self._again))
        if not bool(scores.isfinite().all()):
            raise FederationError(f"client {job.client}, round {job.round}: the gradient of an example is not finite")
        return Upload({_SCORES: scores})

    # ------------------------------------------------------------------ the server
    def extra_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """The client's mask, once there is one."""
        mask = server.extra.get(f"{_MASK}/{client}")
        return {} if mask is None else {_MASK: mask}

    def vet(self, server: ServerState, reply: Reply) -> None:
        """Judge the scores of layers."""
        layers, scores = changed_layers(reply.tensors), reply.extra.get(_SCORES)
        if scores is None or scores.shape != (len(layers),):
            raise FederationError("its scores of layers are missing, or not one for each")
        if not bool((scores >= 0).all()) or not abs(float(scores.sum()) - 1) <= 1e-3:
            raise FederationError("its scores of layers are not shares of one")
        self._require_known(reply, (_SCORES,))

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Add what the client has trained to the mean; keep its scores."""
        rest = left_out(reply.tensors, server.extra.get(f"{_MASK}/{reply.client}"))
        trained = {n: t for n, t in reply.tensors.items() if n not in rest}
        self._mean.add(trained, self.context.weight(reply.num_examples))
        self._came[f"{_SCORES}/{reply.client}"] = reply.extra[_SCORES]

    def begin_round(self, server: ServerState) -> None:
        """Wait for scores."""
        super().begin_round(server)
        self._came: dict[str, Tensor] = {}

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Average, and choose the layers of every client for when it trains next."""
        facts = super().end_round(server, round_index)
        server.extra.update(self._came)
        layers = changed_layers(server.shared)
        # In the order of ids, so that the order in the config changes nothing.
        clients = sorted(i.id for i in self.context.clients if f"{_SCORES}/{i.id}" in server.extra)
        allowed = np.array([[layer + UP in self.holds.get(c, (layer + UP,)) for layer in layers] for c in clients])
        scores = np.zeros(allowed.shape)
        for row, own, client in zip(scores, allowed, clients, strict=True):
            row[own] = server.extra[f"{_SCORES}/{client}"].double().numpy()
        masks = self._choose(scores, allowed, round_index)
        for mask, own, client in zip(masks, allowed, clients, strict=True):
            server.extra[f"{_MASK}/{client}"] = torch.from_numpy(mask[own])
        score, variance = nsga2.objectives(masks[None], scores)[0].tolist()
        return {**facts, "f3ocus": {"score": -score / len(clients), "variance": variance}}

    def _choose(self, scores: nsga2.Floats, allowed: nsga2.Masks, round_index: int) -> nsga2.Masks:
        budget = np.minimum(allowed.sum(axis=1), self.options.layers)
        if self.options.search == "greedy":
            return greedy(scores, allowed, budget, self.options.spread)
        generator = seeds.numpy_generator(self.context.seed, "f3ocus", "nsga2", round_index)
        front, values = nsga2.search(scores, allowed, budget, generator)
        chosen: nsga2.Masks = front[nsga2.knee(values)]
        return chosen


def left_out(names: Iterable[str], mask: Tensor | None) -> frozenset[str]:
    """Return the names of the A and B of the layers that a mask leaves out; without a mask, none."""
    layers = [] if mask is None else list(compress(changed_layers(names), (~mask).tolist()))
    return frozenset(layer + end for layer in layers for end in (DOWN, UP))


def greedy(scores: nsga2.Floats, allowed: nsga2.Masks, budget: NDArray[np.int64], spread: float) -> nsga2.Masks:
    """Return masks: rows choose in turn, one entry at a time, what is worth most less `spread` times how many have it."""
    masks = np.zeros_like(allowed)
    for turn in range(budget.max()):
        for row in np.flatnonzero(budget > turn):
            worth = scores[row] - spread * masks.mean(axis=0)
            masks[row, np.where(allowed[row] & ~masks[row], worth, -np.inf).argmax()] = True
    return masks
