"""The one schema of a run. TOML in, frozen and checked objects out; these classes hold the only defaults.

Unknown keys, wrong types and impossible combinations fail here, in one line, before any data is read. The options of a
strategy are checked by the strategy itself (`[strategies.NAME]`), when `build` looks it up.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from omnifm.errors import ConfigError
from omnifm.paths import anchor

_LATER = ("local_steps", "weighting", "min_replies", "deadline")
"""Keys of `[federation]` that came after results had been published; left at their defaults they change no digest."""
_LATER_SECTIONS = ("security", "privacy", "compression")
"""Sections of which the same is true."""


class Section(BaseModel):
    """Base of every config section: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# TOML tells 1 from 1.0 and people do not: a whole number is a fine float.
Real = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class CohortConfig(Section):
    """One cohort folder and how it is cut into clients."""

    path: str = Field(description="Folder of the cohort; relative paths are relative to the config file.")
    clients: int = Field(1, ge=1, description="Number of clients (`natural` and `by_column` find their own).")
    partition: Literal["natural", "by_modality", "dirichlet", "iid", "by_column"] | None = Field(
        None, description="How this cohort is cut; null: `federation.partition`."
    )
    column: str = Field("", description="The manifest column for `by_column`.")


class FederationConfig(Section):
    """Who takes part, how often, for how long."""

    cohorts: tuple[CohortConfig, ...] = Field((), strict=False, description="The cohorts of the federation.")
    rounds: int = Field(20, ge=1, description="Communication rounds.")
    participation: Real = Field(1.0, gt=0.0, le=1.0, description="Fraction of the clients that train in a round.")
    local_epochs: int = Field(1, ge=1, description="Passes over a client's training images per round.")
    local_steps: int = Field(
        0, ge=0, description="Optimiser steps of a client per round, in place of `local_epochs`; 0: whole epochs."
    )
    weighting: Literal["examples", "equal"] = Field(
        "examples", description="Weight of a client in every mean: its number of training examples, or the same for all."
    )
    min_replies: int = Field(
        0, ge=0, description="Across machines: replies that are enough for a round once `deadline` has passed; 0: all of them."
    )
    deadline: Real = Field(
        0.0, ge=0.0, description="Across machines: seconds after which a round waits for `min_replies` alone; 0: no deadline."
    )
    partition: Literal["natural", "by_modality", "dirichlet", "iid", "by_column"] = Field(
        "iid", description="How cohorts are cut into clients unless a cohort says otherwise."
    )
    gamma: Real = Field(0.5, gt=0.0, description="Concentration of the Dirichlet partition; small is uneven.")
    min_examples: int = Field(10, ge=1, description="A Dirichlet draw is repeated until each client has this many training rows.")
    label_space: Literal["name", "cohort"] = Field(
        "name", description="`name`: equal class names are one class; `cohort`: classes of different cohorts never are."
    )
    evaluate_every: int = Field(1, ge=1, description="Rounds between two evaluations on the validation split.")
    finetune_epochs: int = Field(1, ge=0, description="Local epochs before the `finetuned` test score; 0 leaves it out.")

    @model_validator(mode="after")
    def _deadline_and_quorum_go_together(self) -> "FederationConfig":
        if (self.min_replies > 0) != (self.deadline > 0):
            raise ValueError("min_replies and deadline go together: set both, or neither")
        return self


class DataConfig(Section):
    """What a client sees of its images."""

    image_size: int = Field(64, ge=8, description="Side of the square images, pixels.")
    channels: Literal[1, 3] = Field(1, description="1: luminance; 3: grey is repeated.")
    augment: Literal["none", "flip_shift"] = Field(
        "none", description="`flip_shift`: random mirror image and shift by up to 1/8."
    )
    cache: str = Field("", description="Folder of decoded images; empty: the user's cache folder.")


