"""Packed sequences: how many chunks they may have, and checks of cu_seqlens on the host."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from gdn2gen.base.errors import InputError


def count_chunks(tokens: int, sequences: int, BT: int, packed: bool) -> int:
    """Chunks to launch. `tokens` is T, per sequence or over the packed batch.

    For a packed batch this is an upper bound that needs no look at cu_seqlens on the device: every
    sequence adds at most one chunk that is not full.
    """
    if packed:
        return tokens // BT + sequences
    return sequences * -(-tokens // BT)


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, cpu: Tensor | None = None) -> None:
    """Raise InputError unless cu_seqlens rises from 0 to `tokens`, as far as the host knows.

    On a GPU only `cpu`, its copy on the host, is looked at: reading the values there would wait for
    the GPU in every call. The kernels hold whatever they are (`chunk_tables.py.jinja`).
    """
    if cu_seqlens.device.type == "cpu":
        values = cu_seqlens.tolist()
        copied = values if cpu is None else cpu.tolist()
        if copied != values:
            raise InputError(
                f"cu_seqlens_cpu must be a copy of cu_seqlens, {_short(values)}, "
                f"but got {_short(copied)}"
            )
    elif cpu is not None:
        values = cpu.tolist()
    else:
        return
    if values[0] != 0 or values[-1] != tokens:
        raise InputError(
            f"cu_seqlens must start at 0 and end at T={tokens}, "
            f"but starts at {values[0]} and ends at {values[-1]}"
        )
    if values == sorted(values):
        return
    for index, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            raise InputError(
                f"cu_seqlens must not fall, but cu_seqlens[{index}]={start} "
                f"and cu_seqlens[{index + 1}]={end}"
            )


def _short(values: Sequence[int]) -> str:
    return str(values) if len(values) <= 8 else f"{values[:4]}...{values[-2:]}"
