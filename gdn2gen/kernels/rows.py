"""Rows of a token that lie apart in memory, as those of a slice of a projection do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# Distances of rows and slots, and channels of a layer's parts, are given to kernels in as many
# elements: 16 bytes of bf16, so that vector loads know all that they want of an address.
UNIT: Final = 8

# Elements between rows up to which kernels over chunks, and convolutions, take them as they lie.
# Inside a tile they count tokens in 32 bits, times this: of 64 tokens 2^31 is reached at 33 M, in a
# run of 256 and its taps at 8 M. Views so far apart are none that anybody makes on purpose.
FARTHEST: Final = 2**22


def row_of(name: str) -> str:
    """The scalar that says how far two tokens of an operand lie apart."""
    return f"{name}_row"


def is_row_wise(dims: str) -> bool:
    """Whether an operand of these dims has a row for each token."""
    return dims.startswith("B T ")


def unit_of(dims: Sequence[str]) -> int:
    """What the distance of an operand's rows is given in: of numbers, which no vector load reads,
    in elements."""
    return UNIT if len(dims) > 3 else 1
