import pytest
import torch
from torch import Tensor, nn

from omnifm import seeds
from omnifm.spectral.psp import Block, PrefixSuffix, Suffix

DIM, HEADS = 12, 3


def build(prefix: bool = True) -> PrefixSuffix:
    with seeds.scope(0, "psp"):
        return PrefixSuffix(DIM, HEADS, prefix=prefix)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeds.generator(seed, "draw"))


def reference_block(block: Block, x: Tensor) -> Tensor:
    """PyTorch's own encoder layer with the same weights."""
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": block.query_key_value.weight,
            "self_attn.in_proj_bias": block.query_key_value.bias,
            "self_attn.out_proj.weight": block.out.weight,
            "self_attn.out_proj.bias": block.out.bias,
            "linear1.weight": block.mlp[0].weight,
            "linear1.bias": block.mlp[0].bias,
            "linear2.weight": block.mlp[2].weight,
            "linear2.bias": block.mlp[2].bias,
            "norm1.weight": block.norm_attention.weight,
            "norm1.bias": block.norm_attention.bias,
            "norm2.weight": block.norm_mlp.weight,
            "norm2.bias": block.norm_mlp.bias,
        }
    )
    return layer(x)


def test_the_block_is_the_librarys_pre_norm_encoder_layer() -> None:
    block, x = build().block, draw(2, 7, DIM)
    torch.testing.assert_close(block(x), reference_block(block, x))


def test_a_seed_gives_the_weights_it_always_gave() -> None:
    """Published runs start from these draws, in this order; no digest of a config would show another one."""
    with seeds.scope(0, "psp"):
        block = Block(DIM, HEADS, 2.0)
    with seeds.scope(0, "psp"):
        drawn = [nn.Linear(*sizes) for sizes in ((DIM, 3 * DIM), (DIM, DIM), (DIM, 2 * DIM), (2 * DIM, DIM))]
    for own, expected in zip((block.query_key_value, block.out, block.mlp[0], block.mlp[2]), drawn, strict=True):
        assert torch.equal(own.weight, expected.weight) and torch.equal(own.bias, expected.bias)


def test_an_untrained_block_that_starts_as_the_identity_changes_nothing_and_learns() -> None:
    with seeds.scope(0, "psp"):
        block, plain = Block(DIM, HEADS, 2.0, identity=True), Block(DIM, HEADS, 2.0)
    tokens = draw(2, 5, DIM)
    assert torch.equal(block(tokens), tokens)
    assert not torch.equal(plain(tokens), tokens)
    optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (block(tokens) - tokens.flip(-1)).square().mean().backward()
        optimiser.step()
    moved = {name for name, parameter in block.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert moved == {name for name, _ in block.named_parameters()}, "zero at the end stops no gradient after the first step"


def test_parts_are_prefix_content_suffix_in_this_order() -> None:
    psp, z, r = build(), draw(2, 4, DIM, seed=1), draw(2, 4, DIM, seed=2)
    e = psp.parts.vectors
    expected = torch.cat([z + e[0], r + e[1], (psp.suffix.token + e[2]).expand(2, 1, DIM)], dim=1)
    torch.testing.assert_close(psp(r, z), psp.block(expected))
    assert psp(r, z).shape == (2, 9, DIM)


def test_without_prefix_only_content_and_suffix() -> None:
    psp, r = build(prefix=False), draw(2, 4, DIM)
    assert psp(r, None).shape == (2, 5, DIM)
    assert psp.parts.vectors.shape == (2, DIM)
    with pytest.raises(ValueError, match="argument"):
        psp(r, r)


def test_the_suffix_is_a_module_of_its_own_and_starts_small() -> None:
    psp = build()
    assert isinstance(psp.suffix, Suffix)
    assert [name for name, _ in psp.suffix.named_parameters()] == ["token"]
    assert 0 < float(psp.suffix.token.detach().abs().max()) < 0.1
    names = {id(p) for p in psp.parameters()} - {id(p) for p in psp.suffix.parameters()}
    assert names == {id(p) for p in [*psp.block.parameters(), *psp.parts.parameters()]}


def test_the_suffix_changes_what_the_head_reads() -> None:
    psp, r = build(), draw(2, 4, DIM)
    before = psp(r, r)[:, :8]
    with torch.no_grad():
        psp.suffix.token.add_(draw(1, 1, DIM, seed=5))  # a constant would vanish in the layer norm
    assert (psp(r, r)[:, :8] - before).abs().max() > 1e-4


def test_train_and_eval_agree_for_there_is_no_dropout() -> None:
    psp, r = build(), draw(2, 4, DIM)
    assert torch.equal(psp.train()(r, r), psp.eval()(r, r))


def test_heads_must_divide_the_tokens() -> None:
    with pytest.raises(ValueError, match="10-dimensional tokens do not divide into 4"):
        PrefixSuffix(10, heads=4)
