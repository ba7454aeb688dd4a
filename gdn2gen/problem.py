"""Problem: what is compiled into a kernel. Regime: what is known only at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gdn2gen.errors import InputError, UnsupportedError

OPS: Final = ("gdn2",)
DTYPES: Final = ("bf16", "fp16", "fp32")
GATES: Final = ("none", "softplus", "sigmoid")
# Fields of Problem that add arguments to the kernels and are not tuned for.
OPTIONAL_FLAGS: Final = (
    "has_A_log",
    "has_dt_bias",
    "varlen",
    "initial_state",
    "final_state",
    "state_v_first",
)
# Verified on hardware; every other size is refused until a later issue verifies it.
HEAD_DIMS: Final = (32, 64, 128)


@dataclass(frozen=True, order=True)
class Problem:
    """One recurrence with everything that is compiled in.

    The first seven fields move the speed and are what tuned entries are filed under (`key`); the
    others only add or leave out arguments of the same kernels.
    """

    op: str = "gdn2"
    K: int = 128
    """Key head dim."""
    V: int = 128
    """Value head dim."""
    dtype: str = "bf16"
    """dtype of q, k, v, b, w and o."""
    gate_dtype: str = "fp32"
    """dtype of g."""
    l2norm: bool = True
    """q and k are normalised inside the kernels."""
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

    def __post_init__(self) -> None:
        _one_of("op", self.op, OPS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("gate_dtype", self.gate_dtype, DTYPES)
        _one_of("gate", self.gate, GATES)
        for name, size in (("K", self.K), ("V", self.V)):
            if size not in HEAD_DIMS:
                raise UnsupportedError(
                    f"head dim {name}={size} was not verified; use one of {HEAD_DIMS}"
                )
        if self.gate == "none" and (self.has_A_log or self.has_dt_bias):
            raise InputError("A_log and dt_bias need use_gate_in_kernel=True")
        if self.gate == "softplus" and not self.has_A_log:
            raise InputError("the softplus gate needs A_log, got None; or give lower_bound")

    @property
    def key(self) -> dict[str, str | int | bool]:
        """Readable key of the tuned entry: only what moves the speed."""
        return {
            "op": self.op,
            "K": self.K,
            "V": self.V,
            "dtype": self.dtype,
            "gate_dtype": self.gate_dtype,
            "l2norm": self.l2norm,
            "gate": self.gate,
        }


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
        raise InputError(f"{name} must be one of {allowed}, but got {value!r}")