class ModelConfig(Section):
    """The shared network."""

    backbone: Literal["resnet18", "efficientnet_lite0"] = Field(
        "resnet18", description="Trunk of classification and of the compact VQA model; the other tasks have their own networks."
    )
    width: int = Field(64, ge=4, description="Channels of the network's first stage; ResNet-18 has 64, 16 suits a CPU.")
    stem_stride: Literal[1, 2] = Field(
        2, description="Stride of ResNet-18's first convolution; 1 keeps more detail of small images."
    )
    norm: Literal["group", "batch"] = Field("group", description="Normalisation layers.")
    buffers: Literal["average", "local", "drop"] = Field(
        "average",
        description="Running statistics of BatchNorm: averaged, kept by each client, or reset each round and taken from the "
        "client's training images before it is scored.",
    )
    weights: str = Field("", description="'' from scratch; 'imagenet' (efficientnet_lite0); or a safetensors file.")

    @model_validator(mode="after")
    def _known_combination(self) -> "ModelConfig":
        if self.backbone == "resnet18" and self.weights == "imagenet":
            raise ValueError("model.weights = 'imagenet' comes with model.backbone = 'efficientnet_lite0' alone")
        if self.backbone == "efficientnet_lite0" and (self.norm != "batch" or self.width != 64):
            raise ValueError(
                "efficientnet_lite0 has norm = 'batch' and no width: set model.norm = 'batch' and leave model.width out"
            )
        return self


class OptimiserConfig(Section):
    """The optimiser of a client; its state starts anew each round."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Real = Field(0.05, gt=0.0, description="Learning rate of the first round.")
    momentum: Real = Field(0.9, ge=0.0, lt=1.0, description="SGD only.")
    weight_decay: Real = Field(1e-4, ge=0.0)
    schedule: Literal["constant", "cosine"] = Field("constant", description="Learning rate over the rounds.")
    batch_size: int = Field(32, ge=1)
    clip_norm: Real = Field(0.0, ge=0.0, description="Largest norm of a step's gradient; 0: no clipping.")
    finetune_lr: Real | None = Field(None, gt=0.0, description="Learning rate before the `finetuned` score; null: `lr`.")


class SecurityConfig(Section):
    """Which replies the server refuses. What does not fit, is old or not from whom it says is refused anyway."""

    max_update_norm: Real = Field(0.0, ge=0.0, description="Longest update of a client, its L2 norm; 0: any length.")
    refused: Literal["end", "skip"] = Field(
        "end", description="After a refused reply: the run ends, or the round goes on without the client."
    )


class PrivacyConfig(Section):
    """What keeps a client's contribution from whoever sees the model, and from the server. Off by default."""

    clip: Real = Field(
        0.0,
        ge=0.0,
        description="Longest update of a client, its L2 norm; longer ones are shortened to it. 0: no client-level privacy.",
    )
    noise_multiplier: Real = Field(
        0.0, ge=0.0, description="Standard deviation of the noise on the sum of the updates, in units of `clip`."
    )
    example_clip: Real = Field(
        0.0,
        ge=0.0,
        description="Longest gradient of one training example; longer ones are shortened. 0: no example-level privacy.",
    )
    example_noise: Real = Field(
        0.0, ge=0.0, description="Standard deviation of the noise on a step's sum of gradients, in units of `example_clip`."
    )
    prototype_clip: Real = Field(
        0.0,
        ge=0.0,
        description="Longest spectrum of one image where a client tells of its images; longer ones are shortened. 0: no budget.",
    )
    prototype_noise: Real = Field(
        0.0,
        ge=0.0,
        description="Noise on the sums of these spectra, in units of what one image adds (one client, where `clip` is set).",
    )
    prototype_releases: int = Field(1, ge=1, description="Rounds in which a client sends prototypes; each one is paid for.")
    delta: Real = Field(1e-5, gt=0.0, lt=1.0, description="The delta for which epsilon is stated.")
    noise: Literal["secret", "seeded"] = Field(
        "secret",
        description="`secret`: drawn anew, known to nobody; `seeded`: repeatable, for studies alone: the seed undoes it.",
    )
    secure_aggregation: bool = Field(False, description="The server learns the sum of the updates and no client's own.")
    secure_range: Real = Field(8.0, gt=0.0, description="Largest change of a weight in a round that is added up; others are cut.")
    secure_threshold: Real = Field(
        0.67, gt=0.5, le=1.0, description="Share of a round's clients that must stay to its end; three always must."
    )

    @model_validator(mode="after")
    def _has_a_scale(self) -> "PrivacyConfig":
        if self.noise_multiplier and not self.clip:
            raise ValueError("privacy.noise_multiplier is in units of privacy.clip: set that too")
        if self.example_noise and not self.example_clip:
            raise ValueError("privacy.example_noise is in units of privacy.example_clip: set that too")
        return self

    @model_validator(mode="after")
    def _budgets_fit(self) -> "PrivacyConfig":
        if self.prototype_noise and not self.prototype_clip:
            raise ValueError("privacy.prototype_noise is in units of privacy.prototype_clip: set that too")
        if self.prototype_clip and not (self.clip or self.example_clip):
            raise ValueError("privacy.prototype_clip: the weights need a budget too; set privacy.example_clip or privacy.clip")
        weights = bool(self.noise_multiplier or self.example_noise)
        if self.prototype_clip and weights != bool(self.prototype_noise):
            without = "the prototypes" if weights else "the weights, which read the spectra,"
            raise ValueError(f"privacy.prototype_noise: {without} would have no noise; set it for both or for neither")
        return self


