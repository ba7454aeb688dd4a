"""The reference as the public ops are called: tensors by name or in order, options by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gdn2gen.family import reference
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.registry import recurrence_named


@dataclass(frozen=True)
class ReferenceOp:
    """One form of the reference of one recurrence."""

    op: str
    form: Callable[..., tuple[Tensor, Tensor]] = reference.chunk

    def __str__(self) -> str:
        return f"{self.op}-{self.form.__name__}"

    @property
    def recurrence(self) -> Recurrence:
        return recurrence_named(self.op)

    def __call__(self, *tensors: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        names = [x.name for x in self.recurrence.inputs]
        given = dict(zip(names, tensors, strict=False))
        given |= {name: arguments.pop(name) for name in names if name in arguments}
        return self.form(self.recurrence, given, **arguments)
