"""The LLaVA shape against slow computations, and what each fine-tuning strategy trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from omnifm import seeds
from omnifm.backbones.llava import PAD, Answerer, Connector, LlavaOptions, build_answerer, build_tower, until_end
from omnifm.errors import ConfigError
from omnifm.tasks.base import Features, Inputs, Reading
from omnifm.tasks.vqa_models import LlavaHead

WIDTH, VISION, WORDS, LONGEST = 16, 12, 320, 5
SPECIAL = (0, 1)


def answerer(**options: Any) -> Answerer:
    with seeds.scope(0, "answerer"):
        found = build_answerer(LlavaOptions(lora_rank=2, **options), WIDTH, VISION, WORDS, SPECIAL, LONGEST).eval()
        # Small random weights answer all alike; larger ones do not.
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.mul_(4) if parameter.ndim > 1 else None
    return found


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeds.generator(0, "llava", *shape))


QUESTION = torch.tensor([[PAD, PAD, 7, 8, 9], [3, 4, 5, 6, 7]])
ANSWER = torch.tensor([[10, 11, 1], [12, 1, PAD]])


def one_by_one(model: Answerer, tokens: Tensor, question: Tensor, said: list[int]) -> Tensor:
    """Logits for the next token of one example, without padding, mask or cache."""
    embed = model.language.get_input_embeddings()
    ids = [int(i) for i in question if i != PAD]
    parts = [embed(torch.tensor([SPECIAL[0]])), model.connector(tokens), embed(torch.tensor([*ids, *said]))]
    found: Tensor = model.language(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0, -1]
    return found


@torch.no_grad()
def test_logits_under_teacher_forcing_are_those_of_each_prefix_alone() -> None:
    model, tokens = answerer(), draw(2, 6, VISION)
    found = model.logits(tokens, QUESTION, ANSWER)
    for place in range(2):
        answer = [int(i) for i in ANSWER[place] if i != PAD]
        for step in range(len(answer)):
            expected = one_by_one(model, tokens[place], QUESTION[place], answer[:step])
            torch.testing.assert_close(found[place, step], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generation_takes_the_most_probable_token_at_each_step() -> None:
    model, tokens = answerer(), draw(2, 6, VISION)
    found = model.generate(tokens, QUESTION)
    for place in range(2):
        said: list[int] = []
        for _ in range(LONGEST):
            said.append(int(one_by_one(model, tokens[place], QUESTION[place], said).argmax()))
            if said[-1] == SPECIAL[1]:
                break
        expected = [token for token in said if token != SPECIAL[1]]
        assert [int(i) for i in found[place] if i != PAD] == expected
    assert not torch.equal(found[0], found[1]), "another image and question, another answer"


@torch.no_grad()
def test_an_image_reaches_the_answer_through_the_connector() -> None:
    model = answerer()
    first, second = (model.logits(draw(2, 6, VISION) * scale, QUESTION, ANSWER) for scale in (1.0, -1.0))
    assert not torch.allclose(first, second)
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.zero_()
    first, second = (model.logits(draw(2, 6, VISION) * scale, QUESTION, ANSWER) for scale in (1.0, -1.0))
    assert torch.equal(first, second)


def test_what_comes_after_the_end_is_padding() -> None:
    ids = torch.tensor([[5, 1, 6, 7], [5, 6, 2, 1], [5, 6, 7, 8]])
    expected = torch.tensor([[5, PAD, PAD, PAD], [5, 6, PAD, PAD], [5, 6, 7, 8]])
    assert torch.equal(until_end(ids, (1, 2)), expected)


def trained(tune: str) -> set[str]:
    model = answerer(tune=tune)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_strategy_trains_what_its_name_says() -> None:
    connector = {"connector.linear_1.weight", "connector.linear_1.bias", "connector.linear_2.weight", "connector.linear_2.bias"}
    assert trained("F-C") == connector
    adapters = trained("F-L")
    # Two layers, in each four linear layers of attention and three of the MLP, with two matrices each.
    assert len(adapters) == 2 * 7 * 2 and all("lora_" in name for name in adapters)
    assert trained("F-CL") == trained("F-2stage") == connector | adapters
    assert trained("full") == {name for name, _ in answerer().named_parameters()}
    for tune, frozen in (("full", False), ("F-C", True)):
        tower = build_tower(LlavaOptions(tune=tune), WIDTH, 16)  # type: ignore[arg-type]
        assert all(parameter.requires_grad != frozen for parameter in tower.parameters())


def test_lora_starts_as_the_model_it_adapts() -> None:
    tokens = draw(2, 6, VISION)
    model = answerer(tune="F-L")
    with torch.no_grad():
        before = model.logits(tokens, QUESTION, ANSWER)
        assert len(model.adapters()) == 28 and all(p.requires_grad for p in model.adapters())
        for matrix in model.adapters():
            matrix.add_(0.1)
        assert not torch.allclose(model.logits(tokens, QUESTION, ANSWER), before)
        for matrix in model.adapters():
            matrix.zero_()
        torch.testing.assert_close(model.logits(tokens, QUESTION, ANSWER), before)


@pytest.mark.parametrize("tune", ["full", "F-C", "F-L", "F-CL", "F-2stage"])
def test_the_clients_own_part_trains(tune: str) -> None:
    head = LlavaHead(answerer(tune=tune), LlavaOptions(tune=tune))  # type: ignore[arg-type]
    assert any(parameter.requires_grad for parameter in head.own.parameters())


def test_without_an_answer_in_the_inputs_the_head_writes_one() -> None:
    head = LlavaHead(answerer(), LlavaOptions())
    tokens = draw(2, 6, VISION)

    def answer(side: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            found: Tensor = head(Reading(tokens, tokens, Features(tokens), Inputs(torch.zeros(2, 3, 4, 4), side)))
        return found

    assert answer({"question": QUESTION, "answer": ANSWER}).shape == (2, 3, WORDS)
    assert answer({"question": QUESTION}).dtype == torch.int64


@torch.no_grad()
def test_the_tower_reads_the_layer_it_is_told_and_drops_the_rest() -> None:
    go: dict[str, Any] = {"depth": 3, "patch": 8}
    with seeds.scope(0, "tower"):
        whole = build_tower(LlavaOptions(vision_layer=-1, **go), WIDTH, 16).eval()
    with seeds.scope(0, "tower"):
        part = build_tower(LlavaOptions(vision_layer=-2, **go), WIDTH, 16).eval()
    image = draw(2, 3, 16, 16).sigmoid()
    mean, std = whole.get_buffer("mean"), whole.get_buffer("std")
    states = whole.tower(pixel_values=(image - mean) / std, output_hidden_states=True).hidden_states
    assert part(image).shape == (2, 4, WIDTH)
    torch.testing.assert_close(part(image), states[-2][:, 1:])
    torch.testing.assert_close(whole(image), states[-1][:, 1:])
    assert len(part.tower.encoder.layers) == 2


def test_weights_come_from_folders_in_the_published_layout(tmp_path: Path) -> None:
    tower, model = build_tower(LlavaOptions(vision_layer=-1), WIDTH, 16), answerer()
    tower.tower.post_layernorm = torch.nn.LayerNorm(WIDTH)
    tower.tower.save_pretrained(tmp_path / "clip", safe_serialization=True)
    model.language.save_pretrained(tmp_path / "llama", safe_serialization=True)
    projector = {f"multi_modal_projector.{name}": t.clone() for name, t in model.connector.state_dict().items()}
    save_file(projector, tmp_path / "connector.safetensors")
    places = {"vision": str(tmp_path / "clip"), "language": str(tmp_path / "llama")}
    options = LlavaOptions(**places, connector=str(tmp_path / "connector.safetensors"), tune="F-CL", vision_layer=-1)
    loaded = build_answerer(options, 999, VISION, 999, (9, 9), LONGEST).eval()
    tokens = draw(2, 6, VISION)
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(tokens, QUESTION, ANSWER), model.logits(tokens, QUESTION, ANSWER))
        image = draw(1, 3, 16, 16).sigmoid()
        torch.testing.assert_close(build_tower(options, 999, 16).eval()(image), tower.eval()(image))
    with pytest.raises(ConfigError, match=r"data.image_size = 32: .* reads images of 16 pixels"):
        build_tower(options, 999, 32)


def test_folders_and_sizes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def build(**options: Any) -> None:
        build_tower(LlavaOptions(**options), WIDTH, 16)
        build_answerer(LlavaOptions(**options), WIDTH, VISION, WORDS, SPECIAL, LONGEST)

    (tmp_path / "config.json").write_text("{}")
    for key in ("vision", "language"):
        with pytest.raises(ConfigError, match=f"tasks.vqa.llava.{key}: .* holds no config.json with safetensors"):
            build(**{key: str(tmp_path)})
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for key in ("vision", "language"):
        with pytest.raises(ConfigError, match=f"tasks.vqa.llava.{key}: .* cannot be loaded"):
            build(**{key: str(tmp_path)})
    with pytest.raises(ConfigError, match=r"connector: .* cannot be read"):
        build(connector=str(tmp_path / "model.safetensors"))
    save_file(Connector(VISION, 8).state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(ConfigError, match="has no connector of this size"):
        build(connector=str(tmp_path / "small.safetensors"))
    with pytest.raises(ConfigError, match=r"not a multiple of tasks.vqa.llava.patch = 5"):
        build(patch=5)
    with pytest.raises(ConfigError, match="vision_layer = -4: the tower has 2 layers"):
        build(vision_layer=-4)
    with pytest.raises(ConfigError, match=r"model.width = 12: .* multiple of 8"):
        build_answerer(LlavaOptions(), 12, VISION, WORDS, SPECIAL, LONGEST)
