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
    MAMBA3_GATE,
    MAMBA3_GRADIENT,
    MAMBA3_OUTPUT,
    MAMBA3_REVERSE_STATES,
    MAMBA3_ROTATE,
    MAMBA3_STATES,
    MAMBA3_TURNS,
)
from gdn2gen.kernels.parts import PartStage
from gdn2gen.runtime._operands import readable
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.mamba3 import angle_view, clear, count_tiles
from gdn2gen.runtime.mamba3_loaded import chunk_launch, counted_tokens, scan_launch
from gdn2gen.runtime.mamba3_reverse_scan import add_up, launches_of, reverse_scan
from gdn2gen.runtime.mamba3_turning_scan import turning_scan
from gdn2gen.runtime.parts import _on
from gdn2gen.runtime.passes import empty
from gdn2gen.store.tuned_files import current_look

Some = Sequence[Tensor]
NOTHING: Final = 0
"""What the forward keeps where no backward comes;"""
LITTLE: Final = 1
"""for one that turns queries and keys and makes the states before chunks again;"""
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
    turns: Tensor
    y: Tensor
    """out before its gate; empty without one, and where no backward was to come."""
    h: Tensor
    """The state before each chunk; empty where that was not to be kept,"""
    theta: Tensor
    """and so is Theta of each token within its chunk,"""
    q: Tensor
    """and so is `Turned`."""
    k: Tensor
    within: Tensor
    tail_decay: Tensor
    weight_s: Tensor
    own_dt: Tensor


class Turned(NamedTuple):
    """What all products read: each head's queries and keys, biased and turned; and of each token
    and head log2 of the decay from the chunk's start, the decay to its end, s, and lambda dt."""

    q: Tensor
    k: Tensor
    within: Tensor
    tail_decay: Tensor
    weight_s: Tensor
    own_dt: Tensor


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


