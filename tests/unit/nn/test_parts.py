"""What layers are made of: the short convolution, the gated norm, the cache."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from layer_cases import small, tokens
from torch.nn import functional

from gdn2gen.base.errors import InputError
from gdn2gen.nn import Cache, GatedRMSNorm, ShortConvolution


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_convolution_is_torchs(width: int, bias: bool) -> None:
    torch.manual_seed(0)
    convolution = ShortConvolution(6, width, bias=bias)
    twin = torch.nn.Conv1d(6, 6, width, groups=6, bias=bias)
    twin.load_state_dict(convolution.state_dict())
    x = torch.randn(2, 9, 6)
    y, tail = convolution(x)
    padded = functional.pad(x.mT, (width - 1, 0))
    torch.testing.assert_close(y, functional.silu(twin(padded)).mT)
    assert torch.equal(tail, x[:, 1 - width :])


@pytest.mark.parametrize("width", [2, 3, 4])
def test_convolution_in_pieces(width: int) -> None:
    """Bit for bit, whatever lies in a call: rows, tails of earlier calls, empty sequences."""
    torch.manual_seed(0)
    convolution = ShortConvolution(6, width)
    x = torch.randn(3, 8, 6).bfloat16()
    whole, last = convolution(x)
    start, tail = convolution(x[:, :1])
    rest, end = convolution(x[:, 1:], tail=tail)
    assert torch.equal(torch.cat((start, rest), 1), whole) and torch.equal(end, last)
    tail, before = None, [0, 0, 0]
    for lengths in ((1, 0, 4), (0, 2, 1), (7, 6, 3)):
        ends = [a + n for a, n in zip(before, lengths, strict=True)]
        spans = [slice(a, b) for a, b in zip(before, ends, strict=True)]
        row = torch.cat([x[n, span] for n, span in enumerate(spans)])[None]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        y, tail = convolution(row, tail=tail, cu_seqlens=cu_seqlens)
        for n, part in enumerate(y[0].split(lengths)):
            assert torch.equal(part, whole[n, spans[n]])
        before = ends
    assert tail is not None and torch.equal(tail, last)


def test_convolution_stays_within_the_batch() -> None:
    """Lengths that nobody could check: no index leaves the row."""
    lengths = torch.tensor([0, 90, -7, 5])
    y, _ = ShortConvolution(3)(torch.randn(1, 5, 3), cu_seqlens=lengths)
    assert y.isfinite().all()


def test_convolution_refuses() -> None:
    with pytest.raises(InputError, match=r"x must be \[B, T, 3\], but got \(1, 5, 4\)"):
        ShortConvolution(3)(torch.zeros(1, 5, 4))
    with pytest.raises(InputError, match=r"tail must be \(1, 3, 3\), but got \(2, 3, 3\)"):
        ShortConvolution(3)(torch.zeros(1, 5, 3), tail=torch.zeros(2, 3, 3))
    with pytest.raises(InputError, match="channels must be at least 1"):
        ShortConvolution(0)


@pytest.mark.parametrize(
    ("activation", "active"), [("sigmoid", torch.sigmoid), ("silu", functional.silu)]
)
def test_norm(activation: str, active: Callable[[torch.Tensor], torch.Tensor]) -> None:
    norm = GatedRMSNorm(8, eps=0.1, activation=activation)
    torch.nn.init.normal_(norm.weight)
    x, gate = torch.randn(2, 3, 5, 8)
    wanted = functional.rms_norm(x, (8,), norm.weight, 0.1) * active(gate)
    torch.testing.assert_close(norm(x, gate), wanted)
    narrow = norm(x.bfloat16(), gate.bfloat16())
    assert narrow.dtype == torch.bfloat16, "of one rounding, though what enters was rounded"
    exact = norm(x.bfloat16().double(), gate.bfloat16().double())
    torch.testing.assert_close(narrow.double(), exact, rtol=2**-8, atol=1e-6)


def test_norm_refuses() -> None:
    with pytest.raises(InputError, match=re.escape("must both be [..., 8], but got (2, 8) and")):
        GatedRMSNorm(8)(torch.zeros(2, 8), torch.zeros(1, 8))
    with pytest.raises(InputError, match="size must be at least 1"):
        GatedRMSNorm(0)


def test_sequences_of_a_cache_change_places() -> None:
    """Branches of a search: copied, reordered, dropped, begun anew."""
    layer, x, cache = small("gdn2"), tokens(3, 5), Cache(3)
    step = tokens(3, 1, seed=2)
    with torch.no_grad():
        layer(x, cache=cache)
        other = cache.copy()
        place = cache.layer(3)["state"].data_ptr()
        cache.reorder(torch.tensor([2, 0, 0]))
        assert cache.layer(3)["state"].data_ptr() == place
        cache.reset(torch.tensor([1]))
        found = layer(step, cache=cache)
        for n, before in enumerate((x[2:], x[:0], x[:1])):
            row = step[n : n + 1] if n == 1 else torch.cat((before, step[n : n + 1]), 1)
            torch.testing.assert_close(found[n], layer(row)[0, -1:], rtol=1e-5, atol=1e-6)
        cache.reorder(torch.tensor([1]))
        assert cache.batch_size == 1 and layer(step[:1], cache=cache).shape == (1, 1, 32)
        cache.reset()
        assert torch.equal(layer(step[:1], cache=cache), layer(step[:1]))
        untouched = layer(step, cache=other)
        whole = layer(torch.cat((x, step), 1))[:, -1:]
        torch.testing.assert_close(untouched, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [torch.tensor([True]), torch.tensor([[0]]), torch.tensor([0.0])])
def test_rows_of_a_cache_are_numbers(rows: torch.Tensor) -> None:
    for change in (Cache(1).reorder, Cache(1).reset):
        with pytest.raises(InputError, match=re.escape("rows must be int64 [R], but got")):
            change(rows)


def test_a_cache_has_sequences() -> None:
    with pytest.raises(InputError, match="batch_size must be at least 1, but got 0"):
        Cache(0)
    with pytest.raises(InputError, match="rows must name a sequence at least"):
        Cache(1).reorder(torch.empty(0, dtype=torch.int64))
    assert repr(Cache(2)) == "Cache(batch_size=2, layers=[])"
