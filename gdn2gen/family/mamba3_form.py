"""Mamba-3 around one pass of simple gated linear attention, by torch's own operations.

Token j is written twice, by itself and by the token after it: all tokens after it see it with

    s_j = lambda_j dt_j + (1 - lambda_{j+1}) dt_{j+1}       (without what follows in the last token)

and it sees itself with lambda_j dt_j alone. So its query goes one token ahead, to the state before
it; what it sees of itself is a number, and nothing is taken away again:

    H_t = alpha_t H_{t-1} + s_t v_t k_t^T                   o_t = H_t (alpha_{t+1} q_{t+1})
    y_t = o_{t-1} + c_t v_t                                 c_t = lambda_t dt_t (q_t . k_t) + D

No output depends on a later token, to the last bit: s_j has the next one's dt, but is seen by that
alone. H is the state h of the paper, but for the next token's share, which the last has not: what
is left is its h. Of a state that is carried in, the first token sees

    H_0 = h_0 + (1 - lambda_1) dt_1 v_0 k_0^T               y_1 = alpha_1 H_0 q_1 + c_1 v_1

The scan is that of `simple_gla` with scale 1. Queries and keys are each head's own, since dt is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2gen.family.mamba3 import States, rotate


@dataclass(frozen=True, eq=False)
class Ends:
    """Where sequences begin and end; on the device, so that nobody waits for it."""

    row: Tensor
    first: Tensor
    last: Tensor
    """[sequences]: row and place of the first and the last token; of an empty one any token's."""
    some: Tensor
    """[sequences, 1, 1] bool: whether it has tokens."""
    begins: Tensor
    ends: Tensor
    """[B, T] bool: whether a token is the first, the last of its sequence."""
    sequence: Tensor
    """[B, T]: which one each token is of."""

    @classmethod
    def of(cls, B: int, T: int, cu_seqlens: Tensor | None, device: torch.device) -> Ends:
        """Of B rows of T > 0 tokens. Tokens are those of the batch whatever cu_seqlens holds: on a
        GPU nobody looks at it."""
        if cu_seqlens is None:
            row = torch.arange(B, device=device)
            starts = torch.zeros_like(row)
            stops = starts + T
        else:
            cu_seqlens = cu_seqlens.long().clamp(0, T)
            starts, stops = cu_seqlens[:-1], cu_seqlens[1:]
            row = torch.zeros_like(starts)
        marked = torch.zeros(B, T + 1, dtype=torch.bool, device=device)
        marked[:, T] = True
        marked[row, starts] = True
        if cu_seqlens is None:
            sequence = row[:, None].expand(B, T)
        else:
            tokens = torch.arange(T, device=device)
            sequence = torch.searchsorted(cu_seqlens, tokens, right=True)[None] - 1
            sequence = sequence.clamp(0, starts.shape[0] - 1)
        return cls(
            row,
            starts.clamp(max=T - 1),
            (stops - 1).clamp(min=0),
            (stops > starts)[:, None, None],
            marked[:, :-1],
            marked[:, 1:],
            sequence,
        )


class Numbers(NamedTuple):
    """A token and head's numbers, each [B, T, H], in float32 or wider."""

    decay: Tensor
    """A dt."""
    ahead: Tensor
    """alpha of the next token, 0 in the last of a sequence."""
    own: Tensor
    """lambda dt: the weight by which a token sees itself."""
    before: Tensor
    """(1 - lambda) dt: what it adds to the weight of the one before it."""
    weight: Tensor
    """s: by which all later tokens see it."""


def numbers(ADT: Tensor, DT: Tensor, Trap: Tensor, ends: Ends) -> Numbers:
    """Of ADT, DT and Trap, each [B, H, T]."""
    decay, dt, trap = (_wide(x.mT) for x in (ADT, DT, Trap))
    own, before = trap.sigmoid() * dt, (-trap).sigmoid() * dt
    last = ends.ends[..., None]
    weight = own + _next(before).masked_fill(last, 0.0)
    return Numbers(decay, _next(decay.exp()).masked_fill(last, 0.0), own, before, weight)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _next(x: Tensor) -> Tensor:
    """Each token has what is the next one's, the last of a row 0."""
    return F.pad(x[:, 1:], (0, 0) * (x.dim() - 2) + (0, 1))


