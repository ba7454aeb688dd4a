"""Recurrence: a member of the family, declared once; what callers and tools say of it follows.

Every member is a form of

    S_t = (I - k_t (e_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (u_t * v_t)^T
    o_t = scale * S_t^T q_t

and says which of its inputs are the decay g, the erase factor e and the write factor u. Dims say
whether an input has a number for each channel or one for each head. Where one input decays and
writes, it is a step: g is `rate` times it, u the step itself, and a skip and an output gate may
follow (`Recurrence.stepped`).

Symbols of dims: B sequences of T tokens (or 1 of all tokens, where N sequences are packed), H heads
of q and k, HV of v (a multiple of H), HG of the decay (H or HV), head dims K and V.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final


@dataclass(frozen=True)
class Input:
    """One tensor that a call takes."""

    name: str
    dims: str
    """By symbol; where states are V first, the last two of a state change places."""
    what: str
    """What it is, and its range, for docstrings."""
    dtype: str = "io"
    """Its role. `io`: the dtype of q. `factor`: the same, or fp32. `gate`: bf16, fp16 or fp32.
    `parameter`: those, and fp32 in the kernels. `state`: fp32. `index`: int32 or int64."""
    when: str = ""
    """The field of `Problem` that says that it is given; empty for what every call takes."""
    draw: str = "normal"
    """How random ones are made, see `inputs`: `normal`; `unit`, in (0, 1); `decay`; and of a gate's
    parameters `rate` and `bias`."""
    gradient: str = ""
    """What kernels call its gradient; d<name> if empty."""
    slack: float = 1.0
    """Times as far off as others its gradient may be."""
    apart: bool = False
    """Whether kernels over whole sequences read it where its rows of tokens lie apart, each in one
    piece, as those of a slice of a projection do. All others are copied then."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(self.dims.split())

    @property
    def differentiable(self) -> bool:
        return self.dtype != "index"


@dataclass(frozen=True)
class Decay:
    """What a state is multiplied by before a token."""

    input: str
    activations: tuple[str, ...] = ("none",)
    """What kernels can make of its input, see `Problem.gate`."""


@dataclass(frozen=True)
class Public:
    """Names that callers know."""

    chunk: str
    """The op over whole sequences, here and in flash-linear-attention."""
    fla: str
    """The module of flash-linear-attention that has it; empty where none does."""
    arguments: tuple[str, ...] = ()
    """Those of the op after the tensors that every call takes, in order. Packages of kernels take
    the same, but for those that choose between kernels."""
    recurrent: str = ""
    """The op over a few tokens of each sequence, here and in flash-linear-attention; empty where
    there is none."""
    recurrent_arguments: tuple[str, ...] = ()
    """Its arguments after the first tensors that every call takes, in order, and such tensors where
    others come between; those of states in a pool, which are keywords alone, follow
    (`family.decoding.KEYWORDS`)."""
    elsewhere: str = ""
    """Another module that has it, and what it is called there, where ours has that name, too."""
    recurrent_names: tuple[tuple[str, str], ...] = ()
    """Inputs that it calls otherwise: their names, and those there."""


@dataclass(frozen=True)
class Usual:
    """What commands take of a member where nothing is asked for: as models have it."""

    head_dims: tuple[str, ...] = ("128", "64")
    """K, or K,V: the first one, or all where a command takes several."""
    shapes: tuple[str, ...] = ()
    """Names; empty for all that are no member's own."""
    gate: str = "none"


