"""Mamba-3 by its own kernels over chunks: an op in torch.library for tracers, autograd's own
Function otherwise; see `mamba3_ops`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn2gen.family.mamba3_form import Inputs
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.mamba3_chunks import CHUNKS, by_chunks, chunk_of
from gdn2gen.runtime import mamba3
from gdn2gen.runtime.arguments import is_watched
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.mamba3_chunks import (
    LITTLE,
    MUCH,
    NOTHING,
    Given,
    Gradients,
    Made,
    backward,
    forward,
)
from gdn2gen.runtime.mamba3_loaded import tile_at
from gdn2gen.runtime.parts_ops import _define
from gdn2gen.runtime.sequences import count_chunks

Some = list[Tensor]
_forced: list[bool] = []


@contextmanager
def chunks_forced(chosen: bool) -> Iterator[None]:
    """Have calls in this process run these kernels, or those around a scan, whatever the rule says:
    for tests, and to measure one beside the other."""
    before, _forced[:] = [*_forced], [chosen]
    try:
        yield
    finally:
        _forced[:] = before


def chosen(x: Inputs) -> bool:
    """Whether a call that kernels serve runs these."""
    return _forced[0] if _forced else by_chunks(DTYPE_NAME[x.V.dtype])


def run_chunks(x: Inputs, state: Tensor | None, fast: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, and the state and Theta after the last tokens. `state`: H_0 of `mamba3_form`; `fast`:
    keep for the backward the states before chunks, and queries and keys as they are turned."""
    watched = is_watched((x.Q, x.K, x.V, x.ADT, x.DT, x.Trap, x.Angles, x.Z, x.D, state))
    dtype, (B, T, H, P) = DTYPE_NAME[x.V.dtype], x.V.shape
    G, N = x.Q.shape[2:]
    if watched:  # sizes may be symbols
        BT = chunk_of(dtype, N)
    else:
        problem = Mamba3Problem(dtype=dtype, state_size=N, head_dim=P, angles=x.Angles.shape[3])
        BT = tile_at(problem, B * T, H, G, x.V.device, CHUNKS)
    tiles = [] if x.cu_seqlens is None else mamba3.tables(x.cu_seqlens, T, BT)
    numbers, biases = [x.ADT.float(), x.DT.float(), x.Trap], [x.Q_bias.float(), x.K_bias.float()]
    D, Z = (None if y is None else y.to(z) for y, z in ((x.D, torch.float32), (x.Z, x.V.dtype)))
    angle = None if x.states is None else x.states.angle
    tensors = (x.Q, x.K, x.V, *numbers, *biases, x.Angles, D, Z, angle, state)
    wanted = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in tensors)
    keep = NOTHING if not wanted else MUCH if fast else LITTLE
    rest = (x.Angles, D, Z, angle, state, tiles, BT, keep)
    if watched:
        out, ssm, last, *_ = CHUNKED(x.Q, x.K, x.V, numbers, biases, *rest)
    else:
        out, ssm, last = _Chunks.apply(  # type: ignore[no-untyped-call]
            x.Q, x.K, x.V, *numbers, *biases, *rest
        )
    return out, ssm, last


def _chunked(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    numbers: Some,
    biases: Some,
    Angles: Tensor,
    D: Tensor | None,
    Z: Tensor | None,
    angle_state: Tensor | None,
    ssm_state: Tensor | None,
    tiles: Some,
    BT: int,
    keep: int,
) -> Made:
    given = Given(Q, K, V, numbers, biases, Angles, D, Z, angle_state, ssm_state, tiles, BT)
    return forward(given, keep)


def _chunked_fake(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    numbers: Some,
    biases: Some,
    Angles: Tensor,
    D: Tensor | None,
    Z: Tensor | None,
    angle_state: Tensor | None,
    ssm_state: Tensor | None,
    tiles: Some,
    BT: int,
    keep: int,
) -> tuple[Tensor, ...]:
    (B, T, H, P), N, S = V.shape, Q.shape[3], Angles.shape[3]
    n_tiles = tiles[0].shape[0] if tiles else count_chunks(T, B, BT, False)
    sequences = tiles[1].shape[0] - 1 if tiles else B
    number, keeps_y = numbers[0], keep != NOTHING and Z is not None
    return (
        V.new_empty(V.shape),
        number.new_empty((sequences, H, P, N)),
        number.new_empty((sequences, H, S)),
        number.new_empty((n_tiles, H, S), dtype=torch.int32),
        V.new_empty(V.shape if keeps_y else (0,)),
        V.new_empty((n_tiles, H, P, N) if keep == MUCH else (0,)),
        number.new_empty((B, T, H, S) if keep == MUCH else (0,), dtype=torch.int32),
        *(V.new_empty((B, T, H, N) if keep == MUCH else (0,)) for _ in "qk"),
        *(number.new_empty((B, H, T) if keep == MUCH else (0,)) for _ in range(4)),
    )


