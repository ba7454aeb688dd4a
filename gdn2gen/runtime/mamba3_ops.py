"""What surrounds Mamba-3's scan as ops in torch.library for tracers, by autograd's own Functions
otherwise; see `parts_ops`, whose library this adds to."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn2gen.family.mamba3_form import Before, Inputs
from gdn2gen.family.mamba3_problem import HEAD_DIMS, STATE_SIZES, Mamba3Problem
from gdn2gen.kernels.mamba3 import tile_of
from gdn2gen.runtime import mamba3
from gdn2gen.runtime.arguments import by_kernels, is_watched
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.mamba3_loaded import tile_at
from gdn2gen.runtime.parts_ops import _define
from gdn2gen.runtime.sequences import count_chunks

Some = list[Tensor]


def serves(x: Inputs) -> bool:
    """Whether kernels serve these head dims and dtypes, and nothing is about that wants more of
    them than one derivative backwards."""
    if not by_kernels(x.V.device):
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    for size, sizes in ((x.Q.shape[3], STATE_SIZES), (x.V.shape[3], HEAD_DIMS)):
        if size % sizes.step or size < sizes[0] or size > sizes[-1]:
            return False
    given = (x.V, x.ADT, x.DT, x.Trap, x.Angles, x.Q_bias, x.K_bias, x.D, x.Z)
    # one by one: torch.compile of torch 2.11 compares no sets
    return all(y.dtype in DTYPE_NAME for y in given if y is not None)


class Around:
    """`mamba3_form.before` and `after` by kernels, for one call."""

    def __init__(self, x: Inputs) -> None:
        self._x = x
        self._watched = is_watched((x.Q, x.K, x.V, x.ADT, x.DT, x.Trap, x.Angles, x.Z, x.D))
        B, T, H, P = x.V.shape
        dtype, G, N = DTYPE_NAME[x.V.dtype], *x.Q.shape[2:]
        if self._watched:  # sizes may be symbols
            self._BT = tile_of(dtype, N)
        else:
            problem = Mamba3Problem(dtype=dtype, state_size=N, head_dim=P, angles=x.Angles.shape[3])
            self._BT = tile_at(problem, B * T, H, G, x.V.device)
        packed = x.cu_seqlens
        self._tiles = [] if packed is None else mamba3.tables(packed, T, self._BT)

    def before(self) -> Before:
        x = self._x
        numbers = [x.ADT.float(), x.DT.float(), x.Trap]
        biases = [x.Q_bias.float(), x.K_bias.float()]
        D = None if x.D is None else x.D.float()
        state = None if x.states is None else x.states.angle
        if self._watched:
            made = PROLOGUE(x.Q, x.K, numbers, biases, x.Angles, D, state, self._tiles, self._BT)
        else:
            made = _Prologue.apply(  # type: ignore[no-untyped-call]
                x.Q, x.K, *numbers, *biases, x.Angles, D, state, self._tiles, self._BT
            )
        return Before(*made[:5])

    def after(self, o: Tensor, own: Tensor, first: Tensor | None) -> Tensor:
        x = self._x
        Z = None if x.Z is None else x.Z.to(x.V.dtype)
        run: Any = EPILOGUE if self._watched else _Epilogue.apply
        out: Tensor = run(o, x.V, own, Z, first, self._tiles, self._BT)
        return out


# Before the scan


def _prologue_fake(
    Q: Tensor,
    K: Tensor,
    numbers: Some,
    biases: Some,
    Angles: Tensor,
    D: Tensor | None,
    angle_state: Tensor | None,
    tiles: Some,
    BT: int,
) -> tuple[Tensor, ...]:
    B, T, N = Q.shape[0], Q.shape[1], Q.shape[3]
    H, S = Angles.shape[2:]
    q, k = (Q.new_empty((B, T, H, N)) for _ in "qk")
    decay, own = (Q.new_empty((B, T, H), dtype=torch.float32) for _ in range(2))
    n_tiles = tiles[0].shape[0] if tiles else count_chunks(T, B, BT, False)
    last = Q.new_empty((tiles[1].shape[0] - 1 if tiles else B, H, S), dtype=torch.float32)
    return q, k, decay, own, last, Q.new_empty((n_tiles, H, S), dtype=torch.int32)


def _prologue_backward_fake(
    gradients: Some,
    Q: Tensor,
    K: Tensor,
    numbers: Some,
    biases: Some,
    Angles: Tensor,
    angle_state: Tensor | None,
    tiles: Some,
    turns: Tensor,
    BT: int,
) -> tuple[Any, ...]:
    wide = [x.new_empty(x.shape) for x in (*numbers, *biases)]
    dD = gradients[3].new_empty((Angles.shape[2],))
    last = gradients[4].new_empty(gradients[4].shape)
    dQ, dK, dAngles = (x.new_empty(x.shape) for x in (Q, K, Angles))
    return dQ, dK, wide[:3], wide[3:], dAngles, dD, last


def _save_prologue(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    Q, K, numbers, biases, Angles, D, state, tiles, ctx.BT = inputs
    ctx.has_D, ctx.packed = D is not None, bool(tiles)
    ctx.save_for_backward(Q, K, *numbers, *biases, Angles, state, output[5], *tiles)


def _prologue_gradients(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    Q, K, *rest = ctx.saved_tensors
    numbers, biases, (Angles, state, turns), tiles = rest[:3], rest[3:5], rest[5:8], rest[8:]
    B, T, N = Q.shape[0], Q.shape[1], Q.shape[3]
    H, S = Angles.shape[2:]
    # of what nobody used there is none
    sequences = tiles[1].shape[0] - 1 if tiles else B
    shapes = ((B, T, H, N), (B, T, H, N), (B, T, H), (B, T, H), (sequences, H, S))
    made = [
        Q.new_zeros(shape, dtype=Q.dtype if i < 2 else torch.float32) if y is None else y
        for i, (y, shape) in enumerate(zip(gradients[:5], shapes, strict=True))
    ]
    found = PROLOGUE_BACKWARD(
        [x.contiguous() for x in made], Q, K, numbers, biases, Angles, state, tiles, turns, ctx.BT
    )
    dQ, dK, dnumbers, dbiases, dAngles, dD, dstate = found
    dD, dstate = dD if ctx.has_D else None, None if state is None else dstate
    return dQ, dK, dnumbers, dbiases, dAngles, dD, dstate, [None] * len(tiles), None


PROLOGUE_BACKWARD: Final = _define(
    "mamba3_prologue_backward",
    "(Tensor[] gradients, Tensor Q, Tensor K, Tensor[] numbers, Tensor[] biases, Tensor Angles,"
    " Tensor? angle_state, Tensor[] tiles, Tensor turns, int BT)"
    " -> (Tensor, Tensor, Tensor[], Tensor[], Tensor, Tensor, Tensor)",
    mamba3.prologue_backward,
    _prologue_backward_fake,
)
PROLOGUE: Final = _define(
    "mamba3_prologue",
    "(Tensor Q, Tensor K, Tensor[] numbers, Tensor[] biases, Tensor Angles, Tensor? D,"
    " Tensor? angle_state, Tensor[] tiles, int BT)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    mamba3.prologue,
    _prologue_fake,
    _prologue_gradients,
    _save_prologue,
)


class _Prologue(torch.autograd.Function):
    """The same without torch.library's wrappers: all tensors side by side."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        Q, K, *numbers, q_bias, k_bias, Angles, D, state, tiles, BT = given
        inputs = (Q, K, numbers, [q_bias, k_bias], Angles, D, state, tiles, BT)
        made = mamba3.prologue(*inputs)
        _save_prologue(ctx, inputs, made)
        ctx.mark_non_differentiable(made[5])
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        dQ, dK, numbers, biases, *rest, _, _ = _prologue_gradients(ctx, *gradients)
        return (dQ, dK, *numbers, *biases, *rest, None, None)


