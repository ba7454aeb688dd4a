"""The norm at the end of a layer, with its output gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.base.errors import InputError
from gdn2gen.family.parts import ACTIVATIONS
from gdn2gen.ops.parts import gated_rms_norm


class GatedRMSNorm(nn.Module):
    """RMSNorm over the last dim, times an activated gate:

        y = x / sqrt(mean(x^2) + eps) * weight * activation(gate)

    The gate comes after the norm. Computed in fp32 (fp64 for fp64), returned in the dtype of x; on
    a GPU by one kernel (`ops.parts.gated_rms_norm`).

    Args:
        size: of the last dim.
        eps: added to the mean of squares.
        activation: "sigmoid", as flash-linear-attention's layers have it, or "silu", as the papers.

    Raises:
        InputError: an activation that is not known, or no size.

    State: `weight` [size], ones at first.
    """

    def __init__(self, size: int, *, eps: float = 1e-5, activation: str = "sigmoid") -> None:
        super().__init__()
        if size < 1:
            raise InputError(f"size must be at least 1, but got {size}")
        if activation not in ACTIVATIONS:
            known = " or ".join(map(repr, ACTIVATIONS))
            raise InputError(f"activation must be {known}, but got {activation!r}")
        self.size = size
        self.eps = eps
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, activation={self.activation!r}"

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate [..., size]; y like x. Raises InputError where their shapes differ."""
        if x.shape != gate.shape or x.shape[-1] != self.size:
            raise InputError(
                f"x and gate must both be [..., {self.size}], "
                f"but got {tuple(x.shape)} and {tuple(gate.shape)}"
            )
        return gated_rms_norm(x, gate, self.weight, eps=self.eps, activation=self.activation)


class GroupedRMSNorm(nn.Module):
    """RMSNorm over each of `groups` parts of the last dim, which may be gated after it:

        y = x / sqrt(mean(x^2) + eps) * weight [* silu(gate)]

    Computed in fp32 (fp64 for fp64), returned in the dtype of x. With a gate and one group by one
    kernel on a GPU (`ops.parts.gated_rms_norm`).

    Args:
        size: of the last dim.
        groups: a divisor of it.
        eps: added to the mean of squares.

    Raises:
        InputError: groups that do not divide, or none.

    State: `weight` [size], ones at first.
    """

    def __init__(self, size: int, *, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        if groups < 1 or size < 1 or size % groups != 0:
            raise InputError(
                f"groups of a norm must divide its size, but got groups={groups}, size={size}"
            )
        self.size = size
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.size}, groups={self.groups}, eps={self.eps}"

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x and gate [..., size]; y like x."""
        if gate is not None and self.groups == 1:
            return gated_rms_norm(x, gate, self.weight, eps=self.eps, activation="silu")
        if self.groups == 1 and self.weight.dtype == x.dtype:
            return functional.rms_norm(x, (self.size,), self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        parts = x.to(wide).view(*x.shape[:-1], self.groups, self.size // self.groups)
        y = functional.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2) * self.weight
        y = y if gate is None else y * functional.silu(gate.to(wide))
        return y.to(x.dtype)
