"""Problem: what is compiled into a kernel. Regime: what is known only at run time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, cast

from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.registry import OPS, recurrence_named

DTYPES: Final = ("bf16", "fp16", "fp32")
# Fields of Problem that add arguments to the kernels and are not tuned for.
OPTIONAL_FLAGS: Final = (
    "has_A_log",
    "has_dt_bias",
    "beta_sigmoid",
    "neg_eigval",
    "beta_fp32",
    "varlen",
    "initial_state",
    "final_state",
    "state_v_first",
    "has_rate",
    "has_D",
    "has_z",
)
# What the commands call them, as in --with.
EXTRAS: Final = {x.removeprefix("has_"): x for x in OPTIONAL_FLAGS}
# Fields that came after files had been written; those say nothing of them where they are not set.
_LATER: Final = ("beta_sigmoid", "neg_eigval", "beta_fp32", "bound", "has_rate", "has_D", "has_z")
# Nats: a gate's lower bound may be no lower.
LEAST_BOUND: Final = -5.0
# What kernels are made for: rows of 16 bytes and more, and a state that a multiprocessor can hold.
DIMS: Final = {"K": range(16, 257, 8), "V": range(16, 513, 8)}
_PADDING: Final = {
    "K": "pad q, k, what their channels decay and erase by, and states with zeros to {wider} "
    "channels, and pass scale={size}**-0.5",
    "V": "pad v, w if there is one, and states with zeros to {wider} channels, and take "
    "o[..., :{size}]",
}
# Of `Problem.l2norm`: whatever its recurrence's ops do where they can.
WHERE_TAKEN: Final = cast("bool", None)
# Those that most models have: the accuracy suite takes every pair of them.
USUAL_DIMS: Final = (32, 64, 128)


@dataclass(frozen=True, order=True)
class Problem:
    """One recurrence with everything that is compiled in.

    The first seven fields and `bound` move the speed and are what tuned entries are filed under
    (`key`); the others only add or leave out arguments of the same kernels.
    """

    op: str = OPS[0]
    """The recurrence, one of `registry.OPS`."""
    K: int = 128
    """Key head dim."""
    V: int = 128
    """Value head dim."""
    dtype: str = "bf16"
    """dtype of q, k, v, o, and of the factors that erase and write, but for `beta_fp32`."""
    gate_dtype: str = "fp32"
    """dtype of g; fp32 where nothing decays."""
    l2norm: bool = WHERE_TAKEN
    """q and k are normalised inside the kernels; by default if these can (`normalises`)."""
    gate: str = "none"
    """`none`: g is the natural-log decay. `softplus`, `sigmoid`: g is its pre-activation."""
    has_A_log: bool = False
    has_dt_bias: bool = False
    varlen: bool = False
    """cu_seqlens given: B is 1 and holds N packed sequences."""
    initial_state: bool = False
    final_state: bool = False
    state_v_first: bool = False
    """Initial and final state are [N, H, V, K] instead of [N, H, K, V]."""
    beta_sigmoid: bool = False
    """beta is given before its sigmoid, which is taken inside the kernels."""
    neg_eigval: bool = False
    """That sigmoid counts twice: beta is in (0, 2), and eigenvalues may be negative."""
    beta_fp32: bool = False
    """beta and its gradient are fp32 beside a narrower q; False where q is fp32 itself."""
    bound: int = 0
    """Nats that a token's decay is at most, 1 to 5: the sigmoid gate's lower bound, rounded up (see
    `bound_of`). 0 where it is not known, and for other gates. Only `decay=bounded` counts on it."""
    has_rate: bool = False
    """A step decays by a rate times it; by itself, negative, without."""
    has_D: bool = False
    """D v is added to o."""
    has_z: bool = False
    """o is multiplied by silu(z), after that."""

    def __post_init__(self) -> None:
        _one_of("op", self.op, OPS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("gate_dtype", self.gate_dtype, DTYPES)
        member = recurrence_named(self.op)
        if member.activations == ("none",) and self.gate != "none":
            raise InputError(
                f"{self.op} has no gate in its kernels, so that gate must be none, but got "
                f"{self.gate!r}"
            )
        _one_of("gate", self.gate, member.activations)
        if self.l2norm is WHERE_TAKEN:
            object.__setattr__(self, "l2norm", member.normalises)
        for name, size in (("K", self.K), ("V", self.V)):
            check_head_dim(name, size)
        if self.gate == "none" and (self.has_A_log or self.has_dt_bias):
            raise InputError("A_log and dt_bias need use_gate_in_kernel=True")
        if self.gate == "softplus" and not self.has_A_log and "A_log" in member.named:
            instead = "; or give lower_bound" if member.bounded else ""
            raise InputError(f"the softplus gate needs A_log, got None{instead}")
        self._check_taken(member)
        if self.neg_eigval and not self.beta_sigmoid:
            raise InputError(
                "neg_eigval (allow_neg_eigval=True) needs beta_sigmoid "
                "(use_beta_sigmoid_in_kernel=True)"
            )
        if self.beta_fp32 and not member.has_factor:
            raise InputError(f"{self.op} has no beta that could be fp32 beside a narrower q")
        if self.beta_fp32 and self.dtype == "fp32":
            raise InputError(
                "beta_fp32 is of a beta beside a bf16 or fp16 q, but got dtype='fp32'; leave it out"
            )
        if self.bound not in range(int(-LEAST_BOUND) + 1):
            raise InputError(f"bound must be 0 to {-LEAST_BOUND:.0f} nats, but got {self.bound}")
        if self.bound and self.gate != "sigmoid":
            raise InputError(
                f"only the sigmoid gate has a bound, but got bound={self.bound} with "
                f"gate={self.gate!r}; leave it out, or use gate='sigmoid'"
            )

    def _check_taken(self, member: Recurrence) -> None:
        """Refuse what no call of the recurrence's ops could ask for."""
        if self.l2norm and not member.normalises:
            raise InputError(
                f"{self.op} does not normalise q and k in its kernels, but got l2norm=True: leave "
                "it out, and normalise them before"
            )
        if self.beta_sigmoid and not member.activates_beta:
            raise InputError(f"{self.op} has no beta whose sigmoid could be taken in the kernels")
        if self.state_v_first and not member.takes("state_v_first"):
            raise InputError(f"states of {self.op} are [N, HV, K, V]: leave state_v_first out")
        for name in ("rate", "D", "z"):
            if getattr(self, f"has_{name}") and name not in member.named:
                raise InputError(f"{self.op} takes no {name}: leave has_{name} out")
        if self.has_A_log and "A_log" not in member.named and member.activations != ("none",):
            raise InputError(f"{self.op} takes no A_log: leave has_A_log out")
        if member.decay is None and self.gate_dtype != "fp32":
            raise InputError(
                f"{self.op} has no decay, but got gate_dtype={self.gate_dtype!r}: leave it out"
            )

    @property
    def key(self) -> dict[str, str | int | bool]:
        """Readable key of the tuned entry: only what moves the speed; `bound` where it is known."""
        return {x: y for x, y in self.document.items() if x not in OPTIONAL_FLAGS}

    def dtype_of(self, role: str) -> str:
        """By the role of an input or of what kernels hand on, which may be a dtype itself."""
        factor = "fp32" if self.beta_fp32 else self.dtype
        roles = {"io": self.dtype, "gate": self.gate_dtype, "factor": factor}
        return roles.get(role, role)

    @property
    def extras(self) -> tuple[str, ...]:
        """Names in `EXTRAS` of the optional arguments that it has."""
        return tuple(name for name, field in EXTRAS.items() if getattr(self, field))

    @property
    def document(self) -> dict[str, Any]:
        """Every field, for files; later ones only where they are set."""
        return {x: y for x, y in asdict(self).items() if y or x not in _LATER}


