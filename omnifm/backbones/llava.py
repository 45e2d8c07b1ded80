"""LLaVA's shape (Liu et al., NeurIPS 2023): CLIP's vision tower, a connector of two linear layers, a causal language model.

    r = tower(x)                        (b, l, d_v): patch tokens of one of CLIP's last layers, without the class token
    e = W_2 gelu(W_1 r' + b_1) + b_2    (b, L, d_t): r' enters the language model through the connector
    sequence = [ <s> | e | prompt | answer </s> ]

What is trained (FedVLMBench's names): `F-C` the connector; `F-L` LoRA (Hu et al., ICLR 2022) on all linear layers of the
language model but its output; `F-CL` both at once; `F-2stage` first the one, then the other. All else is frozen then, so it never
travels. `full` trains everything, which only small models from scratch want. Networks come from transformers, LoRA from peft;
weights from local folders in the Hugging Face layout (safetensors only), or random at a small size. Nothing is downloaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from omnifm.backbones.offline import go_offline
from omnifm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, LlamaForCausalLM

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD = -1
"""What fills up token lists to one length; no tokenizer has such an id."""
Tune = Literal["full", "F-C", "F-L", "F-CL", "F-2stage"]
_CONNECTOR_PLACES = ("multi_modal_projector.", "model.multi_modal_projector.", "head.connector.", "")


class LlavaOptions(BaseModel):
    """Where the weights come from, what is trained, and the size of what has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tune: Tune = Field("full", description="What is trained: F-C, F-L, F-CL, F-2stage, or full (small models only).")
    switch_round: int | None = Field(None, ge=1, description="F-2stage: the first round that trains LoRA; null: half of them.")
    vision: str = Field("", description="Folder of a CLIP vision tower; empty: small and random.")
    language: str = Field("", description="Folder of a causal language model and its tokenizer.json; empty: small and random.")
    connector: str = Field("", description="safetensors file with the connector (LLaVA's multi_modal_projector); empty: random.")
    vision_layer: int = Field(-2, le=-1, description="Layer of the tower that is read; LLaVA reads the last but one.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of frozen towers from a folder.")
    lora_rank: int = Field(8, ge=1)
    lora_alpha: float = Field(32, gt=0, description="LoRA's product is scaled by lora_alpha / lora_rank.")
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    depth: int = Field(2, ge=2, description="Layers of a small tower and of a small language model.")
    patch: int = Field(8, ge=2, description="Side of a small tower's patches, pixels.")
    vocabulary: int = Field(1000, ge=300, description="Tokens that the small model's tokenizer learns at most.")

    @property
    def connects(self) -> bool:
        """Whether the connector is trained."""
        return self.tune != "F-L"

    @property
    def adapts(self) -> bool:
        """Whether the language model gets LoRA."""
        return self.tune in ("F-L", "F-CL", "F-2stage")


