"""What a TileLang program launches, found out once: parameters of its kernel, and tensor maps.

A program's host code looks at every tensor, sets the device, has the driver make a tensor map for
each tensor that TMA reads or writes, and hands all of it to tvm's launcher: 1 to 2 us of a call
where nothing has left the caches, 4 to 5 in a training step. Of calls of one kind, all that comes
of it is the same but for addresses. So a copy of the program runs with a stand-in for its kernel,
which notes what it is given, on addresses that are made up, for nobody follows them there. Two such
runs tell which words are addresses, and of which tensors; a third one has to give what they say.
A call then writes addresses, the first words of tensor maps among them, and launches.

What is otherwise than this takes for granted stays a program: code that is no machine code, maps
whose first word is no address, functions of tvm's that do more than set the device and make maps.
One thing is left out on purpose: tvm lets every kernel of a cluster begin before the kernel before
it has ended, whether it waits for that or not. Here only those may that wait.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import count
from math import prod
from pathlib import Path
from threading import RLock
from typing import Any, Final, NamedTuple

from gdn2gen.base.environment import records_programs
from gdn2gen.codegen import _driver, programs
from gdn2gen.codegen._frame import Frame
from gdn2gen.codegen._library import Code, read_code
from gdn2gen.codegen._ready import At, Described, Kernel, Map, Program, tvm_ffi
from gdn2gen.codegen.direct import streams

_CLUSTER: Final = 8
"""Programs of a cluster that every GPU runs; more a kernel has to be allowed."""
_recording = RLock()
_copies = count()


def recorded(
    program: Program, tensors: Sequence[Described], device: int
) -> Sequence[Kernel | Program]:
    """What the program launches, in order; the program itself where that is not known."""
    path = programs.library_of(program.function)
    if path is None or not records_programs():
        return [program]
    if not _driver.may_load(device, streams()(device)):
        return [program]
    with _recording:
        try:
            copy = _copy_of(path)
            found = None if copy is None else copy.launches(program, tensors, device)
        except Exception:  # whatever it is, the call itself has been computed
            found = None  # it goes its own way, and says itself what is wrong
    return [program] if found is None else found


class _Call(NamedTuple):
    """A kernel's launch, as the host code asks for it: a word for each parameter that is none of a
    tensor map, and a map's words."""

    name: str
    parameters: tuple[int | tuple[int, ...], ...]
    sizes: tuple[int, ...]


class _Copy:
    """A program whose kernels are stand-ins."""

    def __init__(self, code: Code, module: Any) -> None:
        self._code, self._module = code, module
        self.function = module.get_function("main")
        self._calls: list[_Call] = []
        self._loaded: dict[tuple[int, str, int], int | None] = {}

    def launches(
        self, program: Program, tensors: Sequence[Described], device: int
    ) -> list[Kernel] | None:
        own = program._replace(function=self.function)
        runs = []
        with self._standing_in():
            for made_up in _addresses(len(tensors)):
                self._calls.clear()
                Frame([own], tensors, device).run(made_up, 0)
                runs.append((made_up, [*self._calls]))
        (places, calls), (others, again), (thirds, last) = runs
        if not calls or not len(calls) == len(again) == len(last):
            return None
        found = []
        for one, other, third in zip(calls, again, last, strict=True):
            parameters = _parameters(one, places, other, others)
            if parameters is None or _filled(parameters, thirds) != third.parameters:
                return None
            kernel = self._kernel(one, parameters, device)
            if kernel is None or not one.sizes == other.sizes == third.sizes:
                return None
            found.append(kernel)
        return found

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        """The host code looks for its kernels among all functions of tvm's, when it first runs."""
        ffi, before = tvm_ffi(), {}
        for name in self._code.kernels:
            before[name] = ffi.get_global_func(name, allow_missing=True)
            ffi.register_global_func(name, partial(self._note, name), override=True)
        try:
            yield
        finally:
            for name, function in before.items():
                if function is None:
                    ffi.remove_global_func(name)
                else:
                    ffi.register_global_func(name, function, override=True)

    def _note(self, name: str, *given: Any) -> None:
        """In place of the kernel of that name."""
        types = self._code.kernels[name].types
        words = [kind.words(x) for kind, x in zip(types, given, strict=False)]
        sizes = tuple([int(x) for x in given[len(types) :]])
        self._calls.append(_Call(name, tuple(words), sizes))

    def _kernel(
        self, call: _Call, parameters: tuple[At | Map | int, ...], device: int
    ) -> Kernel | None:
        entry = self._code.kernels[call.name]
        size = entry.sizes(call.sizes)
        if size is None or size.shared > _driver.MOST_SHARED or prod(size.cluster) > _CLUSTER:
            return None
        key = device, call.name, size.shared
        if key not in self._loaded:
            self._loaded[key] = _driver.load_kernel(self._code.image, call.name, size.shared)
        function = self._loaded[key]
        if function is None or _driver.parameters_of(function) != entry.nbytes:
            return None
        place = call.name, function, size.grid, size.block, size.shared, parameters
        return Kernel(*place, size.dependent, size.cluster)


@lru_cache(maxsize=512)
def _copy_of(path: Path) -> _Copy | None:
    """Of the library at `path`, unless it is not what was loaded, or not all of it is known."""
    content = path.read_bytes()
    code = read_code(content)
    if code is None or not programs.is_content_of(content, path):
        return None
    file = os.memfd_create(path.name)
    try:
        with open(file, "wb", closefd=False) as memory:
            memory.write(content)
        load = tvm_ffi().get_global_func("ffi.Module.load_from_file.so")
        # a name of its own: by one that it knows the loader gives the library that it has
        module = load(f"/proc/self/fd/{'./' * next(_copies)}{file}", "")
    finally:
        os.close(file)
    module.clear_imports()  # where its kernels are
    return _Copy(code, module)


def _parameters(
    one: _Call, places: Sequence[int], other: _Call, others: Sequence[int]
) -> tuple[At | Map | int, ...] | None:
    """What the parameters of a launch are, from two runs; None where they are not understood."""
    tensors = {pair: i for i, pair in enumerate(zip(places, others, strict=True))}
    found: list[At | Map | int] = []
    for x, y in zip(one.parameters, other.parameters, strict=True):
        if isinstance(x, int) and isinstance(y, int):
            tensor = tensors.get((x, y))
            if tensor is None and x != y:
                return None
            found.append(x if tensor is None else At(tensor))
        elif isinstance(x, tuple) and isinstance(y, tuple):
            tensor = tensors.get((x[0], y[0]))
            if tensor is None or x[1:] != y[1:]:
                return None
            found.append(Map(tensor, x[1:]))
        else:
            return None
    return tuple(found)


def _filled(
    parameters: Sequence[At | Map | int], addresses: Sequence[int]
) -> tuple[int | tuple[int, ...], ...]:
    """What a launch is given on tensors that lie there."""
    return tuple(
        addresses[x.tensor]
        if isinstance(x, At)
        else (addresses[x.tensor], *x.rest)
        if isinstance(x, Map)
        else x
        for x in parameters
    )


def _addresses(tensors: int) -> list[list[int]]:
    """Three times where tensors might lie: multiples of 128 below 2^47, all of them different and
    none of them as far from another each time, nor as far from one in a run as in the next."""
    apart = (2**30 + 2**20, 2**31 + 2**14, 3 * 2**29 + 2**7)
    return [
        [2**45 * (run + 1) + (i + 1) * step for i in range(tensors)]
        for run, step in enumerate(apart)
    ]
