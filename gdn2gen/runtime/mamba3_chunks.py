"""Launches of Mamba-3's own kernels over chunks, forward and backward.

Sums of gradients over heads, chunks and tokens that are left are torch's, in fp32 and in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.mamba3_chunks import (
    MAMBA3_GRADIENT,
    MAMBA3_OUTPUT,
    MAMBA3_REVERSE_STATES,
    MAMBA3_STATES,
    MAMBA3_TURNS,
)
from gdn2gen.kernels.parts import PartStage
from gdn2gen.runtime._operands import readable
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.mamba3 import angle_view, clear, count_tiles
from gdn2gen.runtime.mamba3_loaded import chunk_launch, counted_tokens
from gdn2gen.runtime.parts import _on
from gdn2gen.runtime.passes import empty
from gdn2gen.store.tuned_files import current_look

Some = Sequence[Tensor]
NOTHING: Final = 0
"""What the forward keeps where no backward comes;"""
LITTLE: Final = 1
"""for one that makes the states before chunks again;"""
MUCH: Final = 2
"""for one that finds them."""


class Given(NamedTuple):
    """What a call was given: numbers are ADT, DT (both fp32) and Trap, biases, D and states fp32.
    `tiles` are those of `mamba3.tables`, or none."""

    Q: Tensor
    K: Tensor
    V: Tensor
    numbers: Some
    biases: Some
    Angles: Tensor
    D: Tensor | None
    Z: Tensor | None
    angle_state: Tensor | None
    ssm_state: Tensor | None
    tiles: Some
    BT: int


class Made(NamedTuple):
    """Results, and what the backward wants of the forward."""

    out: Tensor
    ssm: Tensor
    """[sequences, H, P, N]: the state after the last tokens."""
    angle: Tensor
    """[sequences, H, S]: Theta after them."""
    theta: Tensor
    turns: Tensor
    y: Tensor
    """out before its gate; empty without one, and where no backward was to come."""
    h: Tensor
    """The state before each chunk; empty where that was not to be kept."""


class Gradients(NamedTuple):
    """Of what `Given` has by the same names; of what was not given an empty one."""

    Q: Tensor
    K: Tensor
    V: Tensor
    numbers: list[Tensor]
    biases: list[Tensor]
    Angles: Tensor
    D: Tensor
    Z: Tensor
    angle_state: Tensor
    ssm_state: Tensor


class _Call:
    """The sizes of one call, and its launches."""

    def __init__(self, x: Given) -> None:
        self.x = x
        B, T, H, P = x.V.shape
        G, N, S = x.Q.shape[2], x.Q.shape[3], x.Angles.shape[3]
        self.problem = Mamba3Problem(
            dtype=DTYPE_NAME[x.Q.dtype],
            state_size=N,
            head_dim=P,
            angles=S,
            trap_dtype=DTYPE_NAME[x.numbers[2].dtype],
            angle_dtype=DTYPE_NAME[x.Angles.dtype],
            skip=x.D is not None,
            gate=x.Z is not None,
            carried=x.ssm_state is not None,
            packed=bool(x.tiles),
        )
        n_tiles, n_sequences = count_tiles(B, T, x.tiles, x.BT)
        # Angles as kernels read them
        self.angles, row, head = angle_view(x.Angles)
        self.sizes = {
            "B": B, "T": T, "H": H, "G": G, "N": N, "P": P, "S": S, "n_tiles": n_tiles,
            "n_sequences": n_sequences, "angle_row": row, "angle_head": head,
        }  # fmt: skip
        # knobs are the same for every batch, where results may not depend on it, and stay in a call
        counted = counted_tokens(n_tiles * x.BT) // x.BT
        self._key = (self.problem, x.BT, counted, H, G, x.V.device, current_look())

    def launch(self, stage: PartStage, *tensors: Tensor | None) -> None:
        launch = chunk_launch(stage, *self._key)
        given = readable([x for x in tensors if x is not None])
        with _on(self.x.V.device):
            launch(*given, **{name: self.sizes[name] for name in stage.scalars})

    def empty(self, *dims: str | int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What a kernel has to write all of."""
        shape = tuple(self.sizes[x] if isinstance(x, str) else x for x in dims)
        return empty(shape, dtype, self.x.V.device)

    def like(self, given: Tensor | None) -> Tensor:
        """A result's place, of the same shape and dtype; empty where there is nothing."""
        if given is None:
            return self.x.V.new_empty(0)
        made = empty(tuple(given.shape), given.dtype, given.device)
        clear(self.x.tiles, made)
        return made

    @property
    def rotated(self) -> list[Tensor]:
        return [self.angles] if self.problem.rotated else []

    def rotation(self, theta: Tensor, turns: Tensor) -> list[Tensor]:
        return [theta, turns] if self.problem.rotated else []

    def turns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Theta of each token within its chunk, before each chunk, and after the last tokens."""
        x = self.x
        theta = self.empty("B", "T", "H", "S", dtype=torch.int32)
        turns = self.empty("n_tiles", "H", "S", dtype=torch.int32)
        angle = self.empty("n_sequences", "H", "S")
        if self.problem.rotated:
            given = (x.numbers[1], *self.rotated, x.angle_state, *x.tiles)
            self.launch(MAMBA3_TURNS, *given, theta, turns, angle)
        return theta, turns, angle

    def states(self, theta: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """The state before each chunk, and after the last tokens."""
        x = self.x
        h = self.empty("n_tiles", "H", "P", "N", dtype=x.V.dtype)
        ssm = self.empty("n_sequences", "H", "P", "N")
        given = (x.K, x.V, *x.numbers, x.biases[1], *self.rotation(theta, turns))
        self.launch(MAMBA3_STATES, *given, x.ssm_state, *x.tiles, h, ssm)
        return h, ssm

    def output(
        self, theta: Tensor, turns: Tensor, h: Tensor, keeps_y: bool
    ) -> tuple[Tensor, Tensor]:
        """out, and y where there is a gate and it is to be kept."""
        x, out = self.x, self.like(self.x.V)
        keeps_y = keeps_y and x.Z is not None
        self.sizes["keep"] = int(keeps_y)
        y = self.like(x.V) if keeps_y else out.new_empty(0)
        given = (x.Q, x.K, x.V, *x.numbers, *x.biases, *self.rotation(theta, turns), x.D, x.Z, h)
        # where y is not to be kept, nothing is written to it
        kept = None if x.Z is None else y if keeps_y else out
        self.launch(MAMBA3_OUTPUT, *given, *x.tiles[:1], out, kept)
        return out, y

    def reverse_states(self, made: Made, dout: Tensor, dssm: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the states after each chunk, and before the first tokens."""
        x = self.x
        dh = self.empty("n_tiles", "H", "P", "N", dtype=x.V.dtype)
        first = self.like(x.ssm_state)
        rotation = self.rotation(made.theta, made.turns)
        given = (x.Q, x.numbers[0], x.biases[0], *rotation, x.Z, dout, dssm, *x.tiles, dh)
        self.launch(MAMBA3_REVERSE_STATES, *given, None if x.ssm_state is None else first)
        return dh, first

    def gradient(
        self, made: Made, h: Tensor, dh: Tensor, dout: Tensor, dangle: Tensor, dturn: Tensor
    ) -> Gradients:
        """All but those of states."""
        x, gate, rotated = self.x, self.x.Z is not None, self.problem.rotated
        dQ, dK, dV, dZ = (self.like(y) for y in (x.Q, x.K, x.V, x.Z))
        heads = [self.empty("B", "T", "H", "N", dtype=x.V.dtype) for _ in "QK"]
        dbiases = [self.empty("n_tiles", "H", "N") for _ in "qk"]
        dADT, dDT, *numbers = (self.empty("B", "H", "T") for _ in range(11))
        dTrap, down = self.like(x.numbers[2]), self.empty("B", "T", "H")
        dAngles = self.empty("B", "T", "H", "S", dtype=x.Angles.dtype)
        clear(x.tiles, dADT, dDT, down, dAngles)
        kept = self.empty("n_tiles", "H")
        sums = [self.empty(*x, "H", "S") for x in (("B", "T"), ("B", "T"), ("n_tiles",))]
        self.launch(
            MAMBA3_GRADIENT,
            *(x.Q, x.K, x.V, *x.numbers, *x.biases, *self.rotated),
            *(*self.rotation(made.theta, made.turns), x.D, x.Z, h, dh, made.y if gate else None),
            *(dout, *x.tiles[:1], *((dangle, dturn) if rotated else ())),
            *(dQ, dK, dV, dZ if gate else None, *dbiases, dADT, dDT, dTrap),
            *(dAngles if rotated else None, down, *heads, *numbers, kept),
            *(sums if rotated else ()),
        )
        none = down.new_empty(0)
        return Gradients(
            *(dQ, dK, dV, [dADT, dDT, dTrap], [y.sum(0) for y in dbiases], dAngles),
            *(down.sum((0, 1)) if x.D is not None else none, dZ, none, none),
        )


