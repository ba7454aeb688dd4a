"""The short causal convolution of q, k and v, a layer's parameters of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gdn2gen.base.errors import InputError
from gdn2gen.family.parts import WIDTHS
from gdn2gen.nn._batch import Batch
from gdn2gen.nn.cache import may_overwrite
from gdn2gen.ops.parts import short_convolution, short_convolution_step


class Taps(NamedTuple):
    """Parameters of a convolution, as `ShortConvolution` has them."""

    weight: Tensor
    bias: Tensor | None


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over tokens, with SiLU:

        y_t = silu(sum_j weight_j * x_{t - width + 1 + j} + bias),   j = 0 .. width - 1

    Each sequence for itself: before its first token lies `tail`, or zeros. Computed in fp32 (fp64
    for fp64), one tap after another in every layout, so that packed or split sequences give the
    same bits; returned in the dtype of x. On a GPU by one kernel (`ops.parts.short_convolution`).

    Args:
        channels: D, each with taps of its own.
        width: taps, 2 to 4.
        bias: whether there is one.

    Raises:
        InputError: another width, or no channels.

    State: `weight` [D, 1, width] and `bias` [D], drawn as torch.nn.Conv1d does.
    """

    bias: nn.Parameter | None

    def __init__(self, channels: int, width: int = 4, *, bias: bool = False) -> None:
        super().__init__()
        if width not in WIDTHS:
            raise InputError(f"width must be one of {WIDTHS}, but got {width}")
        if channels < 1:
            raise InputError(f"channels must be at least 1, but got {channels}")
        self.channels = channels
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.register_parameter("bias", nn.Parameter(torch.empty(channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def parts(self, sizes: list[int]) -> list[Taps]:
        """Its channels in parts of these sizes, each a convolution by itself."""
        biases = [None] * len(sizes) if self.bias is None else torch.split(self.bias, sizes)
        weights = torch.split(self.weight, sizes)
        return [Taps(weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}, bias={self.bias is not None}"

    def forward(
        self, x: Tensor, *, tail: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve the tokens x [B, T, D]; return y like x, and the tail for what comes next.

        Args:
            x: the tokens.
            tail: [N, width-1, D], the last inputs before x of each sequence; zeros if None.
            cu_seqlens: [N+1]: N sequences packed in one row (B = 1); otherwise N is B.

        Raises:
            InputError: x or tail of another shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.channels:
            raise InputError(f"x must be [B, T, {self.channels}], but got {tuple(x.shape)}")
        tails = None if tail is None else [tail]
        (y,), last = convolve([self], [x], tails, cu_seqlens, keep=True)
        return y, last[0]


def convolve(
    convolutions: Sequence[ShortConvolution | Taps],
    x: Sequence[Tensor],
    tails: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    keep: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Several convolutions of the same tokens in one launch; y of each, and with `keep` the tails
    for what comes next."""
    weights, biases = _parameters(convolutions)
    y, last = short_convolution(
        x, weights, biases, tail=tails, output_final_tail=keep, cu_seqlens=cu_seqlens
    )
    return y, last or []


def step(
    convolutions: Sequence[ShortConvolution | Taps], x: Sequence[Tensor], tails: Sequence[Tensor]
) -> list[Tensor]:
    """The same for one token of each sequence, without gradients; `tails` are moved on in place."""
    weights, biases = _parameters(convolutions)
    return short_convolution_step(x, weights, biases, tail=tails)


def convolve_batch(
    convolutions: Sequence[ShortConvolution | Taps],
    x: Sequence[Tensor],
    names: Sequence[str],
    batch: Batch,
    kept: dict[str, Tensor] | None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The same after what a cache keeps by these names; y of each, and the tails that the cache has
    yet to keep."""
    if kept is None:
        return convolve(convolutions, x, cu_seqlens=batch.cu_seqlens)[0], {}
    tails = [kept[name] for name in names if name in kept]
    if len(tails) == len(names) and _may_step(convolutions, x, names, batch, kept):
        return step(convolutions, x, tails), {}
    y, last = convolve(convolutions, x, tails or None, batch.cu_seqlens, keep=True)
    return y, dict(zip(names, last, strict=True))


def _may_step(
    convolutions: Sequence[ShortConvolution | Taps],
    x: Sequence[Tensor],
    names: Sequence[str],
    batch: Batch,
    kept: dict[str, Tensor],
) -> bool:
    """Whether there is one token a sequence, and tails may be moved on where they lie."""
    if batch.cu_seqlens is not None or not batch.single:
        return False
    weights, biases = _parameters(convolutions)
    if torch.is_grad_enabled() and any(
        part.requires_grad for part in (*x, *weights, *(biases or []))
    ):
        return False
    return all(
        may_overwrite(kept, name, trains=False) and kept[name].dtype == part.dtype
        for name, part in zip(names, x, strict=True)
    )


def _parameters(
    convolutions: Sequence[ShortConvolution | Taps],
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Weights [D, width], and biases [D] where there are any."""
    biases = [c.bias for c in convolutions if c.bias is not None]
    return [c.weight.flatten(1) for c in convolutions], list(biases) or None
