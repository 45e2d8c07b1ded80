"""The evaluation contract: global, personal, worst, finetuned; on one split, for every client.

* `personal`: each client's model (shared for it, plus its private state) on its own examples; example-weighted mean.
* `worst`: per score, the lowest client (the highest where a score is better low, as a distance is).
* `global`: the one shared model on the pooled examples, scored as one set; None where the method has no such model.
* `finetuned`: as personal, after `finetune_epochs` local epochs of the task loss alone.
* references: what needs no training (bicubic enlargement, the majority's answer), as `personal` and `worst`.

Scores that are undefined (no examples, a class that never occurs) are None and stay None.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from omnifm.config import FederationConfig, OptimiserConfig
from omnifm.federation import guard
from omnifm.federation.messages import Reply, Request
from omnifm.federation.rounds import Engine, held
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
        holds: Mapping[str, frozenset[str]] | None = None,
        *,
        skips: bool = False,
    ) -> None:
        self._task, self._strategy, self._engine = task, strategy, engine
        self._sizes, self._config, self._has_global = sizes, config, has_global
        self._finetune_lr = optimiser.finetune_lr or optimiser.lr
        self._holds, self._skips = holds or {}, skips

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
                table[client][view] = self._task.metric(client).merge([state]).compute()
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
                held(self._tensors(server, client, view), self._holds.get(client)),
                self._strategy.extra_for_prediction(server, client),
                {**settings, **server.told(client)},
            )
            for client in clients
        )
        # A client whose fine-tuning failed, where the strategy tolerates that, answers without a state.
        excused = view == "finetuned" and self._strategy.tolerates_nonfinite
        return {reply.client: reply.extra for reply in self._vetted(requests, split, excused) if reply.extra}

    def _vetted(self, requests: Iterable[Request], split: str, excused: bool = False) -> Iterator[Reply]:
        """Yield replies whose states of the metric fit; `excused`: there may be none. Raises FederationError with the client."""

        def judge(reply: Reply) -> None:
            if reply.extra or not excused:
                self._task.metric(reply.client).vet(reply.extra, self._sizes[reply.client][split])

        yield from guard.ask(self._engine.exchange, requests, judge, skips=self._skips)

    def _tensors(self, server: ServerState, client: str, view: View) -> Mapping[str, Tensor]:
        return server.shared if view == "global" else self._strategy.shared_for(server, client)

    def references(self, completed: int, split: str) -> dict[str, dict[View, Scores]]:
        """Score the task's untrained references on `split`: by name, `personal` and `worst`."""
        clients = [client for client, sizes in self._sizes.items() if sizes[split] > 0]
        known = {client: frozenset(self._task.references(client)) for client in clients}
        found: dict[str, dict[View, Scores]] = {}
        for name in sorted(frozenset[str]().union(*known.values())):
            settings = {"split": split, "view": "reference", "reference": name}
            requests = (Request("evaluate", completed, c, settings=settings) for c in clients if name in known[c])
            scores = {r.client: self._task.metric(r.client).merge([r.extra]).compute() for r in self._vetted(requests, split)}
            mean = weighted_mean([(s, self._sizes[c][split]) for c, s in scores.items()])
            found[name] = {"personal": mean, "worst": worst(scores.values(), self._task.lower_is_better)}
        return found

    def _summary(
        self,
        states: Mapping[View, Mapping[str, Mapping[str, Tensor]]],
        table: Mapping[str, Mapping[View, Scores | None]],
        split: str,
    ) -> dict[View, Scores | None]:
        weights = {client: sizes[split] for client, sizes in self._sizes.items()}
        views: dict[View, Scores | None] = {
            "personal": weighted_mean([(table[c]["personal"], weights[c]) for c in table]),
            "worst": worst([table[c]["personal"] for c in table], self._task.lower_is_better),
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
        # Exactly rounded, so that the order of the clients in the config changes no bit.
        result[name] = math.fsum(float(v) * w for v, w in defined if v is not None) / total if total else None
    return result


def worst(rows: Iterable[Scores | None], lower_is_better: Collection[str] = ()) -> Scores:
    """Return the worst value of each score over the clients where it is defined: the least, or the largest if low is good."""
    known = [scores for scores in rows if scores is not None]
    names = dict.fromkeys(name for scores in known for name in scores)
    defined = {name: [v for s in known if (v := s.get(name)) is not None] for name in names}
    return {n: (max(v) if n in lower_is_better else min(v)) if v else None for n, v in defined.items()}
