"""Attention over a window of the last tokens, by torch's own operation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.base.errors import InputError
from gdn2gen.nn._heads import split
from gdn2gen.nn.cache import Cache, LayerCache, may_overwrite, write


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
        q, k, v = (split(proj(x), self.num_heads, dim) for proj in self._projections())
        seen = kept["seen"] if kept else torch.zeros(1, dtype=torch.int64, device=x.device)
        at = seen[:, None] + torch.arange(T, device=x.device)  # [B, T], or [1, T] at first
        q, k = (_rotated(part, at, self.base) for part in (q, k))
        if kept and T == 1 and may_overwrite(kept, "k", trains=torch.is_grad_enabled()):
            o = self._one(q, k, v, kept)
        else:
            o = self._many(q, k, v, kept, seen)
        y: Tensor = self.o_proj(o.transpose(1, 2).reshape(B, T, hidden))
        return y

    def _one(self, q: Tensor, k: Tensor, v: Tensor, kept: dict[str, Tensor]) -> Tensor:
        """o [B, heads, 1, D] of a token, which is kept; rows need no order."""
        seen = kept["seen"]
        row = seen.remainder(self.window)[:, None, None, None].expand_as(k)
        for name, x in (("k", k), ("v", v)):
            kept[name].scatter_(1, row, x.to(kept[name].dtype))
        there = torch.arange(self.window, device=seen.device) <= seen[:, None]
        seen.add_(1)
        return _attended(q, kept["k"].to(k.dtype), kept["v"].to(v.dtype), there[:, None, None])

    def _many(
        self, q: Tensor, k: Tensor, v: Tensor, kept: dict[str, Tensor] | None, seen: Tensor
    ) -> Tensor:
        """o [B, heads, T, D]."""
        T, earlier = k.shape[1], 0
        if kept:
            earlier = self.window - 1
            before = torch.arange(earlier, device=seen.device) - earlier
            rows = (seen[:, None] + before).remainder(self.window)
            k = torch.cat((_rows(kept["k"], rows).to(k.dtype), k), 1)
            v = torch.cat((_rows(kept["v"], rows).to(v.dtype), v), 1)
        # Torch's fastest kernels take no mask.
        causal = not kept and self.window >= T
        o = _attended(q, k, v, None if causal else self._mask(seen, T, earlier))
        if kept is not None:
            self._keep(kept, k, v, (seen + T).expand(k.shape[0]))
        return o

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    def _mask(self, seen: Tensor, tokens: int, earlier: int) -> Tensor:
        """[B or 1, 1, T, earlier + T]: what is within the window, and was there."""
        to = torch.arange(earlier, earlier + tokens, device=seen.device)[:, None]
        of = torch.arange(earlier + tokens, device=seen.device)
        near = (of <= to) & (of > to - self.window)
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


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """o [B, heads, T, D] of q, k and v [B, T, heads, D]; causal where there is no mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


def _rotated(x: Tensor, at: Tensor, base: float) -> Tensor:
    """x [B, T, heads, D] turned by its positions `at` [B, T], in fp32."""
    half = x.shape[-1] // 2
    a, b = x[..., :half].float(), x[..., half:].float()
    steps = torch.arange(half, device=x.device, dtype=torch.float32)
    angles = at[..., None, None].float() * base ** (-steps / half)
    turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    return torch.cat(turned, -1).to(x.dtype)
