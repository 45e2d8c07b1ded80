from pathlib import Path

import numpy as np
import pytest
import torch

from omnifm.federation.robust import median
from tests.support import Hospital, Spy, make_lab, spy

FOUR = tuple(Hospital(name, "CT", n) for name, n in zip("abcd", (6, 14, 10, 8), strict=True))


@pytest.mark.parametrize("clients", [3, 4])
def test_a_round_is_numpys_median_whatever_the_numbers_of_examples(clients: int, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "median", hospitals=FOUR[:clients], engine=Spy, federation__rounds=1, model__norm="batch")
    new, replies = lab.run().shared, spy(lab).trained()
    assert len({reply.num_examples for reply in replies}) == clients
    for name, tensor in new.items():
        sent = np.stack([reply.tensors[name].numpy() for reply in replies])
        expected = np.median(sent.astype(float), axis=0) if tensor.is_floating_point() else sent.max(axis=0)
        np.testing.assert_array_equal(tensor.numpy(), expected.astype(sent.dtype))


def test_half_the_clients_less_one_may_say_anything() -> None:
    honest = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = median([*honest, *[torch.full((50,), 1e30)] * 3])
    low, high = torch.stack(honest).amin(dim=0), torch.stack(honest).amax(dim=0)
    assert bool(((found >= low) & (found <= high)).all())
