"""Outcome: what became of one request to a worker, or of one trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, TypeVar

Value = TypeVar("Value")

OK: Final = "ok"
WRONG: Final = "wrong result"
BUILD_ERROR: Final = "build error"
RESOURCES: Final = "resources"
OUT_OF_MEMORY: Final = "out of memory"
CUDA_ERROR: Final = "cuda error"
CRASHED: Final = "crashed"
TIMEOUT: Final = "timeout"
ERROR: Final = "error"
CANCELLED: Final = "cancelled"


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """A value, or the status and the details of why there is none."""

    status: str
    value: Value | None = None
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.status == OK

    @property
    def lasts(self) -> bool:
        """Whether the same request would fare the same: this program was neither stopped nor at
        fault.
        """
        return self.status not in (ERROR, CANCELLED)

    def get(self) -> Value:
        """The value of an outcome that is ok."""
        assert self.value is not None, f"no value: {self.reason}"
        return self.value

    @property
    def reason(self) -> str:
        """Status and detail in one line, as the ledger and the display show it."""
        return f"{self.status}: {self.detail}" if self.detail else self.status

    def failure(self) -> Outcome[Value]:
        """The same without a value, for handing on."""
        return Outcome(self.status, None, self.detail)
