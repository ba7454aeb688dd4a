"""Launches of the kernels of a layer's parts: buffers, scalars, and configs by a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from gdn2gen.family.parts import ConvolutionProblem, NormProblem, PartProblem
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.parts import (
    GATED_NORM,
    GATED_NORM_BACKWARD,
    SHORT_CONV,
    SHORT_CONV_BACKWARD,
    SHORT_CONV_STEP,
    PartStage,
    convolution_knobs,
    norm_knobs,
    partial_rows,
)
from gdn2gen.kernels.rows import FARTHEST, UNIT
from gdn2gen.runtime._loading import stage_launcher
from gdn2gen.runtime._operands import readable
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.lookup import device_of
from gdn2gen.runtime.passes import empty
from gdn2gen.runtime.room import Room

Tensors = Sequence[Tensor]


class Convolved(NamedTuple):
    """What a forward made."""

    y: list[Tensor]
    final_tail: list[Tensor]
    """Nothing where it was not asked for."""
    places: list[Tensor]
    """Of packed sequences, for the backward: `place` and `sequence`, each [T]."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """The kernels of a stage for calls of some sizes."""

    launch: Callable[..., None]
    config: Config


_forced: dict[str, dict[str, Knob]] = {}
ON_FORCE: Final[list[Callable[[], None]]] = []
"""What else forgets what it knows when knobs are forced."""


def force(stage: str, knobs: dict[str, Knob] | None) -> None:
    """Have all calls of a stage in this process take these knobs, as measuring wants; None ends
    that."""
    _forced.pop(stage, None)
    if knobs is not None:
        _forced[stage] = knobs
    convolving.cache_clear()
    norming.cache_clear()
    for forget in ON_FORCE:
        forget()


@lru_cache(maxsize=512)
def convolving(
    stage: PartStage,
    problem: ConvolutionProblem,
    rows: int,
    T: int,
    channels: int,
    device: torch.device,
) -> Loaded:
    gpu = device_of(device)
    knobs = convolution_knobs(stage, problem, rows, T, channels, gpu.sms)
    return _load(stage, problem, knobs, device)


@lru_cache(maxsize=512)
def norming(stage: PartStage, problem: NormProblem, M: int, device: torch.device) -> Loaded:
    gpu = device_of(device)
    return _load(stage, problem, norm_knobs(stage, problem, M, gpu.sms, gpu.arch), device)


def _load(
    stage: PartStage, problem: PartProblem, knobs: dict[str, Knob], device: torch.device
) -> Loaded:
    config = default_config(stage.name, problem).replace(**knobs | _forced.get(stage.name, {}))
    return Loaded(_launcher(problem, config, device), config)


@lru_cache(maxsize=512)
def _launcher(problem: PartProblem, config: Config, _device: torch.device) -> Callable[..., None]:
    return stage_launcher(problem, config)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        return torch.cuda.device(device.index)
    return nullcontext()


def convolution_problem(
    x: Tensors,
    weight: Tensors,
    bias: Tensors,
    *,
    packed: bool = False,
    initial: bool = False,
    final: bool = False,
) -> ConvolutionProblem:
    return ConvolutionProblem(
        dtype=DTYPE_NAME[x[0].dtype],
        weight_dtype=DTYPE_NAME[weight[0].dtype],
        tensors=len(x),
        width=weight[0].shape[1],
        bias=bool(bias),
        packed=packed,
        initial_tail=initial,
        final_tail=final,
    )


def sizes(problem: ConvolutionProblem, x: Tensors, dx: Tensors | None = None) -> dict[str, int]:
    """Channels of each tensor, and how far its rows and those of its gradient lie apart, in
    units."""
    found = {}
    for i, part in enumerate(x):
        n = str(i) if problem.tensors > 1 else ""
        found[f"units{n}"] = part.shape[2] // UNIT
        found[f"x_row{n}"] = _row(part) // UNIT
        if dx is not None:
            found[f"dx_row{n}"] = _row(dx[i]) // UNIT
    return found


def _row(x: Tensor) -> int:
    """Elements from token to token."""
    B, T, D = x.shape
    if B * T <= 1:
        return D
    return x.stride(0) if T == 1 else x.stride(1)


def in_rows(x: Tensor) -> Tensor:
    """x [B, T, D], or a copy where its rows of channels do not lie evenly, 16 bytes apart, and no
    farther than kernels can count."""
    B, T, D = x.shape
    dense = x.stride(2) == 1
    row = _row(x)
    even = B <= 1 or T <= 1 or x.stride(0) == T * x.stride(1)
    apart = row % UNIT == 0 and D <= row <= FARTHEST
    if dense and even and apart and x.data_ptr() % 16 == 0 and not x.is_neg():
        return x
    return torch.clone(x, memory_format=torch.contiguous_format)


def convolve(
    x: Tensors,
    weight: Tensors,
    bias: Tensors,
    tail: Tensors,
    cu_seqlens: Tensor | None,
    final: bool,
) -> Convolved:
    """Short convolutions of x, each [B, T, D] of the same tokens, in one launch.

    `bias` and `tail` may be empty; cu_seqlens is int32 or int64.
    """
    packed = cu_seqlens is not None
    problem = convolution_problem(x, weight, bias, packed=packed, initial=bool(tail), final=final)
    device, (B, T) = x[0].device, x[0].shape[:2]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kept = problem.width - 1
    made = Convolved(
        [empty((B, T, part.shape[2]), part.dtype, device) for part in x],
        [empty((N, kept, part.shape[2]), part.dtype, device) for part in x if final],
        [empty((T,), torch.int32, device) for _ in range(2) if packed],
    )
    if B * T == 0:
        for i, part in enumerate(made.final_tail):
            part.copy_(tail[i]) if tail else part.zero_()
        return made
    sequences = [] if cu_seqlens is None else readable([cu_seqlens.to(torch.int32)])
    x = [in_rows(part) for part in x]
    scalars = {"B": B, "T": T, "N": N, **sizes(problem, x)}
    if packed:
        scalars["bits"] = (N - 1).bit_length()
    loaded = convolving(SHORT_CONV, problem, B, T, sum(p.shape[2] for p in x), device)
    rest = readable([*weight, *bias, *tail])
    with _on(device):
        loaded.launch(*x, *rest, *sequences, *made.y, *made.final_tail, *made.places, **scalars)
    return made


def convolve_backward(
    dy: Tensors,
    x: Tensors,
    weight: Tensors,
    bias: Tensors,
    tail: Tensors,
    places: Tensors,
    room: Room | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of x, in `room` if there is one, of weight and bias; `places` are those that the
    forward made."""
    problem = convolution_problem(
        x, weight, bias, packed=bool(places), initial=bool(tail), final=False
    )
    device, (B, T) = x[0].device, x[0].shape[:2]
    if room is None:
        dx = [empty(part.shape, part.dtype, device) for part in x]
    else:
        dx = room.empty(B, T, x[0])
    dweight = [empty(part.shape, part.dtype, device) for part in weight]
    dbias = [empty(part.shape, part.dtype, device) for part in bias]
    if B * T == 0:
        return dx, [part.zero_() for part in dweight], [part.zero_() for part in dbias]
    x = [in_rows(part) for part in x]
    channels = sum(part.shape[2] for part in x)
    loaded = convolving(SHORT_CONV_BACKWARD, problem, B, T, channels, device)
    rows = partial_rows(loaded.config.size("BT"), loaded.config.size("BR"), B, T)
    partial = empty((rows, problem.width + bool(bias), channels), torch.float32, device)
    rest = readable([*weight, *bias, *tail, *places, *dy])
    with _on(device):
        loaded.launch(*x, *rest, *dx, *dweight, *dbias, partial, B=B, T=T, **sizes(problem, x, dx))
    return dx, dweight, dbias


