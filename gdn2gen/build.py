"""source -> file -> module -> compiled kernel and its resources; ahead of time for any target."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gdn2gen.config import Config
from gdn2gen.errors import BuildError
from gdn2gen.paths import cache_dir
from gdn2gen.problem import Problem
from gdn2gen.render import Rendered, render
from gdn2gen.stages import STAGES

if TYPE_CHECKING:
    from gdn2gen.device import Device

_TRITON_POINTER = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "int32": "*i32"}
_TRITON_SCALAR = {"scale": "fp32", "lower_bound": "fp32"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers per thread, bytes per thread, bytes per block."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    seconds: float


@cache
def load(rendered: Rendered) -> ModuleType:
    """Write the source where Python can show it in tracebacks, and import it."""
    folder = cache_dir() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{rendered.module_name}.py"
    if not path.exists():
        write_atomically(path, rendered.source)
    spec = importlib.util.spec_from_file_location(rendered.module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[rendered.module_name] = module
    spec.loader.exec_module(module)
    return module


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: another process sees the old file or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def compile_ahead(
    problem: Problem, stage_name: str, config: Config, device: Device
) -> Resources:
    """Compile one stage for `device` without launching it; needs no GPU.

    Args are specialised as `launch` specialises them, so that on the same GPU the result is found
    again in Triton's cache. Raises BuildError with the compiler's last words.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    stage = STAGES[stage_name]
    module = load(render(problem, stage_name, config))
    kernel: Any = getattr(module, f"{stage_name}_kernel")
    operands = stage.operands(problem)
    signature: dict[str, str] = {x.name: _TRITON_POINTER[x.dtype_in(problem)] for x in operands}
    signature |= {name: _TRITON_SCALAR.get(name, "i32") for name in stage.scalars}
    constants = {
        name: getattr(module, name) for name in kernel.arg_names if name not in signature
    }
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (kernel.arg_names.index(x.name),): [["tt.divisibility", 16]] for x in operands
    }
    started = time.monotonic()
    try:
        compiled: Any = triton.compile(
            ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", int(device.arch.removeprefix("sm_")), 32),
            options=launch_options(config),
        )
    except Exception as error:
        words = str(error).strip().splitlines()[-3:]
        raise BuildError(
            f"{stage_name} [{config}] does not compile for {device.arch}: {' / '.join(words)}"
        ) from error
    registers, stack = _register_use(compiled)
    return Resources(
        registers, stack, int(compiled.metadata.shared), time.monotonic() - started
    )


def launch_options(config: Config) -> dict[str, int]:
    """The compiler's options, as the stage's `launch` passes them."""
    options = {name: config.size(name) for name in ("num_warps", "num_stages")}
    if config.get("maxnreg"):
        options["maxnreg"] = config.size("maxnreg")
    return options


def _register_use(compiled: Any) -> tuple[int, int]:
    """Registers and stack bytes per thread, read from the cubin by Triton's own cuobjdump."""
    import subprocess

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise BuildError(f"cuobjdump printed no resource usage: {text[-200:]}")
    return int(match[1]), int(match[2])
