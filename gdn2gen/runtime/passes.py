"""Pass: the launches of one direction, with every size of a call filled in.

What a call's sizes decide (shapes, strides, scalars, whether there is anything to do) is worked out
once for all calls of the same sizes: in every call it took a fifth of the time on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn2gen.codegen.frames import Described
from gdn2gen.codegen.sized import sized_launch
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.schedule import Buffer, Step
from gdn2gen.kernels.stages import STAGES
from gdn2gen.runtime.bound import Bound, Made, Worked, bind
from gdn2gen.runtime.call import Call
from gdn2gen.runtime.dtypes import TORCH_DTYPE
from gdn2gen.runtime.layout import Layout, strides_of

_NOTHING_GIVEN: Mapping[str, Tensor] = {}

_poisoned = False


def is_poisoned() -> bool:
    """Whether this is inside of `poisoned`."""
    return _poisoned


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, every buffer is full of NaN before the kernels write it: what was left out shows."""
    global _poisoned
    _poisoned = True
    try:
        yield
    finally:
        _poisoned = False


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that a kernel has to write all of."""
    x = torch.empty(shape, dtype=dtype, device=device)
    return x.fill_(float("nan")) if _poisoned and dtype.is_floating_point else x


class Loaded(NamedTuple):
    """A step of the schedule, and what launches it."""

    step: Step
    launch: Callable[..., None]


def allocator(
    buffer: Buffer, sizes: Mapping[str, int], device: torch.device
) -> Callable[[], Tensor]:
    """What makes the buffer at these sizes, on the current device if that is a GPU."""
    dtype = TORCH_DTYPE[buffer.dtype]
    shape = buffer.shape(sizes)
    if buffer.zeroed:
        return partial(torch.zeros, shape, dtype=dtype, device=device)
    return maker(shape, dtype, device)


def maker(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """What makes an empty tensor, on the current device if that is a GPU."""
    if device.type == "cuda" and _empty_on_gpu is not None:
        return partial(_empty_on_gpu, shape, strides_of(shape), dtype)
    return partial(torch.empty, shape, dtype=dtype, device=device)


def _poisonable(buffer: Buffer) -> bool:
    """Whether kernels have to write all of it, and NaN would show what they left out."""
    in_place = buffer.takes is not None
    return not (in_place or buffer.zeroed) and TORCH_DTYPE[buffer.dtype].is_floating_point


# What the code that torch.compile makes allocates with: on the current device, and from tuples.
# torch.empty goes through the dispatcher, which takes 9 us on an H200 host for each of 33 buffers.
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty_on_gpu: Callable[..., Tensor] | None = getattr(_guards, "_empty_strided_cuda", None)


class Pass:
    """The steps of one direction at the sizes of one call, to be run any number of times."""

    def __init__(
        self,
        steps: tuple[Loaded, ...],
        keep: tuple[str, ...],
        call: Call,
        problem: Problem,
        BT: int,
    ) -> None:
        self._device = call.device
        self._steps = tuple(_SizedStep(x, call, problem, BT) for x in steps)
        known = {name for x in steps for name in x.step.tensors}
        self._keep = tuple(name for name in keep if name in known)

    def run(
        self,
        tensors: Mapping[str, Tensor],
        into: Mapping[str, Tensor] = _NOTHING_GIVEN,
        observe: Callable[[str, Callable[[], None]], None] | None = None,
    ) -> dict[str, Tensor]:
        """Launch the stages in order, and return the tensors to keep.

        `tensors` are the inputs by name. Every output is allocated when its stage comes, unless it
        is given in `into`, and dropped after the last stage that reads it. `observe` is given each
        stage's name and a callable that launches it again on the same buffers.
        """
        device = self._device
        if device.type != "cuda":  # the interpreter writes by torch's own operations
            with torch.no_grad():
                return self._run(tensors, into, observe)
        if torch.cuda.current_device() != device.index:
            with torch.cuda.device(device.index):
                return self._run(tensors, into, observe)
        return self._run(tensors, into, observe)

    def bound(
        self,
        inputs: Mapping[str, Tensor],
        given: tuple[str, Layout] | None = None,
        saved: Layout | None = None,
    ) -> Bound | None:
        """The pass bound to its launches, for inputs like these, in their order; None where some of
        it has to go its own way, or is not known before the pass has run. See `bind`."""
        described = {name: _described(x) for name, x in inputs.items()}
        steps = [x.worked(described) for x in self._steps]
        pieces = () if saved is None else saved.pieces
        keep = [x for x in self._keep if x not in pieces]

        def allocate(nbytes: int) -> Callable[[], Tensor]:
            return maker((nbytes,), torch.uint8, self._device)

        return bind(steps, described, given, keep, saved, self._device, allocate)

    @property
    def kept(self) -> tuple[str, ...]:
        """What it returns, in order."""
        return self._keep

    def _run(
        self,
        tensors: Mapping[str, Tensor],
        into: Mapping[str, Tensor],
        observe: Callable[[str, Callable[[], None]], None] | None,
    ) -> dict[str, Tensor]:
        """On the current device."""
        alive = {**tensors}
        for step in self._steps:
            for name, allocate in step.allocated:
                alive[name] = into[name] if name in into else allocate()
            for name, taken in step.taken:
                alive[name] = alive[taken]
            if _poisoned:
                for name in step.poisonable:
                    alive[name].fill_(float("nan"))
            if step.has_programs:
                step.launch(*step.operands(alive))
                if observe is not None and step.name in STAGES:
                    observe(step.name, partial(step.launch, *step.operands(alive)))
            for name in step.freed:
                del alive[name]
        return {name: alive[name] for name in self._keep}


class _SizedStep:
    """A step with its sizes filled in."""

    def __init__(self, loaded: Loaded, call: Call, problem: Problem, BT: int) -> None:
        step = loaded.step
        sizes = call.sizes(problem, BT, step.max_segments)
        scalars = call.scalars(BT, step.max_segments) | call.row_scalars(problem)
        made = [x for x in step.buffers if x.takes is None]
        self.name, self.freed, self.tensors = step.module, step.freed, step.tensors
        self.launch = sized_launch(loaded.launch, {name: scalars[name] for name in step.scalars})
        self.made = tuple(_made(x, sizes, call.device) for x in made)
        self.allocated = tuple((x.name, x.allocate) for x in self.made)
        self.taken = tuple((x.name, x.takes) for x in step.buffers if x.takes is not None)
        self.poisonable = tuple(x.name for x in step.buffers if _poisonable(x))
        self.operands: Callable[[Mapping[str, Tensor]], Any] = itemgetter(*step.tensors)
        self.has_programs = scalars[step.count] * call.HV > 0

    def worked(self, inputs: Mapping[str, Described]) -> Worked:
        launch: Any = self.launch if self.has_programs else None
        if hasattr(launch, "of_dtype"):
            launch = launch.of_dtype(inputs[self.tensors[0]].dtype)
        return Worked(launch, self.tensors, self.made, self.taken, self.freed)


def _described(x: Tensor) -> Described:
    """Rows lie apart in what only kernels read that know of it."""
    shape = (*x.shape,)
    return Described(shape, strides_of(shape) if x.is_contiguous() else x.stride(), x.dtype)


def _made(buffer: Buffer, sizes: Mapping[str, int], device: torch.device) -> Made:
    shape = buffer.shape(sizes)
    described = Described(shape, strides_of(shape), TORCH_DTYPE[buffer.dtype])
    return Made(buffer.name, described, allocator(buffer, sizes, device), buffer.zeroed)