class VisionTower(nn.Module):
    """CLIP's vision tower up to the layer that is read: images in [0, 1], `(b, 3, h, w)`, to patch tokens `(b, l, d_v)`."""

    def __init__(self, tower: "CLIPVisionModel", layer: int) -> None:
        super().__init__()
        layers = tower.encoder.layers
        if -layer > len(layers):
            raise ConfigError(f"tasks.vqa.llava.vision_layer = {layer}: the tower has {len(layers)} layers")
        # Later layers would be computed, and travel in a full training, for nothing.
        tower.encoder.layers = layers[: len(layers) + layer + 1]
        tower.post_layernorm = nn.Identity()
        self.tower = tower
        self.token_dim = int(tower.config.hidden_size)
        for name, values in (("mean", CLIP_MEAN), ("std", CLIP_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the tokens, float32."""
        pixels = (image - self.get_buffer("mean")) / self.get_buffer("std")
        weight = self.tower.embeddings.patch_embedding.weight
        tokens: Tensor = self.tower(pixel_values=pixels.to(weight.dtype)).last_hidden_state[:, 1:]
        return tokens.float()


class Connector(nn.Module):
    """Two linear layers with a GELU between; names as in LLaVA's checkpoints."""

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_dim, text_dim)
        self.linear_2 = nn.Linear(text_dim, text_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `(b, L, d_v)` to `(b, L, d_t)`."""
        mapped: Tensor = self.linear_2(nn.functional.gelu(self.linear_1(tokens)))
        return mapped


class Answerer(nn.Module):
    """Connector and language model.

    Args:
        connector: from r' to the language model's inputs.
        language: a causal language model of transformers.
        max_answer: tokens generated at most.
    """

    def __init__(self, connector: Connector, language: "LlamaForCausalLM", max_answer: int) -> None:
        super().__init__()
        self.connector = connector
        self.language = language
        self._max_answer = max_answer
        self._start, self._ends = special_tokens(language.config.to_dict())

    def logits(self, tokens: Tensor, question: Tensor, answer: Tensor) -> Tensor:
        """Return logits `(b, m, vocabulary)` under teacher forcing: for each token, given r', prompt and the true tokens before.

        Args:
            tokens: r', `(b, L, d_v)`.
            question: `(b, q)` int64, the prompt, `PAD` in front.
            answer: `(b, m)` int64, `PAD` behind.
        """
        embedded, mask = self._prompt(tokens, question)
        embedded = torch.cat([embedded, self._embed(answer)], dim=1)
        mask = torch.cat([mask, answer != PAD], dim=1).long()
        count = answer.shape[1]
        output = self.language(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),  # padding in the middle takes no position
            logits_to_keep=count + 1,
            use_cache=False,
        )
        found: Tensor = output.logits[:, -count - 1 : -1]
        return found

    def generate(self, tokens: Tensor, question: Tensor) -> Tensor:
        """Return freely generated token ids `(b, n)`, the most probable at each step, `PAD` from the end token on."""
        from transformers import GenerationConfig

        embedded, mask = self._prompt(tokens, question)
        ends = list(self._ends)
        config = GenerationConfig(max_new_tokens=self._max_answer, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
        said: Tensor = self.language.generate(inputs_embeds=embedded, attention_mask=mask.long(), generation_config=config)
        return until_end(said, self._ends)

    def _prompt(self, tokens: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        start = torch.full((len(tokens), 1), self._start, device=tokens.device)
        words = self._embed(question)
        embedded = torch.cat([self._embed(start), self.connector(tokens).to(words.dtype), words], dim=1)
        there = torch.ones(embedded.shape[0], 1 + tokens.shape[1], dtype=torch.bool, device=tokens.device)
        return embedded, torch.cat([there, question != PAD], dim=1)

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.language.get_input_embeddings()(ids.clamp_min(0))
        return embedded

    def adapters(self) -> list[nn.Parameter]:
        """Return LoRA's matrices."""
        from peft.tuners.lora import LoraLayer

        layers = [module for module in self.language.modules() if isinstance(module, LoraLayer)]
        return [p for layer in layers for part in (layer.lora_A, layer.lora_B) for p in part.parameters()]


def until_end(ids: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Return token ids `(b, n)` with `PAD` from the first of the end tokens on."""
    over = torch.isin(ids, torch.tensor(ends, device=ids.device)).cumsum(dim=1) > 0
    return ids.masked_fill(over, PAD)


def special_tokens(config: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Return the id that starts a text, and those that end one, of a language model's config.json."""
    ends = config["eos_token_id"]
    ends = [int(end) for end in (ends if isinstance(ends, list) else [ends])]
    start = config.get("bos_token_id")
    return ends[0] if start is None else int(start), tuple(ends)


def build_tower(options: LlavaOptions, width: int, image_size: int) -> VisionTower:
    """Return the vision tower, frozen unless everything is trained. Raises ConfigError if folder or image size do not fit."""
    go_offline()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if options.vision:
        tower = _load(CLIPVisionModel, options.vision, "vision", options)
        wanted = tower.config.image_size
        if image_size != wanted:
            raise ConfigError(
                f"data.image_size = {image_size}: the tower of tasks.vqa.llava.vision reads images of {wanted} pixels"
            )
    else:
        if image_size % options.patch:
            raise ConfigError(f"data.image_size = {image_size} is not a multiple of tasks.vqa.llava.patch = {options.patch}")
        size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": options.depth}
        tower = CLIPVisionModel(CLIPVisionConfig(**size, num_attention_heads=4, image_size=image_size, patch_size=options.patch))
    found = VisionTower(tower, options.vision_layer)
    found.requires_grad_(options.tune == "full")
    return found


def build_answerer(
    options: LlavaOptions, width: int, vision_dim: int, vocabulary: int, special: tuple[int, int], max_answer: int
) -> Answerer:
    """Return connector and language model, with what `tune` says trainable and all else frozen.

    Args:
        options: folders, sizes, what is trained.
        width: of a small language model.
        vision_dim: d_v.
        vocabulary: tokens of a small language model.
        special: ids that start and end a text, of a small language model.
        max_answer: tokens generated at most.
    """
    go_offline()
    from transformers import AutoModelForCausalLM

    if options.language:
        language = _load(AutoModelForCausalLM, options.language, "language", options)
    else:
        language = _small_language_model(options, width, vocabulary, special)
    connector = Connector(vision_dim, int(language.config.hidden_size))
    if options.connector:
        _load_connector(connector, Path(options.connector))
    full = options.tune == "full"
    language.requires_grad_(full)
    if options.adapts:
        language = _adapted(language, options)
    connector.requires_grad_(options.connects)
    return Answerer(connector, language, max_answer)


def _small_language_model(options: LlavaOptions, width: int, vocabulary: int, special: tuple[int, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if width % 8:
        raise ConfigError(f"model.width = {width}: a language model of four heads with rotary positions needs a multiple of 8")
    size: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": options.depth}
    start, end = special
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    return LlamaForCausalLM(LlamaConfig(**size, **ids, vocab_size=vocabulary, num_attention_heads=4, tie_word_embeddings=False))


def _adapted(language: Any, options: LlavaOptions) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",  # of a causal language model: all but the output layer
        task_type="CAUSAL_LM",
    )
    return inject_adapter_in_model(config, language)


def _load(kind: Any, folder: str, key: str, options: LlavaOptions) -> Any:
    """Load a network from a folder in the Hugging Face layout. Raises ConfigError naming the key if it cannot be."""
    place = Path(folder)
    if not (place / "config.json").is_file() or not any(place.glob("*.safetensors")):
        raise ConfigError(f"tasks.vqa.llava.{key}: {place} holds no config.json with safetensors weights")
    from safetensors import SafetensorError

    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    try:
        return kind.from_pretrained(place, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"tasks.vqa.llava.{key}: {place} cannot be loaded ({str(error).splitlines()[0]})") from None


def _load_connector(connector: Connector, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: Mapping[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"tasks.vqa.llava.connector: {path} cannot be read ({error})") from None
    own = connector.state_dict()
    for prefix in _CONNECTOR_PLACES:
        named = {name: found[prefix + name] for name in own if prefix + name in found}
        if len(named) == len(own) and all(named[name].shape == tensor.shape for name, tensor in own.items()):
            connector.load_state_dict(named)
            return
    raise ConfigError(f"tasks.vqa.llava.connector: {path} has no connector of this size (linear_1, linear_2)")
