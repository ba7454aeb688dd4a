"""What reaches a kernel is plain memory: whatever else a tensor may be is copied, and only that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gdn2gen.runtime._operands import ALIGNMENT, readable

VIEWS: dict[str, Callable[[], Tensor]] = {
    "an odd offset": lambda: torch.arange(9.0)[1:],
    "an offset of 8 bytes": lambda: torch.arange(9.0)[2:],
    "one value further in 16 bits": lambda: torch.arange(9).bfloat16()[1:],
    "strides": lambda: torch.arange(6.0).view(2, 3).T,
    "an expanded scalar": lambda: torch.ones(()).expand(3, 2),
    "a lazy sign": lambda: torch._neg_view(torch.arange(8.0)),
    "the imaginary part of a conjugate": lambda: (
        torch.view_as_complex(torch.arange(8.0).view(4, 2)).conj().imag
    ),
    "zeros that are not written down": lambda: torch._efficientzerotensor((2, 3)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_a_kernel_cannot_read_is_copied(name: str) -> None:
    x, plain = VIEWS[name](), torch.ones(4)
    before, found, after = readable([plain, x, plain])
    assert before is plain and after is plain
    assert found is not x
    assert found.is_contiguous() and not found.is_neg()
    assert found.data_ptr() and found.data_ptr() % ALIGNMENT == 0
    assert torch.equal(torch.from_dlpack(found), x + 0)


def test_what_it_can_read_is_not() -> None:
    tensors = [torch.ones(3), torch.ones(2, 3), torch.arange(8.0)[4:], torch.ones(3, 2)[:2]]
    assert readable(tensors) is tensors
    empty = torch.empty(0, 3)
    assert [*map(id, readable([*tensors, empty]))] == [*map(id, [*tensors, empty])]
    assert not readable([])
