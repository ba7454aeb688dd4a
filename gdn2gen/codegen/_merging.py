"""merge_kernel of the parallel scans, written so that a step of its chain is shorter.

Its products of fp32 are three of halves in bf16 ("bf16x3"). Triton rounds the halves, and every
second one costs an F2F: 72 of a warp's 550 instructions, of which a multiprocessor takes 16 lanes
a cycle, so 1,150 cycles of a step, by count. Halves of transitions that are cut take an AND.
Those of the state are rounded, for the product of the low halves is left out, and of two cut ones
it would have the sign of the whole: 1e-5 of it a step. The three products have sums of their own,
so that none waits for another, and transitions are loaded two steps ahead instead of one.
"""

from __future__ import annotations

import re
from typing import Final

from gdn2gen.base.errors import TemplateError

_LOOP: Final = r"for i_m in tl\.range\(1, NS - 1, num_stages=2\):\n"
_PRODUCT: Final = (
    r'( +)b_S = tl\.dot\(b_S, b_M, (tl\.load\(p_next[^\n]*\)), input_precision="\w+"\)\n'
)
_CUT: Final = r"""\1# halves without F2F: M's are cut, those of S, which are few, rounded
\1M_high = (b_M.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
\1M_low = (b_M - M_high).to(tl.bfloat16)
\1S_high = b_S.to(tl.int32, bitcast=True) + 32768 & -65536
\1S_high = S_high.to(tl.float32, bitcast=True)
\1S_low = (b_S - S_high).to(tl.bfloat16)
\1M_high, S_high = M_high.to(tl.bfloat16), S_high.to(tl.bfloat16)
\1b_S = tl.dot(S_low, M_high) + tl.dot(S_high, M_low)
\1b_S += tl.dot(S_high, M_high, \2)
"""


def merging(source: str, ahead: int) -> str:
    """A module's text with that product, and loads so many steps ahead."""
    stages = f"for i_m in tl.range(1, NS - 1, num_stages={ahead + 1}):\n"
    for pattern, text in ((_LOOP, stages), (_PRODUCT, _CUT)):
        source, count = re.subn(pattern, text, source)
        if count != 1:
            raise TemplateError(f"merge_kernel has {count} places, not one, that read {pattern!r}")
    return source
