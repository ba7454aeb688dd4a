"""The members of the family by name."""

from __future__ import annotations

from typing import Final

from gdn2gen.base.errors import InputError
from gdn2gen.family.gated_delta_rule import GATED_DELTA_RULE
from gdn2gen.family.gdn2 import GDN2
from gdn2gen.family.kda import KDA
from gdn2gen.family.recurrence import Recurrence

RECURRENCES: Final = {x.name: x for x in (GDN2, KDA, GATED_DELTA_RULE)}
OPS: Final = tuple(name for name, x in RECURRENCES.items() if x.plans)
"""Those that have kernels; the first one is meant where none is named."""
CHANNEL_OPS: Final = tuple(x for x in OPS if RECURRENCES[x].decays_by == "channel")
"""Those whose decay is inside the products that score pairs: a number for each channel."""
OUTSIDE_OPS: Final = tuple(x for x in OPS if x not in CHANNEL_OPS)
"""The others: their decay, if there is one, is a factor of what such products give."""
DECODING_OPS: Final = tuple(op for op in OPS if RECURRENCES[op].public.recurrent)
"""Those with an op over a few tokens, too."""


def recurrence_named(op: str) -> Recurrence:
    """Raises InputError, which lists what there is, for any other name."""
    if op not in RECURRENCES:
        raise InputError(f"op must be one of {tuple(RECURRENCES)}, but got {op!r}")
    return RECURRENCES[op]
