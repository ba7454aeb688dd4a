"""What is between a model's mixers: the norm of the residual stream, and SwiGLU; by kernels of
one pass where there are any, by torch's own operations elsewhere."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.family import parts_reference as reference
from gdn2gen.family.parts import CHANNELS_STEP, STREAM_SIZES
from gdn2gen.nn.projections import narrowed
from gdn2gen.runtime.arguments import by_kernels, is_watched
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.stream_parts import StreamNorm, Swiglu

_EPS: Final = 1e-5
# What kernels count elements of in 32 bits.
_MOST: Final = 2**31


class Norm(nn.RMSNorm):
    """RMSNorm before what projects: under autocast its result is narrowed here, once, and not for
    each of the projections, whose gradients would be widened and added up one by one, too."""

    def forward(self, x: Tensor) -> Tensor:
        return narrowed(super().forward(x))


class ResidualNorm(nn.Module):
    """The same of a residual stream, which it hands on: x and norm(x), or with what a block adds
    x + added and norm(x + added).

    Computed in fp32 (fp64 for fp64). On a GPU one kernel reads the stream and one its gradients: of
    4 x 4096 tokens of 2048 channels in fp32 0.40 GB for a forward's 0.80, and 0.54 for 1.47.

    Args:
        size: of the last dim.
        eps: added to the mean of squares.

    State: `weight` [size], ones at first.
    """

    def __init__(self, size: int, *, eps: float = _EPS) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and added [..., size]; the stream like x, and its norm, narrowed under autocast."""
        if _has_norm_kernels(x, added, self.weight):
            found: tuple[Tensor, Tensor] = StreamNorm.apply(  # type: ignore[no-untyped-call]
                x, added, self.weight, self.eps, _narrow_dtype(x)
            )
            return found
        total = x if added is None else x + added
        return total, narrowed(functional.rms_norm(total, (self.size,), self.weight, self.eps))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if _has_swiglu_kernels(gate, up):
        y: Tensor = Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]
        return y
    return reference.swiglu(gate, up)


def _narrow_dtype(x: Tensor) -> torch.dtype:
    """That of a norm of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _has_norm_kernels(x: Tensor, added: Tensor | None, weight: Tensor) -> bool:
    if not by_kernels(x.device) or x.shape[-1] not in STREAM_SIZES:
        return False
    tensors = [x, weight] if added is None else [x, added, weight]
    if added is not None and (added.shape != x.shape or added.dtype != _narrow_dtype(x)):
        return False
    return weight.shape == x.shape[-1:] and _are_plain(tensors)


def _has_swiglu_kernels(gate: Tensor, up: Tensor) -> bool:
    if not by_kernels(gate.device) or gate.numel() % CHANNELS_STEP or gate.numel() >= _MOST:
        return False
    return (gate.shape, gate.dtype) == (up.shape, up.dtype) and _are_plain([gate, up])


def _are_plain(tensors: list[Tensor]) -> bool:
    """Whether kernels can read them, and nothing wants more than one derivative backwards."""
    if is_watched(tensors) or torch.autograd.forward_ad._current_level >= 0:
        return False
    device = tensors[0].device
    return tensors[0].numel() > 0 and all(
        x.dtype in DTYPE_NAME and x.device == device and x.layout == torch.strided for x in tensors
    )
