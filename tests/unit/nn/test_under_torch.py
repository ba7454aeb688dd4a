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

from gdn2gen.base.errors import InputError
from gdn2gen.nn import Cache, LanguageModel
from gdn2gen.nn.layer import RATES, Layer
from gdn2gen.nn.mixer import Mixer

# what all members share
MEMBERS = [*LAYERS][:2]


# 8 s each; of kda a step is compiled below, and its op in test_ops.py
@pytest.mark.parametrize("member", [MEMBERS[0], pytest.param(MEMBERS[1], marks=pytest.mark.slow)])
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


def _stacked(member: str, count: int) -> list[Layer]:
    """Layers of one model, alike but for their weights and numbers."""
    layers = [small(member) for _ in range(count)]
    for index, layer in enumerate(layers):
        layer.layer_idx = index
        with torch.no_grad():
            for x in layer.parameters():
                x.mul_(1 + 0.1 * index)
    return layers


@pytest.mark.parametrize("member", ["gdn2", "mamba3"])
def test_layers_compiled_one_by_one_share_a_graph(member: str) -> None:
    """More of them than Dynamo compiles anew; with parts of a cache, which need no number."""
    torch.compiler.reset()
    layers, x, graphs = _stacked(member, 10), tokens(1, 5), list[object]()
    cache, plain = Cache(1), Cache(1)

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        for layer in layers:
            layer(x[:, :3], cache=cache), layer(x[:, :3], cache=plain)
        wanted = [[y(x[:, t : t + 1], cache=plain) for y in layers] for t in (3, 4)]
        for layer in layers:
            layer.compile(fullgraph=True, backend=backend)
        for t, then in zip((3, 4), wanted, strict=True):
            for layer, y in zip(layers, then, strict=True):
                found = layer(x[:, t : t + 1], cache=cache.part(layer.layer_idx))
                torch.testing.assert_close(found, y)
    assert len(graphs) == 1
    for index, kept in plain.layers.items():
        torch.testing.assert_close(cache.layers[index], kept)


def test_a_models_blocks_compiled_one_by_one_share_a_graph() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "head_dim": 16}
    model, graphs = LanguageModel(11, **options), list[object]()
    given = torch.arange(6)[None]

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        wanted, cache = model(given), Cache(1)
        model(given[:, :4], cache=cache)
        for block in model.blocks:
            block.compile(fullgraph=True, backend=backend)
        found = [model(given[:, t : t + 1], cache=cache) for t in (4, 5)]
    torch.testing.assert_close(torch.cat(found, 1), wanted[:, 4:], rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_a_part_of_a_cache_is_of_one_layer() -> None:
    layer, x, cache = small("gdn2"), tokens(2, 4), Cache(2)
    with torch.no_grad():
        y = [layer(x[:, :3], cache=cache.part(3)), layer(x[:, 3:], cache=cache)]
        torch.testing.assert_close(torch.cat(y, 1), layer(x), rtol=1e-5, atol=1e-6)
        with pytest.raises(InputError, match=r"has layer_idx=3: give it cache.part\(3\)"):
            layer(x, cache=cache.part(1))
        cache.reorder(torch.tensor([0]))
        with pytest.raises(InputError, match="the cache is of 1 sequences, but these tokens are"):
            layer(x, cache=cache.part(3))
        assert layer(x[:1], cache=cache.part(3)).shape == x[:1].shape
    assert repr(Cache(1).part(3)) == "Cache(batch_size=1, layers=[3]).part(3)"


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
