"""The layer of Mamba-2."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from gdn2gen.base.errors import InputError
from gdn2gen.family.mamba2 import step_sizes
from gdn2gen.nn._batch import Batch
from gdn2gen.nn._heads import inner_heads, split
from gdn2gen.nn.cache import in_place, write
from gdn2gen.nn.convolution import ShortConvolution, convolve_batch
from gdn2gen.nn.layer import RATES, STATE, Layer, draw_rates, requires_gradient
from gdn2gen.nn.norm import GroupedRMSNorm
from gdn2gen.ops.chunk import chunk_mamba2
from gdn2gen.ops.recurrent import fused_recurrent_mamba2
from gdn2gen.runtime.head_dims import runs_here

_TAILS = ("x_tail", "B_tail", "C_tail")


class Mamba2(Layer):
    """Mamba-2 (arXiv 2405.21060): one decay a head, keys and queries shared by groups of heads. Per
    head, with the state h in R^{P x N}:

        z, xBC, dt = x W_in                  x, B, C = silu(conv(xBC))
        dt = softplus(dt + dt_bias)          h_t = exp(-exp(A_log) dt_t) h_{t-1} + dt_t x_t B_t^T
        y_t = h_t C_t + D x_t                out = RMSNorm(y * silu(z)) W_out

    Parameters are named, shaped and drawn as those of mamba_ssm's Mamba2 in this order, so that
    state dicts load both ways; flash-linear-attention 0.6.0 and transformers have the same names.
    flash-linear-attention's default is `bias=True, conv_bias=False`, draws exp(A_log) from 0 on,
    and has one group in its norm (`norm_groups=1`).

    Args:
        hidden_size: channels of the tokens and of what is returned.
        state_size: N. On a GPU N and P must be head dims that were verified there, or
            GDN2GEN_UNVERIFIED=1; the CPU's reference takes any.
        head_dim: P.
        expand: channels of x are expand * hidden_size.
        num_heads: heads of x; if given, it must be expand * hidden_size / head_dim.
        n_groups: of B and C, a divisor of the heads. Head i reads group i // (heads / groups).
        conv_size: 2 to 4 taps.
        conv_bias: whether the convolution has one.
        bias: whether the two projections have one.
        rmsnorm: otherwise y is multiplied by silu(z) alone.
        norm_before_gate: RMSNorm(y) * silu(z) instead.
        norm_groups: parts of y that the norm takes by themselves; n_groups if None, as mamba_ssm.
        dt_limit: least and most that dt is after softplus.
        layer_idx: under which a cache keeps this layer.
        norm_eps: of the norm.

    Raises:
        InputError: sizes below 1, or that do not divide.

    State: `dt_bias`, `A_log`, `D` [heads] in fp32 (they stay there in `.bfloat16()`), marked
    `_no_weight_decay`; `in_proj.weight`, of z, x, B, C and dt below each other,
    `conv1d.weight` [D, 1, conv_size] and `.bias`, `norm.weight`, `out_proj.weight`.
    """

    _undecayed: ClassVar[tuple[str, ...]] = (*RATES, "D")

    def __init__(
        self,
        hidden_size: int = 2048,
        *,
        state_size: int = 128,
        head_dim: int = 64,
        expand: float = 2.0,
        num_heads: int | None = None,
        n_groups: int = 1,
        conv_size: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_groups: int | None = None,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.num_heads = inner_heads(hidden_size, expand, head_dim, num_heads, n_groups, state_size)
        least, most = dt_limit
        if not 0.0 <= least <= most:
            raise InputError(f"`0 <= dt_limit[0] <= dt_limit[1]` must hold, but got {dt_limit}")
        self.head_dim = head_dim
        self.state_size = state_size
        self.n_groups = n_groups
        self.dt_limit = (float(least), float(most))
        self.norm_before_gate = norm_before_gate
        inner = self.num_heads * head_dim
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self._own_parameters()
        groups = n_groups * state_size
        self._sizes = [inner, inner, groups, groups, self.num_heads]
        self.in_proj = nn.Linear(hidden_size, sum(self._sizes), bias=bias)
        self.conv1d = ShortConvolution(inner + 2 * groups, conv_size, bias=conv_bias)
        self.norm: GroupedRMSNorm | None = None
        if rmsnorm:
            parts = n_groups if norm_groups is None else norm_groups
            self.norm = GroupedRMSNorm(inner, groups=parts, eps=norm_eps)
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)

    @torch.no_grad()
    def _reset_rates(self) -> None:
        draw_rates(self.A_log, self.dt_bias)
        self.D.fill_(1.0)

    @property
    def recurrence(self) -> tuple[str, int, int]:
        return "mamba2", self.state_size, self.head_dim

    @torch.no_grad()
    def decay_of(self, x: Tensor) -> Tensor:
        *_, dt = torch.split(self.in_proj(x), self._sizes, -1)
        dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
        steps = step_sizes(dt, self.dt_bias, True, self.dt_limit)
        return (-self.A_log.exp() * steps)[..., None]

    def _mix(self, batch: Batch, kept: dict[str, Tensor] | None) -> Tensor:
        z, x, B, C, dt = torch.split(self.in_proj(batch.x), self._sizes, -1)
        # Three of one launch, so that each is a tensor of its own, which the op need not copy.
        taps = self.conv1d.parts(self._sizes[1:4])
        (x, B, C), tails = convolve_batch(taps, [x, B, C], _TAILS, batch, kept)
        given = {
            "q": split(C, self.n_groups, self.state_size),
            "k": split(B, self.n_groups, self.state_size),
            "v": split(x, self.num_heads, self.head_dim),
            "dt": dt,
        }
        # The gate is the op's, unless there is a norm between.
        gates = self.norm is None or not self.norm_before_gate
        gate = split(z, self.num_heads, self.head_dim) if gates else None
        own = {name: getattr(self, name) for name in self._undecayed}
        trains = requires_gradient({**given, "z": gate, **own})
        if kept is not None and batch.single and not trains and self._steps(x):
            y = self._step(**given, z=gate, batch=batch, kept=kept)
        else:
            y = self._scan(**given, z=gate, batch=batch, kept=kept, trains=trains)
        if kept is not None:
            for name, tail in tails.items():
                write(kept, name, tail, trains=trains)
        y = y.flatten(2)
        if self.norm is not None:
            y = self.norm(y, None if gates else z)
        out: Tensor = self.out_proj(y)
        return out

    def _scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dt: Tensor,
        z: Tensor | None,
        batch: Batch,
        kept: dict[str, Tensor] | None,
        trains: bool,
    ) -> Tensor:
        """y [B, T, heads, P], gated if z is given, and the state into the cache."""
        dt, bias, bounded = self._limited(dt)
        y, state = chunk_mamba2(
            q,
            k,
            v,
            dt,
            initial_state=None if kept is None else kept.get(STATE),
            output_final_state=kept is not None,
            use_gate_in_kernel=not bounded,
            rate=-self.A_log.exp(),
            dt_bias=bias,
            D=self.D[:, None].expand(-1, self.head_dim),
            z=z,
            state_v_first=True,
            cu_seqlens=batch.cu_seqlens,
            cu_seqlens_cpu=batch.cu_seqlens_cpu,
        )
        if kept is not None and state is not None:
            write(kept, STATE, state, trains=trains)
        return y

    def _steps(self, x: Tensor) -> bool:
        """Whether one token goes to an op over few tokens: not where that would be refused."""
        name, N, P = fused_recurrent_mamba2.__name__, self.state_size, self.head_dim
        return x.device.type != "cuda" or runs_here(name, x.dtype, x.device, N, P)

    def _step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dt: Tensor,
        z: Tensor | None,
        batch: Batch,
        kept: dict[str, Tensor],
    ) -> Tensor:
        """y of a token a sequence, gated if z is given; the state is moved on where it lies."""
        dt, bias, bounded = self._limited(dt)
        shape = (batch.sequences, self.num_heads, self.head_dim, self.state_size)
        y, _ = fused_recurrent_mamba2(
            q,
            k,
            v,
            dt,
            use_gate_in_kernel=not bounded,
            rate=-self.A_log.exp(),
            dt_bias=bias,
            D=self.D[:, None].expand(-1, self.head_dim),
            z=z,
            state_v_first=True,
            cu_seqlens=batch.cu_seqlens,
            state_pool=in_place(kept, STATE, shape, v),
        )
        return y

    def _limited(self, dt: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """The steps, or what the ops make steps of and its bias; and whether they have limits, of
        which the ops know nothing."""
        if self.dt_limit == (0.0, math.inf):
            return dt, self.dt_bias, False
        return step_sizes(dt, self.dt_bias, True, self.dt_limit), None, True
