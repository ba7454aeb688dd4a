"""The CUDA driver's own functions, by ctypes: what launches, and what is asked before one."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Final

_MOST_DYNAMIC_SHARED: Final = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
MOST_SHARED: Final = 228 * 1024
"""Bytes of shared memory that a multiprocessor has, of any GPU."""


@cache
def driver() -> Any:
    """The CUDA driver, which torch has loaded; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def parameters_of(function: int) -> list[int] | None:
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


def may_load(device: int, stream: int) -> bool:
    """Whether code can be loaded for that device now: it is current, and no graph is captured."""
    found = driver()
    if not all(hasattr(found, x) for x in ("cuCtxGetDevice", "cuStreamIsCapturing")):
        return False
    current, capturing = ctypes.c_int(-1), ctypes.c_int(1)
    if found.cuCtxGetDevice(ctypes.byref(current)) or current.value != device:
        return False
    code = found.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(capturing))
    return code == 0 and capturing.value == 0


def load_kernel(image: bytes, name: str, shared: int) -> int | None:
    """The kernel of that name in compiled code, loaded for good into the current context, with as
    much dynamic shared memory as it wants; None where the driver refuses."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    found = driver()
    if found.cuModuleLoadData(ctypes.byref(module), image):
        return None
    if found.cuModuleGetFunction(ctypes.byref(function), module, name.encode()):
        return None
    wanted = ctypes.c_int(_MOST_DYNAMIC_SHARED), ctypes.c_int(shared)
    if shared and found.cuFuncSetAttribute(function, *wanted):
        return None
    return function.value
