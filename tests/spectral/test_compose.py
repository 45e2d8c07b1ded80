from itertools import product
from unittest.mock import patch

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from omnifm import seeds
from omnifm.spectral import tokenizer as tokenizer_module
from omnifm.spectral.compose import SpectralOptions, SpectralPath
from omnifm.spectral.gskr import retrieve
from omnifm.spectral.rows import BankRows
from tests.spectral.examples import images, make_rows

DIM, LENGTH, BATCH = 12, 4, 5
SMALL = {"band": 8, "width": 6, "dim": 8, "head_dim": 5, "heads": 2, "top_k": 3}
SWITCHES = [dict(zip(("gskr", "eca", "psp", "spalign"), on, strict=True)) for on in product((True, False), repeat=4)]
ALLOWED = [s for s in SWITCHES if any(s.values()) and not (s["gskr"] and not s["eca"] and not s["spalign"])]


def options(**values: object) -> SpectralOptions:
    return SpectralOptions.model_validate({**SMALL, **values})


def build(o: SpectralOptions, rows: BankRows | None = None) -> SpectralPath:
    with seeds.scope(0, "path"):
        path = SpectralPath(o, DIM)
    path.set_bank(rows)
    return path


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(BATCH, LENGTH, DIM, generator=seeds.generator(seed, "tokens"))


def name(switches: dict[str, bool]) -> str:
    return "+".join(k for k, on in switches.items() if on)


def test_thirteen_combinations_can_be_built_and_the_others_say_why() -> None:
    assert len(ALLOWED) == 13
    for switches in SWITCHES:
        if switches in ALLOWED:
            assert options(**switches).any
        elif any(switches.values()):
            with pytest.raises(ValidationError, match="rows that nothing reads"):
                options(**switches)
        else:
            assert not options(**switches).any
            with pytest.raises(ValueError, match="nothing to build"):
                build(options(**switches))


@pytest.mark.parametrize("switches", ALLOWED, ids=name)
def test_gradient_reaches_every_parameter_that_is_on(switches: dict[str, bool]) -> None:
    path = build(options(**switches), make_rows(10))
    r = tokens().requires_grad_()
    out, trace = path(images(BATCH), r)
    # Weights per element: the sum of squares or the plain sum of what a layer norm gave hides parameters.
    weights = torch.randn(out.shape, generator=seeds.generator(0, "weights"))
    ((out * weights).sum() + path.penalty(trace)).backward()
    dead = [n for n, p in path.named_parameters() if p.requires_grad and (p.grad is None or not bool(p.grad.abs().sum() > 0))]
    assert dead == []
    assert r.grad is not None and bool(r.grad.abs().sum() > 0)
    trained = {n.split(".")[0] for n, p in path.named_parameters() if p.requires_grad}
    expected = {"tokenizer": switches["spalign"], "eca": switches["eca"], "psp": switches["psp"]}
    assert trained == {part for part, on in expected.items() if on}


@pytest.mark.parametrize("switches", ALLOWED, ids=name)
@pytest.mark.parametrize("rows", [None, make_rows(10), make_rows(1)], ids=["empty", "rows", "one row"])
def test_the_shape_is_constant_and_the_content_comes_back(switches: dict[str, bool], rows: BankRows | None) -> None:
    path = build(options(**switches), rows)
    out, trace = path(images(BATCH), tokens())
    length = (2 * LENGTH + 1 if switches["eca"] else LENGTH + 1) if switches["psp"] else LENGTH
    assert out.shape == (BATCH, length, DIM)
    assert path.content(out, LENGTH).shape == (BATCH, LENGTH, DIM)
    assert path.penalty(trace).ndim == 0 and bool(torch.isfinite(out).all())


@pytest.mark.parametrize("switches", ALLOWED, ids=name)
def test_the_fft_is_computed_exactly_if_something_reads_s(switches: dict[str, bool]) -> None:
    path = build(options(**switches), make_rows(10))
    with patch.object(tokenizer_module, "low_pass_amplitude", wraps=tokenizer_module.low_pass_amplitude) as fft:
        _, trace = path(images(BATCH), tokens())
    reads = switches["spalign"] or switches["gskr"]
    assert fft.called is reads and (trace.s is not None) is reads
    assert path.embed(images(BATCH)).shape == (BATCH, 8)


def test_everything_on_is_the_method_written_out() -> None:
    rows, x, r = make_rows(10), images(BATCH), tokens()
    path = build(options(), rows)
    out, trace = path(x, r)
    assert path.eca is not None and path.psp is not None
    s = path.tokenizer(x)
    found = retrieve(s, rows, 3)
    torch.testing.assert_close(out, path.psp(r, path.eca(r, found.vectors)))
    torch.testing.assert_close(path.penalty(trace), 0.1 * (s - found.vectors.mean(dim=1)).square().sum(dim=1).mean())
    assert trace.index is not None and torch.equal(trace.index, found.index)
    assert path.content(torch.arange(9)[None, :, None].expand(1, 9, DIM), LENGTH)[0, :, 0].tolist() == [4, 5, 6, 7]


