"""Launches of the kernels around Mamba-3's scan, and of its one token.

Sums of gradients over heads, tiles and tokens that are left are torch's, in fp32 and in one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn2gen.family.mamba3 import States
from gdn2gen.family.mamba3_problem import HEAD_DIMS, STATE_SIZES, Mamba3Problem
from gdn2gen.kernels.mamba3 import (
    MAMBA3_EPILOGUE,
    MAMBA3_EPILOGUE_BACKWARD,
    MAMBA3_PROLOGUE,
    MAMBA3_PROLOGUE_BACKWARD,
)
from gdn2gen.kernels.parts import PartStage
from gdn2gen.runtime._operands import readable
from gdn2gen.runtime.arguments import by_kernels
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.mamba3_loaded import (
    counted_sequences,
    counted_tokens,
    knobs_of,
    stage_launch,
    step_launcher,
)
from gdn2gen.runtime.parts import _on
from gdn2gen.runtime.passes import empty
from gdn2gen.runtime.sequences import count_chunks
from gdn2gen.store.tuned_files import current_look

Tensors = Sequence[Tensor]


class _Call(NamedTuple):
    """The sizes of one call."""

    problem: Mamba3Problem
    BT: int
    B: int
    T: int
    H: int
    G: int
    n_tiles: int
    n_sequences: int
    device: torch.device
    look: int
    """At the tuned files: knobs stay as they are in a call."""

    def knobs(self, stage: PartStage) -> dict[str, Any]:
        return knobs_of(stage, *self[:2], self._counted, *self[4:6], *self[8:])

    def launch(self, stage: PartStage, *tensors: Tensor, **strides: int) -> None:
        scalars = self._asdict() | strides
        launch = stage_launch(stage, *self[:2], self._counted, *self[4:6], *self[8:])
        with _on(self.device):
            launch(*readable(tensors), **{name: scalars[name] for name in stage.scalars})

    @property
    def _counted(self) -> int:
        """Tiles by which knobs are found: the same for every batch, where results may not depend
        on it."""
        return counted_tokens(self.n_tiles * self.BT) // self.BT

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What a kernel has to write all of."""
        return empty(shape, dtype, self.device)


