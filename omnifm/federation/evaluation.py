"""The evaluation contract: global, personal, worst, finetuned; on one split, for every client.

* `personal`: each client's model (shared for it, plus its private state) on its own examples; mean over clients, weighted by
  the examples behind the score (all of them, or the closed questions alone; every slice of a volume where slices are scored
  one by one). So a score that is a mean over examples is the same in `personal` and `global` where all clients have one
  model. Counts are added up.
* `worst`: per score, the lowest client (the highest where a score is better low, as a distance is). Counts have none.
* `global`: the one shared model on the pooled examples, scored as one set; None where the method has no such model.
* `finetuned`: as personal, after `finetune_epochs` local epochs of the task loss alone.
* references: what needs no training (bicubic enlargement, the majority's answer), as `personal` and `worst`.

Scores that are undefined (no examples, a class that never occurs) are None and stay None. Where a client answered without a
state (its fine-tuning or predictions are not finite, and the strategy goes on), or with one that was refused, all scores of that
view are None: those of the others alone are better the worse that client does. A client that did not answer at all (it is late,
or tells no scores, and `federation.min_replies` allows that) is left out.
"""

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from omnifm.config import FederationConfig, OptimiserConfig
from omnifm.federation import guard
from omnifm.federation.messages import Reply, Request
from omnifm.federation.rounds import Engine, held
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import Strategy
from omnifm.metrics.base import Scores
from omnifm.tasks.base import Task

log = logging.getLogger(__name__)

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


class Scored(NamedTuple):
    """One client's scores; how many examples it has; and the share of them behind each score that is not over all."""

    scores: Scores
    examples: int
    shares: Mapping[str, Fraction] = MappingProxyType({})

    def weight(self, name: str) -> int | Fraction:
        """Return the number of examples behind a score. Exact, so that a whole number is one."""
        return self.examples * self.shares.get(name, 1)


