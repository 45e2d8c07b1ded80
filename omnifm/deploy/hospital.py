"""What answers the server's calls where one client's data are."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnifm import build
from omnifm.config import Config, dump, parse
from omnifm.data.words import Discretion
from omnifm.deploy.data import Own, data_apart, own_client, public
from omnifm.deploy.ledger import Answer, Ledger
from omnifm.deploy.policy import Policy
from omnifm.engines.calls import Call, pack, unpack
from omnifm.errors import DataError, FederationError, OmnifmError
from omnifm.federation.client import Site
from omnifm.federation.introduction import read_introduction
from omnifm.federation.messages import Request, decode, encode
from omnifm.federation.release import Passed

log = logging.getLogger(__name__)

_OWN_LOG = "the hospital's own log says why"


@dataclass
class _Open:
    """The site in use, what it was built for, and how many training examples its client has."""

    header: Mapping[str, Any]
    site: Site
    config: Config
    examples: int


class Hospital:
    """Answers packed calls for one client. Its data, model and private state stay between calls.

    Args:
        cohort: the client's data.
        client: its id.
        store: folder of private state, on this machine's disk, a folder in it for each run. The ledger of what has left, in all
            runs together, is in it.
        cache: folder of decoded images; empty: the user's cache folder.
        policy: what this hospital insists on.
        discretion: what may be told of answers.
    """

    def __init__(
        self,
        cohort: Path,
        client: str,
        store: Path,
        cache: str = "",
        *,
        policy: Policy | None = None,
        discretion: Discretion | None = None,
    ) -> None:
        self._cohort, self._client, self._store, self._cache = cohort, client, store, cache
        self._policy = policy or Policy()
        self._discretion = discretion or Discretion()
        self._ledger = Ledger(store / f"ledger-{client}.json")
        self._open: _Open | None = None

    def answer(self, blob: bytes) -> bytes:
        """Answer one packed call with another; whatever goes wrong is an answer too.

        What is wrong with data may name a row, a patient or a file, and so may any crash: the server hears that, no more.
        """
        try:
            call = unpack(blob)
            answers = {"introduce": self._introduce, "answer": self._reply}
            if call.kind not in answers:
                raise FederationError(f"the server asks for {call.kind!r}, which this version does not know")
            return pack(answers[call.kind](call))
        except DataError as error:
            log.warning("%s", error)
            return pack(
                Call("mistake", {"message": f"client {self._client}: its data cannot be used as the config asks; {_OWN_LOG}"})
            )
        except OmnifmError as error:
            log.warning("%s", error)
            # Where the folder lies may hold a person's name.
            return pack(Call("mistake", {"message": str(error).replace(f"{self._store.parent}/", "")}))
        except Exception:
            log.exception("client %s: failed", self._client)
            return pack(Call("crash", {"message": _OWN_LOG}))

    def _introduce(self, call: Call) -> Call:
        own = self._own(self._config(call.header))
        return Call("introduction", own.introduction.model_dump(mode="json"))

    def _reply(self, call: Call) -> Call:
        request = decode(call.body)
        if not isinstance(request, Request):
            raise FederationError(f"client {self._client}: the server sent a reply")
        if request.client != self._client:
            raise FederationError(f"client {self._client}: was asked in the name of client {request.client}")
        self._policy.check_request(request)
        started = time.perf_counter()
        opened = self._opened(call.header)
        self._policy.check_amount(request, opened.examples, opened.config.optimiser.batch_size)
        passed = opened.site.release.watch() if opened.site.release else Passed()
        reply = opened.site.handle(request)
        self._note(Answer.to(request, opened.config, opened.examples, reply, passed), opened.config)
        log.info("%s, round %d: answered in %.1f s", request.kind, request.round, time.perf_counter() - started)
        return Call("reply", {}, encode(reply))

    def _note(self, answer: Answer, config: Config) -> None:
        """Put an answer into the ledger before it leaves.

        Raises:
            FederationError: with it more would have left than the policy allows.
            CheckpointError: the disk refuses.
        """
        if answer == Answer():
            return
        # Without noise that nobody knows there is no epsilon to tell of.
        delta, noisy = self._policy.delta, bool(config.privacy.example_noise) and config.privacy.noise == "secret"
        epsilon = self._ledger.epsilon(delta, answer) if noisy or self._policy.max_epsilon else math.inf
        self._policy.check_epsilon(epsilon)
        self._store.mkdir(parents=True, exist_ok=True)
        self._ledger.add(answer)
        if noisy:
            log.info("all answers so far: epsilon %.3g of one training example (delta %g)", epsilon, delta)

    def _config(self, header: Mapping[str, Any]) -> Config:
        """Return the server's config with this machine's folders.

        Raises:
            ConfigError: it is none, or pools data.
            FederationError: it falls short of this hospital's policy.
        """
        config = public(parse(header.get("config", {})))
        self._policy.check(config)
        return config.model_copy(update={"data": config.data.model_copy(update={"cache": self._cache})})

    def _place(self, header: Mapping[str, Any]) -> Path:
        """Return the folder of private state of the server's run: no run reads or removes another one's."""
        run = header.get("run", "")
        if not isinstance(run, str):
            raise FederationError("the server's call has no text for the name of its run")
        # What the server says becomes no name of a file.
        return self._store / f"run-{hashlib.sha256(run.encode()).hexdigest()[:16]}" if run else self._store

    def _own(self, config: Config) -> Own:
        return own_client(config, self._cohort, self._client, self._discretion, self._policy.columns)

    def _opened(self, header: Mapping[str, Any]) -> _Open:
        """Return what answers for this federation; what is in use, unless the federation is another one."""
        if self._open is None or self._open.header != header:
            self._open = None  # the old model's memory is free before the new one is built
            config = self._config(header)
            own = self._own(config)
            data = data_apart(config, _introductions(header), own)
            self._policy.check(config, len(data.plans))
            site = build.make_site(config, self._place(header), data)
            # What the server checks before a run: one that leaves it out gets nothing all the same.
            build.make_schedule(config, site, [plan.id for plan in data.plans])
            self._open = _Open(header, site, config, build.num_train(data, site.task)[self._client])
            asked = {name: value for name, value in dump(config)["privacy"].items() if value}
            if not config.privacy.prototype_clip:
                del asked["prototype_releases"]  # of nothing
            log.info("strategy %s, %d clients, privacy %s", config.strategy, len(data.plans), asked)
            log.info("%d training examples here", self._open.examples)
        return self._open


def _introductions(header: Mapping[str, Any]) -> list[Any]:
    found = header.get("introductions")
    if not isinstance(found, list):
        raise FederationError("the server's call lacks the introductions")
    return [read_introduction(json.dumps(one)) for one in found]