def _chunked_backward(
    gradients: Some,
    made: Some,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    numbers: Some,
    biases: Some,
    Angles: Tensor,
    D: Tensor | None,
    Z: Tensor | None,
    angle_state: Tensor | None,
    ssm_state: Tensor | None,
    tiles: Some,
    BT: int,
) -> Gradients:
    given = Given(Q, K, V, numbers, biases, Angles, D, Z, angle_state, ssm_state, tiles, BT)
    dout, dssm, dangle = gradients
    out, angle = dout, made[1]  # which the backward does not want
    kept = Made(out, made[0], angle, *made[1:])
    some = (x if x.numel() else None for x in (dssm, dangle))
    return backward(given, kept, dout, *some)


def _chunked_backward_fake(
    gradients: Some,
    made: Some,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    numbers: Some,
    biases: Some,
    Angles: Tensor,
    D: Tensor | None,
    Z: Tensor | None,
    angle_state: Tensor | None,
    ssm_state: Tensor | None,
    tiles: Some,
    BT: int,
) -> tuple[Any, ...]:
    def like(given: Tensor | None, typed: Tensor = V) -> Tensor:
        return typed.new_empty(0) if given is None else given.new_empty(given.shape)

    wide = [like(x) for x in (*numbers, *biases)]
    dD = numbers[0].new_empty((V.shape[2],) if D is not None else (0,))
    dangle, dssm = like(angle_state, numbers[0]), like(ssm_state, numbers[0])
    dQ, dK, dV, dAngles = (like(x) for x in (Q, K, V, Angles))
    return dQ, dK, dV, wide[:3], wide[3:], dAngles, dD, like(Z), dangle, dssm


# Of what the forward makes, all but `out` and the last angles.
_KEPT: Final = len(Made._fields) - 2


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    Q, K, V, numbers, biases, *rest, tiles, ctx.BT, _ = inputs
    ctx.save_for_backward(Q, K, V, *numbers, *biases, *rest, output[1], *output[3:], *tiles)


def _gradients(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    Q, K, V, *rest = ctx.saved_tensors
    numbers, biases, given, rest = rest[:3], rest[3:5], rest[5:10], rest[10:]
    made, tiles = rest[:_KEPT], rest[_KEPT:]
    D, Z, angle_state, ssm_state = given[1:]
    # of what nobody used there is none
    dout, *others = gradients[:3]
    dout = V.new_zeros(V.shape) if dout is None else dout.contiguous()
    wanted = [dout, *(V.new_empty(0) if x is None else x.contiguous() for x in others)]
    found = CHUNKED_BACKWARD(wanted, made, Q, K, V, numbers, biases, *given, tiles, ctx.BT)
    dQ, dK, dV, dnumbers, dbiases, dAngles, *last = found
    optional = [
        y if x is not None else None
        for x, y in zip((D, Z, angle_state, ssm_state), last, strict=True)
    ]
    return dQ, dK, dV, dnumbers, dbiases, dAngles, *optional, [None] * len(tiles), None, None


_TENSORS: Final = (
    "Tensor Q, Tensor K, Tensor V, Tensor[] numbers, Tensor[] biases, Tensor Angles, Tensor? D,"
    " Tensor? Z, Tensor? angle_state, Tensor? ssm_state, Tensor[] tiles, int BT"
)
CHUNKED_BACKWARD: Final = _define(
    "mamba3_chunks_backward",
    f"(Tensor[] gradients, Tensor[] made, {_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor[],"
    " Tensor[], Tensor, Tensor, Tensor, Tensor, Tensor)",
    _chunked_backward,
    _chunked_backward_fake,
)
CHUNKED: Final = _define(
    "mamba3_chunks",
    f"({_TENSORS}, int keep) -> ({', '.join(['Tensor'] * len(Made._fields))})",
    _chunked,
    _chunked_fake,
    _gradients,
    _save,
)


class _Chunks(torch.autograd.Function):
    """The same without torch.library's wrappers: all tensors side by side."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        Q, K, V, *rest = given
        inputs = (Q, K, V, rest[:3], rest[3:5], *rest[5:])
        made = _chunked(*inputs)
        _save(ctx, inputs, made)
        ctx.set_materialize_grads(False)
        return made[:3]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        dQ, dK, dV, numbers, biases, *rest = _gradients(ctx, *gradients)
        return (dQ, dK, dV, *numbers, *biases, *rest[:5], None, None, None)
