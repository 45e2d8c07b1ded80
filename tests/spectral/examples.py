"""Rows and images that several spectral tests use."""

import torch
from torch import Tensor

from omnifm import seeds
from omnifm.spectral.rows import BankRows


def images(b: int, c: int = 1, h: int = 32, w: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(b, c, h, w, generator=seeds.generator(seed, "images"))


def ball(m: int, dim: int, seed: int = 0) -> Tensor:
    vectors = torch.randn(m, dim, generator=seeds.generator(seed, "ball"))
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True) * 0.9


def make_rows(m: int, dim: int = 8, seed: int = 0, clients: int = 3, modalities: int = 2) -> BankRows:
    g = seeds.generator(seed, "rows")
    return BankRows(
        vectors=ball(m, dim, seed),
        client=torch.randint(clients, (m,), generator=g),
        modality=torch.randint(modalities, (m,), generator=g),
        round=torch.randint(6, (m,), generator=g).sort().values,
        weight=torch.randint(1, 20, (m,), generator=g).float(),
        count=torch.randint(5, (m,), generator=g).float(),
        row_id=torch.arange(m) * 3,
    )