_ELSEWHERE: Final = {
    "op": "which is an argument of its own",
    "dtype": "which is an argument of its own",
    "K": "which is called head_dim here",
    "V": "which is called value_dim here",
    "device": "for a GPU is named by target",
    "tune": "for `gdn2gen.tune` is called first, whose entries are taken",
}


def check_fields(kind: type, given: Iterable[str]) -> None:
    """Raises InputError for a keyword that no field of that kind of problem is called by."""
    known = [x.name for x in fields(kind) if x.init and x.name not in _ELSEWHERE]
    for name in given:
        if name not in known:
            why = f", {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
            raise InputError(
                f"no keyword {name!r} is taken{why}; further keywords are the fields of "
                f"{kind.__name__}: {', '.join(known)}"
            )


def untaken(op: str) -> frozenset[str]:
    """Fields of Problem that no call of a recurrence's ops can set."""
    member = recurrence_named(op)
    gated = member.activations != ("none",)
    taken = {
        ("l2norm",): member.normalises,
        ("gate_dtype",): member.decay is not None,
        ("gate", "bound", "has_dt_bias"): gated,
        ("has_A_log",): gated and "A_log" in member.named,
        ("has_rate",): "rate" in member.named,
        ("has_D",): "D" in member.named,
        ("has_z",): "z" in member.named,
        ("state_v_first",): member.takes("state_v_first"),
        ("beta_sigmoid", "neg_eigval"): member.activates_beta,
        ("beta_fp32",): member.has_factor,
    }
    return frozenset(name for names, given in taken.items() if not given for name in names)


