"""Layout: where the tensors that a forward saves lie in one buffer, by sizes that may be symbols.

Tracers see one tensor, whose size is a formula of the sizes of the call, so that what they compiled
for one length serves every other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Tensor

from gdn2gen.family.problem import Problem
from gdn2gen.kernels.schedule import Buffer
from gdn2gen.kernels.stage import Operand
from gdn2gen.runtime.dtypes import TORCH_DTYPE

# Bytes: what loads of whole tiles ask of an address, and then some.
_ALIGNMENT: Final = 128


@dataclass(frozen=True)
class Layout:
    """The pieces of a buffer of `nbytes` bytes: first byte, bytes, dtype and shape, by name."""

    nbytes: int
    pieces: Mapping[str, tuple[int, int, torch.dtype, tuple[int, ...]]]

    @classmethod
    def of(cls, operands: Iterable[Operand], problem: Problem, sizes: Mapping[str, int]) -> Layout:
        # never empty: tracers compile anew for sizes of 0 and 1
        end = _ALIGNMENT
        pieces = {}
        for operand in operands:
            buffer = Buffer.of(operand, problem)
            shape, dtype = buffer.shape(sizes), TORCH_DTYPE[buffer.dtype]
            nbytes = prod(shape) * dtype.itemsize
            pieces[operand.name] = (end, nbytes, dtype, shape)
            end = end + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(end, pieces)

    def split(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors in `buffer` [nbytes] uint8, by name; they share its memory."""
        return {
            name: buffer[start : start + nbytes].view(dtype).view(shape)
            for name, (start, nbytes, dtype, shape) in self.pieces.items()
        }


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor; dims of 0 count as 1, as in torch."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * max(size, 1))
    return tuple(strides[::-1])