class CompressionConfig(Section):
    """How what a client uploads is made smaller. Off by default."""

    upload: Literal["none", "bf16", "int8", "topk"] = Field(
        "none", description="Changes of the weights in bfloat16 or 8 bits, or only those that are largest."
    )
    topk_share: Real = Field(0.1, gt=0.0, le=1.0, description="Share of a tensor's numbers that `topk` sends.")
    error_feedback: bool = Field(True, description="What was left out is added to the client's next upload.")

    @model_validator(mode="after")
    def _is_used(self) -> "CompressionConfig":
        fields = type(self).model_fields
        if self.upload != "topk" and self.topk_share != fields["topk_share"].default:
            raise ValueError("compression.topk_share is for compression.upload = 'topk'")
        if self.upload == "none" and not self.error_feedback:
            raise ValueError("compression.error_feedback is for uploads that are compressed: set compression.upload")
        return self


class EngineConfig(Section):
    """Where and how the arithmetic is done. `kind` and `workers` change the time a run takes, never its bits."""

    kind: Literal["local", "flower-simulation"] = Field(
        "local",
        description="What trains the clients: `local`, this process or `workers` of them; `flower-simulation`, Flower's on Ray.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="`bf16`: autocast of the forward pass; weights stay float32. Slower on a CPU without AVX-512."
    )
    channels_last: bool = Field(
        False, description="Memory layout of images and convolutions; with bf16 2.5 times faster on CPUs with AVX-512."
    )
    workers: int = Field(1, ge=1, description="Processes that train clients side by side.")
    ray_address: str = Field(
        "",
        description="For `flower-simulation`: a running Ray cluster, as `ray.init` takes it; empty: a new Ray on this machine.",
    )
    threads: int = Field(1, ge=1, description="CPU threads per process; another number may give other last bits.")

    @model_validator(mode="after")
    def _ray_is_for_the_simulation(self) -> "EngineConfig":
        if self.ray_address and self.kind != "flower-simulation":
            raise ValueError("ray_address goes with kind = 'flower-simulation'")
        return self


