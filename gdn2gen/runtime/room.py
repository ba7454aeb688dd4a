"""Where gradients of several tensors lie, so that one matrix product takes them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from gdn2gen.kernels.rows import UNIT
from gdn2gen.runtime.passes import empty


@dataclass(frozen=True)
class Room:
    """Columns of one matrix for the gradients of the tensors of a convolution, and of more after
    them: who made these tensors, by one function of autograd, finds it as `room` of that function,
    and multiplies the matrix as it is."""

    offsets: tuple[int, ...]
    widths: tuple[int, ...]
    columns: int

    @classmethod
    def of(cls, widths: Sequence[int], more: int) -> Room:
        """Rows begin 16 bytes apart, if the widths are multiples of 8."""
        ends = [*accumulate(widths, initial=0)]
        return cls(tuple(ends[:-1]), tuple(widths), -(-(ends[-1] + more) // UNIT) * UNIT)

    def empty(self, B: int, T: int, like: Tensor) -> list[Tensor]:
        """The gradients, yet to be written."""
        whole = empty((B, T, self.columns), like.dtype, like.device)
        spans = zip(self.offsets, self.widths, strict=True)
        return [whole[..., begin : begin + width] for begin, width in spans]

    def holding(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """The matrix of which `gradients` are what `empty` gave; None if they lie elsewhere."""
        first = gradients[0] if gradients else None
        if first is None or first.dim() != 3:
            return None
        B, T, _ = first.shape
        size = B * T * self.columns * first.element_size()
        strides = (T * self.columns, self.columns, 1)
        start = first.untyped_storage().data_ptr()
        for x, offset in zip(gradients, self.offsets, strict=True):
            if x is None or x.stride() != strides or x.storage_offset() != offset:
                return None
            stored = x.untyped_storage()
            if stored.data_ptr() != start or stored.nbytes() != size:
                return None
        return first.as_strided((B * T, self.columns), strides[1:], 0)


def room_of(x: Sequence[Tensor]) -> Room | None:
    """Where the function that made all of x wants its gradients, if it does."""
    node: Any = x[0].grad_fn
    room = getattr(node, "room", None)
    if not isinstance(room, Room) or len(room.offsets) != len(x):
        return None
    own = all([part.grad_fn is node and part.output_nr == i for i, part in enumerate(x)])
    return room if own else None
