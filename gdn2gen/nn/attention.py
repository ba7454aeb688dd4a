"""Attention over a window of the last tokens, by torch's own operation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.base.errors import InputError
from gdn2gen.nn._heads import split
from gdn2gen.nn._rotary import cosines_and_sines, turned
from gdn2gen.nn._windowed import attended, attended_within, steps_by_kernel, window_mask
from gdn2gen.nn.cache import Cache, LayerCache, may_overwrite, write
from gdn2gen.nn.projections import Projected
from gdn2gen.runtime.stream_parts import window_step


class SlidingWindowAttention(nn.Module):
    """Causal softmax attention of each token over itself and the `window - 1` tokens before it,
    with rotary positions:

        o_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s,   t - window < s <= t,   y = o W_o

    q and k are rotated in pairs (i, i + D/2) by position * base^(-2i/D).

    Args:
        hidden_size: channels of x and y.
        num_heads: a divisor of hidden_size; D = hidden_size / num_heads is even.
        window: tokens seen, the own one among them.
        base: of the rotary frequencies.
        layer_idx: under which a cache keeps this layer.

    Raises:
        InputError: sizes that do not go together.

    State: `{q,k,v,o}_proj.weight`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        window: int = 2048,
        base: float = 10000.0,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % (2 * num_heads) != 0:
            raise InputError(
                f"hidden_size must be num_heads times an even head dim, "
                f"but got hidden_size={hidden_size}, num_heads={num_heads}"
            )
        if window < 1:
            raise InputError(f"window must be at least 1, but got {window}")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.window = window
        self.base = base
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, *, cache: Cache | LayerCache | None = None) -> Tensor:
        """Attend from the tokens x [B, T, hidden], which follow those that the cache saw; y like x.

        The cache keeps keys and values of the last `window` tokens, that of position p in row
        p % window, and how many tokens there were. One token without gradients goes into the row
        of the one that leaves the window, and moves nothing else.
        """
        B, T, hidden = x.shape
        kept = None if cache is None else cache.of_layer(self.layer_idx, B, self)
        dim = hidden // self.num_heads
        tokens = Projected(x, self._projections())
        q, k, v = (split(tokens.by(proj), self.num_heads, dim) for proj in self._projections())
        seen = kept["seen"] if kept else torch.zeros(1, dtype=torch.int64, device=x.device)
        at = seen[:, None]  # [B, T], or [1, T] at first
        if T != 1:
            at = at + torch.arange(T, device=x.device)
        turns = cosines_and_sines(at, dim, self.base)
        if kept and T == 1 and may_overwrite(kept, "k", trains=torch.is_grad_enabled()):
            o = self._one(q, k, v, kept, turns)
        else:
            o = self._many(turned(q, *turns), turned(k, *turns), v, kept, seen)
        y: Tensor = self.o_proj(o.reshape(B, T, hidden))
        return y

    def _one(
        self, q: Tensor, k: Tensor, v: Tensor, kept: dict[str, Tensor], turns: tuple[Tensor, Tensor]
    ) -> Tensor:
        """o [B, 1, heads, D] of a token, which is turned and kept; rows need no order."""
        seen = kept["seen"]
        if steps_by_kernel(q, k, v, kept):
            return window_step(q, k, v, kept["k"], kept["v"], seen, *turns)
        # side by side, since of one token every launch counts
        q, k = turned(torch.cat((q, k), 2), *turns).chunk(2, 2)
        row = seen.remainder(self.window)[:, None, None, None].expand_as(k)
        for name, x in (("k", k), ("v", v)):
            kept[name].scatter_(1, row, x.to(kept[name].dtype))
        there = torch.arange(self.window, device=seen.device) <= seen[:, None]
        seen.add_(1)
        return attended(q, kept["k"].to(k.dtype), kept["v"].to(v.dtype), there[:, None, None])

    def _many(
        self, q: Tensor, k: Tensor, v: Tensor, kept: dict[str, Tensor] | None, seen: Tensor
    ) -> Tensor:
        """o [B, T, heads, D]."""
        T, earlier = k.shape[1], self.window - 1
        if kept:
            before = torch.arange(earlier, device=seen.device) - earlier
            rows = (seen[:, None] + before).remainder(self.window)
            k = torch.cat((_rows(kept["k"], rows).to(k.dtype), k), 1)
            v = torch.cat((_rows(kept["v"], rows).to(v.dtype), v), 1)
            o = attended(q, k, v, self._mask(seen, T, earlier))
        else:
            o = attended_within(q, k, v, self.window)
        if kept is not None:
            self._keep(kept, k, v, (seen + T).expand(k.shape[0]))
        return o

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    def _mask(self, seen: Tensor, tokens: int, earlier: int) -> Tensor:
        """[B or 1, 1, T, earlier + T]: what is within the window, and was there."""
        near = window_mask(tokens, self.window, seen.device, earlier)
        of = torch.arange(earlier + tokens, device=seen.device)
        # Rows of the cache before a sequence began are no tokens.
        return (near & (of >= earlier - seen[:, None, None]))[:, None]

    def _keep(self, kept: dict[str, Tensor], k: Tensor, v: Tensor, seen: Tensor) -> None:
        """The last rows, of a size that does not change, so that they may lie where they are."""
        trains = torch.is_grad_enabled()
        missing = max(0, self.window - k.shape[1])
        places = torch.arange(self.window, device=seen.device)
        back = (seen[:, None] - 1 - places).remainder(self.window)
        for name, x in (("k", k), ("v", v)):
            x = functional.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x
            write(kept, name, _rows(x, x.shape[1] - 1 - back), trains=trains)
        write(kept, "seen", seen, trains=trains)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Of x [B, T, heads, D] those that rows [B, N] name."""
    return x.gather(1, rows[..., None, None].expand(-1, -1, *x.shape[2:]))
