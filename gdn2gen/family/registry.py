"""The members of the family by name."""

from __future__ import annotations

from typing import Final

from gdn2gen.base.errors import InputError
from gdn2gen.family.gdn2 import GDN2
from gdn2gen.family.kda import KDA
from gdn2gen.family.recurrence import Recurrence

RECURRENCES: Final = {x.name: x for x in (GDN2, KDA)}
OPS: Final = tuple(name for name, x in RECURRENCES.items() if x.plans)
"""Those that have kernels; the first one is meant where none is named."""


def recurrence_named(op: str) -> Recurrence:
    """Raises InputError, which lists what there is, for any other name."""
    if op not in RECURRENCES:
        raise InputError(f"op must be one of {tuple(RECURRENCES)}, but got {op!r}")
    return RECURRENCES[op]
