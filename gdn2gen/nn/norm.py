"""The norm at the end of a layer, with its output gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
