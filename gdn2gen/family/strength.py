"""How strong a decay is: in how many chunks it takes a channel out of one anchor's reach."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor
from torch.nn import functional

from gdn2gen.base.decay import STRONG, WEAK

CHUNK: Final = 32
BITS: Final = 96
"""What kernels with later anchors hold at the first one: 2^-96 over a chunk of 32 tokens."""
STRONG_SHARE: Final = 0.1
"""Of chunks: from here on a model's decay is strong.

At train4k on an H200 the entries on file for weak decay take 1.12 ms with no such chunk, and 4.54
where all are (gdn2, K = V = 128); forms whose time hardly depends on it are predicted to take 1.41
and 2.05. Between these, if time grows with the share of chunks, they are even at a tenth.
"""


def strong_share(g: Tensor) -> Tensor:
    """The part of all chunks of 32 tokens of a head that have a channel which loses more than
    2^-96, of a decay g [B, T, heads, channels] in natural log: a number, on its device.

    What is left of a sequence at its end is a chunk of what it has."""
    g = functional.pad(g, (0, 0, 0, 0, 0, -g.shape[1] % CHUNK))
    lost = g.reshape(g.shape[0], -1, CHUNK, *g.shape[2:]).sum(2)
    share: Tensor = (lost < -BITS * math.log(2.0)).any(-1).double().mean()
    return share


def strength_of(share: float) -> str:
    """`weak` or `strong`, for calls to be told. What is not finite is strong."""
    return WEAK if share < STRONG_SHARE else STRONG
