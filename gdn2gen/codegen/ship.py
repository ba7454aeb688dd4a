"""Write the folder of kernels that ships: what `shipped` reads, compiled for a GPU here or not.

Runs in processes whose caches are the folder itself (`surroundings`), so that what the compilers
keep is what ships.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdn2gen.base.device import Device
from gdn2gen.base.errors import BuildError
from gdn2gen.codegen.build import (
    beside_tilelang,
    compile_for_triton,
    compile_kernel,
    launch_options,
    load,
)
from gdn2gen.codegen.programs import keep_for
from gdn2gen.codegen.render import render, render_slots, render_tables
from gdn2gen.codegen.shipped import TRITON
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.kernels.operands import OUTPUT
from gdn2gen.kernels.schedule import cleared_of


def surroundings(folder: Path, scratch: Path) -> dict[str, str]:
    """The environment of processes that compile into `folder`."""
    return {
        "GDN2GEN_COMPILED_DIR": "",
        "GDN2GEN_CACHE_DIR": str(folder),
        "TRITON_CACHE_DIR": str(folder / TRITON),
        "TILELANG_CACHE_DIR": str(scratch),
        "TRITON_STORE_BINARY_ONLY": "1",
        "TRITON_INTERPRET": "0",
    }


def ship_stage(
    problem: Compiled, stage: str, config: Config, device: Device, present: bool
) -> float:
    """Compile one stage into the folder; seconds. `present`: is the GPU here? Then Triton's own
    launcher is made, too. Raises BuildError with the compiler's words."""

    def compile_all() -> None:
        module = load(render(problem, stage, config))
        options = launch_options(config)
        if language_of(config) == "tilelang":
            keep_for(module, device.arch)
            options = beside_tilelang(module)
        for name in [x for x in vars(module) if x.endswith("_kernel")]:
            _launchable(compile_kernel(module, name, problem, stage, options, device), present)

    return _timed(f"{stage} [{config}]", device, compile_all)


def ship_tables(problem: Problem, BT: int, device: Device, present: bool) -> float:
    """The same of what a packed batch needs around its stages."""

    def compile_all() -> None:
        module = load(render_tables(problem, BT))
        made = dict.fromkeys(("cu_seqlens", "chunk_offsets", "chunk_table"), "int32")
        cleared = {x.name: x.dtype_in(problem) for x in cleared_of(problem)}
        kernels: list[tuple[Any, dict[str, str], int]] = [
            (
                module.chunk_tables_kernel,
                {"given": given, "o": OUTPUT.dtype_in(problem), **made},
                1,
            )
            for given in ("int32", "int64")
        ]
        kernels.append((module.clear_kernel, {"cu_seqlens": "int32", **cleared}, 4))
        for kernel, dtypes, num_warps in kernels:
            scalars = [x for x in ("N", "NT", "T", "HV") if x in kernel.arg_names]
            options = {"num_warps": num_warps}
            compiled = compile_for_triton(module, kernel, dtypes, scalars, options, device)
            _launchable(compiled, present)

    return _timed("chunk_tables", device, compile_all)


def ship_slots(
    problem: Problem,
    pool: str,
    indices: str,
    flagged: bool,
    checkpoints: bool,
    device: Device,
    present: bool,
) -> float:
    """The same of what lies between slots of a pool and the stages: states in the dtype `pool`,
    indices in theirs, slots at multiples of 8 elements."""

    def compile_all() -> None:
        given = {"indexed": True, "flagged": flagged, "checkpoints": checkpoints}
        module = load(render_slots(problem, **given, odd_slots=False))
        dtypes = {
            "state_pool": pool,
            "o": OUTPUT.dtype_in(problem),
            "has_initial_state": "uint8",
            **dict.fromkeys(("initial_state", "final_state"), "fp32"),
            **dict.fromkeys(("ssm_state_indices", "checkpoint_indices"), indices),
            **dict.fromkeys(("checkpoint_slots", "cu_seqlens"), "int32"),
        }
        for kernel in (module.read_kernel, module.put_back_kernel):
            tensors = {x: dtypes[x] for x in kernel.arg_names if x in dtypes}
            constants = [x.name for x in kernel.params if x.is_constexpr]
            scalars = [x for x in kernel.arg_names if x not in (*tensors, *constants)]
            options = {"num_warps": 4}
            compiled = compile_for_triton(module, kernel, tensors, scalars, options, device)
            _launchable(compiled, present)

    return _timed("state_slots", device, compile_all)


def ship_launcher(present: bool) -> str | None:
    """Compile what Triton launches any kernel by, in C; why that cannot be done without a GPU."""
    from triton.backends.nvidia import driver

    if present:
        driver.CudaUtils()
        return None
    if hasattr(driver, "make_launcher") or not hasattr(driver, "include_dirs"):
        return (
            "this Triton compiles a launcher in C for every kernel, which only a GPU's driver "
            "lets it do: run `gdn2gen compile` on such a GPU, or have a C compiler in the container"
        )
    from triton.runtime.build import compile_so_from_file

    with tempfile.TemporaryDirectory() as scratch:
        # to link with, in place of the driver's own library, which is where the GPU is
        stub = Path(scratch) / driver.libraries[0]
        source = Path(scratch) / "driver.c"
        source.touch()
        compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"
        options = ["-shared", "-fPIC", f"-Wl,-soname,{stub.name}", "-o", str(stub)]
        subprocess.run([compiler, *options, str(source)], check=True)
        compile_so_from_file(
            src_path=str(Path(driver.dirname) / "driver.c"),
            name="cuda_utils",
            library_dirs=[driver.libdevice_dir, scratch],
            include_dirs=driver.include_dirs,
            libraries=driver.libraries,
        )
    return None


def _launchable(compiled: Any, present: bool) -> None:
    if present:
        compiled._init_handles()


def _timed(what: str, device: Device, compile_all: Callable[[], None]) -> float:
    started = time.monotonic()
    try:
        compile_all()
    except OSError:
        raise  # a full disk or a compiler that is gone
    except Exception as error:
        words = " / ".join(str(error).strip().splitlines()[-3:])
        raise BuildError(f"{what} does not compile for {device.arch}: {words}") from error
    return time.monotonic() - started
