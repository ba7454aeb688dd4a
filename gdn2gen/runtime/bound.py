"""A pass bound to its launches: what is left of a call is to allocate, and to say where things lie.

`Pass` allocates every buffer when its stage comes, by name, and drops it after the last stage that
reads it. Of a pass that has run once all of that is known: here what is returned is allocated one
by one, what the backward wants saved is one buffer, and so is what lies between stages, at offsets
by when it lives. Launches are `codegen.frames`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import prod
from operator import add, or_
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from gdn2gen.codegen.choosing import chooser
from gdn2gen.codegen.direct import DirectKernel, streams
from gdn2gen.codegen.frames import Described, Frames, Launch
from gdn2gen.runtime._operands import ALIGNMENT
from gdn2gen.runtime.layout import Layout, strides_of

MOST: Final = 2**28
"""Bytes between stages up to which they are one buffer. A GPU is busy with more for longer than a
host with its call, and pieces that are freed one by one leave an allocator more to choose from."""
_PIECE: Final = 128
"""Pieces begin at multiples of it, as loads of whole tiles ask."""


def addresses_of(tensors: Sequence[Tensor], *, known: bool = False) -> list[int] | None:
    """Where they lie; None if a kernel could not read one of them as it lies (`_operands`).

    `known`: they are in rows without gaps, and none is negated lazily.
    """
    try:
        addresses = [*map(Tensor.data_ptr, tensors)]
    except RuntimeError:  # a wrapper of a transform that ended
        return None
    if reduce(or_, addresses, 0) % ALIGNMENT or not all(addresses):
        return None
    plain = known or (
        all(map(Tensor.is_contiguous, tensors)) and not any(map(Tensor.is_neg, tensors))
    )
    return addresses if plain else None


class Made(NamedTuple):
    """A buffer of a pass."""

    name: str
    described: Described
    allocate: Callable[[], Tensor]
    zeroed: bool

    @property
    def nbytes(self) -> int:
        return prod(self.described.shape) * self.described.dtype.itemsize


class Worked(NamedTuple):
    """A step of a pass: what it launches, by its tensors' names, and which buffers it makes."""

    launch: Any
    """None without programs."""
    tensors: tuple[str, ...]
    made: tuple[Made, ...]
    taken: tuple[tuple[str, str], ...]
    """Buffers that take the place of others."""
    freed: tuple[str, ...]


class Bound:
    """A pass whose launches are known, on tensors that lie as kernels read them."""

    def __init__(
        self,
        frames: Frames,
        kernels: tuple[DirectKernel, ...],
        stream_of: Callable[[int], int],
        device: torch.device,
        makers: Sequence[Callable[[], Tensor]],
        pieces: Sequence[tuple[int, int]],
    ) -> None:
        self._frames, self._stream_of = frames, stream_of
        self._kernel = kernels[0] if kernels else None
        self._hooks = [x.own_hooks for x in kernels[1:]]
        self._on_gpu, self._index = device.type == "cuda", device.index or 0
        self._makers = tuple(makers)
        self._based = chooser([base for base, _ in pieces]) if pieces else None
        self._offsets = tuple(offset for _, offset in pieces)

    def run(self, addresses: list[int]) -> list[Tensor] | None:
        """The buffers that it makes: those to keep come first. None where the pass itself has to
        run."""
        frame = self._frames.take()
        if frame is None:
            return None
        try:
            kernel = self._kernel
            if kernel is not None and kernel.is_watched(self._hooks):
                return None
            if self._on_gpu and torch._C._cuda_getDevice() != self._index:
                return None
            made = [make() for make in self._makers]
            bases = [*addresses, *map(Tensor.data_ptr, made)]
            if self._based is not None:
                bases += map(add, self._based(bases), self._offsets)
            frame.run(bases, self._stream_of(self._index))
        finally:
            self._frames.give(frame)
        return made


def bind(
    steps: Sequence[Worked],
    inputs: Mapping[str, Described],
    given: tuple[str, Layout] | None,
    keep: Sequence[str],
    saved: Layout | None,
    device: torch.device,
    allocate: Callable[[int], Callable[[], Tensor]],
) -> Bound | None:
    """`steps` bound to each other; None where one of them has to go its own way.

    `inputs` come in the order of `Bound.run`'s addresses, and last, under its name, what a forward
    saved, if `given` says how it is laid out. `keep` is what is returned, in order, and then, if
    `saved` says how it is laid out, what the forward saves.
    """
    return _Binding(steps, inputs, given, keep, saved, device, allocate).bound()


