"""Keys of known calls: all that their checks and their kernels depend on, but for values.

First without what the tensors are, which guards tell faster (`runtime.kinds`); then with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import Any, Final

from torch import Tensor

from gdn2gen.runtime.arguments import device_of
from gdn2gen.runtime.signature import Signature
from gdn2gen.store.verified import current_look

# A number that is equal may be of a type that is refused: True is 1.
_NUMBERS: Final = frozenset({float, int, NoneType})


def short_key(
    signature: Signature,
    tensors: tuple[Tensor | None, ...],
    flags: tuple[bool, ...],
    numbers: tuple[Any, ...],
    around: tuple[Any, ...],
) -> tuple[Any, ...] | None:
    """Of a call, but for what its tensors are; `around` is what else its kernels depend on. None
    where there is no telling."""
    types = [*map(type, numbers)]
    if not _NUMBERS.issuperset(types):
        return None
    return (
        signature,
        *map(type, tensors),
        *flags,
        *numbers,
        *types,
        current_look(),
        *around,
    )


def whole_key(
    short: tuple[Any, ...],
    given: Sequence[Tensor],
    look: Callable[[Tensor], tuple[Any, ...]],
    lying: Callable[[Sequence[Tensor]], Iterable[Any]],
) -> tuple[Any, ...] | None:
    """The same with what the tensors are: `look` of each, and what `lying` says of how they lie.
    None where they are on several devices, or nested. Of tensors that `is_watched` looked at."""
    device = device_of(given)
    if device is None:
        return None
    try:
        return (*short, device, *map(look, given), *lying(given))
    except RuntimeError:  # what is nested has no shape, what is not dense no strides
        return None