def test_without_gskr_every_foreign_row_is_read() -> None:
    rows, r = make_rows(10), tokens()
    path = build(options(gskr=False), rows)
    out, trace = path(images(BATCH), r)
    assert path.eca is not None and path.psp is not None and trace.s is not None and trace.index is None
    torch.testing.assert_close(out, path.psp(r, path.eca(r, rows.vectors.expand(BATCH, -1, -1))))
    centroid = rows.vectors.mean(dim=0)
    torch.testing.assert_close(path.penalty(trace), 0.1 * (trace.s - centroid).square().sum(dim=1).mean())


def test_without_psp_the_prefix_is_added() -> None:
    rows, r = make_rows(10), tokens()
    path = build(options(psp=False), rows)
    out, trace = path(images(BATCH), r)
    assert path.eca is not None and path.psp is None and trace.s_g is not None
    torch.testing.assert_close(out, r + path.eca(r, trace.s_g))


def test_only_spalign_leaves_the_tokens_alone() -> None:
    r = tokens()
    out, _ = build(options(gskr=False, eca=False, psp=False), make_rows(10))(images(BATCH), r)
    assert out is r


def test_without_spalign_the_tokenizer_is_frozen_and_the_penalty_is_zero() -> None:
    path = build(options(spalign=False), make_rows(10))
    _, trace = path(images(BATCH), tokens())
    assert not any(p.requires_grad for p in path.tokenizer.parameters())
    assert float(path.penalty(trace)) == 0.0 and trace.index is not None


@pytest.mark.parametrize("rows", [None, BankRows.empty(8)], ids=["none", "empty"])
def test_before_any_foreign_row_z_and_the_penalty_are_zero(rows: BankRows | None) -> None:
    path, r = build(options(), rows), tokens()
    out, trace = path(images(BATCH), r)
    assert path.psp is not None and trace.s is not None and trace.s_g is None
    assert torch.equal(out, path.psp(r, torch.zeros_like(r)))
    assert float(path.penalty(trace)) == 0.0


def test_a_zero_prefix_keeps_the_slots_whatever_the_bank_holds() -> None:
    path, r = build(options(prefix="zero"), make_rows(10)), tokens()
    out, trace = path(images(BATCH), r)
    assert path.eca is None and path.psp is not None
    assert torch.equal(out, path.psp(r, torch.zeros_like(r)))
    assert float(path.penalty(trace).detach()) > 0


def test_the_bank_is_no_parameter_no_buffer_and_gets_no_gradient() -> None:
    path = build(options())
    before = list(path.state_dict())
    path.set_bank(make_rows(10))
    assert list(path.state_dict()) == before and list(path.buffers()) == []
    out, trace = path(images(BATCH), tokens())
    (out.sum() + path.penalty(trace)).backward()
    assert path.bank is not None and path.bank.vectors.grad is None
    path.set_bank(None)
    assert path.bank is None


def test_a_random_bank_never_changes_and_is_the_same_everywhere() -> None:
    path = build(options(bank_source="random"), make_rows(10, seed=1))
    assert path.bank is not None
    first = path.bank.vectors
    torch.testing.assert_close(first.norm(dim=1), torch.ones(10))
    assert path.bank.row_id.tolist() == make_rows(10, seed=1).row_id.tolist()
    path.set_bank(make_rows(12, seed=2))
    assert torch.equal(path.bank.vectors[:10], first)
    other = build(options(bank_source="random", psp=False), make_rows(10, seed=3))
    assert other.bank is not None and torch.equal(other.bank.vectors, first)


def test_the_variance_floor_is_part_of_the_penalty() -> None:
    plain, floored = (build(options(variance_floor=v), make_rows(10)) for v in (0.0, 0.3))
    x, r = images(BATCH), tokens()
    assert bool(floored.penalty(floored(x, r)[1]) > plain.penalty(plain(x, r)[1]))


def test_bfloat16_autocast_keeps_the_spectral_parts_in_float32() -> None:
    path, x, r = build(options(), make_rows(10)), images(BATCH), tokens()
    expected, plain = path(x, r)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, trace = path(x, r.bfloat16())
        penalty = path.penalty(trace)
    assert trace.s is not None and plain.s is not None and trace.s.dtype == torch.float32
    assert torch.equal(trace.s, plain.s) and torch.equal(trace.index, plain.index)
    assert penalty.dtype == torch.float32 and torch.equal(penalty, path.penalty(plain))
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)
    (out.float().sum() + penalty).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in path.parameters() if p.grad is not None)


def test_black_and_constant_images_train() -> None:
    path = build(options(), make_rows(10))
    x = torch.cat([torch.zeros(2, 1, 32, 32), torch.ones(1, 1, 32, 32), images(2)])
    out, trace = path(x, tokens())
    (out.square().sum() + path.penalty(trace)).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in path.parameters())


def test_one_seed_one_path() -> None:
    a, b = build(options()).state_dict(), build(options()).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prefix": "zero", "eca": False}, "keeps the prefix slots"),
        ({"prefix": "zero", "psp": False}, "keeps the prefix slots"),
        ({"prefix": "zero", "spalign": False}, "rows that nothing reads"),
        ({"gskr": False, "eca": False, "spalign": False, "bank_source": "random"}, "no effect"),
        ({"spalign": False, "variance_floor": 0.1}, "switch on spalign"),
        ({"band": 10}, "not a multiple of patch"),
        ({"topk": 3}, "Extra inputs"),
    ],
)
def test_impossible_options_say_why(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        options(**values)


def test_rows_of_another_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="length 4, the spectral path has dim = 8"):
        build(options(), make_rows(3, dim=4))
