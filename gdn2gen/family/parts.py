"""PartProblem: what a layer has beside its recurrence, with everything that is compiled in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, Self

from gdn2gen.base.errors import InputError
from gdn2gen.family.problem import DTYPES

WIDTHS: Final = (2, 3, 4)
"""Taps of a short convolution."""
ACTIVATIONS: Final = ("sigmoid", "silu")
"""Of a gate."""
MOST_TENSORS: Final = 3
"""That one launch convolves: q, k and v."""
NORM_SIZES: Final = range(8, 1025, 8)
"""Channels of a row that a gated norm has kernels for, and of a head that a decay's gate has."""
PROJECTED_SIZES: Final = (32, 64, 128)
"""Channels of a head whose gate is projected in the norm, and those that it is projected from."""
PROJECTED_DTYPES: Final = ("bf16", "fp16")
"""Of which there are products at the memory's pace."""
STREAM_SIZES: Final = range(8, 8193, 8)
"""The same of the norm of a residual stream."""
HEAD_SIZES: Final = range(8, 257, 8)
"""Channels of a head of attention, the same."""
CHANNELS_STEP: Final = 8
"""A row of channels is a whole number of 16 bytes."""
DECAY_GATES: Final = ("softplus", "sigmoid")
"""Activations of a decay; the latter has a lower bound."""


@dataclass(frozen=True, order=True, kw_only=True)
class PartProblem:
    """A part of a layer; its subclasses say which."""

    op: ClassVar[str]
    dtype: str = "bf16"
    """dtype of tokens in and out; computed in fp32."""
    weight_dtype: str = "bf16"
    """dtype of parameters and their gradients."""

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("weight_dtype", self.weight_dtype, DTYPES)

    @property
    def varlen(self) -> bool:
        return False

    def dtype_of(self, role: str) -> str:
        return {"io": self.dtype, "weight": self.weight_dtype}.get(role, role)

    @property
    def extras(self) -> tuple[str, ...]:
        """What `with_extras` makes the same problem of: fields that are not as usual."""
        found = []
        for x in fields(self):
            value = getattr(self, x.name)
            if x.name != "dtype" and value != x.default:
                found.append(x.name if value is True else f"{x.name}:{value}")
        return tuple(found)

    def with_extras(self, words: Iterable[str]) -> Self:
        """Fields by words as in `extras`, a flag that is not to be set as `name:no`. Raises
        InputError for others."""
        known = {x.name: x.default for x in fields(self)}
        given: dict[str, Any] = {}
        for word in words:
            name, _, value = word.partition(":")
            flag = isinstance(known.get(name), bool)
            if name not in known or (value not in ("", "no") if flag else not value):
                said = ", ".join(x if y is False else f"{x}:VALUE" for x, y in known.items())
                raise InputError(f"{self.op} takes any of {said}, but got {word!r}")
            given[name] = value != "no" if flag else int(value) if value.isdecimal() else value
        return replace(self, **given)


@dataclass(frozen=True, order=True, kw_only=True)
class ConvolutionProblem(PartProblem):
    """Short convolutions with SiLU of several tensors of the same tokens:

    y_t = silu(sum_j weight_j * x_{t - width + 1 + j} + bias),   j = 0 .. width - 1
    """

    op: ClassVar[str] = "short_convolution"
    tensors: int = 3
    width: int = 4
    """Taps."""
    bias: bool = False
    packed: bool = False
    """cu_seqlens given: B is 1 and holds N packed sequences."""
    initial_tail: bool = False
    """The last width - 1 inputs of each sequence before these are given; zeros otherwise."""
    final_tail: bool = False
    """Those after these are wanted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("width", self.width, WIDTHS)
        _one_of("tensors", self.tensors, range(1, MOST_TENSORS + 1))

    @property
    def varlen(self) -> bool:
        return self.packed


@dataclass(frozen=True, order=True, kw_only=True)
class NormProblem(PartProblem):
    """RMSNorm of rows of `size` channels, times an activated gate:

    y = x / sqrt(mean(x^2) + eps) * weight * activation(gate)
    """

    op: ClassVar[str] = "gated_rms_norm"
    size: int = 128
    activation: str = "sigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("size", self.size, NORM_SIZES)


@dataclass(frozen=True, order=True, kw_only=True)
class ProjectedNormProblem(PartProblem):
    """The same of heads of `size` channels, whose gates are projected from `rank` channels of their
    token:

    y = x / sqrt(mean(x^2) + eps) * weight * activation(proj low + bias)
    """

    op: ClassVar[str] = "projected_norm"
    size: int = 128
    rank: int = 128
    activation: str = "sigmoid"
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("size", self.size, PROJECTED_SIZES)
        _one_of("rank", self.rank, PROJECTED_SIZES)
        _one_of("dtype", self.dtype, PROJECTED_DTYPES)


@dataclass(frozen=True, order=True, kw_only=True)
class DecayGateProblem(PartProblem):
    """The log decay of each of a head's `size` channels, in fp32, of its pre-activation x:

    g = -exp(A_log) * softplus(x + dt_bias), or lower_bound * sigmoid(exp(A_log) * (x + dt_bias))

    A_log, one number a head, and dt_bias are in fp32.
    """

    op: ClassVar[str] = "decay_gate"
    size: int = 128
    gate: str = "softplus"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("gate", self.gate, DECAY_GATES)
        _one_of("size", self.size, NORM_SIZES)


@dataclass(frozen=True, order=True, kw_only=True)
class StreamNormProblem(PartProblem):
    """RMSNorm of the residual stream between a model's blocks, before what projects:

    y = x / sqrt(mean(x^2) + eps) * weight

    `added`: of the stream and what a block adds to it, whose sum goes on as the stream.
    """

    op: ClassVar[str] = "stream_norm"
    stream_dtype: str = "fp32"
    """dtype of x and of the sum; that of y and of what is added is `dtype`."""
    size: int = 2048
    added: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("stream_dtype", self.stream_dtype, DTYPES)
        _one_of("size", self.size, STREAM_SIZES)

    def dtype_of(self, role: str) -> str:
        return self.stream_dtype if role == "stream" else super().dtype_of(role)


@dataclass(frozen=True, order=True, kw_only=True)
class SwigluProblem(PartProblem):
    """y = silu(gate) * up, of tensors that are a whole number of units of 8 elements."""

    op: ClassVar[str] = "swiglu"


@dataclass(frozen=True, order=True, kw_only=True)
class SigmoidProblem(PartProblem):
    """y = sigmoid(x) of rows of channels, of which there is a kernel for the gradient alone."""

    op: ClassVar[str] = "sigmoid"


@dataclass(frozen=True, order=True, kw_only=True)
class RotaryProblem(PartProblem):
    """Heads of `size` channels, turned in pairs (i, i + size/2) by angles of their tokens."""

    op: ClassVar[str] = "rotary"
    size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("size", self.size, HEAD_SIZES)


@dataclass(frozen=True, order=True, kw_only=True)
class WindowProblem(PartProblem):
    """Attention of one token over a window, whose keys and values are kept in a ring:

    o = sum_s softmax_s(q . k_s / sqrt(size)) v_s

    of heads of `size` channels; q and k turned by the token's position before.
    """

    op: ClassVar[str] = "window_step"
    size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("size", self.size, HEAD_SIZES)


def _one_of(name: str, value: object, known: Iterable[object]) -> None:
    if value not in known:
        values = known if isinstance(known, range) else ", ".join(map(repr, known))
        raise InputError(f"{name} must be one of {values}, but got {value!r}")
