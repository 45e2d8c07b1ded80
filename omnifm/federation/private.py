"""Client-level differential privacy on the round loop, and which runs can have it or secure aggregation.

    Delta_i <- Delta_i min(1, C / || Delta_i ||_2)          mean <- (1 / m) (sum_i Delta_i + N(0, (z C)^2 I))

Clients shorten their updates (`Site`), the guard refuses a longer one where it can see it, the server adds noise to the mean,
once, before the strategy makes anything of it. Whatever it makes then (a step, an optimiser, another round) costs nothing more.
Noise is in float64, from ChaCha20's key stream; that floating-point numbers are no real ones (I. Mironov, CCS 2012) stays so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omnifm.config import Config, PrivacyConfig, SecurityConfig
from omnifm.errors import ConfigError
from omnifm.federation import example_level, secure
from omnifm.federation.budgets import NOT_COVERED, Worth, by_client, of_a_client
from omnifm.federation.noise import stream_key
from omnifm.federation.strategy import Strategy
from omnifm.privacy import accounting, crypto

_CLIENT, _EXAMPLE = "privacy.clip", "privacy.example_clip"


class Noise:
    """The server's noise. Args: `privacy`: clip and multiplier; `seed`: of the run, used where the noise is to be repeatable."""

    def __init__(self, privacy: PrivacyConfig, seed: int) -> None:
        self._privacy, self._seed = privacy, seed

    def offsets(self, shared: Mapping[str, Tensor], round_index: int, clients: int) -> dict[str, Tensor]:
        """Return N(0, (z C / m)^2) for the mean of m clients, float64, by name; nothing without noise."""
        scale = self._privacy.noise_multiplier * self._privacy.clip / clients
        if not scale:
            return {}
        sizes = {name: shared[name].numel() for name in sorted(shared)}
        draws = torch.from_numpy(crypto.normals(self._key(round_index), sum(sizes.values()))) * scale
        parts = zip(sizes, draws.split(list(sizes.values())), strict=True)
        return {name: part.view(shared[name].shape) for name, part in parts}

    def _key(self, round_index: int) -> bytes:
        return stream_key(self._privacy, self._seed, b"omnifm noise 1", "noise", round_index)


def longest_update(security: SecurityConfig, privacy: PrivacyConfig) -> float:
    """Return the norm beyond which an update is refused; 0: none is."""
    bounds = [security.max_update_norm, privacy.clip * (1 + accounting.SLACK)]
    return min((bound for bound in bounds if bound), default=0.0)


def check_private(config: Config, strategy: Strategy, shared: Mapping[str, Tensor], schedule: Sequence[Sequence[str]]) -> None:
    """Raise ConfigError, in one line, unless the run can have the privacy it asks for.

    Args:
        config: the run.
        strategy: as the site left it: it knows buffers and who holds what.
        shared: the shared tensors.
        schedule: who takes part in which round.
    """
    privacy = config.privacy
    if privacy.secure_aggregation:
        _check_mean("privacy.secure_aggregation", config, strategy, shared)
        _check_secure(config, shared, len(schedule[0]))
    if privacy.clip:
        _check_mean("privacy.clip", config, strategy, shared)
        _check_uploads(_CLIENT, config, strategy)
        if config.federation.weighting != "equal":
            raise ConfigError("privacy.clip: the noise is for clients of equal weight; set federation.weighting = 'equal'")
        if config.security.refused != "end":
            raise ConfigError("privacy.clip: a round must have all its clients; leave security.refused at 'end'")
        accounting.spent(privacy.noise_multiplier, privacy.delta, len(strategy.context.clients), schedule)

    if privacy.example_clip:
        _check_example(config, strategy)
    if privacy.prototype_clip and not strategy.uploads:
        raise ConfigError(f"privacy.prototype_clip: strategy {config.strategy} tells nothing of its images' spectra")


def _check_uploads(key: str, config: Config, strategy: Strategy) -> None:
    if strategy.uploads and not config.privacy.prototype_clip:
        raise ConfigError(
            f"{key}: with strategy {config.strategy} a client also sends {strategy.uploads}, which get no noise; "
            "set privacy.prototype_clip and privacy.prototype_noise"
        )
    if option := strategy.unfit(by_example=key == _EXAMPLE):
        raise ConfigError(f"{key}: it cannot be had with strategies.{config.strategy}: {option}")


def _check_example(config: Config, strategy: Strategy) -> None:
    key, kind = _EXAMPLE, type(strategy)
    hooks = ("describe", "penalty", "correct", "prepare", "phases", "finish")
    own = {hook for hook in hooks if getattr(kind, hook) is not getattr(Strategy, hook)}
    if own - strategy.by_example or strategy.pooled:
        raise ConfigError(f"{key}: strategy {config.strategy} trains or sends otherwise than by the gradients of single examples")
    if config.task != "classification":
        raise ConfigError(f"{key}: the loss of task {config.task} is not known to be a mean over examples")
    if config.engine.precision != "fp32":
        raise ConfigError(f"{key}: set engine.precision = 'fp32'")
    _check_uploads(key, config, strategy)
    accounting.epsilon_of_examples(config.privacy.example_noise, config.privacy.delta, 1, 1.0)