class Call:
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

    def turns(self) -> tuple[Tensor, Tensor]:
        """Theta before each chunk, and after the last tokens."""
        x = self.x
        turns = self.empty("n_tiles", "H", "S", dtype=torch.int32)
        angle = self.empty("n_sequences", "H", "S")
        if self.problem.rotated:
            given = (x.numbers[1], *self.rotated, x.angle_state, *x.tiles)
            self.launch(MAMBA3_TURNS, *given, turns, angle)
        return turns, angle

    def rotate(self, turns: Tensor, keeps: bool) -> tuple[Turned, Tensor]:
        """And Theta of each token within its chunk, where it is to be kept for the backward."""
        x, rotated, self.sizes["keep"] = self.x, self.problem.rotated, int(keeps)
        theta = turns.new_empty(0)
        if keeps:
            theta = self.empty("B", "T", "H", "S", dtype=torch.int32)
        q, k = (self.empty("B", "T", "H", "N", dtype=x.V.dtype) for _ in "qk")
        made = Turned(q, k, *(self.empty("B", "H", "T") for _ in range(4)))
        given = (x.Q, x.K, *x.biases, *x.numbers, *self.rotated, *([turns] if rotated else ()))
        # where it is not to be kept, nothing is written to it
        kept = theta if keeps else turns
        self.launch(MAMBA3_ROTATE, *given, *x.tiles[:1], *made, kept if rotated else None)
        return made, theta

    def states(self, turned: Turned) -> tuple[Tensor, Tensor]:
        """The state before each chunk, and after the last tokens."""
        x = self.x
        h = self.empty("n_tiles", "H", "P", "N", dtype=x.V.dtype)
        ssm = self.empty("n_sequences", "H", "P", "N")
        given = (turned.k, x.V, *turned[2:5], x.ssm_state)
        self.launch(MAMBA3_STATES, *given, *x.tiles, h, ssm)
        return h, ssm

    def output(self, turned: Turned, h: Tensor, keeps_y: bool) -> tuple[Tensor, Tensor]:
        """out, and y where there is a gate and it is to be kept."""
        x, out = self.x, self.like(self.x.V)
        keeps_y = keeps_y and x.Z is not None
        self.sizes["keep"] = int(keeps_y)
        y = self.like(x.V) if keeps_y else out.new_empty(0)
        # where y is not to be kept, nothing is written to it
        kept = None if x.Z is None else y if keeps_y else out
        numbers = (x.numbers[0], turned.within, turned.weight_s, turned.own_dt)
        given = (*turned[:2], x.V, *numbers, x.D, x.Z, h)
        self.launch(MAMBA3_OUTPUT, *given, *x.tiles[:1], out, kept)
        return out, y

    def scan(self, turned: Turned, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """out, y, the states before chunks and after the last tokens, of what is kept; None where
        that takes two stages."""
        x, B, T, H = self.x, *(self.sizes[y] for y in "BTH")
        launch = scan_launch(self.problem, keep, x.BT, T, B, H, x.V.device, current_look())
        if launch is None:
            return None
        out, ssm = self.like(x.V), self.empty("n_sequences", "H", "P", "N")
        y = self.like(x.V) if keep != NOTHING and x.Z is not None else None
        h = self.empty("n_tiles", "H", "P", "N", dtype=x.V.dtype) if keep == MUCH else None
        # what is not kept is not written, so that anything may stand for it
        places = [out if z is None else z for z in ([y, h] if x.Z is not None else [h])]
        given = (*turned[:2], x.V, *turned[2:], x.D, x.Z, x.ssm_state, out, *places, ssm)
        with _on(x.V.device):
            launch(*readable([z for z in given if z is not None]), T=T)
        none = out.new_empty(0)
        return out, none if y is None else y, none if h is None else h, ssm

    def gate(self, y: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of y and Z, and of what each token has of its own value."""
        x, down = self.x, self.empty("B", "T", "H")
        clear(x.tiles, down)
        if x.Z is None:
            self.launch(MAMBA3_GATE, x.V, dout, down)
            return dout, self.like(None), down
        dy, dZ = self.like(x.V), self.like(x.Z)
        self.launch(MAMBA3_GATE, x.V, x.Z, y, dout, dy, dZ, down)
        return dy, dZ, down

    def reverse_states(self, turned: Turned, dy: Tensor, dssm: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the states after each chunk, and before the first tokens."""
        x = self.x
        dh = self.empty("n_tiles", "H", "P", "N", dtype=x.V.dtype)
        first = self.like(x.ssm_state)
        given = (turned.q, turned.within, dy, dssm, *x.tiles, dh)
        self.launch(MAMBA3_REVERSE_STATES, *given, None if x.ssm_state is None else first)
        return dh, first

    def gradients(
        self,
        of_rows: tuple[Tensor, Tensor, Tensor],
        numbers: list[Tensor],
        dbiases: list[Tensor],
        dAngles: Tensor,
        back: Back,
    ) -> Gradients:
        """Of Q, K and V, and the others with sums that are torch's."""
        none = dAngles.new_empty(0, dtype=torch.float32)
        return Gradients(
            *(*of_rows, numbers, [y.sum(0) for y in dbiases], dAngles),
            *(back.down.sum((0, 1)) if self.x.D is not None else none, back.dZ, none, none),
        )

    def gradient(
        self, made: Made, back: Back, dh: Tensor, dangle: Tensor, dturn: Tensor
    ) -> Gradients:
        """All but those of states."""
        x, rotated = self.x, self.problem.rotated
        dQ, dK, dV = (self.like(y) for y in (x.Q, x.K, x.V))
        heads = [self.empty("B", "T", "H", "N", dtype=x.V.dtype) for _ in "QK"]
        dbiases = [self.empty("n_tiles", "H", "N") for _ in "qk"]
        dADT, dDT, *numbers = (self.empty("B", "H", "T") for _ in range(7))
        dTrap = self.like(x.numbers[2])
        dAngles = self.empty("B", "T", "H", "S", dtype=x.Angles.dtype)
        clear(x.tiles, dADT, dDT, dAngles)
        kept = self.empty("n_tiles", "H")
        sums = [self.empty(*x, "H", "S") for x in (("B", "T"), ("B", "T"), ("n_tiles",))]
        self.launch(
            MAMBA3_GRADIENT,
            *(*back.turned[:2], x.V, *x.numbers, *back.turned[2:], *self.rotated),
            *(*self.rotation(back.theta, made.turns), x.D, back.dy, back.down, back.h, dh),
            *(*x.tiles[:1], *((dangle, dturn) if rotated else ())),
            *(dQ, dK, dV, *dbiases, dADT, dDT, dTrap),
            *(dAngles if rotated else None, *heads, *numbers, kept),
            *(sums if rotated else ()),
        )
        return self.gradients((dQ, dK, dV), [dADT, dDT, dTrap], dbiases, dAngles, back)


class Back(NamedTuple):
    """What products of the backward read: what is turned, without a gate, and states."""

    turned: Turned
    theta: Tensor
    h: Tensor
    dy: Tensor
    dZ: Tensor
    down: Tensor


def _back(call: Call, made: Made, dout: Tensor) -> Back:
    kept = made.h.numel() > 0
    turned, theta = Turned(*made[-len(Turned._fields) :]), made.theta
    if not kept:
        turned, theta = call.rotate(made.turns, True)
    h = made.h if kept else call.states(turned)[0]
    return Back(turned, theta, h, *call.gate(made.y, dout))


def forward(x: Given, keep: int) -> Made:
    """`keep`: what the backward wants, none of NOTHING, LITTLE or MUCH."""
    call = Call(x)
    within = turning_scan(call, keep)
    if within is not None:
        made = ("out", "final_ssm", "last_angle", "turns", "ungated", "h", "theta")
        of_turned = (within[z] for z in Turned._fields)
        found = [z if keep == MUCH else z.new_empty(0) for z in of_turned]
        return Made._make((*(within[z] for z in made), *found))
    turns, angle = call.turns()
    turned, theta = call.rotate(turns, keep == MUCH)
    at_once = call.scan(turned, keep)
    if at_once is not None:
        out, y, h, ssm = at_once
    else:
        h, ssm = call.states(turned)
        out, y = call.output(turned, h, keep != NOTHING)
    kept = [h, theta, *turned]
    kept = kept if keep == MUCH else [z.new_empty(0) for z in kept]
    return Made(out, ssm, angle, turns, y, *kept)


def backward(
    x: Given, made: Made, dout: Tensor, dssm: Tensor | None, dangle: Tensor | None
) -> Gradients:
    """Gradients by those of the results; None of what nobody used."""
    call = Call(x)
    n, H, P, N, S = (call.sizes[y] for y in ("n_sequences", "H", "P", "N", "S"))
    dangle = made.ssm.new_zeros(n, H, S) if dangle is None else dangle
    # what a turn of all tokens changes by the last state, which turns with them
    dturn = torch.zeros_like(dangle) if dssm is None else _across(dssm, made.ssm, S)
    dssm = made.ssm.new_zeros(n, H, P, N) if dssm is None else dssm
    back = _back(call, made, dout)
    at_once = reverse_scan(call, back, dssm)
    if at_once is not None:
        dssm_state, found = at_once[0].first, add_up(call, made, back, at_once, (dangle, dturn))
    else:
        dh, dssm_state = call.reverse_states(back.turned, back.dy, dssm)
        found = call.gradient(made, back, dh, dangle, dturn)
    if x.angle_state is None or x.ssm_state is None:
        return found
    # of pairs across the first token's start
    dangle_state = dangle + dturn - _across(dssm_state, x.ssm_state, S)
    return found._replace(angle_state=dangle_state, ssm_state=dssm_state)


def launches(x: Given, dout: Tensor) -> dict[str, Callable[[], object]]:
    """Each stage of a forward and its backward by its name, to be run by itself."""
    call, made = Call(x), forward(x, MUCH)
    last, dssm = torch.zeros_like(made.angle), torch.zeros_like(made.ssm)
    back = _back(call, made, dout)
    turned, (dh, _) = back.turned, call.reverse_states(back.turned, back.dy, dssm)
    at_once: dict[str, Callable[[], object]] = {}
    if call.scan(turned, MUCH):
        at_once["mamba3_scan"] = lambda: call.scan(turned, MUCH)
    if turning_scan(call, MUCH):
        at_once["mamba3_turning_scan"] = lambda: turning_scan(call, MUCH)
    found = reverse_scan(call, back, dssm)
    if found is not None:
        left, _ = found

        def add() -> object:
            # looked up at every run, as all others are: knobs are forced in between
            launch = launches_of(call)
            assert launch is not None
            return add_up(call, made, back, (left, launch[1]), (last, last))

        at_once["mamba3_reverse_scan"] = lambda: reverse_scan(call, back, dssm)
        at_once["mamba3_sums"] = add
    return at_once | {
        "mamba3_turns": call.turns,
        "mamba3_rotate": lambda: call.rotate(made.turns, True),
        "mamba3_states": lambda: call.states(turned),
        "mamba3_output": lambda: call.output(turned, made.h, True),
        "mamba3_gate": lambda: call.gate(made.y, dout),
        "mamba3_reverse_states": lambda: call.reverse_states(turned, back.dy, dssm),
        "mamba3_gradient": lambda: call.gradient(made, back, dh, last, last),
    }


def _across(dstate: Tensor, state: Tensor, S: int) -> Tensor:
    """What a turn of a state's keys changes by the state's gradient, [sequences, H, S]."""
    (d0, d1), (x0, x1) = ((y[..., : 2 * S : 2], y[..., 1 : 2 * S : 2]) for y in (dstate, state))
    return (d1 * x0 - d0 * x1).sum(2)
