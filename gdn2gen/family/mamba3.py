"""Mamba-3 (arXiv 2603.15569), one input and one output a head, as state-spaces/mamba takes it: the
recurrence in plain PyTorch.

One head, rows are tokens; state h [P, N], v in R^P, q and k in R^N after biases and rotation:

    lambda_t = sigmoid(trap_t)                        alpha_t = exp(A_t dt_t)
    Theta_t = Theta_{t-1} + dt_t pi tanh(angle_t)     mod 2 pi
    q_t = R(Theta_t) (Q_t + Q_bias)                   k_t = R(Theta_t) (K_t + K_bias)
    h_t = alpha_t h_{t-1} + (1 - lambda_t) dt_t alpha_t v_{t-1} k_{t-1}^T + lambda_t dt_t v_t k_t^T
    y_t = h_t q_t + D v_t                             out_t = y_t silu(z_t)

R turns channels 2i and 2i + 1 by angle i, and leaves the channels after those as they are. What
goes from one part of a sequence to the next is Theta, h, the last k and the last v.

Kernels compute it in one pass (`mamba3_form`); what follows is told apart from that on purpose, to
be its truth.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class States(NamedTuple):
    """What a sequence carries on, a row for each."""

    angle: Tensor
    """[sequences, H, S], radians from 0 to 2 pi."""
    ssm: Tensor
    """[sequences, H, P, N]."""
    k: Tensor
    """[sequences, H, N], biased and rotated."""
    v: Tensor
    """[sequences, H, P]."""


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [..., N], whose channels 2i and 2i + 1 are turned by angles[..., i]."""
    turned = 2 * angles.shape[-1]
    first, second = x[..., :turned:2], x[..., 1:turned:2]
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.stack((first * cos - second * sin, first * sin + second * cos), -1)
    return torch.cat((pairs.flatten(-2), x[..., turned:]), -1)


def recurrent(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    *,
    D: Tensor | None = None,
    Z: Tensor | None = None,
    Input_States: tuple[Tensor, ...] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, States]:
    """Token by token; differentiable.

    Args:
        Q, K: [B, T, G, N], each group of which serves H / G heads that follow each other.
        V, Z: [B, T, H, P]. ADT, DT, Trap: [B, H, T]. Q_bias, K_bias: [H, N]. Angles: [B, T, H, S].
        D: [H].
        Input_States: as `States`, of each row, or each packed sequence; zero if None.
        cu_seqlens: [sequences + 1]: sequences that are packed in one row.

    Returns:
        out [B, T, H, P], and the states after the last token of each row or sequence.
    """
    B, T, H, _ = V.shape
    queries, keys = (x.repeat_interleave(H // x.shape[2], 2) for x in (Q, K))
    ends = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    rows = [(b, *part) for b in range(B) for part in itertools.pairwise(ends)]
    outputs, last = [], []
    for n, (b, start, end) in enumerate(rows):
        if Input_States is None:
            theta, h = V.new_zeros(H, Angles.shape[3]), V.new_zeros(H, V.shape[3], K.shape[3])
            k, v = V.new_zeros(H, K.shape[3]), V.new_zeros(H, V.shape[3])
        else:
            theta, h, k, v = (x[n] for x in Input_States)
        for t in range(start, end):
            dt, share = DT[b, :, t, None], Trap[b, :, t, None].sigmoid()
            theta = (theta + dt * math.pi * Angles[b, t].tanh()).remainder(2 * math.pi)
            before = ((1 - share) * dt * v)[..., None] * k[:, None]
            q = rotate(queries[b, t] + Q_bias, theta)
            k, v = rotate(keys[b, t] + K_bias, theta), V[b, t]
            written = (share * dt * v)[..., None] * k[:, None]
            h = ADT[b, :, t, None, None].exp() * (h + before) + written
            y = (h @ q[..., None]).squeeze(-1)
            y = y if D is None else y + D[:, None] * v
            outputs.append(y if Z is None else y * F.silu(Z[b, t]))
        last.append((theta, h, k, v))
    out = torch.stack(outputs).view(V.shape) if outputs else V
    return out, States(*(torch.stack(x) for x in zip(*last, strict=True)))


def one_token(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    D: Tensor | None,
    Z: Tensor | None,
    states: States,
) -> tuple[Tensor, States]:
    """The same of one token of each sequence, of tensors without the dim of tokens; computed in
    float32, or float64 for float64."""
    wide = torch.promote_types(V.dtype, torch.float32)
    narrow = [Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles]
    q, k, v, adt, dt, trap, q_bias, k_bias, angles = (x.to(wide) for x in narrow)
    repeats = V.shape[1] // Q.shape[1]
    dt, share = dt[..., None], trap.sigmoid()[..., None]
    theta = (states.angle + dt * math.pi * angles.tanh()).remainder(2 * math.pi)
    q = rotate(q.repeat_interleave(repeats, 1) + q_bias, theta)
    k = rotate(k.repeat_interleave(repeats, 1) + k_bias, theta)
    before = ((1 - share) * dt * states.v)[..., None] * states.k[:, :, None]
    h = adt.exp()[..., None, None] * (states.ssm + before)
    h = h + (share * dt * v)[..., None] * k[:, :, None]
    y = (h * q[:, :, None]).sum(-1)  # no product of matrices, which autocast would narrow
    y = y if D is None else y + D.to(wide)[:, None] * v
    y = y if Z is None else y * F.silu(Z.to(wide))
    return y.to(V.dtype), States(theta, h, k, V)
