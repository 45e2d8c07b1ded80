"""The evaluation contract: global, personal, worst, finetuned; on one split, for every client.

* `personal`: each client's model (shared for it, plus its private state) on its own examples; example-weighted mean.
* `worst`: per score, the lowest client.
* `global`: the one shared model on the pooled examples, scored as one set; None where the method has no such model.
* `finetuned`: as personal, after `finetune_epochs` local epochs of the task loss alone.

Scores that are undefined (no examples, a class that never occurs) are None and stay None.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from omnifm.config import FederationConfig, OptimiserConfig
from omnifm.federation.messages import Request
from omnifm.federation.rounds import Engine
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import Strategy
from omnifm.metrics.base import Scores
from omnifm.tasks.base import Task

View = str
_COUNT = "num_examples"


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split. Each mapping goes from score to number or None.

    Attributes:
        split: `val` or `test`.
        views: `personal`, `worst`, and `global`, `finetuned` where asked for and defined.
        clients: by client, then by view.
    """

    split: str
    views: dict[View, Scores | None]
    clients: dict[str, dict[View, Scores | None]]


class Evaluator:
    """Asks every client, sampled or not, for its state of the metric, and merges."""

    def __init__(
        self,
        task: Task,
        strategy: Strategy,
        engine: Engine,
        sizes: Mapping[str, Mapping[str, int]],
        config: FederationConfig,
        optimiser: OptimiserConfig,
        has_global: bool,
    ) -> None:
        self._task, self._strategy, self._engine = task, strategy, engine
        self._sizes, self._config, self._has_global = sizes, config, has_global
        self._finetune_lr = optimiser.finetune_lr or optimiser.lr

    def evaluate(self, server: ServerState, completed: int, split: str, *, finetune: bool = False) -> Evaluation:
        """Score `split` with the state after `completed` rounds."""
        clients = [client for client, sizes in self._sizes.items() if sizes[split] > 0]
        states = {"personal": self._ask(server, completed, clients, split, "personal")}
        if self._has_global:
            states["global"] = self._ask(server, completed, clients, split, "global")
        if finetune and self._config.finetune_epochs:
            trained = [client for client in clients if self._sizes[client]["train"] > 0]
            states["finetuned"] = self._ask(server, completed, trained, split, "finetuned")
        table: dict[str, dict[View, Scores | None]] = {c: {view: None for view in states} for c in self._sizes}
        for view, by_client in states.items():
            for client, state in by_client.items():
                table[client][view] = self._task.metric().merge([state]).compute()
        return Evaluation(split, self._summary(states, table, split), table)

    def _ask(
        self, server: ServerState, completed: int, clients: Sequence[str], split: str, view: View
    ) -> dict[str, Mapping[str, Tensor]]:
        settings: dict[str, Any] = {"split": split, "view": "global" if view == "global" else "personal"}
        if view == "finetuned":
            settings |= {"finetune_epochs": self._config.finetune_epochs, "finetune_lr": self._finetune_lr}
        requests = (
            Request(
                "evaluate",
                completed,
                client,
                server.shared if view == "global" else self._strategy.shared_for(server, client),
                self._strategy.extra_for(server, client),
                settings,
            )
            for client in clients
        )
        return {reply.client: reply.extra for reply in self._engine.exchange(requests)}

    def _summary(
        self,
        states: Mapping[View, Mapping[str, Mapping[str, Tensor]]],
        table: Mapping[str, Mapping[View, Scores | None]],
        split: str,
    ) -> dict[View, Scores | None]:
        weights = {client: sizes[split] for client, sizes in self._sizes.items()}
        views: dict[View, Scores | None] = {
            "personal": weighted_mean([(table[c]["personal"], weights[c]) for c in table]),
            "worst": lowest([table[c]["personal"] for c in table]),
            "global": None,
            "finetuned": None,
        }
        if "finetuned" in states:
            views["finetuned"] = weighted_mean([(table[c]["finetuned"], weights[c]) for c in table])
        if "global" in states:
            views["global"] = self._task.metric().merge(states["global"].values()).compute()
        return views


def weighted_mean(rows: Iterable[tuple[Scores | None, int]]) -> Scores:
    """Return the example-weighted mean of each score over the clients where it is defined; None if it is nowhere."""
    known = [(scores, weight) for scores, weight in rows if scores is not None and weight > 0]
    result: Scores = {}
    for name in dict.fromkeys(name for scores, _ in known for name in scores):
        defined = [(scores[name], weight) for scores, weight in known if scores.get(name) is not None]
        total = sum(weight for _, weight in defined)
        result[name] = sum(float(v) * w for v, w in defined if v is not None) / total if total else None
    return result


def lowest(rows: Iterable[Scores | None]) -> Scores:
    """Return the least value of each score over the clients where it is defined."""
    known = [scores for scores in rows if scores is not None]
    names = dict.fromkeys(name for scores in known for name in scores)
    defined = {name: [v for s in known if (v := s.get(name)) is not None] for name in names}
    return {name: min(values) if values else None for name, values in defined.items()}
