"""`omnifm predict` on classification: the whole command, its files and its complaints."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from omnifm.errors import DataError
from omnifm.federation.client import Site
from omnifm.federation.messages import Request
from omnifm.federation.rounds import held
from omnifm.predict.cases import Case
from omnifm.predict.session import open_run
from omnifm.tasks.base import Model, Output
from tests.cli.command import Command
from tests.predict.files import series
from tests.run.jobs import SIDE

Finished = Callable[[str], Path]
CLIENT = "scan-0"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def picture(path: Path, stream: int = 0, shape: tuple[int, ...] = (SIDE, SIDE)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(stream).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("strategy", ["omnifm", "local"])
def test_a_file_of_the_test_split_gets_what_the_run_predicted(strategy: str, finished: Finished, data: Path) -> None:
    """The same pixels, shared tensors, private tensors and bank: the same bits as when the run was tested."""
    run = finished(strategy)
    session = open_run(run, CLIENT)
    plan = next(c for c in read(run / "split.json")["clients"] if c["id"] == CLIENT)
    rows = plan["test"]
    # The rows are in the order of the cohort that `jobs.write_images` writes: train, val, test.
    names = [f"test{row - 32}.png" for row in rows]
    server, record = _checkpoint(run)
    site, strategy_object = _site(run)
    extra = strategy_object.extra_for_prediction(server, CLIENT)
    shared = held(strategy_object.shared_for(server, CLIENT), None)
    logits, _ = site.predict(Request("evaluate", record["rounds_completed"], CLIENT, shared, extra), torch.arange(len(rows)))
    for name, expected in zip(names, logits.double().softmax(1).tolist(), strict=True):
        answer, _ = session.answer(Case("x", (data / "scan/images" / name,)))
        assert list(answer.facts["probabilities"].values()) == pytest.approx(expected, abs=1e-6)


def _checkpoint(run: Path) -> Any:
    from omnifm.track.checkpoint import Checkpoint

    return Checkpoint(run / "checkpoint").load()


def _site(run: Path) -> Any:
    from omnifm import build
    from omnifm.config import load

    site = build.make_site(load(run / "config.toml"), run / "checkpoint/clients")
    return site, site.strategy


def test_the_bank_of_the_server_comes_with_the_request(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []
    run = finished("omnifm")
    monkeypatch.setattr(Site, "predictor", lambda site, request: seen.append(request))
    open_run(run, CLIENT)
    assert (seen[0].client, seen[0].round) == (CLIENT, 3)
    assert torch.equal(seen[0].extra["bank/vectors"], load_file(run / "bank/round-0002.safetensors")["vectors"])


def test_a_network_that_says_nan_is_the_case_s_problem_and_the_next_is_taken(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = open_run(finished("fedavg"), CLIENT)
    monkeypatch.setattr(Model, "forward", lambda self, inputs: Output(inputs.image.flatten(1)[:, :4] * float("nan")))
    with pytest.raises(DataError, match=r"x\.png: the prediction is not finite$"):
        session.answer(Case("x", (picture(tmp_path / "x.png"),)))


def test_another_clients_model_and_another_round_say_something_else(finished: Finished, tmp_path: Path) -> None:
    path = picture(tmp_path / "x.png")
    said = {c: open_run(finished("local"), c).answer(Case("x", (path,)))[0].facts for c in (CLIENT, "scan-1")}
    assert said[CLIENT]["probabilities"] != said["scan-1"]["probabilities"]
    best = open_run(finished("omnifm"), CLIENT, best=True)
    last = open_run(finished("omnifm"), CLIENT)
    assert (best.checkpoint, last.checkpoint, last.rounds) == ("best", "last", 3)
    assert best.rounds == read(finished("omnifm") / "metrics.json")["best_validation_round"] + 1


def test_a_folder_is_answered_and_bad_files_are_told_of(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for k, name in enumerate(("b.png", "a.png", "deep/c.png")):
        picture(folder / name, k)
    picture(folder / "grey.jpg")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no image")
    np.save(folder / "strange.npy", np.zeros((2, 5, 5, 5, 5)))
    np.save(folder / "hole.npy", np.full((5, 5), np.nan))
    ended = omnifm("predict", finished("omnifm"), folder, "--client", CLIENT, "--out", "answers")
    assert ended.code == 1
    complaints = ended.err.splitlines()
    assert len(complaints) == 3, ended.err
    assert complaints[0].startswith(f"omnifm: {folder}/cut.png: cannot be read (")
    assert complaints[1] == f"omnifm: {folder}/hole.npy: holds NaN or infinite values"
    assert complaints[2].startswith(f"omnifm: {folder}/strange.npy: shape ")
    assert ended.out == "4 of 7 answered: answers/predictions.json\n"
    summary = read(tmp_path / "answers/predictions.json")
    assert [case["name"] for case in summary["cases"]] == ["a", "b", "deep/c", "grey"]
    assert [case["file"] for case in summary["failed"]] == [f"{folder}/{n}" for n in ("cut.png", "hole.npy", "strange.npy")]
    assert (summary["client"], summary["checkpoint"], summary["strategy"], summary["rounds"]) == (CLIENT, "last", "omnifm", 3)
    alone = read(tmp_path / "answers/deep/c.json")
    assert sum(alone["probabilities"].values()) == pytest.approx(1) and set(alone["probabilities"]) == {"a", "b"}
    assert alone["probabilities"][alone["class"]] == max(alone["probabilities"].values())
    found = sorted(str(p.relative_to(tmp_path / "answers")) for p in (tmp_path / "answers").rglob("*") if p.is_file())
    assert found == ["a.json", "b.json", "deep/c.json", "grey.json", "predictions.json"]


def test_all_well_is_exit_code_0_and_answers_are_no_input(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    words = ("predict", finished("fedavg"), "in", "--client", CLIENT, "--out", "in/answers")
    assert omnifm(*words).code == 0
    picture(tmp_path / "in/answers/old.png")
    assert "in/answers/predictions.json: is there already; --force replaces it" in omnifm(*words).complaint
    before = (tmp_path / "in/answers/a.json").read_bytes()
    again = omnifm(*words, "--force")
    assert (again.code, again.out) == (0, "1 of 1 answered: in/answers/predictions.json\n")
    assert (tmp_path / "in/answers/a.json").read_bytes() == before


def test_force_replaces_nothing_beside_the_images(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    """A mask that somebody drew has the name of an answer."""
    picture(tmp_path / "in/a.png")
    drawn = picture(tmp_path / "in/a-mask.png").read_bytes()
    words = ("predict", finished("fedavg"), "in/a.png", "--client", CLIENT, "--out", "in", "--force")
    assert "in: holds images of this call, and --force could replace" in omnifm(*words).complaint
    assert (tmp_path / "in/a-mask.png").read_bytes() == drawn and not (tmp_path / "in/a.json").exists()


def test_one_answer_that_is_there_stops_no_other(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.json").write_text("mine")
    ended = omnifm("predict", finished("fedavg"), "in", "--client", CLIENT, "--out", "out")
    assert ended.code == 1
    assert ended.err == "omnifm: out/a.json: is there already; --force replaces it\n"
    assert (tmp_path / "out/a.json").read_text() == "mine"
    assert (tmp_path / "out/b.json").is_file()


def test_what_fails_under_force_leaves_no_answer_of_another_model(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    words = ("in", "--client", CLIENT, "--out", "out", "--force")
    assert omnifm("predict", finished("fedavg"), *words).code == 0 and (tmp_path / "out/a.json").is_file()
    (tmp_path / "in/a.png").write_bytes(b"damaged")
    assert omnifm("predict", finished("omnifm"), *words).code == 1
    assert not (tmp_path / "out/a.json").exists()


def test_what_is_no_answer_is_not_removed(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    """A description that belongs to an image (BIDS) has the name of its answer."""
    picture(tmp_path / "in/a.png")
    (tmp_path / "out").mkdir()
    for text in ('{"RepetitionTime": 2.3}', "no json", "[]"):
        (tmp_path / "out/a.json").write_text(text)
        ended = omnifm("predict", finished("fedavg"), "in", "--client", CLIENT, "--out", "out", "--force")
        assert (ended.code, ended.err) == (
            1,
            "omnifm: out/a.json: is no answer of an earlier call, and stays as it is: take another --out\n",
        )
        assert (tmp_path / "out/a.json").read_text() == text


def test_a_volume_of_another_kind_is_one_line(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", np.arange(3 * 6 * 5).reshape(3, 6, 5), (2, 0, 1))
    ended = omnifm("predict", finished("fedavg"), folder, "--client", CLIENT, "--out", "out")
    assert ended.code == 1
    assert ended.err == f"omnifm: {folder}: is a volume, and cohort.toml has no slice_axis to cut it along\n"


def test_a_flat_nifti_is_no_picture_for_a_model_of_png_files(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    """It is stored by columns: the model would see it transposed."""
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((SIDE, SIDE), np.float32), np.eye(4)), tmp_path / "x.nii")
    ended = omnifm("predict", finished("fedavg"), "x.nii", "--client", CLIENT, "--out", "out")
    assert ended.code == 1
    said = r"is a flat NIfTI, which is stored by columns, and row '\S+' is stored by rows: save all alike"
    assert re.fullmatch(rf"omnifm: x\.nii: {said}\n", ended.err)


def test_a_link_that_leads_out_of_the_folder_is_not_followed(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    picture(tmp_path / "in/sub/a.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").symlink_to(tmp_path / "elsewhere")
    ended = omnifm("predict", finished("fedavg"), "in", "--client", CLIENT, "--out", "out", "--force")
    assert ended.code == 1
    assert ended.err == "omnifm: out/sub/a.json: leaves the folder of answers\n"
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.png", "--client", "nobody"], "--client nobody: not in this run; its clients are scan-0, scan-1, echo-0, echo-1"),
        (["x.png", "--client", CLIENT, "--question", "Is it?"], "task classification answers no question"),
        (["x.png", "--client", CLIENT, "--with", "x.png"], "task classification reads one image a case"),
        (["x.png", "x.png", "--client", CLIENT, "--with", "x.png"], "--with was given 1 times for 2 first images"),
        (["empty", "--client", CLIENT], "empty: holds no image (.nii,"),
        (["x.png", "--client", CLIENT, "--out", "x.png"], "x.png: is a file, not a folder"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], message: str, omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    out = [] if "--out" in words else ["--out", "out"]
    assert message in omnifm("predict", finished("fedavg"), *words, *out).complaint
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_and_one_of_no_known_kind(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    ended = omnifm("predict", finished("fedavg"), "none.png", "x.txt", "--client", CLIENT, "--out", "out")
    assert ended.code == 1
    assert ended.err.splitlines()[0] == "omnifm: none.png: file is missing"
    assert ended.err.splitlines()[1].startswith("omnifm: x.txt: not a PNG")
    assert read(tmp_path / "out/predictions.json")["cases"] == []


def test_a_run_that_cannot_answer_is_one_line(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    import shutil

    words = ("x.png", "--client", CLIENT, "--out", "out")
    assert "none: holds no run (no config.toml)" in omnifm("predict", "none", *words).complaint
    run = Path(shutil.copytree(finished("omnifm"), tmp_path / "run"))
    split = (run / "split.json").read_text()
    (run / "split.json").write_text(split.replace('"sha256": "', '"sha256": "0', 1))
    assert "split.json: the cohorts are not those this run was trained on" in omnifm("predict", run, *words).complaint
    twin = json.loads(split)
    twin["cohorts"]["scan"] = "0" * 64  # as many rows, of other classes: their names would be said of our images
    (run / "split.json").write_text(json.dumps(twin))
    assert "split.json: the cohorts are not those this run was trained on" in omnifm("predict", run, *words).complaint
    (run / "split.json").write_text(split)
    (run / "checkpoint/best.json").unlink()
    assert "run: has no checkpoint, no round was best on validation" in omnifm("predict", run, *words, "--best").complaint
    private = next((run / f"checkpoint/clients/{CLIENT}").glob("*.safetensors"))
    private.write_bytes(private.read_bytes()[:-1])
    assert "damaged or cut short" in omnifm("predict", run, *words).complaint
    shutil.rmtree(run / "checkpoint")
    assert "run: has no checkpoint, no round was completed" in omnifm("predict", run, *words).complaint
    assert not (tmp_path / "out").exists()