class Answers(NamedTuple):
    """States of the metric and scores by client, and the clients that answered without a state that counts."""

    states: Mapping[str, Mapping[str, Tensor]]
    scored: Mapping[str, Scored]
    lost: frozenset[str]

    def defined(self, scores: Scores) -> Scores:
        """Return scores over all clients; None each if one was lost."""
        return dict.fromkeys(scores) if self.lost else scores


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
        answers = {"personal": self._ask(server, completed, clients, split, "personal")}
        if self._has_global:
            answers["global"] = self._ask(server, completed, clients, split, "global")
        if finetune and self._config.finetune_epochs:
            trained = [client for client in clients if self._sizes[client]["train"] > 0]
            answers["finetuned"] = self._ask(server, completed, trained, split, "finetuned")
        table: dict[str, dict[View, Scores | None]] = {
            client: {view: found.scored[client].scores if client in found.scored else None for view, found in answers.items()}
            for client in self._sizes
        }
        return Evaluation(split, self._summary(answers), table)

    def _scored(self, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Scored]:
        metrics = {client: self._task.metric(client).merge([states[client]]) for client in self._sizes if client in states}
        # All tensors of a state have a line for each example, whatever that is: a row of the manifest, or a slice of one.
        lines = {client: len(next(iter(states[client].values()))) for client in metrics}
        return {c: Scored(metric.compute(), lines[c], metric.shares()) for c, metric in metrics.items()}

    def _ask(self, server: ServerState, completed: int, clients: Sequence[str], split: str, view: View) -> Answers:
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
        # A client whose fine-tuning or predictions are not finite, where the strategy tolerates that, answers without a state.
        return self._answers(requests, split, view, excused=self._strategy.tolerates_nonfinite)

    def _answers(self, requests: Iterable[Request], split: str, what: str, *, excused: bool = False) -> Answers:
        """Ask; `excused`: there may be answers without a state. Raises FederationError with a client whose state does not fit."""
        seen: set[str] = set()

        def exchange(requests: Iterable[Request]) -> Iterator[Reply]:
            for reply in self._engine.exchange(requests):
                seen.add(guard.sender(reply))
                yield reply

        def judge(reply: Reply) -> None:
            if reply.extra or not excused:
                self._task.metric(reply.client).vet(reply.extra, self._sizes[reply.client][split])

        states: dict[str, Mapping[str, Tensor]] = {}
        for reply in guard.ask(exchange, requests, judge, skips=self._skips):
            if reply.extra:
                states[reply.client] = reply.extra
            else:
                who = guard.label(reply, reply.round)
                log.warning("%s: a loss or prediction is not finite; the scores over all clients (%s) are undefined", who, what)
        return Answers(states, self._scored(states), frozenset(seen & self._sizes.keys() - states.keys()))

    def _tensors(self, server: ServerState, client: str, view: View) -> Mapping[str, Tensor]:
        return server.shared if view == "global" else self._strategy.shared_for(server, client)

    def references(self, completed: int, split: str) -> dict[str, dict[View, Scores]]:
        """Score the task's untrained references on `split`: by name, `personal` and `worst`.

        One that some clients lack (they have another task) has no main score: it would stand beside a mean over all clients.
        """
        clients = [client for client, sizes in self._sizes.items() if sizes[split] > 0]
        known = {client: frozenset(self._task.references(client)) for client in clients}
        found: dict[str, dict[View, Scores]] = {}
        for name in sorted(frozenset[str]().union(*known.values())):
            settings = {"split": split, "view": "reference", "reference": name}
            asked = [client for client in clients if name in known[client]]
            requests = (Request("evaluate", completed, client, settings=settings) for client in asked)
            found[name] = self._over_clients(self._answers(requests, split, name))
            if len(asked) < len(clients):
                for scores in found[name].values():
                    scores.pop(self._task.primary, None)
        return found

    def _summary(self, answers: Mapping[View, Answers]) -> dict[View, Scores | None]:
        views: dict[View, Scores | None] = {**self._over_clients(answers["personal"]), "global": None, "finetuned": None}
        if "finetuned" in answers:
            views["finetuned"] = self._over_clients(answers["finetuned"])["personal"]
        if shared := answers.get("global"):
            metric = self._task.metric()
            views["global"] = shared.defined((metric.merge(shared.states.values()) if shared.states else metric).compute())
        return views

    def _over_clients(self, answers: Answers) -> dict[View, Scores]:
        counts, rows = self._task.metric().counts, list(answers.scored.values())
        found = {"personal": weighted_mean(rows, counts), "worst": worst(rows, self._task.lower_is_better, counts)}
        return {view: answers.defined(scores) for view, scores in found.items()}


def weighted_mean(rows: Iterable[Scored], counts: Collection[str] = ()) -> Scores:
    """Return the mean of each score over the clients where it is defined, weighted by the examples behind it; the sum of counts.

    None where it is defined nowhere.
    """
    known = [row for row in rows if row.examples > 0]
    result: Scores = {}
    for name in dict.fromkeys(name for row in known for name in row.scores):
        defined = [(value, row.weight(name)) for row in known if (value := row.scores.get(name)) is not None]
        # Exactly rounded, so that the order of the clients in the config changes no bit.
        if name in counts:
            result[name] = math.fsum(value for value, _ in defined) if defined else None
        else:
            total = sum(weight for _, weight in defined)
            result[name] = math.fsum(value * weight for value, weight in defined) / total if total else None
    return result


def worst(rows: Iterable[Scored], lower_is_better: Collection[str] = (), counts: Collection[str] = ()) -> Scores:
    """Return the worst value of each score over the clients where it is defined: the least, or the largest if low is good.

    Counts are left out: the client with the most examples has the most of anything.
    """
    known = [row.scores for row in rows]
    names = dict.fromkeys(name for scores in known for name in scores if name not in counts)
    defined = {name: [v for s in known if (v := s.get(name)) is not None] for name in names}
    return {n: (max(v) if n in lower_is_better else min(v)) if v else None for n, v in defined.items()}
