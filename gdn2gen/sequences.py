"""Packed sequences: checks of cu_seqlens, and the chunk tables that the kernels read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gdn2gen.errors import InputError


@dataclass(frozen=True)
class ChunkTables:
    """Where chunks lie in a packed batch of T tokens and N sequences, for chunks of BT tokens."""

    chunk_table: Tensor
    """[NT, 2] int32: first token and number of tokens of each chunk; 0 tokens past the last one."""
    chunk_offsets: Tensor
    """[N+1] int32: first chunk of each sequence."""
    cu_seqlens: Tensor
    """[N+1] int32."""


def count_chunks(tokens: int, sequences: int, BT: int, packed: bool) -> int:
    """Chunks to launch. `tokens` is T, per sequence or over the packed batch.

    For a packed batch this is an upper bound that needs no look at cu_seqlens on the device: every
    sequence adds at most one chunk that is not full.
    """
    if packed:
        return tokens // BT + sequences
    return sequences * -(-tokens // BT)


# Keyed by the tensor itself and forgotten with it; its version tells whether it was written to.
_tables: Any = WeakTensorKeyDictionary()
_checked: Any = WeakTensorKeyDictionary()


def chunk_tables(cu_seqlens: Tensor, tokens: int, BT: int) -> ChunkTables:
    """Tables for the kernels, made on the device of `cu_seqlens`; kept as long as it lives."""
    key = (cu_seqlens._version, tokens, BT)
    known = _tables.get(cu_seqlens)
    if known is None or known[0] != key:
        known = (key, _make_tables(cu_seqlens.to(torch.int64), tokens, BT))
        _tables[cu_seqlens] = known
    tables: ChunkTables = known[1]
    return tables


def _make_tables(cu_seqlens: Tensor, tokens: int, BT: int) -> ChunkTables:
    sequences = cu_seqlens.numel() - 1
    lengths = cu_seqlens.diff()
    offsets = torch.nn.functional.pad(((lengths + BT - 1) // BT).cumsum(0), (1, 0))
    chunks = torch.arange(count_chunks(tokens, sequences, BT, True), device=cu_seqlens.device)
    owner = torch.searchsorted(offsets[1:], chunks, right=True).clamp(max=sequences - 1)
    first = (chunks - offsets[owner]) * BT
    rows = (lengths[owner] - first).clamp(0, BT)
    table = torch.stack((cu_seqlens[owner] + first, rows), 1)
    return ChunkTables(
        table.to(torch.int32).contiguous(), offsets.to(torch.int32), cu_seqlens.to(torch.int32)
    )


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, cpu: Tensor | None = None) -> None:
    """Raise InputError unless cu_seqlens rises from 0 to `tokens`.

    Reads the values once per tensor (a synchronisation, unless `cpu`, its copy on the host, is
    given), and again when the tensor was written to.
    """
    if torch.compiler.is_compiling():
        return  # values are not known while a graph is traced
    state = (cu_seqlens._version, tokens)
    if _checked.get(cu_seqlens) == state:
        return
    values = (cu_seqlens if cpu is None else cpu).tolist()
    if values[0] != 0 or values[-1] != tokens:
        raise InputError(
            f"cu_seqlens must start at 0 and end at T={tokens}, "
            f"but starts at {values[0]} and ends at {values[-1]}"
        )
    for index, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            raise InputError(
                f"cu_seqlens must not fall, but cu_seqlens[{index}]={start} "
                f"and cu_seqlens[{index + 1}]={end}"
            )
    _checked[cu_seqlens] = state
