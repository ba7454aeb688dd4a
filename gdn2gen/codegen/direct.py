"""Launches of Triton kernels that skip Triton's argument binder once a kernel is compiled.

Triton looks at every argument of every launch again and asks the driver about every pointer: 50 to
90 us a launch on an H200 host, while few heads and tokens keep the GPU busy for less than that.
What a kernel here is specialised on never changes from call to call (constants come from its own
module, and sizes are not specialised), except that pointers are aligned and sizes fit 32 bits:
those two are looked at, and what differs goes through Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import or_
from types import FunctionType, ModuleType
from typing import Any, Final

INT32: Final = range(-(2**31), 2**31)
# Triton compiles for pointers that are multiples of this, and anew for others.
ALIGNMENT: Final = 16


def direct_launch(module: ModuleType, function: str = "launch") -> Callable[..., None]:
    """The `function` of a rendered module, with its Triton kernels launched directly."""
    from triton.runtime.jit import JITFunction

    direct = {
        name: DirectKernel(x)
        for name, x in vars(module).items()
        if name.endswith("_kernel") and isinstance(x, JITFunction)
    }
    launch: Any = getattr(module, function)
    launch.of_module = True
    if not direct:
        return launch  # type: ignore[no-any-return]
    copy: Any = FunctionType(launch.__code__, {**vars(module), **direct}, launch.__name__)
    copy.__kwdefaults__ = launch.__kwdefaults__
    copy.of_module = True
    return copy  # type: ignore[no-any-return]


def streams() -> Callable[[int], int]:
    """What says which stream is current on a device."""
    from triton.runtime import driver

    return driver.active.get_current_stream  # type: ignore[no-any-return]


class DirectKernel:
    """Stands in for one Triton kernel: `kernel[grid](*arguments, **constants_and_options)`."""

    def __init__(self, kernel: Any) -> None:
        from triton import knobs
        from triton.runtime import driver

        self._kernel, self._driver, self._knobs = kernel, driver, knobs.runtime
        self._tensors: int | None = None
        """How many arguments are tensors: the first ones. Scalars follow."""
        self._fitting: tuple[int | float, ...] = ()
        """The scalars of the last launch, which are mostly the same again, and fit 32 bits."""
        self._compiled: dict[int, Any] = {}
        """What the first launch on a device compiled, by the device's index."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    @property
    def parameters(self) -> Sequence[Any]:
        return self._kernel.params  # type: ignore[no-any-return]

    def compiled_on(self, device: int) -> Any:
        """What a launch on that device compiled, if it serves all later ones; else None."""
        return self._compiled.get(device)

    def through_triton(self, grid: tuple[int, ...], *arguments: Any, **named: Any) -> Any:
        """What it compiled, or found."""
        return self._kernel[grid](*arguments, **named)

    def device(self) -> int:
        return int(self._driver.active.get_current_device())

    def stream(self, device: int) -> Any:
        return self._driver.active.get_current_stream(device)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        values = self._plain(arguments)
        if values is None or self.is_watched():
            self._kernel[grid](*arguments, **named)
            return
        device = self._driver.active.get_current_device()
        compiled = self._compiled.get(device)
        if compiled is None:
            compiled = self._kernel[grid](*arguments, **named)
            if self._takes_only_plain_sizes(arguments):
                self._compiled[device] = compiled
            return
        stream = self._driver.active.get_current_stream(device)
        rest = [named[name] for name in self._kernel.arg_names[len(values) :]]
        x, y, z = (*grid, 1, 1)[:3]
        # no hooks, and so no metadata for them
        compiled.run(
            x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *values, *rest
        )  # fmt: skip

    def _plain(self, arguments: tuple[Any, ...]) -> list[int | float] | None:
        """Addresses of tensors, and the scalars; None if Triton would compile another kernel."""
        if self._tensors is None:
            self._tensors = sum(not isinstance(x, int | float) for x in arguments)
        addresses = [x.data_ptr() for x in arguments[: self._tensors]]
        scalars = arguments[self._tensors :]
        if reduce(or_, addresses, 0) % ALIGNMENT:
            return None
        if scalars != self._fitting:
            if not all(x in INT32 for x in scalars if isinstance(x, int)):
                return None
            self._fitting = scalars
        return [*addresses, *scalars]

    @property
    def own_hooks(self) -> Sequence[Any]:
        """Of this kernel alone, to be asked whether there are any: the same list for good."""
        return self._kernel.pre_run_hooks  # type: ignore[no-any-return]

    def is_watched(self, hooks: Sequence[Sequence[Any]] = ()) -> bool:
        """Whether a profiler hooked into Triton's launches, of this kernel or one of those whose
        `own_hooks` are given."""
        enter, leave = self._knobs.launch_enter_hook, self._knobs.launch_exit_hook
        return bool(
            self._kernel.pre_run_hooks
            or any(hooks)
            or (enter is not None and getattr(enter, "calls", True))
            or (leave is not None and getattr(leave, "calls", True))
        )

    def _takes_only_plain_sizes(self, arguments: tuple[Any, ...]) -> bool:
        """Whether Triton compiles nothing anew for other values of the scalars."""
        parameters = self._kernel.params[: len(arguments)]
        return all(
            parameter.do_not_specialize or not isinstance(value, int | float)
            for parameter, value in zip(parameters, arguments, strict=True)
        )
