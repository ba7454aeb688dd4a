"""Launches of the kernels around Mamba-3's scan, and autograd's Functions of them.

Sums of gradients over heads, tiles and tokens that are left are torch's, in fp32 and in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn2gen.family.mamba3 import States
from gdn2gen.family.mamba3_form import Before, Inputs
from gdn2gen.family.mamba3_problem import HEAD_DIMS, STATE_SIZES, Mamba3Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3 import (
    MAMBA3_EPILOGUE,
    MAMBA3_EPILOGUE_BACKWARD,
    MAMBA3_PROLOGUE,
    MAMBA3_PROLOGUE_BACKWARD,
    MAMBA3_STEP,
    mamba3_knobs,
    mamba3_step_knobs,
    tile_of,
)
from gdn2gen.kernels.parts import PartStage
from gdn2gen.runtime._loading import stage_launcher
from gdn2gen.runtime._operands import readable
from gdn2gen.runtime.arguments import by_kernels, is_watched
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.lookup import device_of
from gdn2gen.runtime.parts import _on
from gdn2gen.runtime.passes import empty
from gdn2gen.runtime.sequences import count_chunks


@dataclass(frozen=True, eq=False)
class Call:
    """The sizes of one call, and which tile has which tokens."""

    problem: Mamba3Problem
    B: int
    T: int
    H: int
    G: int
    sequences: int
    n_tiles: int
    device: torch.device
    tiles: tuple[Tensor, ...]
    """Of packed sequences: [tiles, 4] and [sequences + 1], see `_tables`."""

    @classmethod
    def of(cls, x: Inputs) -> Call | None:
        """None where kernels serve no such head dims or dtypes, or something wants to see what
        they compute."""
        (B, T, H, P), (G, N) = x.V.shape, x.Q.shape[2:]
        given = (x.Q, x.K, x.V, x.ADT, x.DT, x.Trap, x.Angles, x.Q_bias, x.K_bias, x.D, x.Z)
        traced = is_watched(given) or torch.autograd.forward_ad._current_level >= 0
        if traced or not by_kernels(x.V.device):
            return None
        dtypes = {y.dtype for y in given if y is not None}
        if N not in STATE_SIZES or P not in HEAD_DIMS or not dtypes <= DTYPE_NAME.keys():
            return None
        packed = x.cu_seqlens is not None
        problem = Mamba3Problem(
            dtype=DTYPE_NAME[x.V.dtype],
            state_size=N,
            head_dim=P,
            angles=x.Angles.shape[3],
            trap_dtype=DTYPE_NAME[x.Trap.dtype],
            angle_dtype=DTYPE_NAME[x.Angles.dtype],
            skip=x.D is not None,
            gate=x.Z is not None,
            carried=x.states is not None,
            packed=packed,
        )
        sequences = B if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
        BT = tile_of(problem)
        n_tiles = count_chunks(T, sequences, BT, packed)
        tables = () if x.cu_seqlens is None else _tables(x.cu_seqlens, T, BT, n_tiles)
        return cls(problem, B, T, H, G, sequences, n_tiles, x.V.device, tables)

    def launch(self, stage: PartStage, *tensors: Tensor, **scalars: int) -> None:
        given = {name: getattr(self, name) for name in ("B", "T", "H", "G", "n_tiles")}
        scalars |= given | {"n_sequences": self.sequences}
        launch = _launcher(stage, self.problem, self.n_tiles, self.H, self.G, self.device)
        with _on(self.device):
            launch(*tensors, **{x: scalars[x] for x in stage.scalars})

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What a kernel has to write all of."""
        return empty(shape, dtype, self.device)

    def parts(self, stage: PartStage) -> int:
        """Parts of the heads of a group."""
        knobs = _knobs(stage, self.problem, self.n_tiles, self.H, self.G, self.device)
        return self.H // self.G // int(knobs["BH"])


def before(call: Call, x: Inputs) -> Before:
    """`mamba3_form.before` by kernels."""
    numbers = (x.ADT.float(), x.DT.float(), x.Trap)
    D = None if x.D is None else x.D.float()
    state = None if x.states is None else x.states.angle
    made = Prologue.apply(  # type: ignore[no-untyped-call]
        call, x.Q, x.K, *numbers, x.Q_bias.float(), x.K_bias.float(), x.Angles, D, state
    )
    return Before(*made)


def after(call: Call, x: Inputs, o: Tensor, own: Tensor, first: Tensor | None) -> Tensor:
    """`mamba3_form.after` by kernels."""
    Z = None if x.Z is None else x.Z.to(x.V.dtype)
    out: Tensor = Epilogue.apply(call, o, x.V, own, Z, first)  # type: ignore[no-untyped-call]
    return out


_forced: dict[str, dict[str, Knob]] = {}


def force(stage: str, knobs: dict[str, Knob] | None) -> None:
    """Have all calls of a stage in this process take these knobs (not BT, which kernels share), as
    measuring wants; None ends that."""
    _forced.pop(stage, None)
    if knobs is not None:
        _forced[stage] = knobs
    for cache in (_knobs, _launcher, _step_launcher):
        cache.cache_clear()


