import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifm.errors import DataError
from omnifm.spectral.fft import low_pass_amplitude
from omnifm.spectral.signature import client_signature, cluster, cosine_table
from tests.spectral.examples import ball, images


def test_the_signature_is_the_mean_spectrum_however_it_is_batched() -> None:
    batch = images(7)
    expected = low_pass_amplitude(batch, 8).mean(dim=0).flatten()
    torch.testing.assert_close(client_signature(batch, 8), expected)
    torch.testing.assert_close(client_signature(iter(batch.split(3)), 8), expected)
    assert expected.shape == (128,)


def test_no_images_and_broken_images_are_errors() -> None:
    with pytest.raises(DataError, match="at least one"):
        client_signature([], 8)
    with pytest.raises(DataError, match="not finite"):
        client_signature(torch.full((1, 1, 32, 32), float("nan")), 8)


def test_the_cosine_table_is_a_correlation_of_what_differs_from_the_mean() -> None:
    signatures = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)) + 100.0
    table = cosine_table(signatures)
    centred = signatures.double().numpy() - signatures.double().numpy().mean(axis=0)
    expected = centred @ centred.T / np.outer(np.linalg.norm(centred, axis=1), np.linalg.norm(centred, axis=1))
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-6)
    assert torch.equal(table, table.T) and torch.equal(table.diagonal(), torch.ones(4))


def test_a_single_client_has_a_table_and_a_cluster() -> None:
    assert cosine_table(ball(1, 5)).tolist() == [[1.0]]
    assert cluster(ball(1, 5), 3).tolist() == [0]
    assert cluster(torch.empty(0, 5), 3).tolist() == []


def groups(seed: int = 0) -> torch.Tensor:
    """Seven clients around three directions: members 0 3 6, 1 4, 2 5."""
    noise = 0.1 * torch.randn(7, 12, generator=torch.Generator().manual_seed(seed))
    return torch.eye(12)[[0, 1, 2, 0, 1, 2, 0]] + noise + 3.0


def test_clusters_are_the_groups_and_numbered_by_first_member() -> None:
    assert cluster(groups(), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert cluster(groups(), 1).tolist() == [0] * 7
    assert cluster(groups(), 7, threshold=1.0).tolist() == list(range(7))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(1, 5), st.floats(-1, 1), st.integers(0, 1000))
def test_never_more_than_the_maximum_and_the_order_of_clients_does_not_matter(
    n: int, most: int, threshold: float, seed: int
) -> None:
    # Few distinct values make ties between distances, where a careless clustering depends on the order.
    signatures = torch.randint(0, 2, (n, 3), generator=torch.Generator().manual_seed(seed)).float()
    labels = cluster(signatures, most, threshold)
    assert len(set(labels.tolist())) <= most
    firsts = [labels.tolist().index(c) for c in range(int(labels.max()) + 1)]
    assert firsts == sorted(firsts)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))
    shuffled = cluster(signatures[order], most, threshold)
    assert torch.equal(labels[order][:, None] == labels[order], shuffled[:, None] == shuffled)


def test_merges_while_the_mean_cosine_is_at_least_the_threshold() -> None:
    from sklearn.cluster import AgglomerativeClustering

    signatures = torch.randn(15, 4, generator=torch.Generator().manual_seed(3))
    distance = 1 - cosine_table(signatures).double().numpy()
    for threshold in (-0.3, 0.1, 0.5, 0.9):
        model = AgglomerativeClustering(None, metric="precomputed", linkage="average", distance_threshold=1 - threshold)
        expected = torch.from_numpy(model.fit(distance).labels_)
        labels = cluster(signatures, 15, threshold)
        assert torch.equal(labels[:, None] == labels, expected[:, None] == expected)


def test_zero_clusters_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_clusters"):
        cluster(groups(), 0)


def test_smooth_and_rough_images_fall_apart() -> None:
    rough = [images(40, seed=i) for i in range(2)]
    smooth = [torch.nn.functional.avg_pool2d(images(40, h=36, w=36, seed=9 + i), 5, stride=1) for i in range(2)]
    signatures = torch.stack([client_signature(x, 8) for x in (rough[0], smooth[0], rough[1], smooth[1])])
    assert cluster(signatures, 4, threshold=0.5).tolist() == [0, 1, 0, 1]
