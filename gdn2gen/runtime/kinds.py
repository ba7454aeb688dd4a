"""Kinds of calls that are known, looked up by what of their tensors decides.

A key of every shape, dtype and layout takes 8 to 15 us of a call, most of it in making it: torch
makes an object of each. torch.compile compares what a call's tensors are with what they were by one
function in C++, which also looks at their types, strides, device, dispatch keys (what is negated
lazily, or has a subclass's) and whether they want a gradient, as the thread's modes have them: 1 us
for nine. So the last few kinds of a call are told by that, and by a short key of all that are no
tensors; what these do not know, the long key does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor

Kind = TypeVar("Kind")

_MOST: Final = 4
"""Kinds by one short key: each that is not it costs a look at its first tensors."""
_PATIENCE: Final = 32
"""Looks that found none of them before the oldest makes place: where lengths differ from call to
call, keeping one costs more than it saves."""

_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_Guards: Any = getattr(_guards, "TensorGuards", None)
_is_nested = attrgetter("is_nested")


class Kinds(Generic[Kind]):
    """What is known of calls: at most `most` kinds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._by_key: dict[tuple[Any, ...], Kind] = {}
        self._seen: dict[tuple[Any, ...], list[tuple[Callable[..., bool], Kind]]] = {}
        self._missed = 0

    def seen(self, short: tuple[Any, ...], given: Sequence[Tensor]) -> Kind | None:
        """The kind of a call like one of the last few: `short` is of all that are no tensors, and
        of which are `given`."""
        kinds = self._seen.get(short, ())
        # what is nested has no strides: torch's function throws where nothing catches it
        if kinds and any(map(_is_nested, given)):
            return None
        for is_like, kind in kinds:
            if is_like(*given):
                return kind
        return None

    def note(self, short: tuple[Any, ...], given: Sequence[Tensor], kind: Kind) -> None:
        """Have `seen` find it from now on, for tensors like these."""
        if _Guards is None:
            return
        before = self._seen.get(short, [])
        if len(before) >= _MOST:
            self._missed += 1
            if self._missed % _PATIENCE:
                return
        guards = _Guards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        if len(self._seen) >= self._most:
            self._seen.clear()
        # made anew, for other threads may be looking through it
        self._seen[short] = [(guards.check, kind), *before[: _MOST - 1]]

    def get(self, key: tuple[Any, ...]) -> Kind | None:
        return self._by_key.get(key)

    def keep(self, key: tuple[Any, ...], kind: Kind) -> None:
        if len(self._by_key) >= self._most:
            self.clear()
        self._by_key[key] = kind

    def clear(self) -> None:
        self._by_key.clear()
        self._seen.clear()

    def __len__(self) -> int:
        return len(self._by_key)

    def values(self) -> list[Kind]:
        return [*self._by_key.values()]
