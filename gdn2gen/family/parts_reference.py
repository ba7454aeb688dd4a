"""A layer's parts by torch's own operations: what their kernels are held to, and the CPU runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATE: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
}


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
        # Tokens before the first sequence stand at its start, and none starts before the batch.
        place = (all_tokens - cu_seqlens[sequence]).clamp(min=0).minimum(all_tokens)
        return cls(cu_seqlens, sequence, place)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """silu of the causal depthwise convolution of x [B, T, D] with weight [D, W], oldest tap first;
    and `last_inputs`. `tail` [N, W - 1, D] is what came before x.

    Each sequence for itself, one tap after another in every layout, so that packed or split
    sequences give the same bits; in fp32 (fp64 for fp64).
    """
    width = weight.shape[1]
    whole, packed = _with_tails(x, width, tail, cu_seqlens)
    if packed is None:
        taps = [whole[:, j : j + x.shape[1]] for j in range(width)]
    else:
        tokens = torch.arange(x.shape[1], device=x.device)
        earlier = _earlier(whole, width, tokens, packed.sequence, packed.place, packed)
        taps = [*(part[None] for part in earlier), x]
    wide = torch.promote_types(x.dtype, torch.float32)
    total = taps[0].to(wide) * weight[:, 0].to(wide)
    for j in range(1, width):
        total = torch.addcmul(total, taps[j].to(wide), weight[:, j].to(wide))
    if bias is not None:
        total = total + bias.to(wide)
    y = functional.silu(total).to(x.dtype)
    return y, _last(whole, width, x.shape[1], packed)


def last_inputs(
    x: Tensor, width: int, tail: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """[N, width - 1, D]: the last inputs of each sequence, oldest first."""
    if cu_seqlens is None and x.shape[1] >= width - 1:
        return x[:, x.shape[1] - width + 1 :].clone()
    whole, packed = _with_tails(x, width, tail, cu_seqlens)
    return _last(whole, width, x.shape[1], packed)


def _with_tails(
    x: Tensor, width: int, tail: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, PackedTokens | None]:
    """Tails before rows; of packed sequences all tails before the one row, without its dim."""
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tail = x.new_zeros(N, width - 1, x.shape[2]) if tail is None else tail.to(x.dtype)
    if cu_seqlens is None:
        return torch.cat((tail, x), 1), None
    return torch.cat((tail.flatten(0, 1), x[0])), PackedTokens.of(cu_seqlens, x.shape[1])


def _last(whole: Tensor, width: int, tokens: int, packed: PackedTokens | None) -> Tensor:
    if packed is None:
        return whole[:, tokens:]
    starts, ends = packed.cu_seqlens[:-1], packed.cu_seqlens[1:]
    sequences = torch.arange(starts.shape[0], device=whole.device)
    return torch.stack(_earlier(whole, width, ends, sequences, ends - starts, packed), 1)


def _earlier(
    whole: Tensor,
    width: int,
    token: Tensor,
    sequence: Tensor,
    place: Tensor,
    packed: PackedTokens,
) -> list[Tensor]:
    """The `width` - 1 inputs before tokens, each in its own sequence or in its tail."""
    kept = width - 1
    tails = (packed.cu_seqlens.shape[0] - 1) * kept
    found = []
    for distance in range(kept, 0, -1):
        of_tail = sequence * kept + kept + place - distance
        row = torch.where(place >= distance, tails + token - distance, of_tail)
        # Within bounds whatever cu_seqlens holds: on a GPU nobody looked at it.
        found.append(whole[row.clamp(0, whole.shape[0] - 1)])
    return found


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * activation(gate) over the last dim; in fp32 (fp64 for
    fp64), returned in the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return (values * scale * weight.to(wide) * ACTIVATE[activation](gate.to(wide))).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return functional.silu(gate) * up