@lru_cache(maxsize=512)
def _knobs(
    stage: PartStage, problem: Mamba3Problem, tiles: int, H: int, G: int, device: torch.device
) -> dict[str, Any]:
    found = mamba3_knobs(stage, problem, tiles, H, G, device_of(device).sms)
    return found | _forced.get(stage.name, {})


@lru_cache(maxsize=512)
def _launcher(
    stage: PartStage, problem: Mamba3Problem, tiles: int, H: int, G: int, device: torch.device
) -> Callable[..., None]:
    knobs = _knobs(stage, problem, tiles, H, G, device)
    return _loaded(problem, stage.name, tuple(sorted(knobs.items())), device)


@lru_cache(maxsize=512)
def _loaded(
    problem: Mamba3Problem, stage: str, knobs: tuple[tuple[str, Any], ...], _device: torch.device
) -> Callable[..., None]:
    return stage_launcher(problem, default_config(stage, problem).replace(**dict(knobs)))


def _tables(cu_seqlens: Tensor, T: int, BT: int, n_tiles: int) -> tuple[Tensor, Tensor]:
    """Of each tile its sequence, its first token, tokens of the sequence before that and from that
    on; and the first tile of each sequence. Made on the device; tokens are those of the batch
    whatever cu_seqlens holds, and tiles that no sequence needs have none."""
    ends = cu_seqlens.long().clamp(0, T).cummax(0).values
    lengths = ends.diff()
    starts = torch.zeros_like(ends)
    starts[1:] = ((lengths + BT - 1) // BT).cumsum(0)
    tile = torch.arange(n_tiles, device=ends.device)
    sequence = (torch.searchsorted(starts, tile, right=True) - 1).clamp(max=lengths.shape[0] - 1)
    before = (tile - starts[sequence]) * BT
    left = (lengths[sequence] - before).clamp(min=0)
    first = (ends[sequence] + before).clamp(max=T)
    table = torch.stack((sequence, first, before, left), 1)
    return table.int(), starts.int()


def _angle_view(Angles: Tensor) -> tuple[Tensor, int, int]:
    """Angles as kernels read them, and how far tokens and heads lie apart: one of them for all
    heads is read as it lies."""
    B, T, H, S = Angles.shape
    rows, heads = Angles.stride(1), Angles.stride(2)
    even = B == 1 or Angles.stride(0) == T * rows
    if not (even and (S == 1 or Angles.stride(3) == 1) and heads in (0, S) and rows >= 0):
        Angles = Angles.contiguous()
        rows, heads = H * S, S
    return Angles, rows, heads


class Prologue(torch.autograd.Function):
    """q, k, decay and own of the scan, and the last angles (none without angles)."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        Q: Tensor,
        K: Tensor,
        ADT: Tensor,
        DT: Tensor,
        Trap: Tensor,
        Q_bias: Tensor,
        K_bias: Tensor,
        Angles: Tensor,
        D: Tensor | None,
        angle_state: Tensor | None,
    ) -> tuple[Tensor, ...]:
        B, T, H, S, N = call.B, call.T, call.H, Angles.shape[3], Q.shape[3]
        angles, row, head = _angle_view(Angles)
        plain = list(readable([Q, K, ADT, DT, Trap, Q_bias, K_bias]))
        given = [*plain, angles] if S else plain
        more = [D] if D is not None else []
        more += [angle_state] if S and angle_state is not None else []
        q, k = (call.empty(B, T, H, N, dtype=Q.dtype) for _ in "qk")
        decay, own = (call.empty(B, T, H) for _ in range(2))
        turns = [call.empty(call.n_tiles, H, S, dtype=torch.int32)] if S else []
        last = [call.empty(call.sequences, H, S)] if S else []
        call.launch(
            MAMBA3_PROLOGUE,
            *given,
            *readable(more),
            *call.tiles,
            *(q, k, decay, own),
            *turns,
            *last,
            angle_row=row,
            angle_head=head,
        )
        ctx.call, ctx.strides, ctx.has_D = call, (row, head), D is not None
        ctx.carried = angle_state is not None
        ctx.save_for_backward(*given, *turns)
        ctx.S = S
        return (q, k, decay, own, last[0] if S else own.new_empty(call.sequences, H, 0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call, S = ctx.call, ctx.S
        saved = ctx.saved_tensors
        given, turns = saved[: 8 if S else 7], saved[8 if S else 7 :]
        Q, Trap = given[0], given[4]
        B, T, H, G, N = call.B, call.T, call.H, call.G, Q.shape[3]
        parts = call.parts(MAMBA3_PROLOGUE_BACKWARD)
        dQ, dK = (call.empty(parts, B, T, G, N) for _ in "QK")
        dq_bias, dk_bias = (call.empty(call.n_tiles, H, N) for _ in "qk")
        dADT, dDT, dweight, down_dt = (call.empty(B, H, T) for _ in range(4))
        dTrap = call.empty(B, H, T, dtype=Trap.dtype)
        dAngles, sums, state = None, [], []
        if S:
            dAngles = call.empty(B, T, H, S, dtype=given[7].dtype)
            sums = [call.empty(B, T, H, S), call.empty(call.n_tiles, H, S)]
            state = [call.empty(call.sequences, H, S)] if ctx.carried else []
        call.launch(
            MAMBA3_PROLOGUE_BACKWARD,
            *given,
            *call.tiles,
            *turns,
            *readable([x.contiguous() for x in (gradients if S else gradients[:4])]),
            *(dQ, dK, dq_bias, dk_bias, dADT, dDT, dTrap),
            *([dAngles] if dAngles is not None else []),
            *state,
            *(dweight, down_dt),
            *sums,
            angle_row=ctx.strides[0],
            angle_head=ctx.strides[1],
        )
        dD = gradients[3].sum((0, 1)) if ctx.has_D else None
        return (
            None,
            dQ.sum(0).to(Q.dtype),
            dK.sum(0).to(Q.dtype),
            *(dADT, dDT, dTrap),
            dq_bias.sum(0),
            dk_bias.sum(0),
            dAngles,
            dD,
            state[0] if state else None,
        )


class Epilogue(torch.autograd.Function):
    """out of the scan's o."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        o: Tensor,
        V: Tensor,
        own: Tensor,
        Z: Tensor | None,
        first: Tensor | None,
    ) -> Tensor:
        given = readable([x for x in (o, V, own, Z, first) if x is not None])
        out = call.empty(*V.shape, dtype=V.dtype)
        call.launch(MAMBA3_EPILOGUE, *given, *call.tiles[:1], out)
        ctx.call, ctx.gated, ctx.carried = call, Z is not None, first is not None
        ctx.save_for_backward(*given)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        call, given = ctx.call, ctx.saved_tensors
        V = given[1]
        do, dV = (call.empty(*V.shape, dtype=V.dtype) for _ in range(2))
        down = call.empty(call.B, call.T, call.H)
        dZ = call.empty(*V.shape, dtype=V.dtype) if ctx.gated else None
        dfirst = None
        if ctx.carried:  # of sequences without tokens nothing is written
            dfirst = torch.zeros(
                call.sequences, call.H, V.shape[3], dtype=torch.float32, device=call.device
            )
        made = [x for x in (do, dV, down, dZ, dfirst) if x is not None]
        call.launch(MAMBA3_EPILOGUE_BACKWARD, *given, *call.tiles[:1], *readable([dout]), *made)
        return (None, do, dV, down, dZ, dfirst)


