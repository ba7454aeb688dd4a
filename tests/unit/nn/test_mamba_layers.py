"""Mamba's layers: their equations, their parameters, and the model of them."""

from __future__ import annotations

import importlib
import math
import re
from typing import Any

import pytest
import torch
from layer_cases import HIDDEN, MAMBA, small, tokens
from mamba_equations import mamba_by_equations
from torch.nn import functional

from gdn2gen.base.errors import InputError
from gdn2gen.nn import Cache, LanguageModel

OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "mamba2": (
        {},
        {"n_groups": 2, "bias": True, "conv_bias": False, "dt_limit": (0.01, 0.05)},
        {"n_groups": 2, "norm_groups": 1, "norm_before_gate": True, "conv_size": 3},
        {"norm_before_gate": True, "norm_groups": 4},
        {"rmsnorm": False},
    ),
    "mamba3": (
        {},
        {"n_groups": 2, "is_outproj_norm": True, "rope_fraction": 1.0},
        {"decay": "heavy_tail", "A_floor": 0.5, "bias": True},
    ),
}
CASES = [(member, options) for member, all_ in OPTIONS.items() for options in all_]
# By hidden size D, heads H of P channels, G groups of N channels, W taps and S angles: what the
# layers of mamba_ssm have, in its order.
PARAMETERS = {
    "mamba2": """dt_bias H; A_log H; D H; in_proj.weight 2*H*P+2*G*N+H D;
        in_proj.bias 2*H*P+2*G*N+H; conv1d.weight H*P+2*G*N 1 W; conv1d.bias H*P+2*G*N;
        norm.weight H*P; out_proj.weight D H*P; out_proj.bias D""",
    "mamba3": """dt_bias H; B_bias H 1 N; C_bias H 1 N; D H; in_proj.weight 2*H*P+2*G*N+3*H+S D;
        in_proj.bias 2*H*P+2*G*N+3*H+S; B_norm.weight N; C_norm.weight N; norm.weight H*P;
        out_proj.weight D H*P; out_proj.bias D""",
}


@pytest.mark.parametrize(("member", "options"), CASES)
def test_equations(member: str, options: dict[str, Any]) -> None:
    """y, and the gradient of every parameter and of x."""
    layer = small(member, dtype=torch.float64, **options)
    with torch.no_grad():  # so that no parameter goes by unseen
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = tokens(2, 13, dtype=torch.float64).requires_grad_()
    y = layer(x)
    wanted = torch.stack([mamba_by_equations(layer, row) for row in x])
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    into = [x, *layer.parameters()]
    towards = tokens(2, 13, dtype=torch.float64, seed=2)
    found = torch.autograd.grad((y * towards).sum(), into)
    for one, other in zip(found, torch.autograd.grad((wanted * towards).sum(), into), strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("member", [*MAMBA])
def test_names_order_and_shapes(member: str) -> None:
    options = {"n_groups": 2, "bias": True, "is_outproj_norm": True, "conv_size": 3}
    layer = small(member, **options)
    sizes = {"D": HIDDEN, "H": 4, "P": 16, "G": 2, "N": 8, "W": 3, "S": 2}
    wanted = []
    for words in PARAMETERS[member].split(";"):
        name, *dims = words.split()
        terms = [[part.split("*") for part in dim.split("+")] for dim in dims]
        wanted.append((name, tuple(sum(math.prod(sizes.get(x) or int(x) for x in factors)
                                       for factors in dim) for dim in terms)))  # fmt: skip
    assert [(name, tuple(x.shape)) for name, x in layer.state_dict().items()] == wanted
    marked = [name for name, p in layer.named_parameters() if hasattr(p, "_no_weight_decay")]
    assert marked == {"mamba2": ["dt_bias", "A_log", "D"], "mamba3": ["dt_bias", "D"]}[member]
    narrow = layer.bfloat16()
    wide = [name for name, p in narrow.named_parameters() if p.dtype == torch.float32]
    assert wide == [name for name, _ in wanted if "." not in name]
    assert narrow(tokens(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("member", [*MAMBA])
def test_state_dicts_load_both_ways(member: str) -> None:
    """Those of flash-linear-attention, where it can be imported, which wants transformers."""
    pytest.importorskip("fla.layers", exc_type=ImportError)
    make = getattr(importlib.import_module(f"fla.layers.{member}"), member.capitalize())
    sizes = {"hidden_size": HIDDEN, "head_dim": 16, "state_size": 8, "n_groups": 2}
    more = {"num_heads": 4, "use_conv_bias": True} if member == "mamba2" else {}
    theirs, ours = make(**sizes, **more, use_bias=True), small(member, n_groups=2, bias=True)
    wanted = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    assert {name: tuple(x.shape) for name, x in ours.state_dict().items()} == wanted
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(small(member, n_groups=2, bias=True).state_dict())
    assert torch.equal(theirs.in_proj.weight, small(member, n_groups=2, bias=True).in_proj.weight)


@pytest.mark.parametrize("member", [*MAMBA])
def test_parameters_are_drawn_anew(member: str) -> None:
    with torch.device("meta"):
        layer = MAMBA[member](64, head_dim=1, expand=8.0, state_size=4)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(torch.nan)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    own = dict(layer.named_parameters(recurse=False))
    steps = functional.softplus(own.pop("dt_bias"))
    assert 0.999e-3 <= steps.min() < 1.1e-3 and 0.09 < steps.max() <= 0.1001
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.2, "even on a scale of logarithms"
    if member == "mamba2":
        rates = own.pop("A_log").exp()
        assert 1 <= rates.min() < 1.5 and 15.5 < rates.max() <= 16
    assert own and all((p == 1).all() for p in own.values())


@pytest.mark.slow
@pytest.mark.parametrize("member", [*MAMBA])
def test_compiles_to_one_graph(member: str) -> None:
    """Forward and backward; packed; and a step that writes into the cache where it lies."""
    layer, x, cache = small(member, n_groups=2), tokens(1, 12).requires_grad_(), Cache(1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for given in ({}, {"cu_seqlens": torch.tensor([0, 5, 12])}):
        into = [x, *layer.parameters()]
        y, found = layer(x, **given), compiled(x, **given)
        torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-6)
        wanted = torch.autograd.grad(y.square().sum(), into)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), into), wanted)
    with torch.no_grad():
        y = layer(x)
        layer(x[:, :11], cache=cache)
        places = {name: kept.data_ptr() for name, kept in cache.layer(3).items()}
        step = compiled(x[:, 11:], cache=cache)
        torch.testing.assert_close(step, y[:, 11:], rtol=1e-5, atol=1e-6)
    assert {name: kept.data_ptr() for name, kept in cache.layer(3).items()} == places


