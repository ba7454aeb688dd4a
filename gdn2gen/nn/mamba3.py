"""The layer of Mamba-3, one input and one output a head."""

from __future__ import annotations

from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.base.errors import InputError
from gdn2gen.family.mamba3 import States
from gdn2gen.nn._batch import Batch
from gdn2gen.nn._heads import inner_heads, split
from gdn2gen.nn.cache import write
from gdn2gen.nn.layer import Layer, draw_steps, requires_gradient
from gdn2gen.nn.norm import GroupedRMSNorm
from gdn2gen.ops.mamba3 import mamba3_siso_combined, mamba3_siso_step
from gdn2gen.runtime.sequences import check_cu_seqlens

DECAYS: Final = ("softplus", "heavy_tail")


class Mamba3(Layer):
    """Mamba-3 (arXiv 2603.15569), one input and one output a head: the exponential-trapezoidal rule
    and rotations that depend on the data. Of each token

        z, x, B, C, dt, a, trap, angle = x W_in
        dt = softplus(dt + dt_bias)          a = min(-softplus(a), -A_floor)
        B, C = RMSNorm(B), RMSNorm(C)        o = recurrence(C, B, x, a dt, dt, trap, angle)
        out = ((o + D x) * silu(z)) W_out

    with the recurrence of `gdn2gen.mamba3_siso_combined`, to which `B_bias` and `C_bias` are given.
    Parameters are named, shaped and drawn as those of the Mamba3 of mamba_ssm and of
    flash-linear-attention 0.6.0 with `is_mimo=False`, so that state dicts load both ways. With the
    same parameters these two are different models: see `decay`.

    Args:
        hidden_size: channels of the tokens and of what is returned.
        state_size: N. On a GPU N and P must be head dims that were verified there, or
            GDN2GEN_UNVERIFIED=1; the CPU's reference takes any.
        head_dim: P.
        expand: channels of x are expand * hidden_size.
        num_heads: heads of x; if given, it must be expand * hidden_size / head_dim.
        n_groups: of B and C, a divisor of the heads. Head i reads group i // (heads / groups).
        rope_fraction: 0.5 or 1: how much of N is rotated, in pairs of channels.
        decay: "softplus", as flash-linear-attention 0.6.0 and mamba_ssm 2.3.2 have it; or
            "heavy_tail", as mamba_ssm's main branch has had it since (its pull request 962): in
            place of softplus(a) 1 + a from 0 on, and 1 / (1 - a) below.
        A_floor: the least that -a is.
        bias: whether the two projections have one.
        is_outproj_norm: RMSNorm(o + D x) * silu(z) of each head instead of the gate alone.
        layer_idx: under which a cache keeps this layer.
        norm_eps: of all norms.

    Raises:
        InputError: sizes below 1, or that do not divide; unknown words.

    State: `dt_bias` [heads], `B_bias` and `C_bias` [heads, 1, N], `D` [heads] in fp32 (they stay
    there in `.bfloat16()`), of which `dt_bias` and `D` are marked `_no_weight_decay`;
    `in_proj.weight`, its parts below each other in the order above, `B_norm.weight` and
    `C_norm.weight` [N], `norm.weight` if there is one, `out_proj.weight`.
    """

    _undecayed: ClassVar[tuple[str, ...]] = ("dt_bias", "D")

    def __init__(
        self,
        hidden_size: int = 2048,
        *,
        state_size: int = 128,
        head_dim: int = 64,
        expand: float = 2.0,
        num_heads: int | None = None,
        n_groups: int = 1,
        rope_fraction: float = 0.5,
        decay: str = "softplus",
        A_floor: float = 1e-4,
        bias: bool = False,
        is_outproj_norm: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.num_heads = inner_heads(hidden_size, expand, head_dim, num_heads, n_groups, state_size)
        if rope_fraction not in (0.5, 1.0):
            raise InputError(f"rope_fraction must be 0.5 or 1.0, but got {rope_fraction}")
        if decay not in DECAYS:
            raise InputError(f"decay must be one of {DECAYS}, but got {decay!r}")
        if A_floor < 0:
            raise InputError(f"A_floor must not be negative, but got {A_floor}")
        turned = int(state_size * rope_fraction) // 2
        if turned < 1:
            raise InputError(
                f"state_size * rope_fraction must be 2 channels at least, but got {state_size} * "
                f"{rope_fraction}"
            )
        self.head_dim = head_dim
        self.state_size = state_size
        self.n_groups = n_groups
        self.decay = decay
        self.A_floor = A_floor
        heads, inner, groups = self.num_heads, self.num_heads * head_dim, n_groups * state_size
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.B_bias = nn.Parameter(torch.empty(heads, 1, state_size, dtype=torch.float32))
        self.C_bias = nn.Parameter(torch.empty(heads, 1, state_size, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self._own_parameters()
        self._sizes = [inner, inner, groups, groups, heads, heads, heads, turned]
        self.in_proj = nn.Linear(hidden_size, sum(self._sizes), bias=bias)
        self.B_norm = GroupedRMSNorm(state_size, eps=norm_eps)
        self.C_norm = GroupedRMSNorm(state_size, eps=norm_eps)
        self.norm: GroupedRMSNorm | None = None
        if is_outproj_norm:
            self.norm = GroupedRMSNorm(inner, groups=heads, eps=norm_eps)
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)

    @torch.no_grad()
    def _reset_rates(self) -> None:
        draw_steps(self.dt_bias)
        for ones in (self.B_bias, self.C_bias, self.D):
            ones.fill_(1.0)

    @property
    def recurrence(self) -> tuple[str, int, int]:
        return "simple_gla", self.state_size, self.head_dim  # its one pass

    @torch.no_grad()
    def decay_of(self, x: Tensor) -> Tensor:
        *_, dt, rate, _, _ = torch.split(self.in_proj(x), self._sizes, -1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = functional.softplus(dt.to(wide) + self.dt_bias)
        return (self._rate(rate.to(wide)) * dt)[..., None]

    def _mix(self, batch: Batch, kept: dict[str, Tensor] | None) -> Tensor:
        z, x, B, C, dt, rate, trap, angles = torch.split(self.in_proj(batch.x), self._sizes, -1)
        heads, wide = self.num_heads, torch.promote_types(x.dtype, torch.float32)
        dt = functional.softplus(dt.to(wide) + self.dt_bias)
        gate = split(z, heads, self.head_dim)
        given = {
            "Q": self.C_norm(split(C, self.n_groups, self.state_size)),
            "K": self.B_norm(split(B, self.n_groups, self.state_size)),
            "V": split(x, heads, self.head_dim),
            "ADT": (self._rate(rate.to(wide)) * dt).mT,
            "DT": dt.mT,
            "Trap": trap.mT,
            "Q_bias": self.C_bias.squeeze(1),
            "K_bias": self.B_bias.squeeze(1),
            "Angles": angles.to(wide)[..., None, :].expand(-1, -1, heads, -1),
            "D": self.D,
            "Z": gate if self.norm is None else None,
        }
        if batch.cu_seqlens is not None and batch.cu_seqlens_cpu is not None:
            check_cu_seqlens(batch.cu_seqlens, batch.x.shape[1], batch.cu_seqlens_cpu)
        y = self._scanned(given, batch, kept).flatten(2)
        if self.norm is not None:
            y = self.norm(y, z)
        out: Tensor = self.out_proj(y)
        return out

    def _rate(self, x: Tensor) -> Tensor:
        """The decay of a step of 1, in natural log."""
        if self.decay == "softplus":
            rate = functional.softplus(x)
        else:  # either side of 0 by itself, so that neither divides by what the other wants
            rate = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), 1 + x)
        return (-rate).clamp(max=-self.A_floor)

    def _scanned(
        self, given: dict[str, Tensor | None], batch: Batch, kept: dict[str, Tensor] | None
    ) -> Tensor:
        """y [B, T, heads, P], and the four states into the cache."""
        if kept is None:
            y = mamba3_siso_combined(**given, cu_seqlens=batch.cu_seqlens)  # type: ignore[arg-type]
            assert isinstance(y, Tensor)
            return y
        trains = requires_gradient(given)
        names = States._fields
        states = tuple(kept[name] for name in names) if names[0] in kept else None
        if states is not None and batch.single and batch.cu_seqlens is None and not trains:
            token = {name: _of_one_token(name, x) for name, x in given.items()}
            y, made = mamba3_siso_step(**token, Input_States=states)  # type: ignore[arg-type]
            y = y[:, None]
        else:
            y, *made = mamba3_siso_combined(
                **given,  # type: ignore[arg-type]
                Input_States=states,  # type: ignore[arg-type]
                return_final_states=True,
                cu_seqlens=batch.cu_seqlens,
            )
        for name, state in zip(names, made, strict=True):
            write(kept, name, state, trains=trains)
        return y


def _of_one_token(name: str, x: Tensor | None) -> Tensor | None:
    """Without the dim of tokens, if it has one."""
    if x is None or name in ("Q_bias", "K_bias", "D"):
        return x
    return x.squeeze(2) if name in ("ADT", "DT", "Trap") else x.squeeze(1)
