"""The memory that the launches of a pass read their arguments from."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch

from gdn2gen.codegen import _driver
from gdn2gen.codegen._ready import At, Described, Kernel, Map, Program, tvm_ffi
from gdn2gen.codegen.choosing import chooser

_GPU: Final = 2  # kDLCUDA
_TENSOR: Final = 7  # kTVMFFIDLTensorPtr
MAP: Final = 16
"""Words of a tensor map."""
_LINE: Final = 64
"""Bytes that tensor maps begin at multiples of, and the host reads at once."""
# Numbers of a launch's attributes, each of which has 64 bytes of value.
_ATTRIBUTE: Final = 9
"""Words of one of them."""
_CLUSTER: Final = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_DEPENDENT: Final = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# DLDataTypeCode, by dtype.
CODES: Final[Mapping[torch.dtype, int]] = {
    torch.int32: 0,
    torch.int64: 0,
    torch.uint8: 1,
    torch.float16: 2,
    torch.float32: 2,
    torch.bfloat16: 4,
}


class Frame:
    """Arguments of all launches of a pass, which lie ready but for addresses. For one thread."""

    def __init__(
        self, launches: Sequence[Kernel | Program], tensors: Sequence[Described], device: int
    ) -> None:
        self._device = device
        self._kept: list[Any] = []
        """Memory that others point into."""
        self._set_stream: Callable[[int, int, int], int] | None = None
        if any(isinstance(x, Program) for x in launches):
            self._set_stream = tvm_ffi().core._env_set_current_stream
        self._place_rows(self._rows(launches, tensors))
        self._streams: list[memoryview] = []
        self._stream = 0
        self._calls = [*map(self._call, launches)]

    def run(self, addresses: Sequence[int], stream: int) -> None:
        """Launch them all, in order, on tensors that lie at `addresses`.

        Raises RuntimeError where the driver or a program refuses one.
        """
        if self._chosen is not None:
            self._written[:] = self._chosen(addresses)
            self._first[:] = self._read
        if stream != self._stream:
            for place in self._streams:
                place[0] = stream
            self._stream = stream
        set_stream = self._set_stream
        if set_stream is None:
            for call in self._calls:
                code = call()
                if code:
                    self._fail(call, code)
            return
        before = set_stream(_GPU, self._device, stream)
        try:
            for call in self._calls:
                code = call()
                if code:
                    self._fail(call, code)
        finally:
            set_stream(_GPU, self._device, before)

    def _aligned(self, words: Sequence[int]) -> memoryview:
        """They lie there from now on, at the beginning of a line."""
        room = memoryview(array("Q", [*words, *(0,) * (_LINE // 8)]))
        first = -_address(room) % _LINE // 8
        found = room[first : first + len(words)]
        found[:] = array("Q", words)
        self._kept.append(room)
        return found

    def _place(self, words: array[int]) -> int:
        """Where they lie from now on."""
        self._kept.append(words)
        return words.buffer_info()[0]

    def _rows(
        self, launches: Sequence[Kernel | Program], tensors: Sequence[Described]
    ) -> dict[At | Map, tuple[int, ...]]:
        """What launches point at, each of which begins with an address: tensor maps, one where they
        are alike; DLTensors where a program wants them; else the address alone of what has no map,
        whose first word is as good: a call writes 46 words for 94 (gdn2, both directions)."""
        given = [y for x in launches if isinstance(x, Kernel) for y in x.parameters]
        maps = {x: (0, *x.rest) for x in given if isinstance(x, Map)}
        if self._set_stream is not None:
            return {At(i): self._dense(x) for i, x in enumerate(tensors)} | maps
        mapped = {x.tensor for x in maps}
        return {x: (0,) for x in given if isinstance(x, At) and x.tensor not in mapped} | maps

    def _place_rows(self, rows: Mapping[At | Map, tuple[int, ...]]) -> None:
        """One after the other, as far apart as tensor maps are, so that one copy writes where all
        of them begin."""
        self._chosen = chooser([x.tensor for x in rows]) if rows else None
        apart = MAP if any(len(x) > 1 for x in rows.values()) else 1
        words = self._aligned([y for x in rows.values() for y in (*x, *(0,) * (apart - len(x)))])
        self._first = words[::apart]
        # of ctypes, which takes a list of numbers in two thirds of an array's time
        self._written: Any = (ctypes.c_uint64 * len(rows))()
        self._read = memoryview(self._written).cast("B").cast("Q")
        self._at: dict[At | Map, int] = {}
        """Where each row lies, and that of a tensor which has none of its own."""
        for i, x in enumerate(rows):
            self._at[x] = _address(words) + 8 * apart * i
            self._at.setdefault(At(x.tensor), self._at[x])

    def _dense(self, x: Described) -> tuple[int, ...]:
        """A DLTensor in words of 8 bytes, but for its address, which is the first."""
        kind = CODES[x.dtype] | x.dtype.itemsize * 8 << 8 | 1 << 16
        shape, strides = (self._place(array("q", y or (0,))) for y in (x.shape, x.strides))
        return (0, _GPU | self._device << 32, len(x.shape) | kind << 32, shape, strides, 0)

    def _call(self, what: Kernel | Program) -> partial[int]:
        return self._program(what) if isinstance(what, Program) else self._kernel(what)

    def _program(self, what: Program) -> partial[int]:
        tensors = [(_TENSOR, self._at[At(place)]) for place in what.tensors]
        given = (*tensors, *what.scalars)
        arguments = self._place(array("Q", [word for x in given for word in x]))
        result = self._place(array("Q", (0, 0)))
        return partial(
            tvm_ffi().LIB.TVMFFIFunctionCall,
            ctypes.c_void_p(what.function.__chandle__()),
            ctypes.c_void_p(arguments),
            ctypes.c_int32(len(given)),
            ctypes.c_void_p(result),
        )

    def _kernel(self, what: Kernel) -> partial[int]:
        halves = [*(*what.grid, 1, 1)[:3], *(*what.block, 1, 1)[:3], what.shared, 0]
        pairs = [low | high << 32 for low, high in zip(halves[::2], halves[1::2], strict=True)]
        attributes = _attributes(what)
        place = self._place(array("Q", attributes)) if attributes else 0
        # the stream comes later
        config = array("Q", (*pairs, 0, place, len(attributes) // _ATTRIBUTE))
        self._streams.append(memoryview(config)[4:5])
        scalars = [x for x in what.parameters if isinstance(x, int)]
        self._next_scalar = self._place(array("Q", (*scalars, 0)))
        parameters = array("Q", [*map(self._parameter, what.parameters)])
        return partial(
            _driver.driver().cuLaunchKernelEx,
            ctypes.c_void_p(self._place(config)),
            ctypes.c_void_p(what.function),
            ctypes.c_void_p(self._place(parameters)),
            ctypes.c_void_p(0),
        )

    def _parameter(self, x: At | Map | int) -> int:
        """Where it lies. Scalars are asked for in the order in which they were placed."""
        if isinstance(x, At | Map):
            return self._at[x]
        self._next_scalar += 8
        return self._next_scalar - 8

    def _fail(self, call: partial[int], code: int) -> None:
        place = self._calls.index(call)
        why = f"TileLang's program gave {code}"
        if call.func is _driver.driver().cuLaunchKernelEx:
            words = ctypes.c_char_p()
            _driver.driver().cuGetErrorString(ctypes.c_int(code), ctypes.byref(words))
            why = f"CUDA error {code}, {(words.value or b'unknown').decode()}"
        raise RuntimeError(
            f"launch {place + 1} of {len(self._calls)} of a pass failed: {why}; errors of earlier "
            "kernels may be reported here: CUDA_LAUNCH_BLOCKING=1 shows which one it is"
        )


def _attributes(what: Kernel) -> list[int]:
    """Of its launch: of each its number, and its value."""
    found: list[int] = []
    if what.cluster:
        x, y, z = what.cluster
        found += [_CLUSTER, x | y << 32, z, *[0] * (_ATTRIBUTE - 3)]
    if what.dependent:  # it is allowed
        found += [_DEPENDENT, 1, *[0] * (_ATTRIBUTE - 2)]
    return found


def _address(words: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(words)) if len(words) else 0