# After it


def _epilogue_fake(
    o: Tensor, V: Tensor, own: Tensor, Z: Any, first: Any, tiles: Some, BT: int
) -> Tensor:
    return V.new_empty(V.shape)


def _epilogue_backward_fake(
    dout: Tensor, o: Tensor, V: Tensor, own: Tensor, Z: Any, first: Any, tiles: Some, BT: int
) -> tuple[Tensor, ...]:
    do, dV = (V.new_empty(V.shape) for _ in range(2))
    dZ = V.new_empty((0,) if Z is None else V.shape)
    dfirst = own.new_empty(() if first is None else first.shape)
    return do, dV, own.new_empty(own.shape), dZ, dfirst


def _save_epilogue(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, tiles, ctx.BT = inputs
    ctx.save_for_backward(*tensors, *tiles)


def _epilogue_gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    o, V, own, Z, first, *tiles = ctx.saved_tensors
    found = EPILOGUE_BACKWARD(dout.contiguous(), o, V, own, Z, first, tiles, ctx.BT)
    do, dV, down, dZ, dfirst = found
    dZ, dfirst = (None if x is None else y for x, y in ((Z, dZ), (first, dfirst)))
    return do, dV, down, dZ, dfirst, [None] * len(tiles), None


EPILOGUE_BACKWARD: Final = _define(
    "mamba3_epilogue_backward",
    "(Tensor dout, Tensor o, Tensor V, Tensor own, Tensor? Z, Tensor? first, Tensor[] tiles,"
    " int BT) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    mamba3.epilogue_backward,
    _epilogue_backward_fake,
)
EPILOGUE: Final = _define(
    "mamba3_epilogue",
    "(Tensor o, Tensor V, Tensor own, Tensor? Z, Tensor? first, Tensor[] tiles, int BT) -> Tensor",
    mamba3.epilogue,
    _epilogue_fake,
    _epilogue_gradients,
    _save_epilogue,
)


class _Epilogue(torch.autograd.Function):
    """The same without torch.library's wrappers."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = mamba3.epilogue(*inputs)
        _save_epilogue(ctx, inputs, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return (*_epilogue_gradients(ctx, dout)[:-2], None, None)
