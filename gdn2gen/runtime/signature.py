"""Signature: how the ops of a recurrence take their arguments, made of its declaration once.

Its fields are plain tuples and numbers: torch.compile reads them in every call that it traces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from gdn2gen.family.registry import recurrence_named


class Options(NamedTuple):
    """What ops take after their tensors. Those with a default are of beta, and left out by ops that
    have none (`Signature.options`)."""

    scale: float | None
    lower_bound: float | None
    l2norm: bool
    gate_in_kernel: bool
    output_final_state: bool
    state_v_first: bool
    beta_sigmoid: bool = False
    neg_eigval: bool = False


_SCHEMA_OF = {float | None: "float?", bool: "bool"}
_OPTIONS = tuple(f"{_SCHEMA_OF[x]} {name}" for name, x in get_type_hints(Options).items())


@dataclass(frozen=True, eq=False)
class Signature:
    """The tensors of a recurrence's ops; cu_seqlens is the last of them."""

    op: str
    public: str
    """What callers call it."""
    names: tuple[str, ...]
    dims: tuple[tuple[str, ...], ...]
    roles: tuple[str, ...]
    """See `Input.dtype`."""
    required: int
    """How many every call gives; they come first."""
    gate: int
    """The place of the one that decays: its role is `gate`."""
    typed_by: tuple[int, ...]
    """Places of those whose dtypes are compiled in: of `io`, `gate` and `factor`; q's where it has
    none of a role."""
    sized_by: tuple[int, ...]
    """Places of those whose shapes say what symbols stand for."""
    parameters: tuple[int, ...]
    """Places of those that kernels take in fp32 with all their dims."""
    gate_parameters: Mapping[str, int]
    """Places of those of the gate, by name: A_log, dt_bias."""
    states: tuple[int, ...]
    """Places of the states."""
    apart: tuple[int, ...]
    """Places of those whose rows may lie apart, see `Input.apart`."""
    conditions: tuple[str, ...]
    """The fields of `Problem` that say which of the others are given."""
    options: int
    """How many of `Options` its ops take."""
    bounded: bool
    """Whether its gate has a form with a lower bound."""
    by_channel: bool
    """Whether each channel decays by itself: then kernels' times may depend on how much."""
    shown: tuple[str, ...]
    """What the caller calls them, where that is not `names`: for errors."""
    decoding: bool = False
    """Of the op over a few tokens: states may be bf16, and there may be no sequence at all."""

    def bind(self, shapes: Iterable[Sequence[int]]) -> dict[str, int]:
        """What symbols stand for, by the shapes of the tensors in `sized_by`: the first use counts.

        A recurrence whose decay has no heads of its own has those of v.
        """
        sizes: dict[str, int] = {}
        for place, shape in zip(self.sized_by, shapes, strict=True):
            for symbol, size in zip(self.dims[place], shape, strict=True):
                sizes.setdefault(symbol, size)
        sizes.setdefault("HG", sizes["HV"])
        return sizes

    def split(
        self, arguments: Sequence[Any]
    ) -> tuple[Sequence[Tensor | None], Tensor | None, Sequence[Any], str]:
        """The tensors, cu_seqlens, the options and the agreement of the forward op."""
        count = len(self.names)
        return arguments[: count - 1], arguments[count - 1], arguments[count:-1], arguments[-1]

    @property
    def forward_schema(self) -> str:
        return f"({self._tensors}, {self._options}, str agreement) -> (Tensor, Tensor, Tensor)"

    @property
    def backward_schema(self) -> str:
        arrived = "Tensor do, Tensor? dht, Tensor saved, Tensor o"
        rest = f"SymInt? sequences, {self._options}, str agreement"
        return f"({arrived}, {self._tensors}, {rest}) -> Tensor[]"

    @property
    def decoding_schema(self) -> str:
        """Of an op that writes what it is given: o, the final state, slots of the pool."""
        rest = (
            "Tensor? ssm_state_indices, Tensor? num_accepted_tokens, Tensor(a!)? state_pool, "
            "Tensor(b!) o, Tensor(c!)? final_state"
        )
        return f"({self._tensors}, {rest}, {self._options}, SymInt? null_slot) -> ()"

    @property
    def prefill_schema(self) -> str:
        """Of an op that writes what it is given: o, states, slots of the pool."""
        rest = (
            "Tensor(a!)? state_pool, Tensor? ssm_state_indices, Tensor? has_initial_state, "
            "Tensor? checkpoint_state_indices, Tensor(b!) o, Tensor(c!)? final_state, "
            "Tensor(d!)? states"
        )
        end = "SymInt? null_slot, int every, str decay"
        return f"({self._tensors}, {rest}, {self._options}, {end}) -> ()"

    @property
    def _options(self) -> str:
        return ", ".join(_OPTIONS[: self.options])

    @property
    def _tensors(self) -> str:
        optional = ("",) * self.required + ("?",) * (len(self.names) - self.required)
        return ", ".join(f"Tensor{x} {name}" for x, name in zip(optional, self.names, strict=True))


@cache
def decoding_signature(op: str) -> Signature:
    """Of the recurrence's op over a few tokens of each sequence."""
    public = recurrence_named(op).public
    found = replace(signature_of(op), public=public.recurrent, decoding=True)
    return renamed(found, **dict(public.recurrent_names))


def renamed(signature: Signature, public: str = "", **there: str) -> Signature:
    """The same for a caller who calls some tensors otherwise: `there`, by their names here."""
    shown = tuple(there.get(name, name) for name in signature.names)
    return replace(signature, public=public or signature.public, shown=shown)


@cache
def signature_of(op: str) -> Signature:
    """Of the recurrence of that name, over whole sequences."""
    recurrence = recurrence_named(op)
    names = tuple(x.name for x in recurrence.inputs)
    roles = tuple(x.dtype for x in recurrence.inputs)

    def places(role: str) -> tuple[int, ...]:
        return tuple(place for place, x in enumerate(roles) if x == role)

    gate, factor = ((*places(role), 0)[0] for role in ("gate", "factor"))
    return Signature(
        op=op,
        public=recurrence.public.chunk,
        names=names,
        shown=names,
        dims=tuple(x.symbols for x in recurrence.inputs),
        roles=roles,
        required=len(recurrence.required),
        gate=gate,
        typed_by=(0, gate, factor),
        sized_by=recurrence.sized_by,
        parameters=places("parameter"),
        gate_parameters={
            x.name: place
            for place, x in enumerate(recurrence.inputs)
            if x.name in ("A_log", "dt_bias")
        },
        states=places("state"),
        apart=tuple(place for place, x in enumerate(recurrence.inputs) if x.apart),
        conditions=tuple(x.when for x in recurrence.optional),
        options=len(_OPTIONS) - (0 if recurrence.activates_beta else len(Options._field_defaults)),
        bounded=recurrence.bounded,
        by_channel=recurrence.decays_by == "channel",
    )
