"""Launches of one kernel, over and over: what a call over a few tokens is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from types import FunctionType, ModuleType
from typing import Any

from gdn2gen.codegen.direct import ALIGNMENT, INT32, DirectKernel, streams
from gdn2gen.codegen.frames import ADDRESS, Frames, Launch


def fixed_launch(module: ModuleType, scalars: Mapping[str, int | float]) -> FixedLaunch:
    """The `launch` of a rendered module with one kernel, for these scalars alone."""
    from triton.runtime.jit import JITFunction

    (name,) = (
        name
        for name, x in vars(module).items()
        if name.endswith("_kernel") and isinstance(x, JITFunction)
    )
    seen = _Seen()
    launch = FunctionType(module.launch.__code__, {**vars(module), name: seen}, name)
    operands = module.launch.__code__.co_argcount
    launch(*[None] * operands, **scalars)
    return FixedLaunch(
        DirectKernel(getattr(module, name)), operands, seen.grid, seen.arguments, seen.named
    )


class _Seen:
    """Stands in for a kernel, and keeps how it would be launched."""

    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grid = grid
        return self._keep

    def _keep(self, *arguments: Any, **named: Any) -> None:
        self.arguments, self.named = arguments, named


class FixedLaunch:
    """A launch that differs from the next in its tensors alone: of a call is left to find out where
    these are, and on which stream. For one device."""

    def __init__(
        self,
        kernel: DirectKernel,
        operands: int,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        named: Mapping[str, Any],
    ) -> None:
        self._direct, self._grid, self._named = kernel, grid, named
        self._scalars = arguments[operands:]
        parameters = kernel.parameters
        self._aligned = tuple(
            i for i in range(operands) if not parameters[i].do_not_specialize_on_alignment
        )
        """Places of tensors of which Triton compiles another kernel where they are not aligned."""
        self._fits = all(x in INT32 for x in self._scalars if isinstance(x, int)) and all(
            x.do_not_specialize for x in parameters[operands : len(arguments)]
        )
        constants = [x.name for x in parameters[len(arguments) :]]
        self._rest = (*self._scalars, *(named[x] for x in constants))
        self._size = (*grid, 1, 1)[:3]
        self._run: Callable[..., None] | None = None
        self._frames: Frames | None = None
        self._stream_of: Callable[[int], Any] = kernel.stream
        self._device = 0
        self._compiled: Any = None
        self._before: tuple[Any, ...] = ()

    def __call__(self, *tensors: Any) -> None:
        addresses = [x.data_ptr() for x in tensors]
        low = reduce(or_, addresses, 0)
        if low % ALIGNMENT:
            low = reduce(or_, [addresses[i] for i in self._aligned], 0)
        run, direct = self._run, self._direct
        if run is None or low % ALIGNMENT or direct.is_watched():
            compiled = direct.through_triton(self._grid, *tensors, *self._scalars, **self._named)
            if run is None and low % ALIGNMENT == 0 and self._fits:
                self._keep(compiled, len(tensors))
            return
        frames = self._frames
        frame = None if frames is None else frames.take()
        stream = self._stream_of(self._device)
        if frame is None:
            run(*self._size, stream, *self._before, *addresses, *self._rest)
            return
        try:
            frame.run(addresses, stream)
        finally:
            frames.give(frame)  # type: ignore[union-attr]

    def _keep(self, compiled: Any, operands: int) -> None:
        """What later calls launch."""
        self._device = self._direct.device()
        self._stream_of = streams()
        self._before = (compiled.function, compiled.packed_metadata, None, None, None)
        launch = Launch(self._direct, self._grid, tuple(range(operands)), self._rest)
        self._frames = Frames.of([launch], [ADDRESS] * operands, self._device, compiled)
        self._compiled = compiled  # unloaded when it goes
        self._run = compiled.run
