"""A pass's launches as the driver takes them: a call writes where its tensors lie, and no more.

Triton's launcher packs every argument of every launch, and TileLang's programs take torch's tensors
one by one: 5 to 14 us a launch, of which the driver's part is 2. What does not change from call to
call (kernels, grids, scalars, shapes) lies ready here in the form that is handed on: parameters of
`cuLaunchKernelEx`, and arguments of tvm-ffi's C functions, whose tensors are DLTensors. Addresses
have one place each, which all launches of the pass point at.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any, Final, NamedTuple

import torch

from gdn2gen.base.environment import binds_launches
from gdn2gen.codegen.direct import INT32, DirectKernel

# What Triton's launcher gives attributes for, or memory: left to it.
_MOST_SHARED: Final = 228 * 1024
_MOST_HIDDEN: Final = 2
"""Pointers that Triton adds to a kernel's parameters, for scratch: of no bytes, or it is left to
its own launcher. Triton 3.6 to 3.9 add two."""
_GPU: Final = 2  # kDLCUDA
_TENSOR: Final = 7  # kTVMFFIDLTensorPtr
_INT: Final = 1  # kTVMFFIInt
_FLOAT: Final = 3  # kTVMFFIFloat
_WORDS: Final = 6
"""Words of 8 bytes of a DLTensor."""
# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, then 64 bytes of value: it is allowed.
_DEPENDENT: Final = (6, 1, *[0] * 7)
# DLDataTypeCode, by dtype.
_CODES: Final[Mapping[torch.dtype, int]] = {
    torch.int32: 0,
    torch.int64: 0,
    torch.uint8: 1,
    torch.float16: 2,
    torch.float32: 2,
    torch.bfloat16: 4,
}
_FORMATS: Final[Mapping[str, str]] = {"i32": "<i4x", "i64": "<q", "fp32": "<f4x", "f32": "<f4x"}
"""Of a scalar's word, by what Triton calls its type."""


