"""Every stage by its name: those of plans, over chunks, the one over tokens, those of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gdn2gen.kernels.blocks import BLOCK_STAGES
from gdn2gen.kernels.gradients import GRAD_KEY, GRAD_VALUE
from gdn2gen.kernels.groups import (
    GRAD_GROUP,
    PREPARE_GROUP,
    RESCAN_GROUP,
    REVERSE_SCAN_GROUP,
    SCAN_GROUP,
)
from gdn2gen.kernels.mamba3 import MAMBA3_STAGES
from gdn2gen.kernels.mamba3_chunks import MAMBA3_CHUNK_STAGES
from gdn2gen.kernels.mamba3_reverse_scan import MAMBA3_REVERSE_SCAN, MAMBA3_SUMS
from gdn2gen.kernels.mamba3_scan import MAMBA3_SCAN
from gdn2gen.kernels.mamba3_turning_scan import TURNING_STAGES
from gdn2gen.kernels.parts import PART_STAGES
from gdn2gen.kernels.prepare import PREPARE, REPREPARE, SUM_DECAY
from gdn2gen.kernels.recurrent import RECURRENT
from gdn2gen.kernels.scans import RESCAN, REVERSE_SCAN, SCAN, SCAN_STATES
from gdn2gen.kernels.stage import Stage
from gdn2gen.kernels.stream_parts import STREAM_STAGES
from gdn2gen.kernels.transitions import TRANSITION_STAGES
from gdn2gen.kernels.whole import (
    FORWARD,
    FORWARD_BLOCKS1,
    FORWARD_BLOCKS2,
    FORWARD_OUTSIDE,
    FORWARD_OUTSIDE_BLOCKS2,
)

_ALL = (
    PREPARE, REPREPARE, SUM_DECAY,
    SCAN, SCAN_STATES, RESCAN, REVERSE_SCAN,
    GRAD_VALUE, GRAD_KEY,
    PREPARE_GROUP, SCAN_GROUP, RESCAN_GROUP, REVERSE_SCAN_GROUP, GRAD_GROUP,
    *BLOCK_STAGES,
    FORWARD, FORWARD_BLOCKS1, FORWARD_BLOCKS2, FORWARD_OUTSIDE, FORWARD_OUTSIDE_BLOCKS2,
    *TRANSITION_STAGES,
)  # fmt: skip
STAGES: Final[Mapping[str, Stage]] = {stage.name: stage for stage in _ALL}
"""Those that plans are chains of."""
EVERY_STAGE: Final[Mapping[str, Stage]] = {
    **STAGES,
    RECURRENT.name: RECURRENT,
    **{
        x.name: x
        for x in (*PART_STAGES, *STREAM_STAGES, *MAMBA3_STAGES, *MAMBA3_CHUNK_STAGES, MAMBA3_SCAN)
    },
    **{x.name: x for x in (MAMBA3_REVERSE_SCAN, MAMBA3_SUMS, *TURNING_STAGES)},
}
"""And that of the mode `recurrent`, which takes `DecodingProblem`s, and those of `PartProblem`s."""
