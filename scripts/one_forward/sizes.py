"""Sizes and limits of the kernel."""

from typing import Final

K = V = 128
BT, BV = 32, 64
HALF = BT // 2
# of a thread that prepares: two channels, and a part of the tokens
PARTS: Final = 2
PART: Final = BT // PARTS
GROUP: Final = 128  # threads
GROUPS: Final = 2  # that prepare, in each of two programs
SLOTS: Final = 2 * GROUPS
COPIES: Final = 5  # tiles of a slot
WARPS: Final = 4  # of a group
RANGE: Final = 104.0  # factors stay within 2^RANGE of their anchor
BELOW: Final = -1e30  # an anchor below all
IO: Final = "bfloat16"
log2e, smallest_log2 = 1.4426950408889634, -150.0
