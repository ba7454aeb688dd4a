"""What a kernel is made for: a recurrence (`Problem`), or a part of a layer (`PartProblem`)."""

from __future__ import annotations

from typing import Protocol


class Compiled(Protocol):
    """Everything that is compiled into a kernel."""

    def __hash__(self) -> int:
        """Kernels are looked up by it."""

    @property
    def op(self) -> str:
        """What is computed."""

    @property
    def dtype(self) -> str:
        """dtype of the tensors that hold most of the bytes."""

    @property
    def varlen(self) -> bool:
        """cu_seqlens given: B is 1 and holds N packed sequences."""

    def dtype_of(self, role: str) -> str:
        """By the role of an input or of what kernels hand on, which may be a dtype itself."""
