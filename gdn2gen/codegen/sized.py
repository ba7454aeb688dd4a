"""A launch at one call's sizes: what it launches, with which grids and scalars, found out once.

A rendered module's `launch` works these out of its scalars in every call. Here it is called once
more with stand-ins for its tensors and kernels, and what it hands on to which of them is noted;
later calls hand over addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from types import FunctionType
from typing import Any

from gdn2gen.codegen.choosing import chooser
from gdn2gen.codegen.direct import ALIGNMENT, INT32, DirectKernel
from gdn2gen.codegen.frames import Launch


def sized_launch(
    launch: Callable[..., None], scalars: Mapping[str, int | float]
) -> Callable[..., None]:
    """`launch` for these scalars, which takes tensors alone. For one device.

    Of one that `direct_launch` gave is worked out once which kernels it launches, in which grids.
    """
    if hasattr(launch, "at"):  # it knows better
        return launch.at(scalars)  # type: ignore[no-any-return]
    if not hasattr(launch, "of_module"):
        return partial(launch, **scalars)
    return SizedLaunch(launch, scalars)


class _Operand:
    """Stands in for a tensor while it is noted where a launch hands it on to."""

    def __init__(self, place: int) -> None:
        self.place = place


@dataclass(frozen=True)
class _Noted:
    """What a launch calls: a Triton kernel, or a program by the function that gives it."""

    what: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]


class SizedLaunch:
    """A launch whose scalars are always the same, of any number of kernels in any language.

    The first call, and whatever is not as in most calls, goes through the launch itself: tensors
    that are not aligned, scalars that do not fit, a profiler that looks on.
    """

    def __init__(self, launch: Callable[..., None], scalars: Mapping[str, int | float]) -> None:
        self._launch, self._scalars = launch, scalars
        self._kernels: tuple[DirectKernel, ...] = ()
        self._steps: tuple[Callable[..., None], ...] | None = None
        self._what: tuple[_Noted, ...] = ()
        self._device = 0

    def __call__(self, *tensors: Any) -> None:
        steps = self._steps
        if steps is None:
            self._launch(*tensors, **self._scalars)
            self._steps = self._worked_out(len(tensors))
            return
        kernels = self._kernels
        if not kernels:  # programs look at their tensors themselves
            for step in steps:
                step(tensors)
            return
        addresses = [x.data_ptr() for x in tensors]
        hooks = [x.own_hooks for x in kernels[1:]]
        if reduce(or_, addresses) % ALIGNMENT or kernels[0].is_watched(hooks):
            self._launch(*tensors, **self._scalars)
            return
        stream = kernels[0].stream(self._device)
        for step in steps:
            step(tensors, addresses, stream)

    def _worked_out(self, operands: int) -> tuple[Callable[..., None], ...] | None:
        """The steps once every kernel is compiled; None while one goes through Triton."""
        noted = self._noted(operands)
        if noted is None:
            return None
        kernels = tuple(x.what for x in noted if isinstance(x.what, DirectKernel))
        if kernels:
            self._device = kernels[0].device()
        steps = [_step(x, self._device) for x in noted]
        self._kernels, self._what = kernels, tuple(noted)
        return None if None in steps else tuple(steps)  # type: ignore[arg-type]

    @property
    def kernels(self) -> tuple[DirectKernel, ...]:
        return self._kernels

    def launches(self, places: Sequence[int]) -> list[Launch] | None:
        """What it launches, where its tensors have these places in a pass; None while some of it
        is not known."""
        if self._steps is None:
            return None
        found = []
        for x in self._what:
            tensors = [places[y.place] for y in x.arguments if isinstance(y, _Operand)]
            scalars = x.arguments[len(tensors) :]
            if isinstance(x.what, DirectKernel):
                rest = x.what.parameters[len(x.arguments) :]
                scalars = (*scalars, *(x.named[y.name] for y in rest))
            found.append(Launch(x.what, x.grid, tuple(tensors), scalars))
        return found

    def _noted(self, operands: int) -> list[_Noted] | None:
        """What it launches, in order; None if it does more with a tensor than hand it on."""
        launch: Any = self._launch
        noted: list[_Noted] = []
        known = dict(launch.__globals__)
        for name, value in launch.__globals__.items():
            if isinstance(value, DirectKernel):
                known[name] = _NotedKernel(value, noted)
            elif name.startswith("compiled"):
                known[name] = partial(_noted_program, value, noted)
        stand_in = FunctionType(launch.__code__, known, launch.__name__)
        stand_in.__kwdefaults__ = launch.__kwdefaults__
        try:
            stand_in(*map(_Operand, range(operands)), **self._scalars)
        except (AttributeError, TypeError):
            return None
        return noted


class _NotedKernel:
    def __init__(self, kernel: DirectKernel, noted: list[_Noted]) -> None:
        self._kernel, self._noted = kernel, noted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def note(*arguments: Any, **named: Any) -> None:
            self._noted.append(_Noted(self._kernel, grid, arguments, named))

        return note


def _noted_program(program: Callable[[], Any], noted: list[_Noted]) -> Callable[..., None]:
    def note(*arguments: Any) -> None:
        noted.append(_Noted(program(), (), arguments, {}))

    return note


def _step(noted: _Noted, device: int) -> Callable[..., None] | None:
    """What launches it again, given tensors, their addresses and a stream; None while a kernel is
    not compiled for all values of its arguments."""
    arguments = noted.arguments
    places = [x.place for x in arguments if isinstance(x, _Operand)]
    rest = arguments[len(places) :]
    if any(isinstance(x, _Operand) for x in rest) or not places:
        return None
    chosen = chooser(places)
    if not isinstance(noted.what, DirectKernel):
        return partial(_run_program, noted.what, chosen, rest)
    kernel: DirectKernel = noted.what
    compiled = kernel.compiled_on(device)
    if compiled is None or not all(x in INT32 for x in rest if isinstance(x, int)):
        return None
    constants = [x.name for x in kernel.parameters[len(arguments) :]]
    rest = (*rest, *(noted.named[x] for x in constants))
    size = (*noted.grid, 1, 1)[:3]
    before = (compiled.function, compiled.packed_metadata, None, None, None)
    return partial(_run_kernel, compiled.run, size, before, chosen, rest)


def _run_program(program: Any, chosen: Any, rest: tuple[Any, ...], tensors: Any, *_: Any) -> None:
    program(*chosen(tensors), *rest)


def _run_kernel(
    run: Any,
    size: tuple[int, ...],
    before: tuple[Any, ...],
    chosen: Any,
    rest: tuple[Any, ...],
    _: Any,
    addresses: list[int],
    stream: Any,
) -> None:
    # no hooks, and so no metadata for them
    run(*size, stream, *before, *chosen(addresses), *rest)
