"""What Mamba's layers do by their docstrings' equations, one token after another."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gdn2gen.nn import Mamba2, Mamba3


def mamba_by_equations(layer: Any, x: Tensor) -> Tensor:
    """y of the tokens x [T, hidden] of one sequence, one token after another."""
    return (_mamba2 if isinstance(layer, Mamba2) else _mamba3)(layer, x)


def _normed(x: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    parts = x.view(x.shape[0], groups, -1)
    return (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(1) * weight


def _mamba2(layer: Mamba2, x: Tensor) -> Tensor:
    H, P, N, G = layer.num_heads, layer.head_dim, layer.state_size, layer.n_groups
    made = layer.in_proj(x)
    z, xBC, dt = made[:, : H * P], made[:, H * P : -H], made[:, -H:]
    taps = layer.conv1d.weight[:, 0]
    rows = functional.pad(xBC, (0, 0, taps.shape[1] - 1, 0))
    xBC = torch.stack([(rows[t : t + taps.shape[1]].T * taps).sum(1) for t in range(len(x))])
    xBC = functional.silu(xBC if layer.conv1d.bias is None else xBC + layer.conv1d.bias)
    v = xBC[:, : H * P].view(-1, H, P)
    B, C = xBC[:, H * P :].view(-1, 2, G, N).repeat_interleave(H // G, 2).unbind(1)
    dt = functional.softplus(dt + layer.dt_bias).clamp(*layer.dt_limit)
    h, y = x.new_zeros(H, P, N), []
    for t in range(len(x)):
        grown = torch.einsum("h,hp,hn->hpn", dt[t], v[t], B[t])
        h = (-layer.A_log.exp() * dt[t]).exp()[:, None, None] * h + grown
        y.append(torch.einsum("hpn,hn->hp", h, C[t]) + layer.D[:, None] * v[t])
    out, gate = torch.stack(y).flatten(1), functional.silu(z)
    if layer.norm is None:
        return layer.out_proj(out * gate)
    given = layer.norm.weight, layer.norm.groups, layer.norm.eps
    before = layer.norm_before_gate
    return layer.out_proj(_normed(out, *given) * gate if before else _normed(out * gate, *given))


def _mamba3(layer: Mamba3, x: Tensor) -> Tensor:
    H, P, N, G = layer.num_heads, layer.head_dim, layer.state_size, layer.n_groups
    z, v, B, C, dt, rate, trap, angles = layer.in_proj(x).split(layer._sizes, -1)
    dt, share = functional.softplus(dt + layer.dt_bias), trap.sigmoid()
    rate = functional.softplus(rate) if layer.decay == "softplus" else _heavy_tail(rate)
    rate = -torch.maximum(rate, torch.tensor(layer.A_floor, dtype=rate.dtype))
    theta = (dt[:, :, None] * math.pi * angles.tanh()[:, None]).cumsum(0)
    turned = []
    for rows, norm, bias in ((B, layer.B_norm, layer.B_bias), (C, layer.C_norm, layer.C_bias)):
        rows = _normed(rows.reshape(-1, N), norm.weight, 1, norm.eps).view(-1, G, N)
        rows = rows.repeat_interleave(H // G, 1) + bias[:, 0]
        pairs = torch.view_as_complex(rows[..., : 2 * theta.shape[2]].unflatten(-1, (-1, 2)))
        pairs = torch.view_as_real(pairs * torch.polar(torch.ones_like(theta), theta)).flatten(2)
        turned.append(torch.cat((pairs, rows[..., 2 * theta.shape[2] :]), -1))
    k, q = turned
    v = v.view(-1, H, P)
    h, y = x.new_zeros(H, P, N), []
    for t in range(len(x)):
        h = h.clone()
        if t > 0:
            left = (1 - share[t]) * dt[t]
            h = h + torch.einsum("h,hp,hn->hpn", left, v[t - 1], k[t - 1])
        h = (rate[t] * dt[t]).exp()[:, None, None] * h
        h = h + torch.einsum("h,hp,hn->hpn", share[t] * dt[t], v[t], k[t])
        y.append(torch.einsum("hpn,hn->hp", h, q[t]) + layer.D[:, None] * v[t])
    out = torch.stack(y).flatten(1)
    if layer.norm is not None:
        out = _normed(out, layer.norm.weight, H, layer.norm.eps)
    return layer.out_proj(out * functional.silu(z))


def _heavy_tail(x: Tensor) -> Tensor:
    return torch.stack([1 + y if y >= 0 else 1 / (1 - y) for y in x.flatten()]).view_as(x)
