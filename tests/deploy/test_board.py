"""What the board says: at the terminal, in JSON and as a page."""

import io
import json
from collections.abc import Collection
from pathlib import Path

from rich.console import Console

from omnifm.deploy.board import Board
from omnifm.deploy.roster import Roster
from omnifm.deploy.status import read_status, table
from omnifm.deploy.words import COLUMNS
from omnifm.engines.calls import Call, pack
from omnifm.engines.parcels import Arrival, Node
from omnifm.engines.remote import Account


def test_it_says_who_is_late_and_why_on_page_and_terminal(tmp_path: Path) -> None:
    now = [1000.0]
    board = Board(tmp_path, ["a", "b"], lambda: now[0], lambda: now[0])
    board.write()
    assert read_status(tmp_path, 1007.0).headline == (
        "not running (last state: waiting for hospitals), round 0 of 0, as of 7 s ago"
    )
    board.state("training")
    board.heard("b", connected=True, said="cohort <b>: is not a folder")
    board.heard("nobody", connected=True)
    board.event({"event": "start", "completed": 2, "rounds": 9, "primary": "dice"})
    board.event({"event": "round", "round": 2, "loss": 0.5})
    board.event({"event": "evaluation", "personal": {"dice": None}})
    board.event({"event": "client"})
    now[0] += 1
    board.accounts({"a": Account(replies=3, late=1, bytes_up=3 * 2**20, waiting="train, round 3", trouble="was restarted")})
    found = read_status(tmp_path, now[0])
    assert found.headline.startswith("not running (last state: training), round 3 of 9, loss 0.500")
    assert found.clients["a"] == ("a", "no", "train, round 3", "3", "1", "0", "0", "0.0", "3.0", "0.0", "was restarted")
    assert found.clients["b"][1] == "yes" and found.clients["b"][-1] == "cohort <b>: is not a folder"
    assert table(found).row_count == 2
    page = (tmp_path / "status.html").read_text()
    assert "cohort &lt;b&gt;: is not a folder" in page and 'http-equiv="refresh"' in page
    assert all(column in page for column in COLUMNS)
    board.state("finished")
    assert "refresh" not in (tmp_path / "status.html").read_text()


ODD = "no \ud800 disk \x1b]0;owned\x07\x1b[2J\x1b[1;1H\u202efull\n\nrun finished"


def test_what_a_hospital_says_reaches_no_terminal_as_it_came(tmp_path: Path) -> None:
    """Half a surrogate pair ended the server's program, and escape sequences could repaint the operator's terminal."""

    class Odd:
        def nodes(self) -> list[Node]:
            return [Node(1), Node(2)]

        def send(self, node: int, blob: bytes) -> str:
            return f"p{node}"

        def take(self, parcels: Collection[str]) -> list[Arrival]:
            calls = {"p1": Arrival("p1", pack(Call("mistake", {"message": ODD}))), "p2": Arrival("p2", error=ODD)}
            return [calls[parcel] for parcel in parcels]

    board = Board(tmp_path, ["a"])
    told: list[str] = []

    def heard(client: str, *, connected: bool, said: str) -> None:
        told.append(said)
        board.heard("a", connected=connected, said=said)

    Roster(Odd(), {"a": b""}, {}, heard)._look()
    assert told == ["no disk ]0;owned [2J [1;1H full run finished"] * 2
    shown = io.StringIO()
    Console(file=shown, force_terminal=True, width=200).print(table(read_status(tmp_path)))
    assert "owned" in shown.getvalue() and not [odd for odd in ("\x1b]0", "\x1b[2J", "\x1b[1;1H") if odd in shown.getvalue()]
    board.heard("a", connected=True, said=ODD)  # wherever it came from
    assert "no ? disk" in (tmp_path / "status.html").read_text()


def test_it_writes_at_most_twice_a_second_while_bytes_flow(tmp_path: Path) -> None:
    now = [0.0]
    board = Board(tmp_path, ["a"], lambda: now[0], lambda: now[0])
    board.write()
    board.accounts({"a": Account(replies=1)})
    assert json.loads((tmp_path / "status.json").read_text())["clients"]["a"]["replies"] == 0
    now[0] += 0.6
    board.accounts({"a": Account(replies=2)})
    assert json.loads((tmp_path / "status.json").read_text())["clients"]["a"]["replies"] == 2


def test_a_clock_that_is_set_back_does_not_silence_it(tmp_path: Path) -> None:
    wall, steady = [7200.0], [0.0]
    board = Board(tmp_path, ["a"], lambda: wall[0], lambda: steady[0])
    board.write()
    wall[0], steady[0] = wall[0] - 3600, 0.6
    board.accounts({"a": Account(replies=1)})
    found = json.loads((tmp_path / "status.json").read_text())
    assert found["clients"]["a"]["replies"] == 1 and found["written"] == 3600
