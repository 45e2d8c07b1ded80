from pathlib import Path

import pytest
import torch

from omnifm.errors import CheckpointError, FederationError
from omnifm.federation.store import ClientStore, read_tensors, write_tensors


def value(number: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([number])}


def held(store: ClientStore, moment: int) -> float | None:
    found = store.load("c", moment)
    return float(found["w"]) if found else None


def test_a_request_of_a_round_is_answered_from_before_that_round(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    assert store.load("c", 5) == {} and store.versions("c") == []
    store.save("c", 2, value(2.0))
    assert (held(store, 2), held(store, 3), held(store, 9)) == (None, 2.0, 2.0)
    store.save("c", 4, value(4.0))
    assert (held(store, 3), held(store, 4), held(store, 5)) == (2.0, 2.0, 4.0)


def test_a_round_that_is_run_again_starts_from_what_was_before(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save("c", 0, value(1.0))
    store.save("c", 1, value(9.0))  # the server is killed here, before its commit
    assert held(store, 1) == 1.0
    store.save("c", 1, value(2.0))
    assert held(store, 2) == 2.0


def test_old_versions_go_unless_they_are_kept(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for index in range(6):
        store.save("c", index, value(index), keep=(2,))
    assert store.versions("c") == [2, 5, 6] and held(store, 2) == 1.0
    store.save("c", 6, value(6.0))
    assert store.versions("c") == [6, 7]


def test_a_kept_moment_between_two_versions_keeps_the_earlier(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for index in (0, 5, 8):
        store.save("c", index, value(index), keep=(4,))
    assert held(store, 4) == 0.0


def test_no_void_round_and_no_later_version_takes_a_release_back(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    assert store.released("c") == frozenset()
    for index in (3, 0, 3):
        store.note_release("c", index)
        store.save("c", index, value(index), void=(3,))
    assert store.released("c") == ClientStore(tmp_path).released("c") == {0, 3} and store.released("d") == frozenset()
    assert store.versions("c") == [1, 4], "it is no version"


def test_clients_do_not_see_each_other(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save("c", 0, value(1.0))
    store.save("c2", 0, value(2.0))
    assert held(store, 1) == 1.0 and store.load("c3", 1) == {}


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "a b"])
def test_an_id_that_could_leave_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="an id has letters"):
        ClientStore(tmp_path).load(name, 0)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save("c", 0, value(1.0))
    path = next((tmp_path / "c").glob("*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"000001\.safetensors: .*damaged") as caught:
        store.load("c", 1)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="missing"):
        read_tensors(tmp_path / "nothing")


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, value(1.0))

    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be written .*no space"):
        write_tensors(path, value(2.0))
    assert float(read_tensors(path)["w"]) == 1.0


def test_versions_of_rounds_that_did_not_count_are_passed_over(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save("c", 0, value(1.0))
    store.save("c", 3, value(9.0))
    assert float(store.load("c", 5, void=[3])["w"]) == 1.0 and held(store, 5) == 9.0
    assert store.load("c", 5, void=[0, 3]) == {}
    # A server that was killed before it knew that the next one counts asks again, and still gets what was before both.
    store.save("c", 5, value(2.0), void=[3])
    assert store.versions("c") == [1, 6] and held(store, 6) == 2.0
    assert float(store.load("c", 5, void=[3])["w"]) == 1.0
