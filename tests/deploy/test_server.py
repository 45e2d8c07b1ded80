"""The server without data and hospitals with theirs leave what a run in one process leaves, whatever happens on the way."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from omnifm import run
from omnifm.config import Config, dump, parse
from omnifm.data.words import Discretion
from omnifm.deploy.board import STATUS_FILE
from omnifm.deploy.data import public
from omnifm.deploy.hospital import Hospital
from omnifm.deploy.policy import Policy
from omnifm.deploy.server import Job, main, read_job, serve_job
from omnifm.deploy.status import read_status
from omnifm.engines.calls import Call, pack, unpack
from omnifm.engines.parcels import Node
from omnifm.errors import CheckpointError, FederationError
from omnifm.federation.messages import Reply, Request, decode, encode
from omnifm.track.folder import write_config
from omnifm.track.lock import is_locked, locked
from tests.deploy.post import Bay, Post, hurry, open_bays
from tests.run import jobs
from tests.tasks.test_vqa import raw_config
from tests.tasks.vqa_cohort import write_questions

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ("scan-0", "scan-1", "echo-0", "echo-1")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in one process."""
    return jobs.finished(tmp_path_factory.getbasetemp(), "omnifm")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def serve(config: Config, post: Post, out: Path, clients: tuple[str, ...] = CLIENTS) -> Job:
    job = Job(out=out, clients=clients, certs=None)
    (out / "flower").mkdir(parents=True, exist_ok=True)
    if not (out / "config.toml").is_file():
        write_config(out / "config.toml", dump(public(config)))
    serve_job(job, post)
    return job


def remembered(out: Path) -> dict[str, Any]:
    """Return the server's tensors, and every client's score in both tests."""
    metrics = json.loads((out / "metrics.json").read_text())
    kept = {key: metrics[key] for key in ("test", "best", "clients", "config_hash", "references")}
    return kept | {p.name: jobs.contents(p) for p in sorted((out / "checkpoint").glob("server-*.safetensors"))}


def private(folder: Path) -> dict[str, Any]:
    return {f"{p.parent.name}/{p.name}": jobs.contents(p) for p in sorted(folder.rglob("*.safetensors"))}


def test_questions_are_answered_apart_as_in_one_process(tmp_path: Path) -> None:
    """The whole run, bit for bit, where every answer is told."""
    for name, modality in (("scan", "MRI"), ("echo", "US")):
        write_questions(tmp_path / name, name, modality)
    raw = raw_config(tmp_path, "omnifm")
    raw["federation"] |= {"rounds": 2, "evaluate_every": 1}
    config = parse(raw)
    run.execute(config, tmp_path / "one")
    bays = open_bays(tmp_path, tmp_path / "hospitals", ("scan-0", "echo-0"), Discretion(least=1))
    serve(config, Post(bays), tmp_path / "apart", ("scan-0", "echo-0"))
    assert remembered(tmp_path / "apart") == remembered(tmp_path / "one")
    assert private(tmp_path / "hospitals") == private(tmp_path / "one" / "checkpoint" / "clients")


def test_it_leaves_what_a_run_in_one_process_leaves(data: Path, one: Path, tmp_path: Path) -> None:
    config = jobs.config(data, "omnifm")
    serve(config, Post(open_bays(data, tmp_path / "hospitals", CLIENTS)), tmp_path / "apart")
    assert remembered(tmp_path / "apart") == remembered(one)
    assert private(tmp_path / "hospitals") == private(one / "checkpoint" / "clients")
    assert (tmp_path / "apart" / "report.html").is_file()
    assert read_status(tmp_path / "apart").headline.startswith("finished, round 3 of 3, loss 0.")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thirty_faults_change_nothing_and_no_reply_counts_twice(data: Path, one: Path, tmp_path: Path, seed: int) -> None:
    config = jobs.config(data, "omnifm")
    post = Post(open_bays(data, tmp_path / "hospitals", CLIENTS), faults=30, seed=seed)
    serve(config, post, tmp_path / "apart")
    assert len(post.met) == 30 and len(set(post.met)) == 6
    assert remembered(tmp_path / "apart") == remembered(one)
    assert private(tmp_path / "hospitals") == private(one / "checkpoint" / "clients")
    events = jobs.lines(tmp_path / "apart" / "events.jsonl")
    trained = [(e["round"], e["client"]) for e in events if e["event"] == "client"]
    assert len(trained) == len(set(trained)) == 9  # three of four, three rounds


