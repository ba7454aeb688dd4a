"""A head dim in slices whose widths are powers of two, as the tiles of products have to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Rows and columns of a product at least.
NARROWEST: Final = 16
# Of one head dim: a third slice costs every product once more, and 16 channels cost what 32 do.
_MOST: Final = 2


@dataclass(frozen=True)
class Slice:
    """Channels from `start` on, `width` of them; the last slice may reach past the head dim."""

    start: int
    width: int


def covering(size: int) -> int:
    """The widest tile of a head dim: a power of two that covers it, and 32 where it is less."""
    return 1 << (max(size, 32) - 1).bit_length()


def slices_of(size: int, widest: int = 128) -> tuple[Slice, ...]:
    """Slices that cover `size` channels, none wider than `widest`: 96 as 64 + 32, 112 as 128.

    Beside the widest ones at most two, and as few channels more than `size` as these allow.
    """
    found: list[Slice] = []
    start = 0
    while size - start > widest:
        start += widest
    whole = [Slice(x, widest) for x in range(0, start, widest)]
    while start < size:
        left = size - start
        width = NARROWEST
        while width * 2 <= left:
            width *= 2
        if len(found) == _MOST - 1:  # the last one covers all that is left
            while width < left:
                width *= 2
        found.append(Slice(start, width))
        start += width
    # 64 + 64 is 128
    while len(found) > 1 and found[-1].width == found[-2].width:
        found[-2:] = [Slice(found[-2].start, 2 * found[-2].width)]
    return (*whole, *found)
