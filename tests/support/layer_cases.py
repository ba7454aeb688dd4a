"""Layers of the family, small ones, and what each does by its docstring's equations."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from gdn2gen.nn import (
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNet2,
    GatedLinearAttention,
    KimiDeltaAttention,
    Mamba2,
    Mamba3,
)
from gdn2gen.nn.layer import Layer
from gdn2gen.nn.mixer import Mixer

LAYERS: Final[dict[str, Callable[..., Mixer]]] = {
    "gdn2": GatedDeltaNet2,
    "kda": KimiDeltaAttention,
    "gated_delta_rule": GatedDeltaNet,
    "delta_rule": DeltaNet,
    "gla": GatedLinearAttention,
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
    "delta_rule": ("fla.layers.delta_net", "DeltaNet"),
    "gla": ("fla.layers.gla", "GatedLinearAttention"),
}


def theirs(member: str, hidden: int = HIDDEN, head_dim: int = 16, **options: Any) -> Any:
    """flash-linear-attention's layer of 2 heads with the same options."""
    module, name = THEIRS[member]
    make = getattr(importlib.import_module(module), name)
    given = {"hidden_size": hidden, "num_heads": 2, "head_dim": head_dim, "expand_v": 1.0}
    given |= options
    if member in ("delta_rule", "gla"):  # whose head dims are shares of the hidden size
        K = given.pop("head_dim")
        V = K * given["expand_v"]
        given |= {"expand_k": 2 * K / hidden, "expand_v": 2 * V / hidden}
    return make(**given)


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
    if not isinstance(layer, GatedLinearAttention):
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
    norm = layer.g_norm_swish_gate if isinstance(layer, GatedLinearAttention) else layer.o_norm
    out = functional.rms_norm(torch.stack(o), (heads.V,), norm.weight, norm.eps)
    if isinstance(layer, DeltaNet) and not layer.use_gate:
        return layer.o_proj(out.flatten(1))
    gate = layer.g_proj(x).view_as(out)
    active = gate.sigmoid() if norm.activation == "sigmoid" else functional.silu(gate)
    return layer.o_proj((out * active).flatten(1))


def _convolved(layer: Mixer, name: str, x: Tensor) -> Tensor:
    made = getattr(layer, f"{name}_proj")(x)
    if isinstance(layer, GatedLinearAttention) and not layer.use_short_conv:
        return made
    if layer.use_short_conv:
        taps = getattr(layer, f"{name}_conv1d")
        rows = functional.pad(made.T[None], (taps.width - 1, 0))
        made = functional.conv1d(rows, taps.weight, taps.bias, groups=taps.channels)[0].T
    return functional.silu(made)


def _gates(layer: Mixer, x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log decay, erase and write factors, each for every value head."""
    heads = layer.heads
    if isinstance(layer, GatedLinearAttention):
        least = -math.inf if layer.clamp_min is None else layer.clamp_min
        g = (layer.gk_proj(x).sigmoid().log() / layer.gate_logit_normalizer).clamp(min=least)
        g = g.view(-1, heads.H, heads.K).repeat_interleave(group, 1)
        return g, torch.zeros_like(g), torch.ones_like(g[..., :1])
    if isinstance(layer, DeltaNet):
        beta = (2 if layer.allow_neg_eigval else 1) * layer.b_proj(x).sigmoid()[..., None]
        return torch.zeros_like(beta), beta, beta
    rates = layer.A_log.exp()[:, None]
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
