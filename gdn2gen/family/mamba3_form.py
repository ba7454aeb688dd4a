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
    """Where sequences of B rows of T > 0 tokens begin and end: found on the device, so that nobody
    waits for it, and only if it is asked for. Tokens are those of the batch whatever cu_seqlens
    holds."""

    B: int
    T: int
    cu_seqlens: Tensor | None
    device: torch.device

    @property
    def _bounds(self) -> tuple[Tensor, Tensor]:
        """[sequences]: the first token, and the one after the last, in their row."""
        if self.cu_seqlens is None:
            starts = torch.zeros(self.B, dtype=torch.long, device=self.device)
            return starts, starts + self.T
        ends = self.cu_seqlens.long().clamp(0, self.T)
        return ends[:-1], ends[1:]

    @property
    def row(self) -> Tensor:
        """[sequences]: the row of each."""
        starts, _ = self._bounds
        if self.cu_seqlens is not None:
            return torch.zeros_like(starts)
        return torch.arange(self.B, device=self.device)

    @property
    def first(self) -> tuple[Tensor, Tensor]:
        """Row and place of the first token of each; of one without tokens any token's."""
        return self.row, self._bounds[0].clamp(max=self.T - 1)

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        return self.row, (self._bounds[1] - 1).clamp(min=0)

    @property
    def some(self) -> Tensor:
        """[sequences, 1, 1] bool: whether it has tokens."""
        starts, stops = self._bounds
        return (stops > starts)[:, None, None]

    @property
    def _marked(self) -> Tensor:
        marked = torch.zeros(self.B, self.T + 1, dtype=torch.bool, device=self.device)
        marked[:, -1] = True  # by T a tracer would take it for a constant
        marked[self.row, self._bounds[0]] = True
        return marked

    @property
    def begins(self) -> Tensor:
        """[B, T] bool: whether a token is the first of its sequence."""
        return self._marked[:, :-1]

    @property
    def ends(self) -> Tensor:
        """[B, T] bool: whether it is the last."""
        return self._marked[:, 1:]

    @property
    def sequence(self) -> Tensor:
        """[B, T]: which one each token is of."""
        if self.cu_seqlens is None:
            return self.row[:, None].expand(self.B, self.T)
        tokens = torch.arange(self.T, device=self.device)
        found = torch.searchsorted(self.cu_seqlens.long(), tokens, right=True)[None] - 1
        return found.clamp(0, self.cu_seqlens.shape[0] - 2)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the op was given, of at least one token a row."""

    Q: Tensor
    K: Tensor
    V: Tensor
    ADT: Tensor
    DT: Tensor
    Trap: Tensor
    Q_bias: Tensor
    K_bias: Tensor
    Angles: Tensor
    D: Tensor | None
    Z: Tensor | None
    states: States | None
    cu_seqlens: Tensor | None
    ends: Ends

    @property
    def wide(self) -> torch.dtype:
        """What is computed in."""
        return torch.promote_types(self.V.dtype, torch.float32)


class Before(NamedTuple):
    """What the scan takes, and what is wanted after it."""

    q: Tensor
    k: Tensor
    """[B, T, H, N] in the dtype of Q: alpha_{t+1} q_{t+1}, and s_t k_t."""
    decay: Tensor
    """[B, T, H], in float32 or wider, as all that follows."""
    own: Tensor
    """[B, T, H]: c, by which a token's own v goes to its output."""
    angle: Tensor
    """[sequences, H, S]: Theta after the last token."""


def before(x: Inputs) -> Before:
    """Biases, rotation and weights."""
    decay, dt, trap = (_wide(y.mT) for y in (x.ADT, x.DT, x.Trap))
    last = x.ends.ends[..., None]
    ahead = _next(decay.exp(), last)
    weight = trap.sigmoid() * dt
    later = weight + _next((-trap).sigmoid() * dt, last)
    q, k = (_biased(y.to(x.wide), bias) for y, bias in ((x.Q, x.Q_bias), (x.K, x.K_bias)))
    own = weight * (q * k).sum(-1)  # which no rotation changes
    own = own if x.D is None else own + x.D
    state = None if x.states is None else x.states.angle
    theta = accumulated(x.Angles, x.DT, state, x.ends).to(x.wide)
    q, k = rotate(q, theta), rotate(k, theta)
    return Before(
        (ahead[..., None] * _next(q, last[..., None])).to(x.Q.dtype),
        (later[..., None] * k).to(x.Q.dtype),
        decay,
        own,
        theta[x.ends.last],
    )