def step_problem(tensors: Mapping[str, Tensor | None]) -> Mamba3Problem | None:
    """Of one token, by the op's names; None where no kernel serves it."""
    Q, V, Trap, Angles = (tensors[x] for x in ("Q", "V", "Trap", "Angles"))
    assert Q is not None and V is not None and Trap is not None and Angles is not None
    dtypes = {x.dtype for x in tensors.values() if x is not None}
    served = Q.shape[2] in STATE_SIZES and V.shape[2] in HEAD_DIMS and dtypes <= DTYPE_NAME.keys()
    if not by_kernels(V.device) or not served:
        return None
    return Mamba3Problem(
        dtype=DTYPE_NAME[V.dtype],
        state_size=Q.shape[2],
        head_dim=V.shape[2],
        angles=Angles.shape[2],
        trap_dtype=DTYPE_NAME[Trap.dtype],
        angle_dtype=DTYPE_NAME[Angles.dtype],
        skip=tensors["D"] is not None,
        gate=tensors["Z"] is not None,
        carried=True,
    )


def step(
    problem: Mamba3Problem, tensors: Mapping[str, Tensor | None], states: States
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """out, and the states after one token but for v."""
    given = []
    for name, x in tensors.items():
        if x is None or (name == "Angles" and not problem.rotated):
            continue
        wide = name in ("ADT", "DT", "Q_bias", "K_bias", "D")
        given.append(x.float() if wide else x)
    Q, V = given[0], given[2]
    if problem.gate:
        given[-1] = given[-1].to(V.dtype)
    (B, G, N), (H, P), device = Q.shape, V.shape[1:], V.device
    given += [x.float() for x in states[0 if problem.rotated else 1 :]]
    out = empty((B, H, P), V.dtype, device)
    angle = empty((B, H, problem.angles), torch.float32, device) if problem.rotated else None
    ssm = empty((B, H, P, N), torch.float32, device)
    k = empty((B, H, N), torch.float32, device)
    if out.numel():
        launch = _step_launcher(problem, B, H, device)
        made = [x for x in (out, angle, ssm, k) if x is not None]
        with _on(device):
            launch(*readable(given), *made, B=B, H=H, G=G)
    return out, angle, ssm, k


@lru_cache(maxsize=512)
def _step_launcher(
    problem: Mamba3Problem, B: int, H: int, device: torch.device
) -> Callable[..., None]:
    knobs = mamba3_step_knobs(problem, B, H, device_of(device).sms)
    knobs |= _forced.get(MAMBA3_STEP.name, {})
    return _loaded(problem, MAMBA3_STEP.name, tuple(sorted(knobs.items())), device)