def _check_mean(key: str, config: Config, strategy: Strategy, shared: Mapping[str, Tensor]) -> None:
    if not strategy.mean_suffices or strategy.neighbourhoods is not None:
        raise ConfigError(f"{key}: the server of strategy {config.strategy} needs more of the clients' tensors than their mean")
    if strategy.holds:
        raise ConfigError(f"{key}: the clients of task {config.task} hold different tensors, of which there is no one mean")
    if moving := strategy.buffers & shared.keys():
        raise ConfigError(
            f"{key}: {min(moving)} is a statistic of images, no parameter; set model.norm = 'group' or model.buffers = 'local'"
        )


def _check_secure(config: Config, shared: Mapping[str, Tensor], sampled: int) -> None:
    privacy, key = config.privacy, "privacy.secure_aggregation"
    if sampled < secure.LEAST:
        raise ConfigError(f"{key}: a round has {sampled} clients, it takes at least {secure.LEAST} to hide one")
    if config.engine.workers > 1 or config.engine.kind != "local":
        raise ConfigError(f"{key}: a client's keys stay in one process; set engine.workers = 1 and engine.kind = 'local'")
    if config.security.max_update_norm:
        raise ConfigError(f"{key}: the server sees no client's update, so security.max_update_norm cannot hold")
    numbers = sum(tensor.numel() for tensor in shared.values())
    error = numbers**0.5 * secure.ring(privacy, sampled).error(1)
    if privacy.clip and error > accounting.SLACK * privacy.clip:
        raise ConfigError(
            f"{key}: rounding moves an update by up to {error:.2g}, too much for privacy.clip; lower privacy.secure_range"
        )
    crypto.public_key(bytes(crypto.KEY_BYTES))  # the extra is there


def statement(
    config: Config, num_train: Mapping[str, int], schedule: Sequence[Sequence[str]], strategy: Strategy | None = None
) -> dict[str, Any] | None:
    """Return what `metrics.json` says of a run's privacy; None if the run has none. `strategy`: as in `budgets.by_client`."""
    privacy = config.privacy
    record: dict[str, Any] = {}
    units: list[dict[str, Any]] = []
    if privacy.clip:
        record["client_level"] = _client_level(config, len(num_train), schedule)
        units.append({"unit": "one client", "client": None, **_worth(of_a_client(config, schedule, strategy))})
    if privacy.secure_aggregation:
        size = len(schedule[0])
        record["secure_aggregation"] = {
            "threshold": secure.threshold(privacy, size),
            "clients_per_round": size,
            "quantum": secure.ring(privacy, size).quantum,
        }
    if privacy.example_clip:
        found = by_client(config, num_train, schedule, strategy)
        record["example_level"] = example_level.record(privacy, {client: worth.weights for client, worth in found.items()})
        worst = max(found, key=lambda client: found[client].together)
        units.append({"unit": "one training image of one client", "client": worst, **_worth(found[worst])})
    if privacy.prototype_clip and strategy is not None:
        record["prototypes"] = _prototypes(privacy, strategy)
    if units:
        record["combined"] = {"delta": privacy.delta, "units": units}
    return {**record, "not_covered": NOT_COVERED} if record else None


def _worth(found: Worth) -> dict[str, float | None]:
    return {name: accounting.stated(value) for name, value in found._asdict().items()}


def _prototypes(privacy: PrivacyConfig, strategy: Strategy) -> dict[str, Any]:
    return {
        "clip": privacy.prototype_clip,
        "noise_multiplier": privacy.prototype_noise,
        "noise": privacy.noise,
        "of": "a client's mean" if privacy.clip else "a client's sum",
        "releases": privacy.prototype_releases if strategy.sends_prototypes else 0,
        "mean_spectrum": strategy.needs_description,
    }


def _client_level(config: Config, clients: int, schedule: Sequence[Sequence[str]]) -> dict[str, Any]:
    privacy = config.privacy
    found = accounting.spent(privacy.noise_multiplier, privacy.delta, clients, schedule)
    return {
        "epsilon": accounting.stated(found.epsilon),
        "epsilon_participation_known": accounting.stated(found.participation_known),
        "delta": privacy.delta,
        "clip": privacy.clip,
        "noise_multiplier": privacy.noise_multiplier,
        "noise": privacy.noise,
        "neighbours": "replace one client",
        "clients_per_round": len(schedule[0]),
        "clients": clients,
        "rounds": len(schedule),
    }
