"""Compiled TileLang programs, kept on disk where a later process runs them without TileLang.

TileLang has a cache of its own, but to look into it a process must import TileLang and trace the
program again: 2.6 s of a warm first step on an H200's host. A library that was kept is loaded in a
fifth of a second.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

from gdn2gen.base.environment import hush_tilelang
from gdn2gen.base.errors import BuildError
from gdn2gen.base.files import replace_file
from gdn2gen.base.folders import is_trusted_file
from gdn2gen.base.paths import code_dir
from gdn2gen.codegen.nvrtc import compiler_for
from gdn2gen.codegen.shipped import shipped

Program = Callable[..., Any]

_loading = Lock()


def compiled_program(
    module: ModuleType, function: str, compile_it: Callable[[], Program]
) -> Program:
    """A program of a rendered module for the present GPU: the one kept, else `compile_it()`.

    `function` is what the module calls `compile_it`.
    """
    name = _name(module, function)
    kept = _kept(name)
    if kept is not None:
        try:
            return _load(kept)
        except Exception:  # whatever it is, compiling anew mends it
            _discard(kept)
    hush_tilelang()
    with compiler_for("cuda"):
        program = compile_it()
    kept = _keep(program, name)
    return program if kept is None else _load(kept)


def are_kept(module: ModuleType) -> bool:
    """Whether a process without a compiler could run all programs of a module."""
    return all(_kept(_name(module, function)) is not None for function in programs_of(module))


def programs_of(module: ModuleType) -> list[str]:
    """The module's functions that compile its programs."""
    return [name for name in vars(module) if name.startswith("compiled")]


def keep_for(module: ModuleType, arch: str) -> None:
    """Compile the module's programs for `arch` (`sm_90`), here or not, and keep them.

    Raises BuildError where a library was not kept.
    """
    import tilelang

    hush_tilelang()
    capability = divmod(int(arch.removeprefix("sm_")), 10)
    # wgmma and the register hand-over between warp groups need the architecture's own target
    target = {"kind": "cuda", "arch": arch + ("a" if arch in ("sm_90", "sm_100") else "")}
    compile_here = tilelang.compile
    for function in programs_of(module):
        name = _name(module, function, capability)
        if _kept(name) is not None:
            continue
        tilelang.compile = partial(compile_here, target=target)
        try:
            with compiler_for():
                program = getattr(module, function).__wrapped__()
        finally:
            tilelang.compile = compile_here
        if _keep(program, name) is None:
            raise BuildError(f"TileLang left no library of {module.__name__} to keep")


def _name(module: ModuleType, function: str, capability: tuple[int, int] | None = None) -> str:
    """From the source's digest, which is in the module's name, the GPU and the toolchain."""
    import torch

    gpu = capability
    if gpu is None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_capability()
    made_of = (gpu, os.uname().machine, *(_version(x) for x in ("tilelang", "apache-tvm-ffi")))
    return f"{module.__name__}-{function}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]}"


def _kept(name: str) -> Path | None:
    """The library of that name that this user or root kept, with the content it had.

    A part of one would kill the process.
    """
    folder = shipped()
    for path in () if folder is None else (folder / "programs").glob(f"{name}-*.so"):
        if is_trusted_file(path) and path.stem.endswith(_digest(path.read_bytes(), name)):
            return path
    for path in code_dir("programs").glob(f"{name}-*.so"):
        if is_trusted_file(path) and path.stem.endswith(_digest(path.read_bytes(), name)):
            return path
        _discard(path)
    return None


def _discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _digest(content: bytes, name: str) -> str:
    """Of the content and of what it is the program of."""
    return hashlib.sha256(name.encode() + b"\0" + content).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _load(path: Path) -> Program:
    import tvm_ffi

    _load_runtime()
    program: Any = tvm_ffi.load_module(str(path)).get_function("main")
    _libraries[program.__chandle__()] = program, path
    return program  # type: ignore[no-any-return]


_libraries: dict[int, tuple[Any, Path]] = {}
"""Of every program that was loaded, by its handle, which is its own for as long as it is here."""


def library_of(program: Any) -> Path | None:
    """The library that a program was loaded from."""
    _, path = _libraries.get(program.__chandle__(), (None, None))
    return path


def is_content_of(content: bytes, path: Path) -> bool:
    """Whether a library that was kept at `path` had this content."""
    name, _, digest = path.stem.rpartition("-")
    return digest == _digest(content, name)


@cache
def _load_runtime() -> None:
    """TileLang's shared library, in which a kept program finds what it calls on the host."""
    with _loading:
        if "tilelang" in sys.modules:
            import tilelang  # noqa: F401  # waits for an import that another thread has begun

            return
        spec = importlib.util.find_spec("tilelang")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("tilelang is not installed")
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        for name in ("libtvm_runtime.so", "libtilelang.so"):
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL | os.RTLD_LAZY)


def _keep(program: Any, name: str) -> Path | None:
    """Copy the library from TileLang's cache; None if it is not there, or could not be written."""
    folder = getattr(program, "_tilelang_cache_path", None)
    library = Path(folder) / "executable.so" if folder else None
    if library is None or not library.exists():
        return None
    try:
        content = library.read_bytes()
        path = code_dir("programs") / f"{name}-{_digest(content, name)}.so"
        replace_file(path, content, durable=False)
    except OSError:
        return None  # a full or read-only disk costs the next process its time, no more
    return path
