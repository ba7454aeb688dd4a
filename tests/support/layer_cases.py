"""Layers of the family, small ones, and what each does by its docstring's equations."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from gdn2gen.nn import GatedDeltaNet, GatedDeltaNet2, KimiDeltaAttention, Mamba2, Mamba3
from gdn2gen.nn.layer import Layer
from gdn2gen.nn.mixer import Mixer

LAYERS: Final[dict[str, Callable[..., Mixer]]] = {
    "gdn2": GatedDeltaNet2,
    "kda": KimiDeltaAttention,
    "gated_delta_rule": GatedDeltaNet,
}
MAMBA: Final[dict[str, Callable[..., Layer]]] = {"mamba2": Mamba2, "mamba3": Mamba3}
"""Layers of the other kind: one projection, one convolution or none."""
ALL: Final[dict[str, Callable[..., Layer]]] = {**LAYERS, **MAMBA}
HIDDEN: Final = 32
# flash-linear-attention's.
THEIRS: Final = {
    "gdn2": ("fla.layers.gdn2", "GatedDeltaNet2"),
    "kda": ("fla.layers.kda", "KimiDeltaAttention"),
    "gated_delta_rule": ("fla.layers.gated_deltanet", "GatedDeltaNet"),
}


def small(member: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A layer of 2 heads of 16 channels, the same at every call; of `options` it gets what it
    takes. Mamba's has 4 heads, and 2 groups where value heads are grouped."""
    torch.manual_seed(0)
    given = {"num_heads": 2, "head_dim": 16, "expand_v": 1.0, **options}
    if member in MAMBA:
        groups = 2 if "num_v_heads" in options else 1
        given = {"state_size": 8, "n_groups": groups, **given, "num_heads": 4}
    layer = ALL[member](HIDDEN, layer_idx=3, **taken(member, given))
    return layer.to(dtype)


def taken(member: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the layer has."""
    known = {*signature(ALL[member]).parameters}
    return {name: x for name, x in options.items() if name in known}


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HIDDEN, generator=made).to(dtype)


def by_equations(layer: Mixer, x: Tensor) -> Tensor:
    """y of the tokens x [T, hidden] of one sequence: one token and one head after another."""
    heads = layer.heads
    group = heads.HV // heads.H
    q, k, v = (_convolved(layer, name, x) for name in "qkv")
    q, k = (part.view(-1, heads.H, heads.K).repeat_interleave(group, 1) for part in (q, k))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    v = v.view(-1, heads.HV, heads.V)
    g, erase, write = _gates(layer, x, group)
    S = x.new_zeros(heads.HV, heads.K, heads.V)
    o = []
    for t in range(x.shape[0]):
        S = g[t].exp()[..., None] * S
        met = torch.einsum("hk,hkv->hv", erase[t] * k[t], S)
        S = S + torch.einsum("hk,hv->hkv", k[t], write[t] * v[t] - met)
        o.append(heads.K**-0.5 * torch.einsum("hk,hkv->hv", q[t], S))
    out = functional.rms_norm(torch.stack(o), (heads.V,), layer.o_norm.weight, layer.o_norm.eps)
    gate = layer.g_proj(x).view_as(out)
    active = gate.sigmoid() if layer.o_norm.activation == "sigmoid" else functional.silu(gate)
    return layer.o_proj((out * active).flatten(1))


def _convolved(layer: Mixer, name: str, x: Tensor) -> Tensor:
    made = getattr(layer, f"{name}_proj")(x)
    if layer.use_short_conv:
        taps = getattr(layer, f"{name}_conv1d")
        rows = functional.pad(made.T[None], (taps.width - 1, 0))
        made = functional.conv1d(rows, taps.weight, taps.bias, groups=taps.channels)[0].T
    return functional.silu(made)


def _gates(layer: Mixer, x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log decay, erase and write factors, each for every value head."""
    heads, rates = layer.heads, layer.A_log.exp()[:, None]
    if isinstance(layer, GatedDeltaNet):
        g = -rates[:, 0] * functional.softplus(layer.a_proj(x) + layer.dt_bias)
        beta = (2 if layer.allow_neg_eigval else 1) * layer.b_proj(x).sigmoid()[..., None]
        return g[..., None], beta, beta
    raw = layer.f_proj(x).view(-1, rates.shape[0], heads.K)
    raw = raw + layer.dt_bias.view(-1, heads.K)
    bound = layer.lower_bound
    g = -rates * functional.softplus(raw) if bound is None else bound * (rates * raw).sigmoid()
    most = 2 if layer.allow_neg_eigval else 1
    erase = most * layer.b_proj(x).sigmoid()
    if isinstance(layer, KimiDeltaAttention):
        beta = erase[..., None]
        return g, beta, beta
    write = layer.w_proj(x).sigmoid().view(-1, heads.HV, heads.V)
    erase = erase.view(-1, heads.H, heads.K)
    return g.repeat_interleave(group, 1), erase.repeat_interleave(group, 1), write
