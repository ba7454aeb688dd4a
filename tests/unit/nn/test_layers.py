"""Layers: their equations, all ways to give them sequences, and what is refused."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layer_cases import ALL, HIDDEN, LAYERS, MAMBA, by_equations, small, tokens

from gdn2gen.base.errors import InputError
from gdn2gen.nn import Cache
from gdn2gen.nn.mixer import Mixer
from gdn2gen.runtime import head_dims

MEMBERS = [*LAYERS]
STATE = dict.fromkeys(ALL, "state") | {"mamba3": "ssm"}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_v_heads": 4, "expand_v": 0.5, "conv_bias": True, "conv_size": 3},
    {
        "allow_neg_eigval": True,
        "lower_bound": -4.0,
        "output_gate": "silu",
        "use_gate": True,
        "use_short_conv": False,
        "clamp_min": -0.35,
        "gate_logit_normalizer": 2.0,
    },
)


@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "grouped", "bounded"))
@pytest.mark.parametrize("member", MEMBERS)
def test_equations(member: str, options: dict[str, Any]) -> None:
    """y, and the gradient of every parameter and of x."""
    layer = small(member, dtype=torch.float64, **options)
    x = tokens(2, 20, dtype=torch.float64).requires_grad_()
    y = layer(x)
    wanted = torch.stack([by_equations(layer, row) for row in x])
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    into = [x, *layer.parameters()]
    towards = tokens(2, 20, dtype=torch.float64, seed=2)
    found = torch.autograd.grad((y * towards).sum(), into)
    for one, other in zip(found, torch.autograd.grad((wanted * towards).sum(), into), strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=("plain", "grouped"))
@pytest.mark.parametrize("member", [*ALL])
def test_prefill_then_token_by_token(
    member: str, options: dict[str, Any], dtype: torch.dtype, near: float
) -> None:
    layer, x = small(member, dtype=dtype, **options), tokens(2, 20, dtype=dtype)
    cache = Cache(2)
    with torch.no_grad():
        whole = layer(x)
        parts = [layer(x[:, :2], cache=cache), layer(x[:, 2:13], cache=cache)]
        places = {name: kept.data_ptr() for name, kept in cache.layer(3).items()}
        parts += [layer(x[:, t : t + 1], cache=cache) for t in range(13, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=near, atol=near * 0.2)
    assert {name: kept.data_ptr() for name, kept in cache.layer(3).items()} == places
    assert cache.layer(3)[STATE[member]].dtype == torch.float32


@pytest.mark.parametrize("member", [*ALL])
def test_packed_is_one_by_one(member: str) -> None:
    """Sequences shorter than the convolution and empty ones, too; then the next tokens of each."""
    layer, x = small(member, num_v_heads=4), tokens(1, 20)
    lengths, more = (7, 0, 2, 11), (1, 3, 0, 2)
    cu_seqlens, next_seqlens = (torch.tensor([0, *n]).cumsum(0) for n in (lengths, more))
    y, cache = tokens(1, 6, seed=3), Cache(4)
    with torch.no_grad():
        first = layer(x, cu_seqlens=cu_seqlens, cache=cache)
        second = layer(y, cu_seqlens=next_seqlens, cu_seqlens_cpu=next_seqlens, cache=cache)
        parts = zip(x.split(lengths, 1), y.split(more, 1), strict=True)
        for n, (start, rest) in enumerate(parts):
            wanted = layer(torch.cat((start, rest), 1))
            found = torch.cat((first.split(lengths, 1)[n], second.split(more, 1)[n]), 1)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("member", "mode"),
    [*itertools.product(MEMBERS, ("chunk", "fused_recurrent")), *((x, "chunk") for x in MAMBA)],
)
def test_padding_is_not_there(member: str, mode: str) -> None:
    """On the left, on the right, everywhere; a row of it keeps its state in a step, too."""
    layer, x, cache = small(member, mode=mode), tokens(4, 9), Cache(4)
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[0, :4] = mask[1, 6:] = mask[2] = mask[3, 2] = 0
    step, more = tokens(4, 1, seed=3), torch.tensor([[1], [0], [1], [1]])
    with torch.no_grad():
        y = layer(x.masked_fill(mask[..., None] == 0, torch.nan), attention_mask=mask, cache=cache)
        last = layer(step, attention_mask=more, cache=cache)
        again = layer(step, cache=cache)
        for n in range(4):
            row = x[n, mask[n] != 0]
            rows = torch.cat((row, *[step[n]] * (int(more[n]) + 1)))[None]
            wanted = layer(rows)[0]
            found = torch.cat((y[n, mask[n] != 0], last[n, more[n] != 0], again[n]))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not y[mask == 0].any() and not last[more == 0].any()


@pytest.mark.parametrize("member", [*ALL])
def test_gradients_through_padding_and_cache(member: str) -> None:
    """What a cache held before is a constant, and what it holds later no backward reads."""
    layer, x, cache = small(member), tokens(2, 8), Cache(2)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    layer(x, attention_mask=mask, cache=cache)
    state = cache.layer(3)[STATE[member]].clone()
    y = layer(x[:, :1], cache=cache)
    with torch.no_grad():
        layer(x[:, :1], cache=cache)
    y.sum().backward()
    assert not torch.equal(cache.layer(3)[STATE[member]], state)
    assert not any(kept.requires_grad for kept in cache.layer(3).values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_what_was_made_in_inference_mode_is_taken_up() -> None:
    layer, x, cache = small("gdn2"), tokens(1, 6), Cache(1)
    with torch.inference_mode():
        first = layer(x[:, :4], cache=cache)
    with torch.no_grad():
        rest = [layer(x[:, t : t + 1], cache=cache) for t in (4, 5)]
        torch.testing.assert_close(torch.cat((first, *rest), 1), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("member", ["gla", *MAMBA])
def test_a_cache_of_inference_mode_serves_outside_of_it(member: str) -> None:
    """In training, and where sequences are put in order or begin anew."""
    layer, x, cache = small(member), tokens(2, 6), Cache(2)
    with torch.inference_mode():
        layer(x[:, :4], cache=cache)
    other, third = cache.copy(), Cache(2)
    third.layers[3] = dict(cache.layer(3))
    y = layer(x[:, 4:], cache=cache)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x)[:, 4:], rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None for p in layer.parameters())
    third.reorder(torch.tensor([1, 0]))
    for name, kept in third.layer(3).items():
        assert torch.equal(kept, other.layer(3)[name].flip(0)), name
    with torch.inference_mode():
        layer(x[:, :4], cache=(fourth := Cache(2)))
    fourth.reset(torch.tensor([1]))
    assert not any(kept[1].any() or not kept[0].any() for kept in fourth.layer(3).values())


@pytest.mark.parametrize("member", ALL)
def test_any_parameter_may_train_alone_beside_a_cache(member: str) -> None:
    """States that a backward will read are not overwritten by later tokens."""
    layer, x = small(member), tokens(1, 5)
    for p in layer.parameters():
        layer.requires_grad_(False)
        p.requires_grad_(True)
        cache = Cache(1)
        y = torch.cat([layer(part, cache=cache) for part in x.split([3, 1, 1], 1)], 1)
        y.square().sum().backward()
        assert p.grad is not None and p.grad.isfinite().all()


@pytest.mark.parametrize("member", ALL)
def test_a_load_that_assigns_leaves_own_parameters_wide(member: str) -> None:
    layer = small(member)
    narrow = {name: x.bfloat16() for name, x in layer.state_dict().items()}
    layer.load_state_dict(narrow, assign=True)
    assert layer.o_proj.weight.dtype == torch.bfloat16 if member in LAYERS else True
    for name, p in layer.named_parameters(recurse=False):
        assert p.dtype == torch.float32 and p.requires_grad, name
        assert getattr(p, "_no_weight_decay", False) == (name in layer._undecayed)


@pytest.mark.parametrize("member", ALL)
def test_every_parameter_has_a_gradient_of_no_tokens(member: str) -> None:
    """As other processes wait for, which had tokens."""
    layer = small(member)
    layer(tokens(2, 3), attention_mask=torch.zeros(2, 3)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("member", ["kda", *MAMBA])
def test_nothing_to_do(member: str) -> None:
    layer, cache = small(member), Cache(2)
    with torch.no_grad():
        assert layer(tokens(2, 0), cache=cache).shape == (2, 0, HIDDEN)
        nobody = layer(tokens(2, 3), attention_mask=torch.zeros(2, 3), cache=cache)
    assert nobody.shape == (2, 3, HIDDEN) and not nobody.any()


def _layer(**options: Any) -> Mixer:
    return LAYERS["gdn2"](**{"hidden_size": 8, "num_heads": 2, "head_dim": 4, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, but got 0"),
        ({"num_v_heads": 3}, "num_v_heads must be a multiple of num_heads, but got num_v_heads=3"),
        ({"head_dim": 0}, "head_dim must be at least 1, but got 0"),
        ({"expand_v": 0.3}, "whole number of channels, but got 4 * 0.3"),
        ({"mode": "parallel"}, "mode must be one of"),
        ({"conv_size": 5}, "width must be one of (2, 3, 4), but got 5"),
        ({"output_gate": "relu"}, "activation must be 'sigmoid' or 'silu', but got 'relu'"),
        ({"lower_bound": 1.0}, "lower_bound"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        _layer(**options)


def test_a_safe_gate_has_a_bound() -> None:
    with pytest.raises(InputError, match="safe_gate=True needs lower_bound"):
        LAYERS["kda"](8, head_dim=4, num_heads=2, safe_gate=True)
    layer = small("kda", safe_gate=True, lower_bound=-5.0)
    assert not layer.A_log.any()
    assert layer(tokens(1, 3)).isfinite().all()


_TWO = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        ((2,), {}, "x must be [B, T, hidden] with hidden=32, but got (2, 32)"),
        ((2, 2), {"cu_seqlens": _TWO}, "cu_seqlens wants B=1, but x has B=2"),
        ((1, 2), {"cu_seqlens": _TWO[None]}, "cu_seqlens must be [N+1] with N >= 1"),
        ((1, 2), {"cu_seqlens": _TWO.float()}, "cu_seqlens must be int32 or int64"),
        ((1, 2), {"cu_seqlens": _TWO + 1}, "cu_seqlens must start at 0"),
        ((1, 2), {"cu_seqlens_cpu": _TWO}, "cu_seqlens_cpu was given without cu_seqlens"),
        ((1, 2), {"cu_seqlens": _TWO, "attention_mask": torch.ones(1, 2)}, "give one of them"),
        ((2, 2), {"attention_mask": torch.ones(2, 3)}, "attention_mask must be [B, T] = (2, 2)"),
        ((2, 2), {"cache": Cache(3)}, "the cache is of 3 sequences, but these tokens are of 2"),
    ],
)
def test_calls_that_do_not_fit(rows: tuple[int, ...], given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        small("gdn2")(tokens(*rows), **given)


def test_a_cache_wants_to_know_the_layer() -> None:
    with pytest.raises(InputError, match="this layer has None"):
        _layer()(torch.zeros(1, 1, 8), cache=Cache(1))


def test_one_token_goes_to_an_op_that_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU where the op over few tokens was not verified, and that over chunks was."""
    layer = small("kda", dtype=torch.bfloat16)
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    monkeypatch.setattr(head_dims, "passed_here", lambda *_: False)
    monkeypatch.delenv("GDN2GEN_UNVERIFIED", raising=False)
    assert not layer._steps(q)  # type: ignore[arg-type]
    monkeypatch.setenv("GDN2GEN_UNVERIFIED", "1")
    assert layer._steps(q)  # type: ignore[arg-type]
    assert layer._steps(torch.zeros(1))
