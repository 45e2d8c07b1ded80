"""Visual question answering as a task: what travels, what may be seen, and a whole run of both networks."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from omnifm import build, run, seeds
from omnifm.backbones.build import build_trunk
from omnifm.backbones.resnet import ResNet18Trunk
from omnifm.build import load_data, strategy_options
from omnifm.config import Config, parse
from omnifm.data.cohort import Cohort, Row
from omnifm.data.readers import Image
from omnifm.errors import ConfigError, DataError, FederationError
from omnifm.federation.messages import Request
from omnifm.federation.pooled import JoinedSplit
from omnifm.federation.sharing import split_state
from omnifm.metrics.vqa import decode_texts
from omnifm.tasks import vqa_text
from omnifm.tasks.base import Batch, Inputs, Model
from omnifm.tasks.vqa import Vqa, shifted
from omnifm.tasks.vqa_models import LlavaHead
from tests.data.builders import in_memory
from tests.tasks.vqa_cohort import SIDE, write_questions

Words = vqa_text.Words


def fake_words(questions: Any, most: int) -> Words:
    """Random states instead of MiniLM's, which takes two seconds to load; as a function of the text, as those are."""
    texts = sorted(set(questions))
    states = torch.stack([torch.randn(4, vqa_text.WORD_DIM, generator=seeds.generator(0, text)) for text in texts])
    return Words(states.half(), torch.ones(len(texts), 4, dtype=torch.bool), {text: i for i, text in enumerate(texts)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vqa")
    write_questions(root / "scan", "scan", "MRI")
    write_questions(root / "echo", "echo", "US", image_disjoint="1")
    return root


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.TASKS, "vqa", "omnifm.tasks.vqa:Vqa")
    monkeypatch.setattr("omnifm.tasks.vqa_models.minilm_words", fake_words)


def raw_config(folder: Path, strategy: str = "fedavg", model: str = "compact", **options: Any) -> dict[str, Any]:
    llava = {"patch": 16, "lora_rank": 2, "vocabulary": 300, **options.pop("llava", {})}
    return {
        "task": "vqa",
        "strategy": strategy,
        "federation": {"cohorts": [{"path": str(folder / n)} for n in ("scan", "echo")], "rounds": 4, "evaluate_every": 4},
        "data": {"image_size": SIDE, "channels": 3, "cache": str(folder / "cache"), "augment": "flip_shift"},
        "model": {"width": 16, "stem_stride": 1},
        "optimiser": {"name": "adamw", "lr": 3e-3, "batch_size": 8},
        "strategies": {"omnifm": {"dim": 8, "band": 8, "neighbourhood_band": 8, "bank": {"prototypes": 2, "capacity": 12}}},
        "tasks": {"vqa": {"model": model, "compact": {"token_dim": 16, "layers": 1}, "llava": llava, **options}},
    }


def make(folder: Path, **options: Any) -> tuple[Vqa, Config]:
    config = parse(raw_config(folder, **options))
    task = build.make_task(config, load_data(config))
    assert isinstance(task, Vqa)
    return task, config


def make_model(task: Vqa, config: Config) -> Model:
    return build.make_model(config, task, build.make_strategy(config, load_data(config), task))


def first(task: Vqa, client: str, split: str = "train", count: int = 6) -> Batch:
    return task.client_data(client).split(split).batch(torch.arange(count))


# ------------------------------------------------------------------------------------------------------ numbers
def test_answers_are_one_if_they_are_equal_once_normalised_and_frequent_ones_come_first() -> None:
    def row(answer: str, split: str = "train") -> Row:
        return Row(id=answer + split, split=split, question="?", answer=answer)

    cohort = in_memory(
        [row("The Lung"), row("lung"), row("Lung."), row("two"), row("heart", "test"), row("2", "val")], task="vqa"
    )
    table = vqa_text.answer_table({"c": cohort})
    assert table.texts == ("Lung.", "two", "heart") and table.classes == 2
    assert [table.of(r) for r in cohort.rows] == [0, 0, 0, 1, 2, 1]
    with pytest.raises(DataError, match="without training rows"):
        vqa_text.answer_table({"c": in_memory([row("x", "test")], task="vqa")})


def test_question_types_are_taken_apart() -> None:
    rows = [Row(id="a", question_type="POS, Pres"), Row(id="b", question_type="pos"), Row(id="c")]
    assert vqa_text.question_types({"c": in_memory(rows, task="vqa")}) == ("pos", "pres")
    assert vqa_text.types_of(rows[2]) == []


def test_token_lists_are_padded_and_cut_so_that_what_matters_stays() -> None:
    tokenizer = vqa_text.train_tokenizer(["which side is bright?", "left lung", "right"] * 3, 400)
    end = vqa_text.special_ids(tokenizer, None)[1]
    prompts = vqa_text.encode(tokenizer, ["which side is bright?", "side?"], 4)
    whole = tokenizer.encode("which side is bright?").ids
    assert prompts.shape == (2, 4) and prompts[0].tolist() == whole[-4:], "the end of a prompt asks for the answer"
    assert (prompts[1] == vqa_text.PAD).tolist()[0] is True
    answers = vqa_text.encode(tokenizer, ["left", "left lung " * 9], 3, end=end)
    assert answers[1, -1] == end and answers.shape == (2, 3)
    assert vqa_text.decode(tokenizer, answers)[0] == "left"
    assert vqa_text.decode(tokenizer, vqa_text.encode(tokenizer, ["Caf\u00e9 3.5 CM"], 99, end=end)) == ["caf\u00e9 3.5 cm"]


TRAIN = """
from omnifm.tasks.vqa_text import train_tokenizer
texts = [f"what is {a} {b}?" for a in ("left", "right", "lung") for b in ("abc", "bca", "cab", "acb")]
found = train_tokenizer(texts[::-1], 330).to_str()
"""


def test_a_tokenizer_is_the_same_in_every_process() -> None:
    code = f"{TRAIN}print(found)"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    texts = [f"what is {a} {b}?" for a in ("left", "right", "lung") for b in ("abc", "bca", "cab", "acb")]
    assert vqa_text.train_tokenizer(texts, 330).to_str() == elsewhere and len(elsewhere) > 1000


def test_minilm_knows_what_questions_mean_and_no_neighbour_changes_it() -> None:
    texts = ["Is the heart enlarged?", "Is the cardiac silhouette too large?", "Which plane is this image taken in?"]
    together = vqa_text.minilm_words(texts, 32)
    assert together.states.shape[2] == vqa_text.WORD_DIM
    vectors = [together.states[together.place[t]].float()[together.mask[together.place[t]]].mean(0) for t in texts]
    same, other = (torch.cosine_similarity(vectors[0], v, dim=0) for v in vectors[1:])
    assert same > 0.5 > other
    alone = vqa_text.minilm_words(texts[:1], 32)
    length = int(alone.mask.sum())
    assert torch.equal(alone.states[0], together.states[together.place[texts[0]], :length])
    short = vqa_text.minilm_words(texts, 5)
    assert short.states.shape[1] == 5 and bool(short.mask.all())


# ------------------------------------------------------------------------------------------------------ the task
def test_a_batch_carries_what_is_asked_and_never_shows_the_answer_to_the_compact_model(folder: Path) -> None:
    task, _ = make(folder)
    batch = first(task, "scan-0")
    rows = Cohort.read(folder / "scan").rows
    assert [task.table.texts[i].lower() for i in batch.target.tolist()] == [rows[i].answer.lower() for i in batch.row.tolist()]
    assert set(batch.side) == {"closed", "disjoint", "question_type", "number", "question", "question_mask"}
    assert batch.side["closed"].tolist() == [0, 1] * 3
    assert [task.types[k] for k in range(2)] == ["pos", "pres"] and batch.side["question_type"][:2].tolist() == [[1, 0], [1, 1]]
    with pytest.raises(DataError, match="client x"):
        task.client_data("x")
    pooled = JoinedSplit([task.client_data(c).train for c in ("scan-0", "echo-0")]).batch(torch.tensor([25, 0]))
    assert pooled.side["disjoint"].tolist() == [1, 0]


@pytest.mark.parametrize("model", ["compact", "llava"])
def test_blind_images_are_black_for_everybody(folder: Path, model: str) -> None:
    task, config = make(folder, model=model, blind=True)
    batch = first(task, "scan-0")
    assert not bool(batch.image.any())
    assert "black" in " ".join(task.notes)
    with torch.no_grad():
        said = decode_texts(task.predict(make_model(task, config).eval(), batch)[:, 0])
    assert said[0] == said[2] == said[4], "the same question, whatever the image was"


def test_training_images_are_shifted_and_not_mirrored() -> None:
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    for k in range(8):
        moved = shifted(ramp, seeds.generator(0, "shift", k))
        assert moved.shape == ramp.shape and bool((moved.diff(dim=3) >= 0).all()), "left stays left"
        assert float((moved - ramp).abs().max()) <= 4
    assert torch.equal(shifted(ramp, seeds.generator(1, "a")), shifted(ramp, seeds.generator(1, "a")))
    assert len({float(shifted(ramp, seeds.generator(2, "b", k))[0, 0, 0, 16]) for k in range(8)}) > 1


def test_the_majority_answers_by_kind_of_question(folder: Path) -> None:
    task, _ = make(folder)
    plan = next(p for p in task.data.plans if p.id == "scan-0")
    majority = task.references("scan-0")["majority"]
    batch = first(task, "scan-0", "test")
    rows = task.data.cohorts["scan"].rows
    said = decode_texts(majority(batch)[:, 0])
    for closed, words in zip(batch.side["closed"].tolist(), said, strict=True):
        answers = [rows[i].answer for i in plan.train if (rows[i].answer_type == "closed") == bool(closed)]
        assert answers.count(words) == max(map(answers.count, answers))
    # A kind of question that was never asked in training falls back on open or closed.
    strange = batch._replace(side={**batch.side, "question_type": torch.zeros_like(batch.side["question_type"])})
    assert decode_texts(majority(strange)[:, 0]) == said
    llava, _ = make(folder, model="llava")
    assert llava.references("scan-0")["majority"](first(llava, "scan-0", "test")).shape[:2] == (6, 2)


def test_a_picture_says_question_truth_and_answer(folder: Path) -> None:
    task, config = make(folder)
    model, batch = make_model(task, config).eval(), first(task, "scan-0", "test")
    picture = task.picture(task.predict(model, batch), batch, 1)
    assert picture.panels[0][0] == "Is the left side bright?" and picture.panels[0][1].shape == (SIDE, SIDE, 3)
    assert picture.truth in ("Yes", "No") and picture.prediction in task.table.texts
    assert picture.correct == (picture.truth == picture.prediction)


@pytest.mark.parametrize("model", ["compact", "llava"])
def test_a_file_can_be_asked_anything(folder: Path, model: str) -> None:
    task, config = make(folder, model=model)
    image = Image(np.full((3, 40, 20), 7, dtype=np.float32) * np.arange(20), None, None, 8)
    batch = task.examples([image], "Is anything bright, anywhere?", "scan-0")
    assert batch.image.shape == (1, 3, SIDE, SIDE)
    found = task.answer(task.predict(make_model(task, config).eval(), batch), batch, [image], "scan-0")
    assert isinstance(found.facts["answer"], str)
    with pytest.raises(ConfigError, match="needs --question"):
        task.examples([image], " ", "scan-0")


def test_configs_that_cannot_be(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"set data.channels = 3"):
        config = raw_config(folder, model="llava")
        grey = parse({**config, "data": {**config["data"], "channels": 1}})
        build.make_task(grey, load_data(grey))
    with pytest.raises(ConfigError, match=r"tasks.vqa.prompt: holds no \{question\}"):
        make(folder, model="llava", prompt="Well?")
    with pytest.raises(ConfigError, match=r"language: .* holds no tokenizer.json"):
        make(folder, model="llava", llava={"language": str(folder)})
    with pytest.raises(ConfigError, match=r"tasks.vqa.llava.tune: "):
        make(folder, llava={"tune": "F-X"})


def frozen(folder: Path, **changes: Any) -> tuple[Vqa, Config]:
    """Build the task with a frozen ResNet whose weights are in a file."""
    raw = raw_config(folder)
    model = {"width": 4, "stem_stride": 1, "weights": str(folder / "trunk.safetensors")}
    with seeds.scope(0, "trunk"):
        save_file(ResNet18Trunk(3, 4, 1, "group").state_dict(), folder / "trunk.safetensors")
    raw["data"]["augment"] = "none"
    raw["tasks"]["vqa"]["compact"]["freeze_trunk"] = True
    config = parse({**raw, "model": model, **changes})
    task = build.make_task(config, load_data(config))
    assert isinstance(task, Vqa)
    return task, config


def test_a_frozen_trunk_sees_each_image_once_and_is_no_part_of_the_model(folder: Path) -> None:
    task, config = frozen(folder)
    trunk, _ = build_trunk(config.model, 3)
    batch = first(task, "scan-0", "test")
    with torch.no_grad():
        expected = trunk.eval()((batch.image - 0.5) / 0.25)
    torch.testing.assert_close(batch.side["seen"], expected)
    model = make_model(task, config)
    assert {name for name in model.state_dict() if name.startswith("backbone.")} == {
        "backbone.project.weight",
        "backbone.project.bias",
    }
    with torch.no_grad():
        found = model.backbone(batch.inputs).tokens
    torch.testing.assert_close(found, model.backbone.get_submodule("project")(expected))


def test_images_of_several_questions_are_told_apart(folder: Path) -> None:
    cohort = Cohort.read(folder / "scan")
    twice = replace(cohort, rows=tuple(replace(row, image=cohort.rows[k // 2].image) for k, row in enumerate(cohort.rows)))
    task, config = frozen(folder)
    pixels = np.array(task._images["scan"].pixels)[np.arange(len(cohort.rows)) // 2]
    task._images["scan"] = replace(task._images["scan"], pixels=pixels)
    seen = task._look(twice)
    assert len(seen.tensors["seen"]) == len(cohort.rows) // 2 and seen.place.tolist() == [k // 2 for k in range(len(cohort.rows))]
    with torch.no_grad():
        expected = task.network.see(torch.from_numpy(pixels[9:10]))["seen"][0]
    torch.testing.assert_close(seen.side(torch.tensor([9]))["seen"][0], expected)
    del config


def test_a_frozen_trunk_needs_weights_and_images_that_stay(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.weights, which names none"):
        frozen(folder, model={"width": 4})
    with pytest.raises(ConfigError, match=r"set data.augment = 'none'"):
        data = {"image_size": SIDE, "channels": 3, "cache": str(folder / "cache"), "augment": "flip_shift"}
        frozen(folder, data=data)


# ---------------------------------------------------------------------------------------------- LLaVA's fine-tuning
def test_what_is_written_freely_does_not_depend_on_the_true_answer(folder: Path) -> None:
    task, config = make(folder, model="llava")
    model, batch = make_model(task, config).eval(), first(task, "scan-0", "test")
    with torch.no_grad():
        said = task.predict(model, batch)
        lied = task.predict(model, batch._replace(side={**batch.side, "answer": batch.side["answer"].flip(0)}))
    assert said.shape[:2] == (6, 2)
    assert decode_texts(said[:, 0]) == decode_texts(lied[:, 0])


def test_the_loss_is_over_the_answers_tokens_alone(folder: Path) -> None:
    task, _ = make(folder, model="llava")
    batch = first(task, "scan-0")
    answer = batch.side["answer"]
    logits = torch.randn(*answer.shape, 300, generator=seeds.generator(0, "logits"), dtype=torch.float64)
    terms = [-logits[b, k].log_softmax(0)[answer[b, k]] for b, k in (answer != vqa_text.PAD).nonzero().tolist()]
    torch.testing.assert_close(task.loss(logits, batch), torch.stack(terms).mean())


@pytest.mark.parametrize(("tune", "travels"), [("F-C", {"connector"}), ("F-L", {"lora"}), ("F-CL", {"connector", "lora"})])
def test_only_what_is_trained_travels(folder: Path, tune: str, travels: set[str]) -> None:
    task, config = make(folder, model="llava", llava={"tune": tune})
    shared = split_state(make_model(task, config), (), "average").shared
    kinds = {"lora" if "lora_" in name else "connector" if ".connector." in name else name for name in shared}
    assert kinds == travels


def stage(task: Vqa, model: Model, round_index: int) -> set[str]:
    """Return what a step of a round moves."""
    task.begin_training(model, round_index)
    batch = first(task, "scan-0")
    model.zero_grad()
    task.loss(model(batch.inputs).prediction, batch).backward()
    moved = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"lora" if "lora_" in name else "connector" if ".connector." in name else name for name in moved}


def test_two_stages_train_the_connector_then_lora(folder: Path) -> None:
    task, config = make(folder, model="llava", llava={"tune": "F-2stage"})
    model = make_model(task, config)
    batch = first(task, "scan-0")
    with pytest.raises(FederationError, match="did not say which round"):
        task.loss(model(batch.inputs).prediction, batch)
    assert (
        split_state(model, (), "average").shared
        == split_state(make_model(*make(folder, model="llava", llava={"tune": "F-CL"})), (), "average").shared
    )
    # Half of four rounds; a configured round wins.
    assert [stage(task, model, r) for r in (0, 1, 2, 3, 0)] == [{"connector"}] * 2 + [{"lora"}] * 2 + [{"connector"}]
    early, config = make(folder, model="llava", llava={"tune": "F-2stage", "switch_round": 1})
    assert [stage(early, make_model(early, config), r) for r in (0, 1)] == [{"connector"}, {"lora"}]


# ------------------------------------------------------------------------------------------------------ whole runs
@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a network call")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def test_a_run_in_two_stages_moves_the_connector_then_lora(folder: Path, tmp_path: Path) -> None:
    """The loop tells the task which round it is."""
    raw = raw_config(folder, model="llava", llava={"tune": "F-2stage"})
    raw["federation"]["rounds"] = 2
    config = parse(raw)
    shared: list[dict[str, torch.Tensor]] = []
    data = load_data(config)
    site = build.make_site(config, tmp_path / "clients", data)
    state = site.initial_shared()
    for round_index in range(2):
        request = Request("train", round_index, data.plans[0].id, state, {}, {"epochs": 1})
        shared.append(dict(site.handle(request).tensors))
    moved = [
        {"lora" if "lora_" in name else "connector" for name in new if not torch.equal(new[name], state[name])} for new in shared
    ]
    assert moved == [{"connector"}, {"lora"}]


@pytest.mark.parametrize("strategy", ["omnifm", "fedper", "centralised"])
def test_the_compact_model_learns_what_is_in_the_picture(folder: Path, tmp_path: Path, offline: None, strategy: str) -> None:
    config = raw_config(folder, strategy)
    config["federation"] |= {"local_epochs": 6}
    metrics = run.execute(parse(config), tmp_path / "out")
    personal, majority = metrics["test"]["personal"], metrics["references"]["majority"]["personal"]
    assert personal["accuracy"] > majority["accuracy"] + 0.2
    assert "forced_accuracy" not in personal and personal["disjoint_accuracy"] is not None
    assert "left to right" not in (tmp_path / "out/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("strategy", "tune"), [("omnifm", "full"), ("fedper", "F-CL"), ("feddat", "F-CL"), ("lora", "full")])
def test_the_llava_shape_runs_from_config_to_report(
    folder: Path, tmp_path: Path, offline: None, strategy: str, tune: str
) -> None:
    config = raw_config(folder, strategy, model="llava", llava={"tune": tune, "vision_layer": -1})
    config["federation"]["rounds"] = 2
    metrics = run.execute(parse(config), tmp_path / "out")
    scores = metrics["test"]["personal"]
    assert scores["accuracy"] is not None and scores["forced_accuracy"] is not None
    assert any("teacher forcing" in note for note in metrics["notes"])


def test_a_model_says_nothing_of_options_of_strategies(folder: Path) -> None:
    # The probes pass through both ways of the head, so a bad size is found before training.
    task, config = make(folder, model="llava")
    probes = task.probes()
    assert ["answer" in probe.side for probe in probes] == [True, False]
    head = make_model(task, config).head
    assert isinstance(head, LlavaHead) and isinstance(probes[0], Inputs)
    assert strategy_options(config)[0].__name__ == "FedAvg"