def convolve_step(x: Tensors, weight: Tensors, bias: Tensors, tail: Tensors, y: Tensors) -> None:
    """One token of each sequence, x [N, 1, D], into y; `tail` [N, W-1, D] is moved on where it
    lies."""
    problem = convolution_problem(x, weight, bias)
    device, N = x[0].device, x[0].shape[0]
    if N == 0:
        return
    x = [in_rows(part) for part in x]
    loaded = convolving(SHORT_CONV_STEP, problem, N, 1, sum(p.shape[2] for p in x), device)
    with _on(device):
        loaded.launch(*x, *readable([*weight, *bias]), *tail, *y, N=N, **sizes(problem, x))


def norm_problem(x: Tensor, weight: Tensor, activation: str) -> NormProblem:
    return NormProblem(
        dtype=DTYPE_NAME[x.dtype],
        weight_dtype=DTYPE_NAME[weight.dtype],
        size=weight.shape[0],
        activation=activation,
    )


def norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """The gated RMSNorm over the last dim."""
    problem, device = norm_problem(x, weight, activation), x.device
    M = x.numel() // problem.size
    y = empty(x.shape, x.dtype, device)
    if M > 0:
        loaded = norming(GATED_NORM, problem, M, device)
        with _on(device):
            loaded.launch(*readable([x, gate, weight]), y, eps=eps, M=M)
    return y


def norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight."""
    problem, device = norm_problem(x, weight, activation), x.device
    M = x.numel() // problem.size
    dx, dgate, dweight = (empty(part.shape, part.dtype, device) for part in (x, gate, weight))
    if M == 0:
        return dx, dgate, dweight.zero_()
    loaded = norming(GATED_NORM_BACKWARD, problem, M, device)
    rows = partial_rows(loaded.config.size("BT"), loaded.config.size("BR"), 1, M)
    partial = empty((rows, problem.size), torch.float32, device)
    with _on(device):
        given = readable([x, gate, weight, dy])
        loaded.launch(*given, dx, dgate, dweight, partial, eps=eps, M=M)
    return dx, dgate, dweight