def after(x: Inputs, o: Tensor, own: Tensor, first: Tensor | None) -> Tensor:
    """out [B, T, H, P] of the scan's o, in the dtype of V."""
    y = F.pad(o[:, :-1].to(x.wide), (0, 0, 0, 0, 1, 0))
    y = y.masked_fill(x.ends.begins[..., None, None], 0.0) + own[..., None] * x.V
    if first is not None:
        # sequences without tokens add zeros, so that one number at most goes anywhere
        first = first.masked_fill(~x.ends.some, 0.0)
        y = y.index_put(x.ends.first, first, accumulate=True)
    return (y if x.Z is None else y * F.silu(x.Z.to(x.wide))).to(x.V.dtype)


def carried_in(x: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """H_0 [sequences, H, P, N], and what first tokens see of it, [sequences, H, P]."""
    state = state_in(x)
    if x.states is None or state is None:
        return None, None
    at = x.ends.first
    decay, dt = (_wide(_taken(y.mT, at, x.ends)) for y in (x.ADT, x.DT))
    rates = _wide(_taken(x.Angles, at, x.ends)).tanh()
    theta = x.states.angle + math.pi * dt[..., None] * rates
    query = rotate(_biased(_taken(x.Q, at, x.ends).to(x.wide), x.Q_bias), theta)
    # no product of matrices, which autocast would narrow
    return state, decay.exp()[..., None] * (state * query[:, :, None]).sum(-1)


def state_in(x: Inputs) -> Tensor | None:
    """H_0 alone."""
    if x.states is None:
        return None
    # of a sequence without tokens dt is 0: it hands on what it was given
    dt, trap = (_wide(_taken(y.mT, x.ends.first, x.ends)) for y in (x.DT, x.Trap))
    share = ((-trap).sigmoid() * dt)[..., None]
    return x.states.ssm + (share * x.states.v)[..., None] * x.states.k[:, :, None]


def carried_out(x: Inputs, angle: Tensor, ssm: Tensor) -> States:
    """The states after the last tokens."""
    at = x.ends.last
    k = rotate(_biased(_taken(x.K, at, x.ends).to(x.wide), x.K_bias), angle)
    last = angle, k, x.V[at]
    if x.states is None:
        angle, k, v = (y.masked_fill(~x.ends.some, 0.0) for y in last)
    else:
        given = x.states.angle, x.states.k, x.states.v.to(x.V.dtype)
        pairs = zip(last, given, strict=True)
        angle, k, v = (torch.where(x.ends.some, *pair) for pair in pairs)
    return States(angle, ssm, k, v)


def accumulated(Angles: Tensor, DT: Tensor, state: Tensor | None, ends: Ends) -> Tensor:
    """Theta [B, T, H, S] in radians, from 0 to 2 pi but for rounding; in float64.

    So sums are as exact as what is summed, however long a sequence is.
    """
    rates = _wide(Angles).tanh().double()
    turns = DT.mT.double()[..., None] * (0.5 * rates)
    odd = ~turns.isfinite()
    turns = turns.masked_fill(odd, 0.0)
    total = turns.cumsum(1)
    # sums begin anew in each sequence
    offset = (turns - total)[ends.first]
    if state is not None:
        offset = offset + state.double() / (2 * math.pi)
    total = total + offset[ends.sequence]
    # and so does what they have of no number, which no difference takes away again
    count = odd.cumsum(1)
    since = count + (odd.long() - count)[ends.first][ends.sequence]
    total = total.masked_fill(since > 0, math.nan)
    return 2 * math.pi * (total - total.detach().floor())


def _biased(x: Tensor, bias: Tensor) -> Tensor:
    """[..., H, N]: of each head, what its group has, and its own bias."""
    groups, N = x.shape[-2:]
    return (x[..., None, :] + bias.to(x.dtype).view(groups, -1, N)).flatten(-3, -2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _next(x: Tensor, last: Tensor) -> Tensor:
    """Each token has what is the next one's, the `last` of a sequence 0: by no product, in which
    what is no number of another sequence would be none."""
    return F.pad(x[:, 1:], (0, 0) * (x.dim() - 2) + (0, 1)).masked_fill(last, 0.0)


def _taken(x: Tensor, at: tuple[Tensor, Tensor], ends: Ends) -> Tensor:
    """Of each sequence what `x` [B, T, ...] has in one token, and of one without tokens zeros: that
    token is another's, which shall neither be seen nor have a gradient."""
    taken = x[at]
    if ends.cu_seqlens is None:
        return taken
    return taken.masked_fill(~ends.some.view(-1, *(1,) * (taken.dim() - 1)), 0.0)
