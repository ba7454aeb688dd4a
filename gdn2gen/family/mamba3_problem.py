"""Mamba3Problem: what surrounds Mamba-3's scan, with everything that is compiled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from gdn2gen.base.errors import InputError
from gdn2gen.family.parts import CHANNELS_STEP, PartProblem
from gdn2gen.family.problem import DTYPES

STATE_SIZES: Final = range(16, 257, CHANNELS_STEP)
"""Channels of q and k, as the scan takes them."""
HEAD_DIMS: Final = range(16, 513, CHANNELS_STEP)
"""Channels of v."""


@dataclass(frozen=True, order=True, kw_only=True)
class Mamba3Problem(PartProblem):
    """What comes before and after the scan of Mamba-3 (`mamba3_form`)."""

    op: ClassVar[str] = "mamba3"
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
                raise InputError(f"{name} must be one of {sizes}, but got {getattr(self, name)!r}")
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
