import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from omnifm.build import STRATEGIES, strategy_options
from omnifm.config import Config, digest, dump, load, parse, parse_override, put
from omnifm.errors import ConfigError

BASE: dict[str, Any] = {"federation": {"cohorts": [{"path": "cohorts/a"}]}}


def raw(**changes: Any) -> dict[str, Any]:
    """Return the least config with dotted keys (`__` for the dot) set."""
    found: dict[str, Any] = tomllib.loads(tomli_w.dumps(BASE))
    for key, value in changes.items():
        put(found, key.replace("__", "."), value)
    return found


def config(**changes: Any) -> Config:
    return parse(raw(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 1}, "sede: unknown key"),
        ({"federation__round": 3}, "federation.round: unknown key"),
        ({"optimiser__learning_rate": 3}, "optimiser.learning_rate: unknown key"),
        ({"federation__cohorts": [{"path": "a", "client": 2}]}, "federation.cohorts.0.client: unknown key"),
        ({"federation__cohorts": [{"clients": 2}]}, "federation.cohorts.0.path: "),
        ({"federation__cohorts": []}, "federation.cohorts is empty"),
        ({"federation__rounds": 0}, "federation.rounds: "),
        ({"federation__rounds": 2.5}, "federation.rounds: "),
        ({"federation__rounds": "20"}, "federation.rounds: "),
        ({"federation__rounds": True}, "federation.rounds: "),
        ({"federation__participation": 0.0}, "federation.participation: "),
        ({"federation__participation": 1.1}, "federation.participation: "),
        ({"federation__gamma": float("nan")}, "federation.gamma: "),
        ({"federation__partition": "random"}, "federation.partition: "),
        ({"optimiser__lr": 0}, "optimiser.lr: "),
        ({"optimiser__lr": float("inf")}, "optimiser.lr: "),
        ({"optimiser__momentum": 1.0}, "optimiser.momentum: "),
        ({"optimiser__name": "adam"}, "optimiser.name: "),
        ({"data__channels": 2}, "data.channels: "),
        ({"data": 3}, "data: "),
        ({"engine__workers": 0}, "engine.workers: "),
        ({"engine__kind": "ray"}, "engine.kind: "),
        ({"engine": "ray"}, "engine.kind: "),
        ({"engine__ray_address": "auto"}, "engine: ray_address goes with kind = 'flower-simulation'"),
        ({"engine__precision": "fp16"}, "engine.precision: "),
        ({"task": 3}, "task: "),
        ({"tasks": {"fusion": 3}}, "tasks.fusion: "),
        ({"seed": -1}, "seed: "),
        ({"strategies": {"fedprox": 3}}, "strategies.fedprox: "),
        ({"model__weights": "imagenet"}, "comes with model.backbone = 'efficientnet_lite0' alone"),
        ({"model__backbone": "efficientnet_lite0"}, "set model.norm = 'batch'"),
        ({"federation__label_space": "cohort", "federation__cohorts": [{"path": "a"}] * 2}, "names one folder twice"),
        ({"compression__upload": "zip"}, "compression.upload: "),
        ({"compression__upload": "topk", "compression__topk_share": 0.0}, "compression.topk_share: "),
        ({"compression__upload": "int8", "compression__topk_share": 0.5}, "topk_share is for compression.upload = 'topk'"),
        ({"compression__error_feedback": False}, "compression.error_feedback is for uploads that are compressed"),
    ],
)
def test_every_mistake_is_one_line_with_its_key(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    text = str(caught.value)
    assert message in text and "\n" not in text and "pydantic" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "fedsomething"}, f"strategy = 'fedsomething': unknown; known are {', '.join(sorted(STRATEGIES))}"),
        ({"strategies": {"fedprx": {}}}, "strategy = 'fedprx': unknown"),
        ({"strategies": {"fedprox": {"nu": 1}}}, "strategies.fedprox.nu: unknown key"),
        ({"strategies": {"fedprox": {"mu": -1}}}, "strategies.fedprox.mu: "),
        ({"strategies": {"omnifm": {"bank": {"capacity": 0}}}}, "strategies.omnifm.bank.capacity: "),
    ],
)
def test_options_of_every_strategy_are_checked_even_if_another_runs(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        strategy_options(config(**{"strategy": "fedavg", **changes}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_whole_number_is_a_fine_float_and_nothing_else_is_bent() -> None:
    assert config(federation__participation=1).federation.participation == 1.0
    assert isinstance(config(optimiser__lr=1).optimiser.lr, float)


def test_defaults_are_those_of_a_config_that_says_nothing() -> None:
    found = config()
    assert (found.strategy, found.model.width, found.federation.rounds) == ("omnifm", 64, 20)
    assert found.federation.cohorts[0].clients == 1 and found.optimiser.finetune_lr is None
    for section in ("federation", "data", "model", "optimiser", "engine"):
        assert getattr(found, section) == type(getattr(found, section)).model_validate(raw().get(section, {}))


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config().seed = 3
    with pytest.raises(ValueError, match="frozen"):
        config().optimiser.lr = 3.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1", ("a.b", 1)),
        ("a = 2.5", ("a", 2.5)),
        ("a=true", ("a", True)),
        ("a=[1, 2]", ("a", [1, 2])),
        ('a=[{path="x", clients=2}]', ("a", [{"path": "x", "clients": 2}])),
        ('a="two words"', ("a", "two words")),
        ("a=fedavg", ("a", "fedavg")),
        ("a=some/folder-1.x", ("a", "some/folder-1.x")),
        ("a=~/x", ("a", "~/x")),
        ('a="x=y"', ("a", "x=y")),
        ("a=", None),
        ("a", None),
        ("=3", None),
        ("a b=3", None),
        ("a..b=3", None),
        ("a=two words", None),
        ("a=1.2.3", None),
        ("a=[1", None),
    ],
)
def test_overrides_are_toml_or_a_bare_word(text: str, expected: tuple[str, Any] | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match="--set") as caught:
            parse_override(text)
        assert "\n" not in str(caught.value)
    else:
        assert parse_override(text) == expected


def test_an_override_makes_tables_and_refuses_to_walk_through_values() -> None:
    found: dict[str, Any] = {"a": {"b": 1}}
    put(found, "a.c.d", 2)
    put(found, "a.b", 3)
    assert found == {"a": {"b": 3, "c": {"d": 2}}}
    with pytest.raises(ConfigError, match=r"--set a\.b\.e: a\.b is a value, not a table"):
        put(found, "a.b.e", 4)


def write(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(raw(**changes)), encoding="utf-8")
    return path


def test_paths_in_a_file_are_relative_to_it_and_those_of_overrides_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "configs" / "c.toml", model__weights="w.safetensors", data__cache="../cache")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    found = load(file)
    assert found.federation.cohorts[0].path == str(tmp_path / "configs" / "cohorts" / "a")
    assert (found.model.weights, found.data.cache) == (str(tmp_path / "configs" / "w.safetensors"), str(tmp_path / "cache"))
    changed = load(file, ['federation.cohorts=[{path="b"}, {path="/c"}]', "data.cache=here", 'model.weights=""'])
    assert [c.path for c in changed.federation.cohorts] == [str(work / "b"), "/c"]
    assert (changed.data.cache, changed.model.weights) == (str(work / "here"), "")


