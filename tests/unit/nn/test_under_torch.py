"""Layers among torch's own machinery: compile, autocast, checkpoints, copies, dtypes, devices."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from io import BytesIO

import pytest
import torch
from layer_cases import LAYERS, small, tokens
from torch.utils.checkpoint import checkpoint

from gdn2gen.nn import Cache
from gdn2gen.nn.layer import RATES
from gdn2gen.nn.mixer import Mixer

# what all members share
MEMBERS = [*LAYERS][:2]


@pytest.mark.parametrize("member", MEMBERS)
def test_compiles_to_one_graph(member: str) -> None:
    """Forward and backward over whole sequences, and packed ones."""
    layer, x = small(member, num_v_heads=4), tokens(1, 12).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for given in ({}, {"cu_seqlens": torch.tensor([0, 5, 12])}):
        into = [x, *layer.parameters()]
        y, found = layer(x, **given), compiled(x, **given)
        torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-6)
        wanted = torch.autograd.grad(y.square().sum(), into)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), into), wanted)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_compiled_step_writes_into_the_cache(member: str) -> None:
    layer, x, cache = small(member), tokens(2, 6), Cache(2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = layer(x)
        layer(x[:, :3], cache=cache)
        place = cache.layer(3)["state"].data_ptr()
        for t in range(3, 6):
            step = compiled(x[:, t : t + 1], cache=cache)
            torch.testing.assert_close(step, y[:, t : t + 1], rtol=1e-5, atol=1e-6)
    assert cache.layer(3)["state"].data_ptr() == place


@pytest.mark.parametrize("member", MEMBERS)
def test_autocast(member: str) -> None:
    """bf16 in between; gradients in fp32, near those of fp32."""
    layer, x = small(member), tokens(2, 12)
    layer(x).square().sum().backward()
    wanted = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32
        error = (p.grad - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.05, name


@pytest.mark.parametrize("member", MEMBERS)
def test_activation_checkpointing(member: str) -> None:
    layer, x = small(member), tokens(2, 7).requires_grad_()
    into = [x, *layer.parameters()]
    wanted = torch.autograd.grad(layer(x).sum(), into)
    y = checkpoint(layer, x, use_reentrant=False)
    assert torch.is_tensor(y)
    for one, other in zip(torch.autograd.grad(y.sum(), into), wanted, strict=True):
        assert torch.equal(one, other)


def _through_a_file(layer: Mixer) -> Mixer:
    file = BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = type(layer)(32, num_heads=2, head_dim=16, layer_idx=3)
    other.load_state_dict(torch.load(file), assign=True)
    return other


def _through_meta(layer: Mixer) -> Mixer:
    with torch.device("meta"):
        other = type(layer)(32, num_heads=2, head_dim=16, layer_idx=3)
    assert other.A_log.is_meta
    other.to_empty(device="cpu").load_state_dict(layer.state_dict())
    return other


@pytest.mark.parametrize("way", [copy.deepcopy, _through_a_file, _through_meta])
@pytest.mark.parametrize("member", MEMBERS)
def test_copies_give_the_same(member: str, way: Callable[[Mixer], Mixer]) -> None:
    layer = small(member)
    other, x = way(layer), tokens(1, 5)
    assert torch.equal(layer(x), other(x))
    assert other.A_log is not layer.A_log
    _rates_are_marked(other)


def _rates_are_marked(layer: Mixer) -> None:
    marked = [name for name, p in layer.named_parameters() if hasattr(p, "_no_weight_decay")]
    assert marked == [*RATES]


@pytest.mark.parametrize("member", MEMBERS)
def test_rates_stay_wide(member: str) -> None:
    layer = small(member)
    before = layer.A_log.detach().clone()
    layer.bfloat16()
    assert torch.equal(layer.A_log, before) and layer.dt_bias.dtype == torch.float32
    assert {p.dtype for p in layer.children() for p in p.parameters()} == {torch.bfloat16}
    _rates_are_marked(layer)
    assert layer(tokens(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.double().A_log.dtype == torch.float64
    assert layer.half().A_log.dtype == torch.float64, "not narrowed from there either"


@pytest.mark.parametrize("member", MEMBERS)
def test_parameters_are_drawn_anew(member: str) -> None:
    """All of them, within their bounds, on a device that had none at first."""
    with torch.device("meta"):
        layer = LAYERS[member](64, num_heads=256, head_dim=8, conv_bias=True)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(torch.nan)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    rates, steps = layer.A_log.exp(), torch.nn.functional.softplus(layer.dt_bias)
    assert 1 <= rates.min() < 1.5 and 15.5 < rates.max() <= 16
    assert 0.999e-3 <= steps.min() < 1.1e-3 and 0.09 < steps.max() <= 0.1001
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.1, "even on a scale of logarithms"
    taps, bias = layer.q_conv1d.weight, layer.q_conv1d.bias
    assert bias is not None and 0.45 < taps.abs().max() <= 0.5 and 0.45 < bias.abs().max() <= 0.5
    assert torch.equal(layer.o_norm.weight, torch.ones(8))
    assert 0.12 < layer.q_proj.weight.abs().max() <= 0.125
