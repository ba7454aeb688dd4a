"""The short causal convolution of q, k and v, by torch's own operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.base.errors import InputError

WIDTHS = (2, 3, 4)


@dataclass(frozen=True)
class PackedTokens:
    """Which sequence each token of a packed row is of, and how many come before it there."""

    cu_seqlens: Tensor
    sequence: Tensor
    """[T]; a token that no sequence covers counts to the one before it."""
    place: Tensor
    """[T]: 0 at the start of a sequence."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int) -> PackedTokens:
        cu_seqlens = cu_seqlens.long()
        all_tokens = torch.arange(tokens, device=cu_seqlens.device)
        # Of sequences that start at one token all but the last are empty.
        sequence = torch.searchsorted(cu_seqlens, all_tokens, right=True) - 1
        sequence = sequence.clamp(0, cu_seqlens.shape[0] - 2)
        return cls(cu_seqlens, sequence, all_tokens - cu_seqlens[sequence])


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over tokens, with SiLU:

        y_t = silu(sum_j weight_j * x_{t - width + 1 + j} + bias),   j = 0 .. width - 1

    Each sequence for itself: before its first token lies `tail`, or zeros. Computed in fp32 (fp64
    for fp64), one tap after another in every layout, so that packed or split sequences give the
    same bits; returned in the dtype of x.

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

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}, bias={self.bias is not None}"

    def forward(
        self, x: Tensor, *, tail: Tensor | None = None, packed: PackedTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve the tokens x [B, T, D]; return y like x, and the tail for what comes next.

        Args:
            x: the tokens.
            tail: [N, width-1, D], the last inputs before x of each sequence; zeros if None.
            packed: where sequences lie in one row (B = 1), N of them; otherwise N is B.

        Raises:
            InputError: x or tail of another shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.channels:
            raise InputError(f"x must be [B, T, {self.channels}], but got {tuple(x.shape)}")
        rows = x.shape[0] if packed is None else packed.cu_seqlens.shape[0] - 1
        shape = (rows, self.width - 1, self.channels)
        if tail is None:
            tail = x.new_zeros(shape)
        elif tail.shape != shape:
            raise InputError(f"tail must be {shape}, but got {tuple(tail.shape)}")
        if packed is None:
            whole = torch.cat((tail.to(x.dtype), x), 1)
            taps = [whole[:, j : j + x.shape[1]] for j in range(self.width)]
            tail = whole[:, x.shape[1] :]
        else:
            taps, tail = _packed_taps(x, tail.to(x.dtype), packed)
        return self._activated(taps).to(x.dtype), tail

    def _activated(self, taps: list[Tensor]) -> Tensor:
        """silu of the sum over taps, oldest first."""
        wide = torch.promote_types(taps[0].dtype, torch.float32)
        weight = self.weight.to(wide)
        total = taps[0].to(wide) * weight[:, 0, 0]
        for j in range(1, self.width):
            total = torch.addcmul(total, taps[j].to(wide), weight[:, 0, j])
        if self.bias is not None:
            total = total + self.bias.to(wide)
        return functional.silu(total)


def _packed_taps(x: Tensor, tail: Tensor, packed: PackedTokens) -> tuple[list[Tensor], Tensor]:
    """What each tap meets at every token, and the new tails."""
    kept = tail.shape[1]
    whole = torch.cat((tail.flatten(0, 1), x[0]))

    def before(token: Tensor, sequence: Tensor, place: Tensor, distance: int) -> Tensor:
        """Rows of `whole` that lie so far before a token, in its own sequence or in its tail."""
        of_tail = sequence * kept + kept + place - distance
        of_tokens = tail.shape[0] * kept + token - distance
        # Within bounds whatever cu_seqlens holds: on a GPU nobody looked at it.
        return torch.where(place >= distance, of_tokens, of_tail).clamp(0, whole.shape[0] - 1)

    tokens = torch.arange(x.shape[1], device=x.device)
    taps = [
        whole[before(tokens, packed.sequence, packed.place, distance)][None]
        for distance in range(kept, 0, -1)
    ]
    starts, ends = packed.cu_seqlens[:-1], packed.cu_seqlens[1:]
    sequences = torch.arange(tail.shape[0], device=x.device)
    last = [
        whole[before(ends, sequences, ends - starts, distance)] for distance in range(kept, 0, -1)
    ]
    return [*taps, x], torch.stack(last, 1)