def tables(cu_seqlens: Tensor, T: int, BT: int) -> list[Tensor]:
    """Of each tile its sequence, its first token, tokens of the sequence before that and from that
    on; and the first tile of each sequence. Made on the device; tokens are those of the batch
    whatever cu_seqlens holds, and tiles that no sequence needs have none."""
    ends = cu_seqlens.long().clamp(0, T).cummax(0).values
    lengths = ends.diff()
    starts = torch.zeros_like(ends)
    starts[1:] = ((lengths + BT - 1) // BT).cumsum(0)
    tile = torch.arange(count_chunks(T, lengths.shape[0], BT, True), device=ends.device)
    sequence = (torch.searchsorted(starts, tile, right=True) - 1).clamp(max=lengths.shape[0] - 1)
    before = (tile - starts[sequence]) * BT
    left = (lengths[sequence] - before).clamp(min=0)
    first = (ends[sequence] + before).clamp(max=T)
    return [torch.stack((sequence, first, before, left), 1).int(), starts.int()]


def clear(tiles: Tensors, *made: Tensor) -> None:
    """Zeros for tokens of no sequence, which no kernel writes: where a packed batch ends the host
    does not know. Sums over all tokens would have whatever lies there."""
    if tiles:
        for x in made:
            x.zero_()


def prologue(
    Q: Tensor,
    K: Tensor,
    numbers: Tensors,
    biases: Tensors,
    Angles: Tensor,
    D: Tensor | None,
    angle_state: Tensor | None,
    tiles: Tensors,
    BT: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, decay and own of the scan; the last angles, and the turns that the backward wants.

    `numbers`: ADT, DT (both fp32) and Trap, each [B, H, T]; `biases` and D in fp32; `tiles`: those
    of `tables`, or none.
    """
    call = _call_before(Q, K, numbers, Angles, angle_state, tiles, BT, D is not None)
    B, T, H, N, S = call.B, call.T, call.H, Q.shape[3], Angles.shape[3]
    angles, row, head = angle_view(Angles)
    given = [Q, K, *numbers, *biases, *([angles] if S else []), *([D] if D is not None else [])]
    given += [angle_state] if S and angle_state is not None else []
    q, k = (call.empty(B, T, H, N, dtype=Q.dtype) for _ in "qk")
    decay, own = (call.empty(B, T, H) for _ in range(2))
    turns = call.empty(call.n_tiles, H, S, dtype=torch.int32)
    last = call.empty(call.n_sequences, H, S)
    made = [q, k, decay, own, *([turns, last] if S else [])]
    call.launch(MAMBA3_PROLOGUE, *given, *tiles, *made, angle_row=row, angle_head=head)
    return q, k, decay, own, last, turns


def prologue_backward(
    gradients: Tensors,
    Q: Tensor,
    K: Tensor,
    numbers: Tensors,
    biases: Tensors,
    Angles: Tensor,
    angle_state: Tensor | None,
    tiles: Tensors,
    turns: Tensor,
    BT: int,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of Q, K, numbers, biases, Angles, D and angle_state. `gradients`: of q, k, decay,
    own and the last angles."""
    call = _call_before(Q, K, numbers, Angles, angle_state, tiles, BT, False)
    B, T, H, G, N, S = call.B, call.T, call.H, call.G, Q.shape[3], Angles.shape[3]
    angles, row, head = angle_view(Angles)
    parts = H // G // int(call.knobs(MAMBA3_PROLOGUE_BACKWARD)["BH"])
    dQ, dK = (call.empty(parts, B, T, G, N) for _ in "QK")
    dbiases = [call.empty(call.n_tiles, H, N) for _ in "qk"]
    dADT, dDT, dweight, down_dt = (call.empty(B, H, T) for _ in range(4))
    dTrap = call.empty(B, H, T, dtype=numbers[2].dtype)
    dAngles = call.empty(B, T, H, S, dtype=Angles.dtype)
    dstate = call.empty(call.n_sequences, H, S)
    clear(tiles, dQ, dK, dADT, dDT, dTrap, dAngles)
    made = [dQ, dK, *dbiases, dADT, dDT, dTrap, *([dAngles] if S else [])]
    made += [dstate] if S and angle_state is not None else []
    scratch = [call.empty(B, T, H, S), call.empty(call.n_tiles, H, S)] if S else []
    call.launch(
        MAMBA3_PROLOGUE_BACKWARD,
        *(Q, K, *numbers, *biases, *([angles] if S else []), *tiles, *([turns] if S else [])),
        *gradients[: 5 if S else 4],
        *(*made, dweight, down_dt, *scratch),
        angle_row=row,
        angle_head=head,
    )
    return (
        dQ.sum(0).to(Q.dtype),
        dK.sum(0).to(Q.dtype),
        [dADT, dDT, dTrap],
        [x.sum(0) for x in dbiases],
        dAngles,
        gradients[3].sum((0, 1)),
        dstate,
    )


def epilogue(
    o: Tensor,
    V: Tensor,
    own: Tensor,
    Z: Tensor | None,
    first: Tensor | None,
    tiles: Tensors,
    BT: int,
) -> Tensor:
    """out of the scan's o."""
    call = _call_after(V, Z, first, tiles, BT)
    out = call.empty(*V.shape, dtype=V.dtype)
    clear(tiles, out)
    given = [x for x in (o, V, own, Z, first) if x is not None]
    call.launch(MAMBA3_EPILOGUE, *given, *tiles[:1], out)
    return out


def epilogue_backward(
    dout: Tensor,
    o: Tensor,
    V: Tensor,
    own: Tensor,
    Z: Tensor | None,
    first: Tensor | None,
    tiles: Tensors,
    BT: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of o, V, own, Z and first; of what was not given an empty one."""
    call = _call_after(V, Z, first, tiles, BT)
    do, dV = (call.empty(*V.shape, dtype=V.dtype) for _ in range(2))
    dZ = call.empty(*(V.shape if Z is not None else (0,)), dtype=V.dtype)
    down = call.empty(*V.shape[:3])
    clear(tiles, do, dV, dZ, down)
    # of sequences without tokens nothing is written
    dfirst = own.new_zeros(() if first is None else first.shape)
    given = [x for x in (o, V, own, Z, first) if x is not None]
    made = [
        do,
        dV,
        down,
        *([dZ] if Z is not None else []),
        *([dfirst] if first is not None else []),
    ]
    call.launch(MAMBA3_EPILOGUE_BACKWARD, *given, *tiles[:1], dout, *made)
    return do, dV, down, dZ, dfirst


def _call_before(
    Q: Tensor,
    K: Tensor,
    numbers: Tensors,
    Angles: Tensor,
    angle_state: Tensor | None,
    tiles: Tensors,
    BT: int,
    skip: bool,
) -> _Call:
    B, T, G, N = Q.shape
    problem = Mamba3Problem(
        dtype=DTYPE_NAME[Q.dtype],
        state_size=N,
        angles=Angles.shape[3],
        trap_dtype=DTYPE_NAME[numbers[2].dtype],
        angle_dtype=DTYPE_NAME[Angles.dtype],
        skip=skip,
        carried=angle_state is not None,
        packed=bool(tiles),
    )
    counts = count_tiles(B, T, tiles, BT)
    return _Call(problem, BT, B, T, Angles.shape[2], G, *counts, Q.device, current_look())


def _call_after(
    V: Tensor, Z: Tensor | None, first: Tensor | None, tiles: Tensors, BT: int
) -> _Call:
    B, T, H, P = V.shape
    problem = Mamba3Problem(
        dtype=DTYPE_NAME[V.dtype],
        head_dim=P,
        gate=Z is not None,
        carried=first is not None,
        packed=bool(tiles),
    )
    counts = count_tiles(B, T, tiles, BT)
    return _Call(problem, BT, B, T, H, 1, *counts, V.device, current_look())


def count_tiles(B: int, T: int, tiles: Tensors, BT: int) -> tuple[int, int]:
    """Of tiles and of sequences."""
    if tiles:
        return tiles[0].shape[0], tiles[1].shape[0] - 1
    return count_chunks(T, B, BT, False), B


def angle_view(Angles: Tensor) -> tuple[Tensor, int, int]:
    """Angles as kernels read them, and how far tokens and heads lie apart: one of them for all
    heads is read as it lies. What is not contiguous here, `readable` would copy."""
    B, T, H, S = Angles.shape
    row, head = Angles.stride(1), Angles.stride(2)
    shared = head == 0 and H > 1 and (S == 1 or Angles.stride(3) == 1)
    if shared and (B == 1 or Angles.stride(0) == T * row):
        return Angles[:, :, 0].contiguous(), S, 0
    return Angles.contiguous(), H * S, S


def step_problem(tensors: Mapping[str, Tensor | None]) -> Mamba3Problem | None:
    """Of one token, by the op's names; None where no kernel serves it."""
    Q, V, Trap, Angles = (tensors[x] for x in ("Q", "V", "Trap", "Angles"))
    assert Q is not None and V is not None and Trap is not None and Angles is not None
    dtypes = {x.dtype for x in tensors.values() if x is not None}
    served = Q.shape[2] in STATE_SIZES and V.shape[2] in HEAD_DIMS
    served = served and all(x in DTYPE_NAME for x in dtypes)
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
        launch = step_launcher(problem, counted_sequences(B), H, G, device, current_look())
        made = [x for x in (out, angle, ssm, k) if x is not None]
        with _on(device):
            launch(*readable(given), *made, B=B, H=H, G=G)
    return out, angle, ssm, k
