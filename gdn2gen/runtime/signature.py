"""Signature: how the ops of a recurrence take their arguments, made of its declaration once.

Its fields are plain tuples and numbers: torch.compile reads them in every call that it traces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from gdn2gen.family.recurrence import Input
from gdn2gen.family.registry import recurrence_named


class Options(NamedTuple):
    """What every op takes after its tensors."""

    scale: float | None
    lower_bound: float | None
    l2norm: bool
    gate_in_kernel: bool
    output_final_state: bool
    state_v_first: bool


_SCHEMA_OF = {float | None: "float?", bool: "bool"}
_OPTIONS = ", ".join(f"{_SCHEMA_OF[x]} {name}" for name, x in get_type_hints(Options).items())


@dataclass(frozen=True, eq=False)
class Signature:
    """The tensors of a recurrence's ops; cu_seqlens is the last of them."""

    op: str
    public: str
    """What callers call it."""
    inputs: tuple[Input, ...]
    names: tuple[str, ...]
    required: int
    """How many every call gives; they come first."""
    gate: int
    """The place of the one whose dtype is `Problem.gate_dtype`."""
    sized_by: tuple[int, ...]
    """Places of those whose shapes say what symbols stand for."""
    conditions: tuple[str, ...]
    """The fields of `Problem` that say which of the others are given."""

    def bind(self, shapes: Iterable[Sequence[int]]) -> dict[str, int]:
        """What symbols stand for, by the shapes of the tensors in `sized_by`: the first use counts.

        A recurrence whose decay has no heads of its own has those of v.
        """
        sizes: dict[str, int] = {}
        for place, shape in zip(self.sized_by, shapes, strict=True):
            for symbol, size in zip(self.inputs[place].symbols, shape, strict=True):
                sizes.setdefault(symbol, size)
        sizes.setdefault("HG", sizes["HV"])
        return sizes

    def split(
        self, arguments: Sequence[Any]
    ) -> tuple[list[Tensor | None], Tensor | None, Options, str]:
        """The tensors, cu_seqlens, the options and the agreement of the forward op."""
        count = len(self.names)
        *tensors, cu_seqlens = arguments[:count]
        *options, agreement = arguments[count:]
        return tensors, cu_seqlens, Options(*options), agreement

    @property
    def forward_schema(self) -> str:
        tensors = ", ".join(f"Tensor{'?' if x.when else ''} {x.name}" for x in self.inputs)
        return f"({tensors}, {_OPTIONS}, str agreement) -> (Tensor, Tensor, Tensor)"

    @property
    def backward_schema(self) -> str:
        tensors = ", ".join(f"Tensor{'?' if x.when else ''} {x.name}" for x in self.inputs)
        arrived = "Tensor do, Tensor? dht, Tensor saved, Tensor o"
        rest = f"SymInt? sequences, {_OPTIONS}, str agreement"
        return f"({arrived}, {tensors}, {rest}) -> Tensor[]"


@cache
def signature_of(op: str) -> Signature:
    """Of the recurrence of that name."""
    recurrence = recurrence_named(op)
    gates = [place for place, x in enumerate(recurrence.required) if x.dtype == "gate"]
    return Signature(
        op=op,
        public=recurrence.public.chunk,
        inputs=recurrence.inputs,
        names=tuple(x.name for x in recurrence.inputs),
        required=len(recurrence.required),
        gate=gates[0] if gates else 0,
        sized_by=recurrence.sized_by,
        conditions=tuple(x.when for x in recurrence.optional),
    )