@dataclass(frozen=True, eq=False)
class Recurrence:
    """A member of the family. There is one object of each: they are equal if identical."""

    name: str
    """As in `Problem.op`, and on the command line."""
    title: str
    source: str
    """Where it was published."""
    inputs: tuple[Input, ...]
    """Every tensor of a call, in the order of the public op."""
    decay: Decay | None
    erase: str | None
    """The input that erases; None where nothing does."""
    write: str | None
    """The input that v is multiplied by; None where v is written as it is. If it is the one that
    erases too, the two are tied, and its gradient is the sum of both."""
    public: Public
    usual: Usual = Usual()
    plans: tuple[str, ...] = ()
    """Those that serve it. Without any it has a reference, but no op, and no command offers it."""

    def __post_init__(self) -> None:
        known = {x.name for x in self.inputs}
        roles = {self.decay.input if self.decay else None, self.erase, self.write} - {None}
        if not roles <= known:
            raise ValueError(f"{self.name} has no inputs {sorted(map(str, roles - known))}")

    @cached_property
    def named(self) -> Mapping[str, Input]:
        return {x.name: x for x in self.inputs}

    @cached_property
    def required(self) -> tuple[Input, ...]:
        """What every call takes; these come first."""
        return tuple(x for x in self.inputs if not x.when)

    @cached_property
    def optional(self) -> tuple[Input, ...]:
        return tuple(x for x in self.inputs if x.when)

    @cached_property
    def differentiable(self) -> tuple[Input, ...]:
        return tuple(x for x in self.inputs if x.differentiable)

    @cached_property
    def gradients(self) -> Mapping[str, str]:
        """What kernels call the gradient of each input, in order."""
        return {x.name: x.gradient or f"d{x.name}" for x in self.differentiable}

    @cached_property
    def sized_by(self) -> tuple[int, ...]:
        """Places of the inputs whose shapes say what symbols stand for: the first use of each."""
        bound: set[str] = set()
        places = []
        for place, x in enumerate(self.required):
            if not bound.issuperset(x.symbols):
                places.append(place)
                bound.update(x.symbols)
        return tuple(places)

    @property
    def tied(self) -> bool:
        """Whether one number a head erases and writes: then kernels take it as a factor of the key
        that is written, and erase by the key as it is."""
        return self.erase is not None and self.erase == self.write

    @property
    def stepped(self) -> bool:
        """Whether one number a head, a step, decays and writes: g = `rate` step, where a rate that
        is not given is -1, and step k v^T is written. Such members have no scale, and their heads
        share the scores of a group: they may add `D` v to o, and then multiply it by silu(`z`)."""
        return self.decay is not None and self.write == self.decay.input

    @property
    def decays_by(self) -> str:
        """`channel` or `head`: what the decay has one number for; `step` where that is what a token
        writes, too; `none` without a decay."""
        if self.stepped:
            return "step"
        return "none" if self.decay is None else self.per(self.decay.input)

    @property
    def erases(self) -> bool:
        """Whether anything is taken out of the state but by decay."""
        return self.erase is not None

    def takes(self, option: str) -> bool:
        """Whether its public ops have that keyword."""
        return option in self.public.arguments

    @property
    def normalises(self) -> bool:
        """Whether its kernels can normalise q and k."""
        return self.takes("use_qk_l2norm_in_kernel")

    @property
    def activates_beta(self) -> bool:
        """Whether its kernels can take the sigmoid of what erases and writes."""
        return self.tied and self.takes("use_beta_sigmoid_in_kernel")

    @property
    def has_factor(self) -> bool:
        """Whether it takes one that may be fp32 beside a narrower q."""
        return any(x.dtype == "factor" for x in self.inputs)

    @property
    def activations(self) -> tuple[str, ...]:
        return self.decay.activations if self.decay else ("none",)

    @property
    def bounded(self) -> bool:
        """Whether its gate has a form with a bound: `lower_bound` times a sigmoid."""
        return "sigmoid" in self.activations

    @property
    def update(self) -> str:
        """S_t, in the names of its inputs."""
        g, e, u = self.decay and self.decay.input, self.erase, self.write
        decays = {"channel": f"Diag(exp {g}_t) ", "head": f"exp({g}_t) "}
        if self.stepped:
            decays["head"] = f"exp(rate {g}_t) "
        erases = {"channel": f"(I - k_t ({e}_t * k_t)^T) ", "head": f"(I - {e}_t k_t k_t^T) "}
        writes = {"channel": f"k_t ({u}_t * v_t)^T", "head": f"{u}_t k_t v_t^T"}
        kept = f"{erases[self.per(e)] if e else ''}{decays[self.per(g)] if g else ''}S_{{t-1}}"
        return f"{kept} + {writes[self.per(u)] if u else 'k_t v_t^T'}"

    def per(self, name: str) -> str:
        """`channel` or `head`: what an input has one number for."""
        return "channel" if {"K", "V"} & {*self.named[name].symbols} else "head"


# What members share.
QUERY: Final = Input("q", "B T H K", "queries")
KEY: Final = Input("k", "B T H K", "keys")
VALUE: Final = Input("v", "B T HV V", "values")
PLAIN_CHANNEL_DECAY: Final = Input(
    "g", "B T HG K", "decay in natural log, <= 0 (any size, -inf too)", "gate", draw="decay"
)
PLAIN_HEAD_DECAY: Final = replace(PLAIN_CHANNEL_DECAY, dims="B T HG")
# And of members whose kernels can take it through its activation.
CHANNEL_DECAY: Final = replace(
    PLAIN_CHANNEL_DECAY,
    what=f"{PLAIN_CHANNEL_DECAY.what}; with `use_gate_in_kernel` its pre-activation",
)
HEAD_DECAY: Final = replace(CHANNEL_DECAY, dims="B T HG")
PLAIN_BETA: Final = Input(
    "beta", "B T HV", "what is erased and written, in [0, 1], or [0, 2]", "factor", draw="unit"
)
BETA: Final = replace(
    PLAIN_BETA, what=f"{PLAIN_BETA.what}; with `use_beta_sigmoid_in_kernel` its pre-activation"
)
STATE: Final = Input(
    "initial_state", "N HV K V", "one for each sequence; zero if None", "state",
    when="initial_state", gradient="dh0",
)  # fmt: skip
# One number for a head, a sum over all tokens and channels. Under a sigmoid gate its terms have
# either sign: what rounding one score leaves goes alike into all channels, 0.7e-2 to 1.2e-2 of the
# root of the terms' squares by the bf16 interpreter, and 1.4e-2 to 2.1e-2 of the sum was seen on an
# H200.
RATE: Final = Input(
    "A_log", "HG", "optional with `lower_bound`", "parameter",
    when="has_A_log", draw="rate", slack=3.0,
)  # fmt: skip
BIAS: Final = Input(
    "dt_bias", "HG K", "optional; its dims may come as one", "parameter",
    when="has_dt_bias", draw="bias",
)  # fmt: skip
HEAD_RATE: Final = replace(RATE, what="needed with `use_gate_in_kernel`")
HEAD_BIAS: Final = replace(BIAS, dims="HG", what="optional")
SEQUENCES: Final = Input(
    "cu_seqlens", "N+1",
    "rising from 0 to T: packed sequences; wants B = 1. On a GPU only the kernels read it: other "
    "lengths may be written to it between replays of a CUDA graph. What they hold is taken within "
    "0 .. T and rising; o and gradients of tokens that no sequence covers are zero",
    "index", when="varlen",
)  # fmt: skip
GATES: Final = ("none", "softplus", "sigmoid")
# Of a decay per head, whose gate has no form with a bound.
HEAD_GATES: Final = ("none", "softplus")