def test_paths_of_a_mixture_are_relative_to_the_file_too(tmp_path: Path) -> None:
    own = {"mixed": {"set": {"fusion": {"model.weights": "w.safetensors", "data.image_size": 96}}}}
    found = load(write(tmp_path / "configs" / "c.toml", tasks=own))
    assert found.tasks["mixed"]["set"]["fusion"] == {
        "model.weights": str(tmp_path / "configs" / "w.safetensors"),
        "data.image_size": 96,
    }


@pytest.mark.parametrize("path", ["~nobody-has-this-name/x", "a\0b"])
def test_what_is_no_path_is_one_line_with_its_key(path: str, tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", model__weights=path)
    with pytest.raises(ConfigError, match=r"^model\.weights: ") as caught:
        load(file)
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)
    file = write(tmp_path / "c.toml", federation__cohorts=[{"path": path}])
    with pytest.raises(ConfigError, match=r"^federation\.cohorts\.0\.path: "):
        load(file)


@pytest.mark.parametrize("rate", [0.0, -0.1])
def test_a_finetuning_rate_that_cannot_be_is_refused_before_training(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"optimiser\.finetune_lr: "):
        config(optimiser__finetune_lr=rate)


def test_overrides_win_in_their_order(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", federation__rounds=3, seed=1)
    found = load(file, ["federation.rounds=5", "federation.rounds=6", "strategy=fedavg"])
    assert (found.federation.rounds, found.seed, found.strategy) == (6, 1, "fedavg")
    with pytest.raises(ConfigError, match=r"optimiser\.lr: "):
        load(file, ["optimiser.lr=fast"])


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"a = ", "not a TOML file"), (b"\xff\xfe", "not a TOML file")]
)
def test_a_file_that_is_none_is_one_line_with_its_name(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_dumped_is_toml_and_reads_back_as_the_same_config(tmp_path: Path) -> None:
    first = config(strategy="fedprox", strategies={"fedprox": {"mu": 0.5}}, optimiser__finetune_lr=0.1)
    file = tmp_path / "c.toml"
    file.write_text(tomli_w.dumps(dump(first)), encoding="utf-8")
    assert dump(load(file))["strategies"] == {"fedprox": {"mu": 0.5}}
    assert digest(load(file)) == digest(first)


SAME = [
    {"engine__workers": 7},
    {"engine__kind": "flower-simulation", "engine__ray_address": "auto"},
    {"engine": "flower-simulation"},
    {"data__cache": "/somewhere/else"},
    {"federation__cohorts": [{"path": "/elsewhere/a"}]},
    {"strategies": {"fedprox": {"mu": 3.0}}},
    {"federation__rounds": 20},
    {"federation__local_steps": 0, "federation__weighting": "examples"},
    {"security__refused": "end", "security__max_update_norm": 0},
    {"privacy__clip": 0.0, "privacy__secure_aggregation": False},
    {"compression__upload": "none", "compression__topk_share": 0.1},
]
OTHER = [
    {"compression__upload": "int8"},
    {"compression__upload": "topk"},
    {"compression__upload": "topk", "compression__topk_share": 0.01},
    {"compression__upload": "topk", "compression__error_feedback": False},
    {"privacy__clip": 1.0},
    {"privacy__secure_aggregation": True},
    {"security__refused": "skip"},
    {"security__max_update_norm": 2},
    {"seed": 1},
    {"strategy": "fedavg"},
    {"strategies": {"omnifm": {"top_k": 3}}},
    {"federation__rounds": 21},
    {"federation__cohorts": [{"path": "cohorts/b"}]},
    {"federation__cohorts": [{"path": "cohorts/a", "clients": 2}]},
    {"federation__local_steps": 3},
    {"federation__weighting": "equal"},
    {"engine__precision": "bf16"},
    {"engine__threads": 2},
    {"optimiser__lr": 0.051},
    {"data__image_size": 65},
]


@pytest.mark.parametrize("changes", SAME)
def test_what_cannot_change_a_score_does_not_change_the_digest(changes: Mapping[str, Any]) -> None:
    assert digest(config(**changes)) == digest(config())


def test_options_that_came_later_leave_the_digests_of_published_runs_as_they_were() -> None:
    assert digest(config()) == "f7cc3895778c"


def test_what_can_change_a_score_does() -> None:
    digests = [digest(config(**changes)) for changes in [{}, *OTHER]]
    assert len(set(digests)) == len(digests)
    assert all(len(d) == 12 and int(d, 16) >= 0 for d in digests)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8), st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2), max_size=3
    )
)
def test_any_table_is_a_config_or_one_line(table: dict[str, Any]) -> None:
    try:
        parse({**BASE, **table})
    except ConfigError as error:
        assert "\n" not in str(error)