def check_head_dim(name: str, size: int) -> None:
    """Raises UnsupportedError for a head dim, called K or V, that kernels are not made for."""
    dims = DIMS[name]
    if size in dims:
        return
    nearest = sorted(sorted(dims, key=lambda x: abs(x - size))[: 2 if size > dims.start else 1])
    nearest = [x for x in nearest if abs(x - size) < dims.step] or nearest[-1:]
    remedy = f"use {' or '.join(map(str, nearest))}"
    if size >= dims.stop or size <= 0:
        remedy = f"it may be {dims.start} at least and {dims.stop - 1} at most"
    elif nearest[-1] > size:
        remedy += f": {_PADDING[name].format(size=size, wider=nearest[-1])}"
    raise UnsupportedError(
        f"head dim {name}={size} has no kernels, which are made for multiples of {dims.step} from "
        f"{dims.start} to {dims.stop - 1}; {remedy}"
    )


def gate_parameters(op: str, gate: str) -> dict[str, bool]:
    """Fields of Problem for what a layer gives beside the tensors of every call, where it has the
    gate in the kernel: its parameters, and what follows a state, all that there are."""
    names = ("A_log", "dt_bias", "rate", "D", "z")
    parameters = (x for x in recurrence_named(op).optional if x.name in names)
    return {x.when: gate != "none" for x in parameters}


def check_lower_bound(lower_bound: float) -> None:
    """Raises InputError unless -5 <= lower_bound < 0, in nats."""
    if not LEAST_BOUND <= lower_bound < 0.0:
        raise InputError(f"`-5 <= lower_bound < 0` must hold, but got {lower_bound}")


def bound_of(lower_bound: float) -> int:
    """`Problem.bound` of a gate's lower bound: the least whole number of nats that covers it.

    Found by comparing: where `lower_bound` is a tracer's symbol, the result is a number for good.
    """
    for bound in range(1, int(-LEAST_BOUND) + 1):
        if lower_bound >= -bound:
            return bound
    return math.ceil(-float(lower_bound))


@dataclass(frozen=True, order=True)
class Regime:
    """Sizes known at run time; only these may be matched approximately."""

    tokens: int
    """Tokens over all sequences: B * T, or the T of a packed batch."""
    sequences: int
    """Independent sequences: B, or N of cu_seqlens."""
    heads: int
    """Value heads HV."""

    @property
    def key(self) -> dict[str, int]:
        return {"tokens": self.tokens, "sequences": self.sequences, "heads": self.heads}


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}")
