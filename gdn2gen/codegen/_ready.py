"""Launches in the form that they are made in: kernels of the driver, and functions of tvm-ffi."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any, Final, NamedTuple

import torch

from gdn2gen.codegen import _driver
from gdn2gen.codegen.direct import INT32, DirectKernel

_MOST_HIDDEN: Final = 2
"""Pointers that Triton adds to a kernel's parameters, for scratch: of no bytes, or it is left to
its own launcher. Triton 3.6 to 3.9 add two."""
INT: Final = 1  # kTVMFFIInt
FLOAT: Final = 3  # kTVMFFIFloat
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


class At(NamedTuple):
    """A parameter that says where a tensor lies, by its place among those of the pass."""

    tensor: int


class Map(NamedTuple):
    """A parameter that is a tensor map: its words after the first, which is where a tensor lies."""

    tensor: int
    rest: tuple[int, ...]


class Kernel(NamedTuple):
    """A kernel as the driver launches it."""

    name: str
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    parameters: tuple[At | Map | int, ...]
    """Scalars are words, whose first bytes they are."""
    dependent: bool
    """Whether it may begin before the launch before it has ended, for which it waits itself."""
    cluster: tuple[int, ...] = ()
    """Programs that run together, if it wants any."""


class Program(NamedTuple):
    """A function of tvm-ffi and its arguments: places of tensors, then type and value of others."""

    function: Any
    tensors: tuple[int, ...]
    scalars: tuple[tuple[int, int], ...]


def ready(launch: Launch, device: int, compiled: Any = None) -> Kernel | Program | None:
    """What is launched, in its form here; None where it goes through its own launcher. `compiled`
    is what was, if its kernel does not know it."""
    if not isinstance(launch.what, DirectKernel):
        return _program(launch)
    kernel = launch.what
    compiled = kernel.compiled_on(device) if compiled is None else compiled
    return None if compiled is None else _kernel(launch, kernel, compiled)


def _kernel(launch: Launch, kernel: DirectKernel, compiled: Any) -> Kernel | None:
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
    words = [y for x, kind in given if (y := _word(x, kind)) is not None]
    if len(words) < len(given):
        return None
    sizes = [*(8,) * tensors, *(8 if kind == "i64" else 4 for _, kind in given)]
    found = _driver.parameters_of(compiled.function)
    hidden = None if found is None else found[len(sizes) :]
    if found is None or found[: len(sizes)] != sizes:
        return None
    if hidden not in [[8] * n for n in range(_MOST_HIDDEN + 1)]:
        return None
    return Kernel(
        str(getattr(metadata, "name", "")),
        compiled.function,
        launch.grid,
        (32 * metadata.num_warps,),
        metadata.shared,
        (*map(At, launch.tensors), *words, *(0,) * len(hidden)),
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
        and metadata.shared <= _driver.MOST_SHARED
    )


def _word(value: Any, kind: str) -> int | None:
    """A scalar as a word whose first bytes it is; None for what is not handed on so."""
    number = float if kind in ("fp32", "f32") else int
    if kind not in _FORMATS or type(value) is not number or (kind == "i32" and value not in INT32):
        return None
    return int.from_bytes(struct.pack(_FORMATS[kind], value), "little")


def _program(launch: Launch) -> Program | None:
    """One of tvm-ffi's own functions; what TileLang wraps goes its own way."""
    if not hasattr(launch.what, "__chandle__") or hasattr(launch.what, "torch_function"):
        return None
    core, library = (getattr(tvm_ffi(), x, None) for x in ("core", "LIB"))
    if not (hasattr(core, "_env_set_current_stream") and hasattr(library, "TVMFFIFunctionCall")):
        return None
    scalars: list[tuple[int, int]] = []
    for x in launch.scalars:
        if type(x) is int:
            scalars.append((INT, x & (2**64 - 1)))
        elif type(x) is float:
            scalars.append((FLOAT, int.from_bytes(struct.pack("<d", x), "little")))
        else:
            return None
    return Program(launch.what, launch.tensors, tuple(scalars))


@cache
def tvm_ffi() -> ModuleType:
    import tvm_ffi

    return tvm_ffi