class Described(NamedTuple):
    """What of a tensor of a pass never changes: rows without gaps, but for inputs whose rows lie
    apart, in known calls of one kind as far."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


ADDRESS: Final = Described((), (), torch.uint8)
"""Of a tensor that only kernels in Triton are given, which take addresses."""


class Launch(NamedTuple):
    """A launch of a pass: a Triton kernel, or a program, and what it is given."""

    what: Any
    grid: tuple[int, ...]
    tensors: tuple[int, ...]
    """The first arguments, by their places among the tensors of the pass."""
    scalars: tuple[Any, ...]
    """The others; of a kernel, its constants among them."""


class _Kernel(NamedTuple):
    """A Triton kernel as the driver launches it."""

    name: str
    function: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    scalars: tuple[int, ...]
    """Words."""
    hidden: int
    dependent: bool
    """Whether it may begin before the launch before it has ended, for which it waits itself."""


class _Program(NamedTuple):
    """A function of tvm-ffi, and its arguments after the tensors: type and value."""

    function: Any
    scalars: tuple[tuple[int, int], ...]


class Frames:
    """The frames of a pass, one for each thread that runs it."""

    def __init__(
        self,
        launches: Sequence[tuple[_Kernel | _Program, tuple[int, ...]]],
        tensors: Sequence[Described],
        device: int,
    ) -> None:
        self._launches, self._tensors, self._device = launches, tensors, device
        self._of_thread = threading.local()

    @classmethod
    def of(
        cls,
        launches: Sequence[Launch],
        tensors: Sequence[Described],
        device: int,
        compiled: Any = None,
    ) -> Frames | None:
        """None where one of them has to go through its own launcher, or all do, as the environment
        says. `compiled` is what was, if their kernels do not know it."""
        if not binds_launches() or any(x.dtype not in _CODES for x in tensors):
            return None
        found = []
        for launch in launches:
            if 0 in launch.grid:  # Triton's launcher leaves it out, and the driver refuses it
                continue
            known = _known(launch, device, compiled)
            if known is None:
                return None
            found.append((known, launch.tensors))
        return cls(found, tensors, device)

    def take(self) -> Frame | None:
        """This thread's frame, to be given back. None the first time that a thread asks, which has
        to go another way: Triton's launcher and TileLang's programs give a thread its context. And
        None while it is taken: a finaliser may call in the middle of a call."""
        own = self._of_thread.__dict__
        frame: Frame | None = own.pop("frame", None)
        if frame is None:
            asked = own["asked"] = own.get("asked", 0) + 1
            if asked == 2:
                return Frame(self._launches, self._tensors, self._device)
        return frame

    def give(self, frame: Frame) -> None:
        self._of_thread.__dict__["frame"] = frame


class Frame:
    """The memory that the launches of a pass read their arguments from. For one thread."""

    def __init__(
        self,
        launches: Sequence[tuple[_Kernel | _Program, tuple[int, ...]]],
        tensors: Sequence[Described],
        device: int,
    ) -> None:
        self._device = device
        self._kept: list[Any] = []
        """Memory that others point into."""
        dense = [self._dense(x) for x in tensors]
        words = array("Q", [word for x in dense for word in x])
        self._at = self._place(words)
        self._addresses = memoryview(words)[::_WORDS]
        self._streams: list[memoryview] = []
        self._stream = 0
        self._set_stream: Callable[[int, int, int], int] | None = None
        self._calls = [self._call(what, places) for what, places in launches]
        if any(isinstance(what, _Program) for what, _ in launches):
            self._set_stream = _tvm_ffi().core._env_set_current_stream

    def run(self, addresses: Sequence[int], stream: int) -> None:
        """Launch them all, in order, on tensors that lie at `addresses`.

        Raises RuntimeError where the driver or a program refuses one.
        """
        self._addresses[:] = array("Q", addresses)
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

    def _place(self, words: array[int]) -> int:
        """Where they lie from now on."""
        self._kept.append(words)
        return words.buffer_info()[0]

    def _dense(self, x: Described) -> tuple[int, ...]:
        """A DLTensor, but for its address."""
        kind = _CODES[x.dtype] | x.dtype.itemsize * 8 << 8 | 1 << 16
        shape, strides = (self._place(array("q", y or (0,))) for y in (x.shape, x.strides))
        return (0, _GPU | self._device << 32, len(x.shape) | kind << 32, shape, strides, 0)

    def _call(self, what: _Kernel | _Program, places: tuple[int, ...]) -> partial[int]:
        if isinstance(what, _Program):
            tensors = [(_TENSOR, self._at + 8 * _WORDS * place) for place in places]
            given = (*tensors, *what.scalars)
            arguments = self._place(array("Q", [word for x in given for word in x]))
            result = self._place(array("Q", (0, 0)))
            return partial(
                _tvm_ffi().LIB.TVMFFIFunctionCall,
                ctypes.c_void_p(what.function.__chandle__()),
                ctypes.c_void_p(arguments),
                ctypes.c_int32(len(given)),
                ctypes.c_void_p(result),
            )
        x, y, z = (*what.grid, 1, 1)[:3]
        block = what.threads, 1, 1
        halves = [x, y, z, *block, what.shared, 0]
        pairs = [low | high << 32 for low, high in zip(halves[::2], halves[1::2], strict=True)]
        attributes = self._place(array("Q", _DEPENDENT)) if what.dependent else 0
        config = array("Q", (*pairs, 0, attributes, int(what.dependent)))  # the stream comes later
        self._streams.append(memoryview(config)[4:5])
        scalars = self._place(array("Q", (*what.scalars, 0)))
        nothing = scalars + 8 * len(what.scalars)
        parameters = (
            *(self._at + 8 * _WORDS * place for place in places),
            *(scalars + 8 * i for i in range(len(what.scalars))),
            *(nothing,) * what.hidden,
        )
        return partial(
            driver().cuLaunchKernelEx,
            ctypes.c_void_p(self._place(config)),
            ctypes.c_void_p(what.function),
            ctypes.c_void_p(self._place(array("Q", parameters))),
            ctypes.c_void_p(0),
        )

    def _fail(self, call: partial[int], code: int) -> None:
        place = self._calls.index(call)
        why = f"TileLang's program gave {code}"
        if call.func is driver().cuLaunchKernelEx:
            words = ctypes.c_char_p()
            driver().cuGetErrorString(ctypes.c_int(code), ctypes.byref(words))
            why = f"CUDA error {code}, {(words.value or b'unknown').decode()}"
        raise RuntimeError(
            f"launch {place + 1} of {len(self._calls)} of a pass failed: {why}; errors of earlier "
            "kernels may be reported here: CUDA_LAUNCH_BLOCKING=1 shows which one it is"
        )


def _known(launch: Launch, device: int, compiled: Any = None) -> _Kernel | _Program | None:
    """What is launched, in its form here; None where it goes through its own launcher."""
    if not isinstance(launch.what, DirectKernel):
        return _program(launch)
    kernel = launch.what
    compiled = kernel.compiled_on(device) if compiled is None else compiled
    return None if compiled is None else _kernel(launch, kernel, compiled)


def _kernel(launch: Launch, kernel: DirectKernel, compiled: Any) -> _Kernel | None:
    metadata = getattr(compiled, "metadata", None)
    source = getattr(compiled, "src", None)
    types = getattr(source, "signature", None)
    if metadata is None or types is None or not _is_plain(metadata):
        return None
    kinds = [str(types.get(x.name)) for x in kernel.parameters]
    tensors = len(launch.tensors)
    if not all(x.startswith("*") for x in kinds[:tensors]):
        return None
    pairs = zip(launch.scalars, kinds[tensors:], strict=True)
    given = [(x, kind) for x, kind in pairs if kind != "constexpr"]
    words = [_word(x, kind) for x, kind in given]
    if None in words:
        return None
    sizes = [*(8,) * tensors, *(8 if kind == "i64" else 4 for _, kind in given)]
    found = _parameters(compiled.function)
    hidden = None if found is None else found[len(sizes) :]
    if found is None or found[: len(sizes)] != sizes:
        return None
    if hidden not in [[8] * n for n in range(_MOST_HIDDEN + 1)]:
        return None
    return _Kernel(
        str(getattr(metadata, "name", "")),
        compiled.function,
        launch.grid,
        32 * metadata.num_warps,
        metadata.shared,
        tuple(words),  # type: ignore[arg-type]
        len(hidden),
        bool(getattr(metadata, "launch_pdl", False)),
    )


def _is_plain(metadata: Any) -> bool:
    """Whether a launch wants no attributes but that of `dependent`, and no memory of Triton's."""
    unwanted = (
        "launch_cooperative_grid",
        "global_scratch_size",
        "profile_scratch_size",
        "tensordesc_meta",
    )
    return (
        not any(getattr(metadata, x, None) for x in unwanted)
        and getattr(metadata, "num_ctas", 1) == 1
        and metadata.shared <= _MOST_SHARED
    )


