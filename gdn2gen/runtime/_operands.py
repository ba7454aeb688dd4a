"""Tensors as kernels read them: row after row, from an address that TMA takes, nothing lazy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod
from operator import or_
from typing import Final

import torch
from torch import Tensor

from gdn2gen.kernels.rows import FARTHEST
from gdn2gen.runtime.layout import strides_of

ALIGNMENT: Final = 16
"""Bytes. TMA reads from multiples of it alone, and Triton compiles another kernel for the rest."""


def readable(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """`tensors`, with a copy of each one that a kernel could not read as it lies in memory.

    That is a view with strides or at an odd offset, and one whose values torch negates, or fills
    with zeros, only where it reads them. Takes real tensors: fakes have no address. 2.5 us for ten
    on a host of 2.1 GHz, where their `contiguous()` takes 0.8.
    """
    addresses = [*map(Tensor.data_ptr, tensors)]
    if (
        reduce(or_, addresses, 0) % ALIGNMENT == 0
        and all(addresses)
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
    ):
        return tensors
    return [x if _is_readable(x) else _copy(x) for x in tensors]


def _is_readable(x: Tensor) -> bool:
    # no address: of no elements, or of zeros that torch did not write down
    in_place = x.data_ptr() % ALIGNMENT == 0 and (x.data_ptr() != 0 or x.numel() == 0)
    return in_place and x.is_contiguous() and not x.is_neg()


def row_between(x: Tensor, unit: int) -> int:
    """How far the rows of x [B, T, ...] lie apart, in elements, where they do and kernels read them
    so; else 0.

    Rows are then of one piece each, as far from each other everywhere, by multiples of `unit`, and
    no farther than kernels can count in 32 bits.
    """
    if x.is_contiguous() or x.is_neg():
        return 0
    try:
        address = x.data_ptr()
    except RuntimeError:  # a wrapper of a transform that ended
        return 0
    if not address or address % ALIGNMENT:
        return 0
    B, T, *heads = x.shape
    row = x.stride(0) if T == 1 else x.stride(1)
    even = B == 1 or T == 1 or x.stride(0) == T * row
    in_one_piece = x.stride()[2:] == strides_of(tuple(heads))
    apart = even and in_one_piece and row % unit == 0
    return row if apart and prod(heads) <= row <= FARTHEST else 0


def _copy(x: Tensor) -> Tensor:
    return torch.clone(x, memory_format=torch.contiguous_format)
