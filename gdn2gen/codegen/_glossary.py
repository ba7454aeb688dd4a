"""The lines on operands in the docstrings of kernels."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of symbol, shape, dtype and meaning, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, (*widths[:-1], 0))) for row in rows]