def _word(value: Any, kind: str) -> int | None:
    """A scalar as a word whose first bytes it is; None for what is not handed on so."""
    number = float if kind in ("fp32", "f32") else int
    if kind not in _FORMATS or type(value) is not number or (kind == "i32" and value not in INT32):
        return None
    return int.from_bytes(struct.pack(_FORMATS[kind], value), "little")


def _program(launch: Launch) -> _Program | None:
    """One of tvm-ffi's own functions; what TileLang wraps goes its own way."""
    if not hasattr(launch.what, "__chandle__") or hasattr(launch.what, "torch_function"):
        return None
    core, library = (getattr(_tvm_ffi(), x, None) for x in ("core", "LIB"))
    if not (hasattr(core, "_env_set_current_stream") and hasattr(library, "TVMFFIFunctionCall")):
        return None
    scalars: list[tuple[int, int]] = []
    for x in launch.scalars:
        if type(x) is int:
            scalars.append((_INT, x & (2**64 - 1)))
        elif type(x) is float:
            scalars.append((_FLOAT, int.from_bytes(struct.pack("<d", x), "little")))
        else:
            return None
    return _Program(launch.what, tuple(scalars))


def _parameters(function: int) -> list[int] | None:
    """Bytes of each parameter of a kernel, as the driver knows them; None if it does not say."""
    ask = getattr(driver(), "cuFuncGetParamInfo", None)  # of 12.4 and later
    if ask is None or getattr(driver(), "cuLaunchKernelEx", None) is None:
        return None
    found: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while True:
        place = ctypes.c_size_t(len(found))
        if ask(ctypes.c_void_p(function), place, ctypes.byref(offset), ctypes.byref(size)):
            return found
        found.append(size.value)


@cache
def driver() -> Any:
    """The CUDA driver, which torch has loaded; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@cache
def _tvm_ffi() -> ModuleType:
    import tvm_ffi

    return tvm_ffi
