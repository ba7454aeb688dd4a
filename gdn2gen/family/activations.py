"""What the decay, q and k pass through before a recurrence, where a call says so."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2gen.base.errors import InputError

L2NORM_EPS = 1e-6
# Beyond it softplus(x) is x to the last bit of fp64; torch's default of 20 is off by 1e-10 there.
_SOFTPLUS_LINEAR = 40.0


def activate_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
) -> Tensor:
    """Turn the pre-activation `g` of the decay into the decay itself, in natural log, <= 0.

    -exp(A_log) * softplus(g + dt_bias), which needs A_log; or, with `lower_bound` < 0,
    lower_bound * sigmoid(exp(A_log) * (g + dt_bias)), where a missing A_log is a factor of 1.

    Args:
        g: [B, T, HG, K], any float dtype; the result has its shape and the promoted dtype.
        A_log: [HG].
        dt_bias: [HG * K] or [HG, K].
        lower_bound: limit of the decay per token, in nats; must be negative.
    """
    heads, dim = g.shape[-2:]
    if A_log is not None and A_log.shape != (heads,):
        raise InputError(f"A_log must be [{heads}], one per head of g, but got {[*A_log.shape]}")
    if dt_bias is not None:
        if dt_bias.shape not in ((heads * dim,), (heads, dim)):
            raise InputError(
                f"dt_bias must be [{heads * dim}] or [{heads}, {dim}], but got {[*dt_bias.shape]}"
            )
        g = g + dt_bias.view(heads, dim)
    factor = None if A_log is None else A_log.exp()[:, None]
    if lower_bound is not None:
        if not lower_bound < 0:
            raise InputError(f"lower_bound must be negative, but got {lower_bound}")
        return lower_bound * torch.sigmoid(g if factor is None else factor * g)
    if factor is None:
        raise InputError("the softplus gate needs A_log, got None; or give lower_bound")
    return -factor * F.softplus(g, threshold=_SOFTPLUS_LINEAR)


def activate_step(dt: Tensor, dt_bias: Tensor | None = None) -> Tensor:
    """softplus(dt + dt_bias): a step >= 0 of its pre-activation `dt` [B, T, HV]; dt_bias [HV]."""
    return F.softplus(dt if dt_bias is None else dt + dt_bias, threshold=_SOFTPLUS_LINEAR)


def l2norm(x: Tensor, eps: float = L2NORM_EPS) -> Tensor:
    """Scale the rows of `x` [..., K] to unit length: x * rsqrt(sum(x^2) + eps), dtype of x."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
