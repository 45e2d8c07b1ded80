"""A hospital's folder serves one federation after another: none reads, removes or stumbles over another one's private state."""

import json
from pathlib import Path
from typing import Any

import pytest

from omnifm.config import dump
from omnifm.deploy.data import public
from omnifm.deploy.hospital import Hospital
from omnifm.deploy.policy import Policy
from omnifm.deploy.server import Job
from omnifm.engines.calls import Call, pack, unpack
from omnifm.errors import FederationError
from omnifm.federation.introduction import MOST_BYTES, read_introduction
from omnifm.federation.messages import Kind, Request, encode
from tests.deploy.post import Post, hurry, open_bays
from tests.deploy.test_server import CLIENTS, private, remembered, serve
from tests.run import jobs


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def run_at(data: Path, hospitals: Path, out: Path, strategy: str, **changes: Any) -> Job:
    federation = {"rounds": 2, "participation": 0.5}
    return serve(jobs.config(data, strategy, federation=federation, **changes), Post(open_bays(data, hospitals, CLIENTS)), out)


@pytest.mark.parametrize(("before", "second"), [("omnifm", "fedavg"), ("fedper", "fedper")])
def test_a_second_federation_is_what_it_is_at_new_hospitals(before: str, second: str, data: Path, tmp_path: Path) -> None:
    """It ended at a tensor that it does not know; and a client that had not trained yet had the head of the one before."""
    run_at(data, tmp_path / "used", tmp_path / "first", before)
    first = private(tmp_path / "used")
    run_at(data, tmp_path / "used", tmp_path / "second", second, seed=1)
    run_at(data, tmp_path / "new", tmp_path / "alone", second, seed=1)
    assert remembered(tmp_path / "second") == remembered(tmp_path / "alone")
    stayed = {p for p in (tmp_path / "used").rglob("*.safetensors")}
    assert first and len(stayed) == len(first) + len(private(tmp_path / "new"))


def test_a_run_that_goes_on_finds_its_own_state(data: Path, tmp_path: Path) -> None:
    run_at(data, tmp_path / "h", tmp_path / "out", "fedper")
    (tmp_path / "out" / "metrics.json").unlink()
    before = remembered_names(tmp_path / "h")
    run_at(data, tmp_path / "h", tmp_path / "out", "fedper")
    assert remembered_names(tmp_path / "h") == before


def remembered_names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.safetensors"))


def test_hospitals_that_contradict_each_other_are_asked_anew_at_the_next_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they said must not be kept before it was judged: nobody could mend it but by removing a file at the server."""
    jobs.write_federation(tmp_path / "mine")
    config = tmp_path / "mine" / "scan" / "cohort.toml"
    sound = config.read_text()
    post = Post(open_bays(data, tmp_path / "h", CLIENTS) | open_bays(tmp_path / "mine", tmp_path / "h", CLIENTS[:1]))
    config.write_text(sound.replace('modality = "MRI"', 'modality = "CT"'))
    with pytest.raises(FederationError, match="scan-"):
        serve(jobs.config(data, "fedavg", federation={"rounds": 1}), post, tmp_path / "out")
    config.write_text(sound)
    serve(jobs.config(data, "fedavg", federation={"rounds": 1}), post, tmp_path / "out")
    assert (tmp_path / "out" / "metrics.json").is_file()


def introduced(data: Path, store: Path) -> dict[str, Any]:
    hospital = Hospital(data / "scan", "scan-0", store, str(data / "cache"))
    asked = {"config": dump(public(jobs.config(data, "fedavg")))}
    return dict(unpack(hospital.answer(pack(Call("introduce", asked)))).header)


def test_an_introduction_that_would_fill_every_call_is_refused(data: Path, tmp_path: Path) -> None:
    found = introduced(data, tmp_path)
    assert read_introduction(json.dumps(found)).client == "scan-0"
    found["spec"]["classes"] = [f"{number} " + "\u00e9" * 900 for number in range(1000)]
    with pytest.raises(FederationError, match=rf"client scan-0: introduces itself with \d+ bytes, at most {MOST_BYTES}"):
        read_introduction(json.dumps(found, ensure_ascii=False))


class Server:
    """One that asks scan-0 for what it likes."""

    def __init__(self, data: Path, store: Path, policy: Policy | None = None, strategy: str = "fedavg") -> None:
        raw = dump(public(jobs.config(data, strategy)))
        hospitals = [Hospital(data / c[:4], c, store / c, str(data / "cache"), policy=policy) for c in CLIENTS]
        heard = [dict(unpack(h.answer(pack(Call("introduce", {"config": raw})))).header) for h in hospitals]
        self.hospital, self.header = hospitals[0], {"config": raw, "run": "a", "introductions": heard}

    def ask(self, number: int = 0, kind: Kind = "train", **settings: Any) -> str:
        tensors = self.hospital._opened(self.header).site.initial_shared()
        request = Request(kind, number, "scan-0", tensors, settings={"epochs": 1, **settings})
        answer = unpack(self.hospital.answer(pack(Call("answer", self.header, encode(request)))))
        return f"{answer.kind}: {answer.header.get('message', '')}"


def test_steps_beyond_the_passes_that_are_allowed_and_chosen_examples_are_refused(data: Path, tmp_path: Path) -> None:
    """12 examples in batches of 4: two passes are six steps."""
    server = Server(data, tmp_path, Policy(max_local_epochs=2))
    assert server.ask(steps=6) == "reply: "
    assert server.ask(steps=7).endswith("policy: steps = 7 in a request, 2 passes over the data are 6")
    assert Server(data, tmp_path / "b").ask(steps=7) == "reply: ", "by default it is not refused"
    assert "a number of examples in a request" in Server(data, tmp_path / "c").ask(budget=1)


@pytest.mark.parametrize(("least", "refused"), [(12, False), (13, True)])
def test_answers_of_few_examples_are_refused(least: int, refused: bool, data: Path, tmp_path: Path) -> None:
    said = Server(data, tmp_path, Policy(min_examples=least)).ask()
    assert ("12 training examples, at least 13 are wanted" in said) == refused


SCORES: dict[str, Any] = {"kind": "evaluate", "split": "val", "view": "personal"}
TUNED: dict[str, Any] = {**SCORES, "finetune_epochs": 1, "finetune_lr": 0.1}


@pytest.mark.parametrize(("asked", "refused"), [({"kind": "describe"}, True), (TUNED, True), (SCORES, False)])
def test_spectra_and_fine_tuning_of_few_examples_are_refused_too(
    asked: dict[str, Any], refused: bool, data: Path, tmp_path: Path
) -> None:
    """The mean spectrum of a client of one image is that image's, and scores after fine-tuning tell of what it was trained on."""
    said = Server(data, tmp_path, Policy(min_examples=13), "omnifm").ask(**asked)
    assert said.endswith("policy: 12 training examples, at least 13 are wanted") if refused else said == "reply: "
    assert Server(data, tmp_path / "b", Policy(min_examples=12), "omnifm").ask(**asked) == "reply: "


def test_a_damaged_file_is_named_to_the_server_without_its_folder(data: Path, tmp_path: Path) -> None:
    server = Server(data, tmp_path / "ada.lovelace", strategy="fedper")
    assert server.ask() == "reply: "
    for file in (tmp_path / "ada.lovelace").rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    said = server.ask(1)
    assert said.startswith("mistake: ") and "000001.safetensors: cannot be read" in said and "ada.lovelace" not in said
