from pathlib import Path

import numpy as np
import pytest

from tests.support import Hospital, Spy, differing, make_lab, spy

FIVE = tuple(Hospital(name, "CT", 6 + 2 * i) for i, name in enumerate("abcde"))


@pytest.mark.parametrize(("beta", "drop"), [(0.2, 1), (0.21, 2), (0.49, 2)])
def test_a_round_is_the_mean_of_what_lies_between(beta: float, drop: int, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "trimmed_mean", {"beta": beta}, hospitals=FIVE, engine=Spy, federation__rounds=1)
    new, replies = lab.run().shared, spy(lab).trained()
    for name, tensor in new.items():
        sent = np.sort(np.stack([reply.tensors[name].numpy() for reply in replies]).astype(float), axis=0)
        np.testing.assert_array_equal(tensor.numpy(), sent[drop : 5 - drop].mean(axis=0).astype(np.float32))


def test_nothing_trimmed_is_fedavg_with_equal_weights_bit_for_bit(tmp_path: Path) -> None:
    ours = make_lab(tmp_path / "1", "trimmed_mean", {"beta": 0.0}, hospitals=FIVE, federation__rounds=3)
    plain = make_lab(tmp_path / "2", "fedavg", hospitals=FIVE, federation__rounds=3, federation__weighting="equal")
    assert differing(ours.run().shared, plain.run().shared) == []


def test_as_much_trimmed_as_can_be_is_the_median(tmp_path: Path) -> None:
    ours = make_lab(tmp_path / "1", "trimmed_mean", {"beta": 0.49}, hospitals=FIVE)
    assert differing(ours.run().shared, make_lab(tmp_path / "2", "median", hospitals=FIVE).run().shared) == []
