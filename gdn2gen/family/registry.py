"""The members of the family by name."""

from __future__ import annotations

from typing import Final

from gdn2gen.base.errors import InputError
from gdn2gen.family.delta_rule import DELTA_RULE
from gdn2gen.family.gated_delta_rule import GATED_DELTA_RULE
from gdn2gen.family.gdn2 import GDN2
from gdn2gen.family.gla import GLA
from gdn2gen.family.kda import KDA
from gdn2gen.family.mamba2 import MAMBA2
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.simple_gla import SIMPLE_GLA

_MEMBERS: Final = (GDN2, KDA, GATED_DELTA_RULE, DELTA_RULE, GLA, SIMPLE_GLA, MAMBA2)
RECURRENCES: Final = {x.name: x for x in _MEMBERS}
OPS: Final = tuple(name for name, x in RECURRENCES.items() if x.plans)
"""Those that have kernels; the first one is meant where none is named."""
CHANNEL_OPS: Final = tuple(x for x in OPS if RECURRENCES[x].decays_by == "channel")
"""Those whose decay is inside the products that score pairs: a number for each channel."""
STEP_OPS: Final = tuple(x for x in OPS if RECURRENCES[x].stepped)
"""Those whose decay is a rate times what is written: their heads share the scores of a group."""
OUTSIDE_OPS: Final = tuple(x for x in OPS if x not in (*CHANNEL_OPS, *STEP_OPS))
"""The others: their decay, if there is one, is a factor of what such products give."""
LINEAR_OPS: Final = tuple(x for x in OPS if not RECURRENCES[x].erases)
"""Those that only write: they have no scores of keys with keys, and nothing to invert."""
DECODING_OPS: Final = tuple(op for op in OPS if RECURRENCES[op].public.recurrent)
"""Those with an op over a few tokens, too."""


def recurrence_named(op: str) -> Recurrence:
    """Raises InputError, which lists what there is, for any other name."""
    if op not in RECURRENCES:
        raise InputError(f"op must be one of {', '.join(RECURRENCES)}, but got {op!r}")
    return RECURRENCES[op]
