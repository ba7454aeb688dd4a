"""Call: sizes and scalars of one call of an op, by the symbols of the stage contracts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import RECURRENCES, recurrence_named
from gdn2gen.kernels.groups import HEADS
from gdn2gen.kernels.plans import EVERY
from gdn2gen.kernels.rows import row_of, unit_of
from gdn2gen.kernels.scans import MAX_SEGMENTS, SEGMENT, least_chunks
from gdn2gen.runtime._operands import row_between
from gdn2gen.runtime.sequences import count_chunks
from gdn2gen.runtime.signature import Signature

# Inputs whose rows may lie apart, and their dims.
ROW_WISE: Final = {
    op: {x.name: x.symbols for x in recurrence_named(op).inputs if x.apart} for op in RECURRENCES
}
# Python's own would compare, and sizes may be symbols; untyped in torch.
_max: Any = torch.sym_max
_min: Any = torch.sym_min


def rows_of(signature: Signature, tensors: Sequence[Tensor | None]) -> tuple[tuple[str, int], ...]:
    """Of tensors as kernels read them: those whose rows lie apart, and how far (`Call.rows`)."""
    found = []
    for place in signature.apart:
        x = tensors[place]
        row = 0 if x is None else row_between(x, unit_of(signature.dims[place]))
        if row:
            found.append((signature.names[place], row))
    return tuple(found)


@dataclass(frozen=True)
class Call:
    """Sizes and scalars of one call, by the symbols of the stage contracts."""

    B: int
    T: int
    H: int
    HV: int
    HG: int
    N: int
    scale: float
    lower_bound: float | None
    packed: bool
    device: torch.device
    # of states that are kept on the way, see `family.prefill`
    every: int = 0
    """Tokens from one to the next; 0 where none are."""
    NC: int = 0
    """How many a sequence may have."""
    first_checkpoint: int = 0
    """1 where the state before the first token is none of them."""
    slot_stride: int = 0
    """How far they lie apart, in the unit that the kernel was made for."""
    rows: tuple[tuple[str, int], ...] = ()
    """Of inputs whose rows of a token lie apart: how far, in elements."""

    def chunks(self, BT: int) -> int:
        return count_chunks(self.T, self.N, BT, self.packed)

    def segments(self, BT: int, max_segments: int = MAX_SEGMENTS) -> tuple[int, int]:
        """Segments of a sequence, and chunks of a segment.

        `max_segments` bounds those of all heads and sequences together; more than MAX_SEGMENTS may
        be shorter by as much (`least_chunks`). Sequences of a packed batch are one segment each:
        their lengths are not known on the host.
        """
        if self.packed:
            return 1, 2**24
        chunks = _max(1, -(-self.T // BT))
        most = _max(1, max_segments // _max(1, self.N * self.HV))
        NS = _min(-(-chunks // least_chunks(SEGMENT, max_segments)), most)
        length = -(-chunks // NS)
        return -(-chunks // length), length

    def blocks(self, BT: int, every: int) -> int:
        """Blocks of `every` chunks, over all sequences, each of one sequence alone.

        Of a packed batch at least as many as there are: a block of sequence n is numbered by its
        chunk over `every`, plus n.
        """
        if self.packed:
            return self.chunks(BT) // every + self.N
        chunks = -(-self.T // BT)
        return self.N * -(-chunks // every)

    def scalars(self, BT: int, max_segments: int = MAX_SEGMENTS) -> dict[str, Any]:
        """Every scalar that a stage may ask for, by name."""
        NS, segment = self.segments(BT, max_segments)
        if self.every:
            segment = self.every // BT
        return {
            "n_sequences": self.N,
            "n_chunks": self.chunks(BT),
            "scale": self.scale,
            "lower_bound": self.lower_bound or 0.0,
            "T": self.T,
            "H": self.H,
            "HV": self.HV,
            "HG": self.HG,
            "NS": NS,
            "segment": segment,
            "NC": self.NC,
            "first_checkpoint": self.first_checkpoint,
            "slot_stride": self.slot_stride,
        }

    def row_scalars(self, problem: Problem) -> dict[str, Any]:
        """How far rows lie apart of the inputs that may lie so, by the names of the scalars."""
        apart, found = dict(self.rows), {}
        for name, dims in ROW_WISE[problem.op].items():
            of_head = problem.V if dims[-1] == "V" else 1
            found[row_of(name)] = apart.get(name, self.HV * of_head) // unit_of(dims)
        return found

    def sizes(self, problem: Problem, BT: int, max_segments: int = MAX_SEGMENTS) -> dict[str, int]:
        return {
            "B": self.B,
            "T": self.T,
            "H": self.H,
            "HV": self.HV,
            "HG": self.HG,
            "N": self.N,
            "N+1": self.N + 1,
            "NT": self.chunks(BT),
            "NS": self.segments(BT, max_segments)[0],
            **{f"NT{n}": self.blocks(BT, n) for n in EVERY if n > 1},
            "NZ": -(-problem.V // 16),
            "BT": BT,
            "NB": BT // 16,
            "K": problem.K,
            "V": problem.V,
            "NK": 1,  # at least: how many slices of K there are, a stage's config says
            "2": 2,
            # programs of a chunk: at least one a group, or each of so many of its heads at most
            "HP": self.H,
            **{f"HP{n}": self.H * -(-self.HV // _max(1, self.H) // n) for n in HEADS},
        }
