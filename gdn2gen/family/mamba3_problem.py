"""Mamba3Problem: what surrounds Mamba-3's scan, with everything that is compiled in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final

from gdn2gen.base.errors import InputError
from gdn2gen.family.parts import CHANNELS_STEP, PartProblem
from gdn2gen.family.problem import DTYPES, check_fields

STATE_SIZES: Final = range(16, 257, CHANNELS_STEP)
"""Channels of q and k, as the scan takes them."""
HEAD_DIMS: Final = range(16, 513, CHANNELS_STEP)
"""Channels of v."""
MAMBA3: Final = "mamba3"
"""What commands call it: its op over whole sequences, and all that is around its scan."""
PART_OPS: Final = (MAMBA3,)
"""Ops of which kernels are tuned that are in no plan."""
STEP: Final = "mamba3_siso_step"
"""The op of one token, which is verified by itself."""


@dataclass(frozen=True, order=True, kw_only=True)
class Mamba3Problem(PartProblem):
    """What comes before and after the scan of Mamba-3 (`mamba3_form`)."""

    op: ClassVar[str] = MAMBA3
    weight_dtype: str = "fp32"
    """dtype of biases and D."""
    state_size: int = 128
    head_dim: int = 64
    angles: int = 32
    """Pairs of channels that are rotated."""
    trap_dtype: str = "fp32"
    angle_dtype: str = "fp32"
    skip: bool = False
    """D given."""
    gate: bool = False
    """Z given."""
    carried: bool = False
    """Input states given."""
    packed: bool = False
    """cu_seqlens given: B is 1 and holds N packed sequences."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, sizes in (("state_size", STATE_SIZES), ("head_dim", HEAD_DIMS)):
            if getattr(self, name) not in sizes:
                raise InputError(
                    f"{name} must be a multiple of {sizes.step} from {sizes.start} to "
                    f"{sizes[-1]}, but got {getattr(self, name)!r}"
                )
        if self.angles not in range(self.state_size // 2 + 1):
            raise InputError(
                f"angles must be up to {self.state_size // 2}, half of state_size, but got "
                f"{self.angles!r}"
            )
        for name in ("trap_dtype", "angle_dtype"):
            if getattr(self, name) not in DTYPES:
                raise InputError(
                    f"{name} must be one of {', '.join(DTYPES)}, but got {getattr(self, name)!r}"
                )

    @property
    def K(self) -> int:
        """What the scan calls the channels of q and k."""
        return self.state_size

    @property
    def V(self) -> int:
        """What the scan calls the channels of v."""
        return self.head_dim

    @property
    def has_z(self) -> bool:
        """As other members with a gate of their output say it."""
        return self.gate

    @property
    def document(self) -> dict[str, Any]:
        """For files: what it is by the names of other members' problems, and its own fields."""
        common = {"op": self.op, "K": self.K, "V": self.V, "dtype": self.dtype}
        own = {x.name: getattr(self, x.name) for x in fields(self)}
        common |= {"gate_dtype": "fp32", "l2norm": False, "varlen": self.packed}
        return common | own | {"has_z": self.gate}

    @property
    def varlen(self) -> bool:
        return self.packed

    @property
    def rotated(self) -> bool:
        """Whether there are angles."""
        return self.angles > 0

    @property
    def carries_angles(self) -> bool:
        return self.carried and self.rotated

    def dtype_of(self, role: str) -> str:
        of_numbers = {"trap": self.trap_dtype, "angle": self.angle_dtype}
        return of_numbers.get(role) or super().dtype_of(role)


def usual_mamba3_problem(
    head_dim: int, value_dim: int | None, dtype: str, fields: dict[str, Any]
) -> Mamba3Problem:
    """`head_dim` is N, `value_dim` P (N if None); half of the channels are rotated, and D and Z
    given, unless `fields`, those of `Mamba3Problem`, say otherwise.

    Raises InputError for others.
    """
    usual = {"angles": head_dim // 4, "skip": True, "gate": True}
    P = head_dim if value_dim is None else value_dim
    given: dict[str, Any] = {"dtype": dtype, "state_size": head_dim, "head_dim": P}
    check_fields(Mamba3Problem, (x for x in fields if x not in given))
    return Mamba3Problem(**given | usual | fields)