class _Binding:
    """Places for all tensors of a pass: inputs, what is allocated by itself, and pieces of it."""

    def __init__(
        self,
        steps: Sequence[Worked],
        inputs: Mapping[str, Described],
        given: tuple[str, Layout] | None,
        keep: Sequence[str],
        saved: Layout | None,
        device: torch.device,
        allocate: Callable[[int], Callable[[], Tensor]],
    ) -> None:
        self.steps, self.device, self.allocate = steps, device, allocate
        self.tensors: list[Described] = [*inputs.values()]
        self.places: dict[str, int] = {name: i for i, name in enumerate(inputs)}
        self.makers: list[Callable[[], Tensor]] = []
        self.pieces: list[tuple[int, int]] = []
        self.keep, self.saved, self.given = keep, saved, given

    def bound(self) -> Bound | None:
        made = {x.name: x for step in self.steps for x in step.made}
        roots = {name: taken for step in self.steps for name, taken in step.taken}
        kept = [roots.get(name, name) for name in self.keep]
        alone = dict.fromkeys(x for x in kept if x in made)
        if len(alone) != len(kept):
            return None  # it is an input
        alone |= dict.fromkeys(x.name for x in made.values() if x.zeroed)
        in_saved = {} if self.saved is None else self.saved.pieces
        if any(made[name].zeroed for name in in_saved):
            return None
        between = {
            name: x for name, x in made.items() if name not in alone and name not in in_saved
        }
        offsets, nbytes = _offsets(self.steps, between, roots)
        if nbytes > MOST:
            return None
        # what is returned first, then what is saved: see `bind`
        for name in kept:
            self._alone(made[name])
        if self.saved is not None:
            saved_at = self._buffer(self.saved.nbytes)
        for name in alone:
            if name not in kept:
                self._alone(made[name])
        found: list[tuple[Made, int, int]] = []
        if self.saved is not None:
            found += [(made[x], saved_at, y[0]) for x, y in in_saved.items()]
        if between:
            base = self._buffer(max(nbytes, _PIECE))
            found += [(between[x], base, offset) for x, offset in offsets.items()]
        for x, base, offset in found:
            self._piece(x.name, x.described, base, offset)
        if self.given is not None:
            name, layout = self.given
            for piece, (start, _, dtype, shape) in layout.pieces.items():
                self._piece(
                    piece, Described(shape, strides_of(shape), dtype), self.places[name], start
                )
        for name, taken in roots.items():
            self.places[name] = self.places[taken]
        return self._with_launches()

    def _alone(self, x: Made) -> None:
        self.places[x.name] = len(self.tensors)
        self.tensors.append(x.described)
        self.makers.append(x.allocate)

    def _buffer(self, nbytes: int) -> int:
        place = len(self.tensors)
        self.tensors.append(Described((nbytes,), (1,), torch.uint8))
        self.makers.append(self.allocate(nbytes))
        return place

    def _piece(self, name: str, described: Described, base: int, offset: int) -> None:
        self.places[name] = len(self.tensors)
        self.tensors.append(described)
        self.pieces.append((base, offset))

    def _with_launches(self) -> Bound | None:
        launches: list[Launch] = []
        kernels: list[DirectKernel] = []
        for step in self.steps:
            if step.launch is None:
                continue
            if not hasattr(step.launch, "launches"):
                return None
            found = step.launch.launches([self.places[x] for x in step.tensors])
            if found is None:
                return None
            launches += found
            kernels += step.launch.kernels
        if not launches:  # no tokens
            return None
        index = self.device.index or 0
        frames = Frames.of(launches, self.tensors, index)
        if frames is None:
            return None
        stream_of = streams()
        return Bound(frames, tuple(kernels), stream_of, self.device, self.makers, self.pieces)


def _offsets(
    steps: Sequence[Worked], buffers: Mapping[str, Made], roots: Mapping[str, str]
) -> tuple[dict[str, int], int]:
    """Where each buffer begins in one that holds them all, and its bytes: two of them share memory
    where one is freed before the other is made. In order, each in the first gap that fits."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, step in enumerate(steps):
        first |= {x.name: i for x in step.made if x.name in buffers}
        last |= {roots.get(x, x): i for x in step.freed}
    placed: list[tuple[int, int, int, int]] = []
    found: dict[str, int] = {}
    for name, begin in first.items():
        end = last.get(name, len(steps))
        size = -(-buffers[name].nbytes // _PIECE) * _PIECE
        offset = 0
        for start, stop, one, other in sorted(placed):
            apart = other < begin or end < one
            if not apart and start < offset + size and offset < stop:
                offset = stop
        placed.append((offset, offset + size, begin, end))
        found[name] = offset
    return found, max([stop for _, stop, _, _ in placed], default=0)
