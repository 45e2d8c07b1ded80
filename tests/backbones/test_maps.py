import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnifm.backbones.maps import MOST_TOKENS, add_back, to_tokens, token_grid


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 400))
def test_a_grid_has_at_most_so_many_cells_and_is_no_finer_than_the_map(height: int, width: int, most: int) -> None:
    rows, columns = token_grid(height, width, most)
    assert 1 <= rows <= height and 1 <= columns <= width and rows * columns <= max(most, 1)
    if height * width <= most:
        assert (rows, columns) == (height, width)


def test_square_maps_get_square_grids() -> None:
    assert token_grid(64, 64) == (16, 16) and token_grid(16, 16) == (16, 16) and token_grid(128, 32) == (32, 8)


def test_tokens_are_the_means_of_their_cells_in_reading_order() -> None:
    x = torch.rand(2, 3, 32, 32)
    tokens, grid = to_tokens(x)
    assert grid == (16, 16) and tokens.shape == (2, MOST_TOKENS, 3)
    torch.testing.assert_close(tokens[:, 17], x[:, :, 2:4, 2:4].mean(dim=(2, 3)))


def test_a_small_map_is_its_tokens_and_comes_back_bit_for_bit() -> None:
    x, change = torch.rand(2, 3, 4, 5), torch.rand(2, 20, 3)
    tokens, grid = to_tokens(x)
    assert torch.equal(tokens.transpose(1, 2).reshape(x.shape), x)
    assert torch.equal(add_back(x, change, grid), x + change.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("size", [8, 64])
def test_no_change_of_the_tokens_leaves_the_map_as_it_is(size: int) -> None:
    x = torch.randn(1, 4, size, size)
    tokens, grid = to_tokens(x)
    assert torch.equal(add_back(x, torch.zeros_like(tokens), grid), x)


def test_an_even_change_is_added_everywhere() -> None:
    x = torch.randn(1, 2, 40, 40)
    tokens, grid = to_tokens(x)
    change = torch.tensor([1.0, -2.0]).expand(tokens.shape)
    torch.testing.assert_close(add_back(x, change, grid), x + torch.tensor([1.0, -2.0])[None, :, None, None])
