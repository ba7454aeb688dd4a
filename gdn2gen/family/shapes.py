"""The named shapes that tuning and benchmarks speak of, and their parser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from gdn2gen.base.errors import InputError
from gdn2gen.family.problem import Regime


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens and H heads; with `cu_seqlens`, one packed batch (B = 1).

    Of q and k there are as many heads, or `groups`.
    """

    name: str
    B: int
    T: int
    H: int
    cu_seqlens: tuple[int, ...] | None = None
    groups: int | None = None

    @property
    def key_heads(self) -> int:
        """Heads of q and k."""
        return self.H if self.groups is None else self.groups

    @property
    def regime(self) -> Regime:
        sequences = self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return Regime(tokens=self.B * self.T, sequences=sequences, heads=self.H)


SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape("train4k", 4, 4096, 16),
        Shape("train2k", 8, 2048, 16),
        Shape("long16k", 1, 16384, 16),
        Shape("long32k", 1, 32768, 16),
        Shape("wide8k", 1, 8192, 64),
        Shape("few8k", 1, 8192, 8),
        Shape("varlen8k", 1, 8192, 64, (0, 1300, 1847, 3895, 4858, 5129, 8192)),
    )
}
"""Those that every member is tuned and measured at."""
NAMED_SHAPES: Final = SHAPES | {"mamba4k": Shape("mamba4k", 4, 4096, 64, groups=1)}
"""And those of members whose models have others (`Recurrence.usual`)."""

_EXPECTED: Final = (
    f"give one of {', '.join(NAMED_SHAPES)}, or BxTxH such as 4x4096x16, or BxTxH/G such as "
    "4x4096x64/1 with G heads of q and k"
)


def parse_shapes(text: str) -> list[Shape]:
    """Parse a comma-separated list of names (`train4k`) and sizes (`BxTxH`, as in 4x4096x16).

    Raises InputError for a word that is neither, and where there is none.
    """
    found = [_parse_shape(word.strip()) for word in text.split(",") if word.strip()]
    if not found:
        raise InputError(f"no shape is named in {text!r}; {_EXPECTED}")
    return found


def shape_of(regime: Regime) -> Shape | None:
    """A shape of these sizes: a named one, or BxTxH; None for an unnamed packed batch."""
    for shape in NAMED_SHAPES.values():
        if shape.regime == regime:
            return shape
    if not regime.sequences or regime.tokens % regime.sequences:
        return None
    B, T, H = regime.sequences, regime.tokens // regime.sequences, regime.heads
    return Shape(f"{B}x{T}x{H}", B, T, H)


def _parse_shape(word: str) -> Shape:
    if word in NAMED_SHAPES:
        return NAMED_SHAPES[word]
    match = re.fullmatch(r"([0-9]{1,12})x([0-9]{1,12})x([0-9]{1,12})(?:/([0-9]{1,12}))?", word)
    if match is None or 0 in (sizes := [int(x) for x in match.groups() if x is not None]):
        raise InputError(f"unknown shape {word!r}; {_EXPECTED}")
    B, T, H, *groups = sizes
    if groups and H % groups[0]:
        raise InputError(f"{H} heads cannot be shared out to {groups[0]} groups, as in {word!r}")
    return Shape(word, B, T, H, groups=groups[0] if groups else None)
