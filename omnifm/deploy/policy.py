"""What a hospital insists on, whatever the server's config says: a small TOML file of its own."""

import math
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omnifm import build
from omnifm.config import Config, one_line, read_toml
from omnifm.deploy.data import COLUMNS
from omnifm.errors import ConfigError, FederationError
from omnifm.federation.messages import Request
from omnifm.federation.strategies.omnifm import OmniFMOptions
from omnifm.privacy.accounting import LEAST_NOISE

_SCORED = ("val", "test")


class Policy(BaseModel):
    """The least a federation has to offer, and the most it may ask. Every default asks for nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    secure_aggregation: bool = Field(False, description="The server must learn the sum of updates alone.")
    min_example_noise: float = Field(0.0, ge=0, allow_inf_nan=False, description="Least noise of DP-SGD, in units of its clip.")
    min_client_noise: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Least noise on the sum of updates, in units of its clip; the server adds it."
    )
    min_clients: int = Field(0, ge=0, description="Fewest clients in the federation.")
    strategies: list[str] = Field([], description="Allowed strategies; empty: all.")
    allow_bank: bool = Field(True, description="Whether prototypes of spectra may go to OmniFM's bank.")
    allow_extras: bool = Field(True, description="Whether anything may leave besides weights, losses and scores.")
    allow_scores: bool = Field(
        True, description="Whether an evaluation is answered: the state of a metric, a line for every image, case or question."
    )
    columns: list[str] = Field(
        list(COLUMNS), description="Columns of the manifest by whose values a config may part the cohort; they get into ids."
    )
    min_examples: int = Field(0, ge=0, description="Fewest training examples of this hospital that an answer is made of.")
    max_rounds: int = Field(0, ge=0, description="Most rounds; 0: any number.")
    max_local_epochs: int = Field(
        0, ge=0, description="Most passes over the data in a round, or of fine-tuning before a test; 0: any number."
    )
    max_local_steps: int = Field(0, ge=0, description="Most optimiser steps in a round, where steps are counted; 0: any number.")
    max_epsilon: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Most epsilon of one training example, by the hospital's own count; 0: any."
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Delta of `max_epsilon`.")

    def check(self, config: Config, clients: int = 0) -> None:
        """Raise FederationError, in one line with everything that falls short, unless a federation is as it should be.

        Args:
            config: the server's.
            clients: how many there are; 0: not known yet.
        """
        short = [*self._privacy(config), *self._uploads(config), *self._effort(config)]
        if clients and clients < self.min_clients:
            short.append(f"{clients} clients, at least {self.min_clients} are wanted")
        if short:
            raise FederationError(f"refused by this hospital's policy: {'; '.join(short)}")

    def check_request(self, request: Request) -> None:
        """Raise FederationError if a request asks for more than its config may, or for scores of what nobody tests on."""
        short = []
        if self.max_rounds and request.round >= self.max_rounds and request.kind == "train":
            short.append(f"round {request.round}, at most {self.max_rounds} rounds are allowed")
        if request.kind == "evaluate":
            if not self.allow_scores:
                short.append("an evaluation, whose scores are not told")
            if request.settings.get("split") not in _SCORED:
                short.append(
                    f"an evaluation of split {request.settings.get('split')!r}, where {' and '.join(_SCORED)} are scored"
                )
        limits = (("epochs", self.max_local_epochs), ("steps", self.max_local_steps), ("finetune_epochs", self.max_local_epochs))
        for key, most in limits:
            asked = request.settings.get(key, 0)
            if most and not (isinstance(asked, int) and asked <= most):
                short.append(f"{key} = {asked!r} in a request, at most {most} are allowed")
        if short:
            raise FederationError(f"refused by this hospital's policy: {'; '.join(short)}")

    def check_amount(self, request: Request, examples: int, batch_size: int) -> None:
        """Raise FederationError if a request is for more passes over the data than may be, or for less of the data.

        Args:
            request: the server's.
            examples: the client's training examples.
            batch_size: of a step.
        """
        short, steps = [], request.settings.get("steps") or 0
        if request.settings.get("budget"):
            short.append("a number of examples in a request, which pooled data alone have")
        most = self.max_local_epochs * math.ceil(examples / batch_size)
        if most and steps > most:
            short.append(f"steps = {steps} in a request, {self.max_local_epochs} passes over the data are {most}")
        # A mean spectrum, and scores after fine-tuning, are made of them too.
        read = request.kind in ("train", "describe") or bool(request.settings.get("finetune_epochs"))
        if read and examples < self.min_examples:
            short.append(f"{examples} training examples, at least {self.min_examples} are wanted")
        if short:
            raise FederationError(f"refused by this hospital's policy: {'; '.join(short)}")

    def check_epsilon(self, epsilon: float) -> None:
        """Raise FederationError if with the answer that is asked for more would have left than may."""
        if self.max_epsilon and not epsilon <= self.max_epsilon:  # no comparison with NaN holds
            raise FederationError(
                f"refused by this hospital's policy: with this answer one example has an epsilon of {epsilon:.3g} "
                f"(delta {self.delta:g}), at most {self.max_epsilon:g} is allowed"
            )

    def _privacy(self, config: Config) -> Iterator[str]:
        privacy = config.privacy
        if self.secure_aggregation and not privacy.secure_aggregation:
            yield "privacy.secure_aggregation = false"
        for key, least in (("example_noise", self.min_example_noise), ("noise_multiplier", self.min_client_noise)):
            found = getattr(privacy, key)
            if found < least:
                yield f"privacy.{key} = {found:g}, at least {least:g} is wanted"
        if self.max_epsilon and privacy.example_noise < LEAST_NOISE:
            yield f"privacy.example_noise = {privacy.example_noise:g}, with which no epsilon of {self.max_epsilon:g} can be kept"
        if privacy.noise == "seeded" and (self.min_example_noise or self.min_client_noise or self.max_epsilon):
            yield 'privacy.noise = "seeded", which anybody can take off'

    def _uploads(self, config: Config) -> Iterator[str]:
        kind, options = build.strategy_options(config)
        if self.strategies and config.strategy not in self.strategies:
            yield f"strategy = {config.strategy!r}, allowed: {', '.join(self.strategies)}"
        sends = kind.card.up
        if isinstance(options, OmniFMOptions):
            sends = sends if options.reads_bank else ""  # without a bank the spectral path sends the model alone
            if options.reads_bank and not self.allow_bank:
                yield f"strategies.{config.strategy} has a bank"
        sends = "; ".join(filter(None, [sends, "mean spectra" if options.aggregation == "neighbours" else ""]))
        if sends and not self.allow_extras:
            yield f"strategy {config.strategy} sends more than the model ({sends})"

    def _effort(self, config: Config) -> Iterator[str]:
        federation = config.federation
        epochs = (("local_epochs", self.max_local_epochs), ("finetune_epochs", self.max_local_epochs))
        for key, most in (("rounds", self.max_rounds), *epochs, ("local_steps", self.max_local_steps)):
            found = getattr(federation, key)
            if most and found > most:
                yield f"federation.{key} = {found}, at most {most} are allowed"


def read_policy(path: Path) -> Policy:
    """Read a policy. Raises ConfigError naming the file and the key that is wrong."""
    raw = read_toml(path)
    try:
        policy = Policy.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {one_line(error)}") from None
    if unknown := sorted(set(policy.strategies) - build.STRATEGIES.keys()):
        raise ConfigError(f"{path}: strategies: there is no strategy {unknown[0]!r}")
    return policy
