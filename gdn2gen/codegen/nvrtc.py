"""TileLang without a CUDA toolkit: CUDA source compiled by NVRTC, which pip installs with torch.

The program around a kernel stays what it is with nvcc, a library that a C compiler makes (Triton
wants one, too), so that a launch costs the same. On two cores a scan takes NVRTC 13.0 0.5 s once it
has read the headers, and nvcc 1.8.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

from gdn2gen.base.environment import cuda_compiler
from gdn2gen.base.errors import BuildError
from gdn2gen.base.folders import private_dir

# From here on NVRTC keeps what it has read of headers: that scan took 1.1 s without. Threads that
# compile at once wait for each other while one reads.
_KEEPS_HEADERS = (12, 8)
_HANDING_OVER: Final = threading.Lock()


# Functions that nvcc knows, and NVRTC by a header that includes what no wheel has: one instruction
# of PTX each.
_DEVICE: Final = {
    "cudaGridDependencySynchronize": "griddepcontrol.wait",
    "cudaTriggerProgrammaticLaunchCompletion": "griddepcontrol.launch_dependents",
}


def _declared(source: str) -> str:
    used = {name: x for name, x in _DEVICE.items() if name in source}
    head = "static __device__ __forceinline__ void"
    body = 'asm volatile("{};" ::: "memory");'
    return "".join(f"{head} {name}() {{ {body.format(x)} }}\n" for name, x in used.items())


@dataclass(frozen=True)
class Nvrtc:
    """The library, and the folders of CUDA's headers."""

    library: Path
    headers: tuple[Path, ...]

    @cached_property
    def _functions(self) -> ctypes.CDLL:
        for beside in self.library.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(beside))  # which the library looks for by name alone
        return ctypes.CDLL(str(self.library))

    @cached_property
    def version(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._functions.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def compile(self, source: str, arch: str, options: Iterable[str]) -> bytes:
        """The binary of `source` for `arch` (`sm_90a`). Raises BuildError with what NVRTC says."""
        major, minor = self.version
        given = [f"--gpu-architecture={arch}", "-default-device", "-w", *options]
        given += [f"-D__CUDACC_VER_MAJOR__={major}", f"-D__CUDACC_VER_MINOR__={minor}"]
        given += [f"-I{folder}" for folder in self.headers]
        if self.version >= _KEEPS_HEADERS:
            given += ["-pch", f"--pch-dir={_headers_read()}"]
        call, program = self._functions, ctypes.c_void_p()
        text = f"#include <tl_templates/cuda/nvrtc_std.h>\n{_declared(source)}{source}"
        call.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
        try:
            words = (ctypes.c_char_p * len(given))(*(word.encode() for word in given))
            if call.nvrtcCompileProgram(program, len(given), words) != 0:
                said = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
                raise BuildError(f"NVRTC {major}.{minor} does not compile for {arch}:\n{said}")
            return self._read(program, "CUBIN")
        finally:
            call.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self._functions, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        getattr(self._functions, f"nvrtcGet{what}")(program, content)
        return content.raw


@cache
def find_nvrtc() -> Nvrtc | None:
    """NVRTC with the headers that TileLang's kernels include, as wheels lay them; None without."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(x) for x in (spec.submodule_search_locations or ())] if spec else []
    for major in _majors():
        library = _first(roots, (f"cu{major}/lib", "cuda_nvrtc/lib"), f"libnvrtc.so.{major}")
        own = f"cu{major}/include"
        headers = _first(roots, (own, "cuda_runtime/include"), "cuda_fp16.h")
        places = (f"{own}/cccl", "cuda_cccl/include/cccl", "cuda_cccl/include", "cu13/include/cccl")
        standard = _first(roots, places, "cuda/std/cassert")
        if library and headers and standard:
            folder = standard.parents[2]
            # CUTLASS includes cccl/cuda/std, which includes cuda/std
            around = folder.parent if folder.name == "cccl" else folder
            return Nvrtc(library, tuple(dict.fromkeys((headers.parent, folder, around))))
    return None


def _majors() -> tuple[str, ...]:
    """CUDA's versions to look for: torch's own, of which the libraries are there with it."""
    import torch

    return tuple(dict.fromkeys(((torch.version.cuda or "13").partition(".")[0], "13", "12")))


def _first(roots: list[Path], folders: tuple[str, ...], name: str) -> Path | None:
    paths = (root / folder / name for folder in folders for root in roots)
    return next((path for path in paths if path.is_file()), None)


@cache
def _headers_read() -> str:
    folder = tempfile.mkdtemp(dir=private_dir(), prefix="nvrtc-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def has_compiler() -> bool:
    """Whether TileLang is here and can compile: by nvcc, or else by NVRTC."""
    return has_tilelang() and (cuda_compiler() is not None or find_nvrtc() is not None)


@cache
def has_tilelang() -> bool:
    """Whether TileLang can be imported; it is not."""
    return importlib.util.find_spec("tilelang") is not None


def why_no_compiler() -> str:
    """Where `has_compiler` says no: what is missing."""
    if not has_tilelang():
        return "TileLang cannot be compiled here, for the package tilelang is not installed"
    return "TileLang cannot be compiled here, for neither nvcc nor NVRTC was found"


def compiler_for(target: str | None = None) -> AbstractContextManager[Any]:
    """To compile TileLang's programs in: where there is no nvcc, TileLang is handed NVRTC.

    With `target` (`cuda`: the present GPU), programs are for it: without a toolkit TileLang would
    not look for a GPU.
    """
    if cuda_compiler() is not None:
        return nullcontext()
    from tilelang.backend.target import determine_target

    with _HANDING_OVER:
        _hand_over()
    if target is None:
        return nullcontext()
    found: AbstractContextManager[Any] = determine_target(target, return_object=True)
    return found


@cache
def _hand_over() -> None:
    """Once: modules put something before it (`one_warp_loads`), on which other threads rely.

    `cache` alone would let two threads in that come together, and the later one take that away.
    """
    from tilelang.contrib import nvcc

    nvcc.compile_cuda = _compile_cuda


def _compile_cuda(
    code: str,
    target_format: str = "ptx",
    arch: str | list[str] | None = None,
    options: str | list[str] | None = None,
    path_target: str | None = None,
    verbose: bool = False,
) -> bytearray:
    """In place of TileLang's function of that name, which calls nvcc."""
    nvrtc = find_nvrtc()
    named = re.search(r"sm_\w+", " ".join([arch] if isinstance(arch, str) else arch or []))
    if nvrtc is None or named is None or target_format != "cubin":
        raise BuildError(f"no nvcc was found, and NVRTC cannot make a {target_format} for {arch}")
    words = [options] if isinstance(options, str) else options or []
    return bytearray(nvrtc.compile(code, named[0], words))