def test_secure_aggregation_is_at_work_across_machines(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No hospital's shared tensors are in what comes from it, and the mean is a plain run's to the quantum."""
    changes: dict[str, Any] = {"federation": {"rounds": 2, "participation": 1.0}}
    pytest.importorskip("cryptography", reason="needs the extra omnifm[privacy]")
    plain = jobs.config(data, "fedavg", **changes)
    config = jobs.config(data, "fedavg", privacy={"secure_aggregation": True}, **changes)
    post = Post(open_bays(data, tmp_path / "hospitals", CLIENTS))
    came: list[Reply] = []
    answer = Hospital.answer

    def listen(hospital: Hospital, blob: bytes) -> bytes:
        found = answer(hospital, blob)
        call = unpack(found)
        came.extend([decode(call.body)] if call.kind == "reply" else [])  # type: ignore[list-item]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hospital, "answer", listen)
        with caplog.at_level(logging.INFO):
            serve(config, post, tmp_path / "hidden")
    assert "strategy fedavg, 4 clients, privacy {'delta': 1e-05, 'noise': 'secret', 'secure_aggregation': True" in caplog.text
    trained = [reply for reply in came if reply.kind == "train"]
    assert len(trained) == 8 and all(not reply.tensors and "secagg/masked" in reply.extra for reply in trained)
    assert sum(reply.kind == "secagg" for reply in came) == 2 * 3 * 4, "keys, shares and unmasking, from each in each round"
    serve(plain, Post(open_bays(data, tmp_path / "others", CLIENTS)), tmp_path / "plain")
    hidden, seen = (load_file(tmp_path / n / "checkpoint" / "server-000002.safetensors") for n in ("hidden", "plain"))
    assert hidden.keys() == seen.keys()
    for name, tensor in seen.items():
        torch.testing.assert_close(hidden[name], tensor, atol=1e-5, rtol=0)


class Killed(Exception):
    """The end of the server's process."""


def test_a_server_that_is_killed_goes_on_from_its_last_round(
    data: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = jobs.config(data, "omnifm")
    post = Post(open_bays(data, tmp_path / "hospitals", CLIENTS))

    send, count = post.send, 0

    def dying(node: int, blob: bytes) -> str:
        nonlocal count
        count += 1
        if count in (14, 40):
            raise Killed
        return send(node, blob)

    monkeypatch.setattr(post, "send", dying)
    for _ in range(2):
        with pytest.raises(Killed):
            serve(config, post, tmp_path / "apart")
    serve(config, post, tmp_path / "apart")
    assert remembered(tmp_path / "apart") == remembered(one)


def test_hospitals_that_start_anew_keep_their_private_state(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every call each hospital is a new process: all it has is its disk."""
    config = jobs.config(data, "fedper")
    run.execute(config, tmp_path / "one")
    post = Post(open_bays(data, tmp_path / "hospitals", CLIENTS))
    send = post.send

    def forgetful(node: int, blob: bytes) -> str:
        fresh = open_bays(data, tmp_path / "hospitals", CLIENTS)
        post.bays = {c: Bay(fresh[c].hospital, bay.node) for c, bay in post.bays.items()}
        return send(node, blob)

    monkeypatch.setattr(post, "send", forgetful)
    serve(config, post, tmp_path / "apart")
    assert remembered(tmp_path / "apart") == remembered(tmp_path / "one")


def test_a_round_without_a_client_says_who_was_missing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = jobs.config(data, "fedavg", federation={"participation": 1.0, "min_replies": 3, "deadline": 0.2})
    post = Post(open_bays(data, tmp_path / "hospitals", CLIENTS))
    take = post.take

    def without_echo_1(parcels: Any) -> list[Any]:
        calls = [(arrival, unpack(arrival.blob)) for arrival in take(parcels)]
        return [a for a, call in calls if call.kind != "reply" or decode(call.body).client != "echo-1"]

    monkeypatch.setattr(post, "take", without_echo_1)
    serve(config, post, tmp_path / "apart")
    rounds = [e for e in jobs.lines(tmp_path / "apart" / "events.jsonl") if e["event"] == "round"]
    assert [e["missing"] for e in rounds] == [["echo-1"]] * 3
    metrics = json.loads((tmp_path / "apart" / "metrics.json").read_text())
    assert [c["test"]["personal"] is None for c in metrics["clients"]] == [False, False, False, True]


def test_a_run_goes_on_without_the_scores_of_a_hospital_that_tells_none(data: Path, tmp_path: Path) -> None:
    """It trains, and what it has trained counts as in a run that it is scored in."""
    config = jobs.config(data, "fedavg", federation={"rounds": 2, "participation": 1.0, "min_replies": 3, "deadline": 0.2})
    post = Post(open_bays(data, tmp_path / "hospitals", CLIENTS))
    post.bays["echo-1"].hospital = quiet(data, tmp_path / "quiet")
    serve(config, post, tmp_path / "apart")
    serve(config, Post(open_bays(data, tmp_path / "others", CLIENTS)), tmp_path / "told")
    clients = json.loads((tmp_path / "apart" / "metrics.json").read_text())["clients"]
    assert [c["test"]["personal"] is None for c in clients] == [False, False, False, True]
    events = jobs.lines(tmp_path / "apart" / "events.jsonl")
    assert ["missing" in e for e in events if e["event"] == "round"] == [False, False]
    assert [e["client"] for e in events if e["event"] == "client"] == sorted(CLIENTS) * 2
    apart, told = (jobs.contents(tmp_path / n / "checkpoint" / "server-000002.safetensors") for n in ("apart", "told"))
    assert apart == told


def test_a_run_that_needs_those_scores_ends_with_a_line_that_names_the_hospital(data: Path, tmp_path: Path) -> None:
    config = jobs.config(data, "fedavg", federation={"rounds": 1, "participation": 1.0})
    post = Post(open_bays(data, tmp_path / "hospitals", CLIENTS))
    post.bays["echo-1"].hospital = quiet(data, tmp_path / "quiet")
    with pytest.raises(FederationError, match=r"client echo-1: refused by .* policy: an evaluation, whose scores"):
        serve(config, post, tmp_path / "apart")


def quiet(data: Path, folder: Path) -> Hospital:
    """Return echo-1 with a policy that lets no score leave."""
    return Hospital(data / "echo", "echo-1", folder, str(data / "cache"), policy=Policy(allow_scores=False))


def test_a_server_started_again_needs_nobody_who_is_away_if_enough_are_there(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = jobs.config(data, "fedavg", federation={"participation": 1.0, "min_replies": 3, "deadline": 0.2})
    post = Post(open_bays(data, tmp_path / "hospitals", CLIENTS))
    execute = run.execute

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr(run, "execute", killed)
    with pytest.raises(Killed):
        serve(config, post, tmp_path / "apart")
    monkeypatch.setattr(run, "execute", execute)
    # All nodes are others than before, as without keys they are after a restart, and echo-1 does not come back.
    fresh = open_bays(data, tmp_path / "hospitals", CLIENTS[:3])
    post.bays = {c: Bay(bay.hospital, replace(bay.node, address=90 + bay.node.address)) for c, bay in fresh.items()}
    serve(config, post, tmp_path / "apart")
    rounds = [e for e in jobs.lines(tmp_path / "apart" / "events.jsonl") if e["event"] == "round"]
    assert [e["missing"] for e in rounds] == [["echo-1"]] * 3


def said(hospital: Hospital, call: Call) -> str:
    answer = unpack(hospital.answer(pack(call)))
    return f"{answer.kind}: {answer.header.get('message', '')}"


def test_a_hospital_answers_nonsense_in_one_line(hospital: Hospital, data: Path) -> None:
    header = {"config": dump(public(jobs.config(data, "fedavg"))), "introductions": []}
    assert unpack(hospital.answer(b"\x00")).header["message"] == "a call is cut short"
    assert said(hospital, Call("shutdown")).startswith("mistake: the server asks for 'shutdown'")
    assert said(hospital, Call("introduce", {"config": {"task": 1}})).startswith("mistake: task: ")
    assert said(hospital, Call("answer", header, encode(Request("train", 0, "echo-0")))).startswith(
        "mistake: client scan-0: was asked in the name of client echo-0"
    )
    assert "does not have it as it is" in said(hospital, Call("answer", header, encode(Request("train", 0, "scan-0"))))
    assert said(hospital, Call("answer", {"config": header["config"]}, encode(Request("train", 0, "scan-0")))).endswith(
        "lacks the introductions"
    )


@pytest.mark.parametrize("folder", ["/etc", "../../secret"])
def test_a_path_from_the_server_is_not_followed(hospital: Hospital, data: Path, folder: str) -> None:
    raw = dump(public(jobs.config(data, "fedavg")))
    raw["federation"]["cohorts"] = [{"path": f"{folder}/scan", "clients": 2}]
    raw["data"]["cache"] = folder
    answer = unpack(hospital.answer(pack(Call("introduce", {"config": raw}))))
    assert answer.kind == "introduction" and answer.header["train"] == 12  # of the cohort that is here
    raw["model"]["weights"] = f"{folder}/x.safetensors"
    assert "a file of weights does not travel" in said(hospital, Call("introduce", {"config": raw}))


def impostors(data: Path, tmp_path: Path, keys: dict[str, bytes]) -> Post:
    bays = open_bays(data, tmp_path / "hospitals", CLIENTS)
    return Post({c: replace(bay, node=replace(bay.node, key=keys.get(c, b""))) for c, bay in bays.items()})


def test_a_node_that_poses_as_another_is_refused(data: Path, tmp_path: Path) -> None:
    from omnifm.deploy.roster import Roster

    keys = {client: client.encode() for client in CLIENTS}
    post = impostors(data, tmp_path, keys)
    # echo-1's key, but it says that it is scan-0; and a node with a key that nobody knows.
    post.bays["echo-1"] = Bay(post.bays["scan-0"].hospital, Node(50, b"echo-1"))
    post.bays["zoo"] = Bay(post.bays["scan-0"].hospital, Node(51, b"unknown"))
    heard: list[str] = []

    def note(client: str, *, connected: bool, said: str = "") -> None:
        heard.append(said)
        if said:
            raise Killed  # it would wait for the true echo-1 for ever

    roster = Roster(post, keys, dump(public(jobs.config(data, "fedavg"))), note)
    with pytest.raises(Killed):
        roster.gather()
    assert heard[-1] == "introduces itself as scan-0, and is refused"


def test_who_is_not_expected_is_left_out(data: Path, tmp_path: Path) -> None:
    config = jobs.config(
        data, "fedavg", federation={"rounds": 1, "participation": 1.0, "cohorts": [{"path": str(data / "scan"), "clients": 2}]}
    )
    post = Post(open_bays(data, tmp_path / "hospitals", ("scan-0", "scan-1")))
    serve(config, post, tmp_path / "apart", ("scan-1",))
    assert [c["id"] for c in json.loads((tmp_path / "apart" / "metrics.json").read_text())["clients"]] == ["scan-1"]


def test_an_outcome_is_left_whatever_it_is(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "apart"
    (out / "flower").mkdir(parents=True)
    write_config(out / "config.toml", dump(public(jobs.config(data, "fedavg", federation={"rounds": 1}))))
    job = Job(out=out, clients=CLIENTS, certs=None)
    (out / "flower" / "job.json").write_text(job.model_dump_json())
    monkeypatch.setenv("OMNIFM_SERVER", str(out / "flower" / "job.json"))
    monkeypatch.setattr("omnifm.deploy.server._end_with_serve", lambda job, ticket: None)
    post = Post(open_bays(data, tmp_path / "hospitals", CLIENTS))
    monkeypatch.setattr(post, "take", lambda parcels: (_ for _ in ()).throw(FederationError("no\nluck")))
    main(post)
    assert json.loads(job.outcome.read_text()) == {"ok": False, "message": "no luck"}
    monkeypatch.undo()
    monkeypatch.setenv("OMNIFM_SERVER", str(out / "flower" / "job.json"))
    monkeypatch.setattr("omnifm.deploy.server._end_with_serve", lambda job, ticket: None)
    _quick_again(monkeypatch)
    main(Post(open_bays(data, tmp_path / "hospitals", CLIENTS)))
    assert json.loads(job.outcome.read_text()) == {"ok": True, "message": ""}
    assert job.log.is_file() and not [h for h in logging.getLogger().handlers if "server.log" in str(h)]


def _quick_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnifm.engines.remote._POLL_SECONDS", 0.0)


def test_status_of_nothing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds no {STATUS_FILE}"):
        read_status(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_job(tmp_path / "job.json")


PROGRAM = """
import sys, time
from pathlib import Path
from omnifm.deploy import server
server.serve_job = lambda job, carrier: (print("up", flush=True), time.sleep(600))
server.main(None)
"""


@pytest.mark.parametrize("how", ["serve ends", "another SuperLink"])
def test_the_server_program_ends_with_who_serves(tmp_path: Path, how: str) -> None:
    out = tmp_path / "run"
    (out / "flower").mkdir(parents=True)
    job = Job(out=out, clients=CLIENTS, certs=None)
    (out / "flower" / "job.json").write_text(job.model_dump_json())
    job.ticket.write_text("1")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMNIFM_SERVER": str(out / "flower" / "job.json")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(job.serving, "server"))
        program = subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, text=True)
        assert program.stdout is not None and program.stdout.readline() == "up\n"
        if how == "serve ends":
            stack.pop_all().close()
        else:
            job.ticket.write_text("2")
        assert program.wait(timeout=60) == 1
        program.stdout.close()
    assert not is_locked(job.lock) and not job.outcome.exists()