def forward(x: Given, keep: int) -> Made:
    """`keep`: what the backward wants, none of NOTHING, LITTLE or MUCH."""
    call = _Call(x)
    theta, turns, angle = call.turns()
    h, ssm = call.states(theta, turns)
    out, y = call.output(theta, turns, h, keep != NOTHING)
    return Made(out, ssm, angle, theta, turns, y, h if keep == MUCH else h.new_empty(0))


def backward(
    x: Given, made: Made, dout: Tensor, dssm: Tensor | None, dangle: Tensor | None
) -> Gradients:
    """Gradients by those of the results; None of what nobody used."""
    call = _Call(x)
    h = made.h if made.h.numel() else call.states(made.theta, made.turns)[0]
    n, H, P, N, S = (call.sizes[y] for y in ("n_sequences", "H", "P", "N", "S"))
    dangle = made.ssm.new_zeros(n, H, S) if dangle is None else dangle
    # what a turn of all tokens changes by the last state, which turns with them
    dturn = torch.zeros_like(dangle) if dssm is None else _across(dssm, made.ssm, S)
    dssm = made.ssm.new_zeros(n, H, P, N) if dssm is None else dssm
    dh, dssm_state = call.reverse_states(made, dout, dssm)
    found = call.gradient(made, h, dh, dout, dangle, dturn)
    if x.angle_state is None or x.ssm_state is None:
        return found
    # of pairs across the first token's start
    dangle_state = dangle + dturn - _across(dssm_state, x.ssm_state, S)
    return found._replace(angle_state=dangle_state, ssm_state=dssm_state)


def launches(x: Given, dout: Tensor) -> dict[str, Callable[[], object]]:
    """Each stage of a forward and its backward by its name, to be run by itself."""
    call, made = _Call(x), forward(x, MUCH)
    theta, turns, last = made.theta, made.turns, torch.zeros_like(made.angle)
    dssm = torch.zeros_like(made.ssm)
    dh, _ = call.reverse_states(made, dout, dssm)
    return {
        "mamba3_turns": call.turns,
        "mamba3_states": lambda: call.states(theta, turns),
        "mamba3_output": lambda: call.output(theta, turns, made.h, True),
        "mamba3_reverse_states": lambda: call.reverse_states(made, dout, dssm),
        "mamba3_gradient": lambda: call.gradient(made, made.h, dh, dout, last, last),
    }


def _across(dstate: Tensor, state: Tensor, S: int) -> Tensor:
    """What a turn of a state's keys changes by the state's gradient, [sequences, H, S]."""
    (d0, d1), (x0, x1) = ((y[..., : 2 * S : 2], y[..., 1 : 2 * S : 2]) for y in (dstate, state))
    return (d1 * x0 - d0 * x1).sum(2)