def accumulated(Angles: Tensor, DT: Tensor, state: Tensor | None, ends: Ends) -> Tensor:
    """Theta [B, T, H, S] in radians, from 0 to 2 pi but for rounding; in float64.

    So sums are as exact as what is summed, however long a sequence is.
    """
    rates = _wide(Angles).tanh().double()
    turns = DT.mT.double()[..., None] * (0.5 * rates)
    total = turns.cumsum(1)
    # sums begin anew in each sequence
    offset = (turns - total)[ends.row, ends.first]
    if state is not None:
        offset = offset + state.double() / (2 * math.pi)
    total = total + offset[ends.sequence]
    return 2 * math.pi * (total - total.detach().floor())


class Before(NamedTuple):
    """What the scan takes, and what is wanted after it."""

    q: Tensor
    k: Tensor
    """[B, T, H, N] in the dtype of Q: alpha_{t+1} q_{t+1}, and s_t k_t."""
    decay: Tensor
    """[B, T, H]."""
    own: Tensor
    """[B, T, H]: c, by which a token's own v goes to its output."""
    state: Tensor | None
    """[sequences, H, P, N]: H_0."""
    first: Tensor | None
    """[sequences, H, P]: what the first token sees of it."""
    angle: Tensor
    last_k: Tensor
    last_v: Tensor
    """Of the states after the last token, as in `States`."""


def before(
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
    states: States | None,
    ends: Ends,
) -> Before:
    """Biases, rotation and weights of at least one token a row; computed in float32 (float64 for
    float64)."""
    wide = torch.promote_types(Q.dtype, torch.float32)
    made = numbers(ADT, DT, Trap, ends)
    theta = accumulated(Angles, DT, None if states is None else states.angle, ends).to(wide)
    q, k = _biased(Q.to(wide), Q_bias.to(wide)), _biased(K.to(wide), K_bias.to(wide))
    own = made.own * (q * k).sum(-1)  # which no rotation changes
    own = own if D is None else own + D
    q, k = rotate(q, theta), rotate(k, theta)
    last = [x[ends.row, ends.last] for x in (theta, k, V)]
    state, first = None, None
    if states is None:
        last = [x.masked_fill(~ends.some, 0.0) for x in last]
    else:
        # an empty sequence hands on what it was given
        given = (states.angle, states.k, states.v.to(V.dtype))
        last = [torch.where(ends.some, *pair) for pair in zip(last, given, strict=True)]
        share = made.before[ends.row, ends.first][..., None] * ends.some
        state = states.ssm + (share * states.v)[..., None] * states.k[:, :, None]
        alpha, query = made.decay[ends.row, ends.first].exp(), q[ends.row, ends.first]
        first = alpha[..., None] * (state @ query[..., None]).squeeze(-1)
    return Before(
        (made.ahead[..., None] * _next(q)).to(Q.dtype),
        (made.weight[..., None] * k).to(Q.dtype),
        made.decay,
        own,
        state,
        first,
        *last,
    )


def _biased(x: Tensor, bias: Tensor) -> Tensor:
    """[B, T, H, N]: of each head, what its group has, and its own bias."""
    groups, N = x.shape[2:]
    return (x[:, :, :, None] + bias.view(groups, -1, N)).flatten(2, 3)


def after(
    o: Tensor, V: Tensor, own: Tensor, first: Tensor | None, Z: Tensor | None, ends: Ends
) -> Tensor:
    """out [B, T, H, P] of the scan's o, in the dtype of V."""
    wide = torch.promote_types(V.dtype, torch.float32)
    y = F.pad(o[:, :-1].to(wide), (0, 0, 0, 0, 1, 0))
    y = y.masked_fill(ends.begins[..., None, None], 0.0) + own[..., None] * V
    if first is not None:
        # sequences without tokens add zeros, so that one number at most goes anywhere
        first = first.masked_fill(~ends.some, 0.0).to(wide)
        y = y.index_put((ends.row, ends.first), first, accumulate=True)
    return (y if Z is None else y * F.silu(Z.to(wide))).to(V.dtype)
