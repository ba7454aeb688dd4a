"""Launches of the kernels between a model's mixers, as functions of autograd: the norm of the
residual stream, and SwiGLU; of a layer's norm that projects its gate, and of what its sigmoids hand
back."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn2gen.family.parts import (
    CHANNELS_STEP,
    PROJECTED_DTYPES,
    PROJECTED_SIZES,
    ProjectedNormProblem,
    RotaryProblem,
    SigmoidProblem,
    StreamNormProblem,
    SwigluProblem,
    WindowProblem,
)
from gdn2gen.kernels.parts import PartStage, partial_rows
from gdn2gen.kernels.rows import UNIT
from gdn2gen.kernels.stream_parts import (
    PROJECTED_NORM,
    ROTARY,
    ROTARY_KNOBS,
    SIGMOID_BACKWARD,
    SIGMOID_KNOBS,
    STREAM_NORM,
    STREAM_NORM_BACKWARD,
    SWIGLU,
    SWIGLU_BACKWARD,
    SWIGLU_KNOBS,
    WINDOW_KNOBS,
    WINDOW_STEP,
    projected_knobs,
    stream_norm_knobs,
)
from gdn2gen.runtime import parts
from gdn2gen.runtime._operands import ALIGNMENT, readable
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.lookup import device_of
from gdn2gen.runtime.passes import empty


@lru_cache(maxsize=512)
def _norming(
    stage: PartStage,
    stream: torch.dtype,
    dtype: torch.dtype,
    weight: torch.dtype,
    size: int,
    added: bool,
    M: int,
    device: torch.device,
) -> parts.Loaded:
    problem = StreamNormProblem(
        dtype=DTYPE_NAME[dtype],
        weight_dtype=DTYPE_NAME[weight],
        stream_dtype=DTYPE_NAME[stream],
        size=size,
        added=added,
    )
    knobs = stream_norm_knobs(stage, problem, M, device_of(device).sms)
    return parts._load(stage, problem, knobs, device)


@lru_cache(maxsize=64)
def _gating(stage: PartStage, dtype: torch.dtype, device: torch.device) -> parts.Loaded:
    return parts._load(stage, SwigluProblem(dtype=DTYPE_NAME[dtype]), SWIGLU_KNOBS, device)


@lru_cache(maxsize=64)
def _rotating(dtype: torch.dtype, size: int, device: torch.device) -> parts.Loaded:
    problem = RotaryProblem(dtype=DTYPE_NAME[dtype], size=size)
    return parts._load(ROTARY, problem, ROTARY_KNOBS, device)


@lru_cache(maxsize=64)
def _attending(dtype: torch.dtype, size: int, device: torch.device) -> parts.Loaded:
    problem = WindowProblem(dtype=DTYPE_NAME[dtype], size=size)
    return parts._load(WINDOW_STEP, problem, WINDOW_KNOBS, device)


@lru_cache(maxsize=64)
def _sloping(dtype: torch.dtype, device: torch.device) -> parts.Loaded:
    problem = SigmoidProblem(dtype=DTYPE_NAME[dtype])
    return parts._load(SIGMOID_BACKWARD, problem, SIGMOID_KNOBS, device)


@lru_cache(maxsize=512)
def _projecting(
    problem: ProjectedNormProblem, M: int, H: int, device: torch.device
) -> parts.Loaded:
    knobs = projected_knobs(M, H, device_of(device).sms)
    return parts._load(PROJECTED_NORM, problem, knobs, device)


parts.ON_FORCE.extend(
    x.cache_clear for x in (_norming, _gating, _rotating, _attending, _sloping, _projecting)
)


class StreamNorm(torch.autograd.Function):
    """x + added, or x, and its norm in `dtype`: one pass over the stream, and one in the backward
    for both of its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        size, device = x.shape[-1], x.device
        M = x.numel() // size
        total = x if added is None else empty(x.shape, x.dtype, device)
        y = empty(x.shape, dtype, device)
        sums = () if added is None else (total,)
        given = readable([x, weight] if added is None else [x, added, weight])
        loaded = _norming(
            STREAM_NORM, x.dtype, dtype, weight.dtype, size, added is not None, M, device
        )
        with parts._on(device):
            loaded.launch(*given, *sums, y, eps=eps, M=M)
        ctx.eps, ctx.added, ctx.dtype = eps, added is not None, dtype
        ctx.save_for_backward(total, weight)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        size, device = x.shape[-1], x.device
        M = x.numel() // size
        dx, dweight = (empty(part.shape, part.dtype, device) for part in (x, weight))
        dadded = empty(x.shape, ctx.dtype, device) if ctx.added else None
        loaded = _norming(
            STREAM_NORM_BACKWARD, x.dtype, ctx.dtype, weight.dtype, size, ctx.added, M, device
        )
        rows = partial_rows(loaded.config.size("BT"), loaded.config.size("BR"), 1, M)
        partial = empty((rows, size), torch.float32, device)
        made = (dx, dweight, partial) if dadded is None else (dx, dadded, dweight, partial)
        with parts._on(device):
            loaded.launch(*readable([x, weight, dy, dtotal]), *made, eps=ctx.eps, M=M)
        return dx, dadded, dweight, None, None