class Config(Section):
    """A run, resolved."""

    task: str = Field("classification", description="What is learned; `omnifm list tasks` names them.")
    strategy: str = "omnifm"
    seed: int = Field(0, ge=0)
    federation: FederationConfig = FederationConfig.model_construct()
    data: DataConfig = DataConfig.model_construct()
    model: ModelConfig = ModelConfig.model_construct()
    optimiser: OptimiserConfig = OptimiserConfig.model_construct()
    engine: EngineConfig = EngineConfig.model_construct()
    security: SecurityConfig = SecurityConfig.model_construct()
    privacy: PrivacyConfig = PrivacyConfig.model_construct()
    compression: CompressionConfig = CompressionConfig.model_construct()
    strategies: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Options by strategy name.")
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Options by task name.")

    @model_validator(mode="before")
    @classmethod
    def _engine_in_a_word(cls, raw: Any) -> Any:
        """Take `engine = "flower-simulation"` for a table with that kind."""
        return {**raw, "engine": {"kind": raw["engine"]}} if isinstance(raw.get("engine"), str) else raw

    @model_validator(mode="after")
    def _has_cohorts(self) -> "Config":
        if not self.federation.cohorts:
            raise ValueError("federation.cohorts is empty: name at least one cohort folder")
        if self.federation.label_space == "cohort" and len({c.path for c in self.federation.cohorts}) < len(
            self.federation.cohorts
        ):
            raise ValueError("federation.cohorts names one folder twice: use clients = N instead")
        return self


def one_line(error: ValidationError) -> str:
    """Return the first complaint of pydantic as one line that starts with the key."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    reason = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    line = f"{key}: {reason}" if key else reason
    # A key may be any text in TOML, a line break too.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def parse(raw: Mapping[str, Any]) -> Config:
    """Check a nested mapping. Raises ConfigError with one line that names the key."""
    try:
        return Config.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError(one_line(error)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ConfigError naming it when it is missing or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file ({error})") from None


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML config, apply `key=TOML-VALUE` overrides, check the result.

    Relative cohort paths and weight files in the file are relative to the file; those in overrides to the working folder.

    Raises:
        ConfigError: the file is missing or no TOML, or a key is wrong.
    """
    raw = read_toml(path)
    anchor(raw, path.resolve().parent)
    changes: dict[str, Any] = {}
    for override in overrides:
        key, value = parse_override(override)
        put(changes, key, value)
        put(raw, key, value)
    anchor(changes, Path.cwd())
    anchor(raw, Path.cwd())
    return parse(raw)


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=VALUE`; VALUE is TOML, or a bare word, which is a string."""
    key, sign, value = text.partition("=")
    if not sign or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key.strip()):
        raise ConfigError(f"--set {text}: expected key=VALUE, e.g. federation.rounds=10")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        if re.fullmatch(r"[A-Za-z_./~][\w./~-]*", value):
            return key.strip(), value
        raise ConfigError(f"--set {text}: {value!r} is no TOML value (text needs quotes)") from None


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in nested tables, making tables on the way."""
    *tables, last = key.split(".")
    for depth, table in enumerate(tables):
        inner = raw.setdefault(table, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {key}: {'.'.join(tables[: depth + 1])} is a value, not a table")
        raw = inner
    raw[last] = value


def dump(config: Config) -> dict[str, Any]:
    """Return the resolved config as plain data that TOML can hold (null keys are left out: null is their default)."""
    return config.model_dump(mode="json", exclude_none=True)


def digest(config: Config) -> str:
    """Return 12 hex digits that change with anything that can change a score.

    The kind of engine, workers, the cache folder and the folder a cohort lies in cannot; its name can.
    """
    raw = dump(config)
    for key in ("kind", "workers", "ray_address"):
        raw["engine"].pop(key)
    raw["data"].pop("cache")
    for cohort in raw["federation"]["cohorts"]:
        cohort["path"] = Path(cohort["path"]).name
    raw["strategies"] = {config.strategy: raw["strategies"].get(config.strategy, {})}
    if not raw["tasks"]:
        raw.pop("tasks")  # a run without such options has the digest it had before there were any
    for section in _LATER_SECTIONS:
        if getattr(config, section) == type(getattr(config, section))():
            raw.pop(section)
    for key in _LATER:
        if raw["federation"][key] == FederationConfig.model_fields[key].default:
            raw["federation"].pop(key)
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:12]