@pytest.mark.parametrize("member", [*MAMBA])
def test_autocast(member: str) -> None:
    """bf16 in between; gradients in fp32, near those of fp32."""
    layer, x = small(member, is_outproj_norm=True), tokens(2, 12)
    layer(x).square().sum().backward()
    wanted = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32
        assert (p.grad - wanted[name]).norm() < 0.05 * wanted[name].norm(), name


@pytest.mark.parametrize("member", [*MAMBA])
def test_a_model_of_them(member: str) -> None:
    """It learns a row by heart and says it, token by token; every other block attends."""
    torch.manual_seed(0)
    model = LanguageModel(
        13, hidden_size=32, num_layers=2, mixer=member, window=8, attention_heads=2,
        head_dim=16, state_size=16, init_std=0.2,
    )  # fmt: skip
    row = torch.randint(13, (1, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(16):
        loss = model(row[:, :-1], targets=row[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(model.generate(row[:, :4], 5), row)


@pytest.mark.parametrize(
    ("member", "options", "said"),
    [
        ("mamba2", {"hidden_size": 0}, "hidden_size must be at least 1, but got 0"),
        ("mamba2", {"head_dim": 5}, "expand * hidden_size must be a multiple of head_dim, but got"),
        ("mamba3", {"expand": 0.3}, "but got 0.3 * 8 and head_dim=4"),
        ("mamba3", {"num_heads": 3}, "expand * hidden_size / head_dim = 4, but got 3"),
        ("mamba2", {"n_groups": 3}, "n_groups must divide the heads, but got n_groups=3 and 4"),
        ("mamba2", {"state_size": 0}, "state_size must be at least 1, but got 0"),
        ("mamba2", {"norm_groups": 3}, "groups of a norm must divide its size"),
        ("mamba2", {"dt_limit": (0.5, 0.1)}, "`0 <= dt_limit[0] <= dt_limit[1]` must hold"),
        ("mamba3", {"rope_fraction": 0.3}, "rope_fraction must be 0.5 or 1.0, but got 0.3"),
        ("mamba3", {"state_size": 2}, "state_size * rope_fraction must be 2 channels at least"),
        ("mamba3", {"decay": "relu"}, "decay must be one of ('softplus', 'heavy_tail')"),
        ("mamba3", {"A_floor": -1.0}, "A_floor must not be negative, but got -1.0"),
    ],
)
def test_sizes_that_do_not_fit(member: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        MAMBA[member](**{"hidden_size": 8, "head_dim": 4, "state_size": 4, **options})


@pytest.mark.parametrize("member", [*MAMBA])
def test_lengths_on_the_host_are_checked(member: str) -> None:
    ends = torch.tensor([0, 2, 4])
    with pytest.raises(InputError, match="cu_seqlens_cpu must be a copy of cu_seqlens"):
        small(member)(tokens(1, 4), cu_seqlens=ends, cu_seqlens_cpu=torch.tensor([0, 3, 4]))