class Swiglu(torch.autograd.Function):
    """silu(gate) * up, which keeps its arguments alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = empty(gate.shape, gate.dtype, gate.device)
        _gate(SWIGLU, (gate, up), (y,))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = (empty(x.shape, x.dtype, x.device) for x in (gate, up))
        _gate(SWIGLU_BACKWARD, (gate, up, dy), (dgate, dup))
        return dgate, dup


def _gate(stage: PartStage, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
    x = given[0]
    loaded = _gating(stage, x.dtype, x.device)
    with parts._on(x.device):
        loaded.launch(*readable(given), *made, units=x.numel() // CHANNELS_STEP)


def sigmoid_backward(dy: Tensor, y: Tensor, dx: Tensor) -> None:
    """dy y (1 - y) into dx, each [M, D]; D and what lies between rows of dx are multiples of 8."""
    M, D = dx.shape
    loaded = _sloping(dx.dtype, dx.device)
    with parts._on(dx.device):
        given = readable([y, dy])
        loaded.launch(*given, dx, M=M, units=D // CHANNELS_STEP, dx_row=dx.stride(0) // UNIT)


def projects(x: Tensor, low: Tensor, proj: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel of the norm of x [.., H, D] that projects its gate, of low [M, R]
    and proj [H D, R]."""
    if DTYPE_NAME.get(x.dtype) not in PROJECTED_DTYPES or x.numel() == 0:
        return False
    sizes = proj.shape[1], x.shape[-1]
    in_rows = low.stride(1) == 1 and low.stride(0) % UNIT == 0 and low.data_ptr() % ALIGNMENT == 0
    dtypes = {x.dtype, low.dtype, proj.dtype, weight.dtype}
    return in_rows and len(dtypes) == 1 and all(size in PROJECTED_SIZES for size in sizes)


def projected_norm(
    x: Tensor,
    low: Tensor,
    proj: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor,
    eps: float,
    activation: str,
) -> Tensor:
    """The gated norm of x [.., H, D], by gates that are projected from low [M, R], whose rows may
    lie apart; without gradients."""
    problem = ProjectedNormProblem(
        dtype=DTYPE_NAME[x.dtype],
        weight_dtype=DTYPE_NAME[proj.dtype],
        size=x.shape[-1],
        rank=proj.shape[1],
        activation=activation,
        bias=gate_bias is not None,
    )
    M, H, device = low.shape[0], x.shape[-2], x.device
    y = empty(x.shape, x.dtype, device)
    loaded = _projecting(problem, M, H, device)
    bias = () if gate_bias is None else (gate_bias,)
    x, *parameters = readable([x, proj, *bias, weight])
    scalars = {"eps": eps, "M": M, "H": H, "low_row": low.stride(0) // UNIT}
    with parts._on(device):
        loaded.launch(x, low, *parameters, y, **scalars)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] turned by cos and sin [B or 1, T, 1, D/2], in fp32."""
    B, T, H, D = x.shape
    y = empty(x.shape, x.dtype, x.device)
    loaded = _rotating(x.dtype, D, x.device)
    with parts._on(x.device):
        loaded.launch(*readable([x, cos, sin]), y, M=B * T, H=H, R=cos.numel() // (D // 2))
    return y


def window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    seen: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """o [B, 1, H, D] of one token of each sequence, without gradients; rings [B, W, H, D] and
    `seen` [B] are moved on in place."""
    (B, _, H, D), W, device = q.shape, k_ring.shape[1], q.device
    loaded = _attending(q.dtype, D, device)
    S = -(-W // loaded.config.size("BT"))
    o = empty(q.shape, q.dtype, device)
    part_o = empty((B, H, S, D), torch.float32, device)
    part_m, part_l = empty((2, B, H, S), torch.float32, device)
    given = readable([q, k, v])
    turns = readable([cos, sin])
    with parts._on(device):
        loaded.launch(
            *given, k_ring, v_ring, seen, *turns, o, part_o, part_m, part_l, B=B, H=H, W=W, S=S
        )
    return o
