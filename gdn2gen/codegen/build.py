"""source -> file -> module -> compiled kernel and its resources; ahead of time for any target."""

from __future__ import annotations

import linecache
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gdn2gen.base import environment
from gdn2gen.base.dtypes import DTYPE
from gdn2gen.base.environment import hush, hush_tilelang
from gdn2gen.base.errors import BuildError
from gdn2gen.base.files import replace_file
from gdn2gen.base.paths import code_dir
from gdn2gen.codegen.faults import why_wrong
from gdn2gen.codegen.nvrtc import compiler_for, has_compiler, why_no_compiler
from gdn2gen.codegen.render import Rendered, render
from gdn2gen.codegen.shipped import install, source_of
from gdn2gen.family.compiled import Compiled
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.kernels.stages import EVERY_STAGE

if TYPE_CHECKING:
    from gdn2gen.base.device import Device

# The other scalars are sizes.
_SCALAR_DTYPES = {"scale": "fp32", "lower_bound": "fp32", "eps": "fp32"}
# TileLang's barriers lie before the tiles, and push them to the next multiple of 1 KB. Not counted,
# a prepare of 76,416 bytes passed for three programs to a multiprocessor of an H200: two were, and
# it took 0.401 ms at long32k instead of 0.324.
_BARRIERS_BYTES = 1024
# Options of a Triton kernel in a TileLang module, as its `launch` passes them.
_BESIDE_TILELANG = {"num_warps": 4, "num_stages": 1}
# Kernels whose options are not all the config's.
_OWN_OPTIONS: dict[str, dict[str, int]] = {
    "merge_kernel": {"num_warps": 8},
    "later_frames_kernel": {"maxnreg": 128},
}
# Kernels of none of the config's options.
_ALL_OPTIONS = {
    "activate_beta_kernel": {"num_warps": 1},
    "fold_beta_kernel": {"num_warps": 1},
    "fold_decay_kernel": {"num_warps": 1},
    "fold_heads_kernel": {"num_warps": 1},
    "fold_parts_kernel": {"num_warps": 1},
    "gate_group_kernel": {"num_warps": 4, "num_stages": 2},
    "heads_kernel": {"num_warps": 4, "num_stages": 1},
    "numbers_kernel": {"num_warps": 4, "num_stages": 1},
    "angles_kernel": {"num_warps": 1, "num_stages": 1},
    "tokens_kernel": {"num_warps": 1, "num_stages": 1},
    "weights_kernel": {"num_warps": 1, "num_stages": 1},
    "tail_kernel": {"num_warps": 1, "num_stages": 1},
    "place_kernel": {"num_warps": 4, "num_stages": 1},
    "sum_kernel": {"num_warps": 4, "num_stages": 1},
}
# Likewise, and theirs are constants of the module, by these names.
_OF_MODULE = {"pair_group_kernel": {"num_warps": "PAIR_WARPS", "num_stages": "STAGES"}}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers and bytes per thread, bytes and threads per block.

    Of a TileLang kernel's threads some may only load.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    seconds: float


@cache
def load(rendered: Rendered) -> ModuleType:
    """The rendered source as a module. What runs is what was rendered: nothing is read from disk.

    The source is also written where tracebacks and profilers find it.
    """
    path = str(_show(rendered))
    if environment.interpreted():
        from gdn2gen.codegen.hasten import compiled, hasten
        from gdn2gen.codegen.interpreter import mend_loops, mend_masks, teach_bf16, teach_waits

        mend_loops()
        mend_masks()
        hasten()
        if "bfloat16" in rendered.source:
            teach_bf16()
        if "gdc_" in rendered.source:
            teach_waits()
        code = compiled(rendered.source, path)
    else:
        code = compile(rendered.source, path, "exec", dont_inherit=True)
    install()
    # Triton and TileLang read the source of their kernels back: without a time, it stays as it is
    lines = rendered.source.splitlines(keepends=True)
    linecache.cache[path] = (len(rendered.source), None, lines, path)
    module = ModuleType(rendered.module_name)
    module.__file__ = path
    sys.modules[rendered.module_name] = module
    hush()
    try:
        exec(code, vars(module))
    except BaseException:
        del sys.modules[rendered.module_name]
        raise
    return module


def _show(rendered: Rendered) -> Path:
    """Have a file say what was rendered, whatever it said before; a full disk costs no more."""
    name = f"{rendered.module_name}.py"
    ships = source_of(name, rendered.source)
    if ships is not None:
        return ships
    path = code_dir("kernels") / name
    with suppress(OSError):
        if not path.is_file() or path.read_bytes() != rendered.source.encode():
            replace_file(path, rendered.source, durable=False)
    return path


def compile_ahead(problem: Compiled, stage_name: str, config: Config, device: Device) -> Resources:
    """Compile one stage for `device` without launching it; needs no GPU.

    Args are specialised as `launch` specialises them, so that on the same GPU the result is found
    again in Triton's cache. Raises BuildError with the compiler's last words, OSError where
    it could not be run or its files not be written, and UnsupportedError under TRITON_INTERPRET=1.
    """
    environment.check_compiles()
    started = time.monotonic()
    module = load(render(problem, stage_name, config))
    compile_module = _compile_tilelang if language_of(config) == "tilelang" else _compile_triton
    try:
        used = compile_module(module, problem, stage_name, config, device)
    except OSError:
        raise  # a full disk or a compiler that is gone: no fault of the config's
    except Exception as error:
        words = str(error).strip().splitlines()[-3:]
        raise BuildError(
            f"{stage_name} [{config}] does not compile for {device.arch}: {' / '.join(words)}"
        ) from error
    return Resources(*used, time.monotonic() - started)


def _compile_triton(
    module: ModuleType, problem: Compiled, stage_name: str, config: Config, device: Device
) -> tuple[int, int, int, int]:
    """Registers and stack bytes per thread, shared bytes and threads per block.

    Of the stage's own kernel, though all kernels of the module are compiled, and the largest of
    them must fit into shared memory.
    """
    main = f"{stage_name}_kernel"
    others = [x for x in vars(module) if x.endswith("_kernel") and x != main]
    options = launch_options(config)
    used = [
        _used(compile_kernel(module, name, problem, stage_name, options, device))
        for name in (main, *others)
    ]
    return (*used[0][:2], max(shared for _, _, shared in used), 32 * options["num_warps"])


def _used(compiled: Any) -> tuple[int, int, int]:
    """Registers and stack bytes per thread, and shared bytes."""
    return (*_register_use(compiled.asm["cubin"]), int(compiled.metadata.shared))


def compile_kernel(
    module: ModuleType,
    name: str,
    problem: Compiled,
    stage_name: str,
    options: dict[str, int],
    device: Device,
) -> Any:
    """What Triton makes of one kernel of a stage's module. `options`: of the stage's own kernel."""
    stage, kernel = EVERY_STAGE[stage_name], getattr(module, name)
    operands = [x for x in stage.operands(problem) if x.name in kernel.arg_names]
    dtypes = {x.name: x.dtype_in(problem) for x in operands}
    known = (*stage.scalars_of(problem), "NT", "n_programs")
    scalars = [x for x in kernel.arg_names if x in known or x.startswith("units")]
    of_module = {option: getattr(module, x) for option, x in _OF_MODULE.get(name, {}).items()}
    own = of_module or _ALL_OPTIONS.get(name) or options | _OWN_OPTIONS.get(name, {})
    if name in getattr(module, "EARLY", ()):
        own = own | {"launch_pdl": True}
    return compile_for_triton(module, kernel, dtypes, scalars, own, device)


def compile_for_triton(
    module: ModuleType,
    kernel: Any,
    dtypes: Mapping[str, str],
    scalars: Sequence[str],
    options: Mapping[str, int],
    device: Device,
) -> Any:
    """One kernel compiled as its launches specialise it: `dtypes` of its tensors and the names of
    its scalars; all else are constants of the module. Raises BuildError where a compiler is known
    to have got it wrong."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", int(device.arch.removeprefix("sm_")), 32)
    types = {name: f"*{DTYPE[dtype].triton_name}" for name, dtype in dtypes.items()}
    types |= {name: DTYPE[_SCALAR_DTYPES.get(name, "int32")].triton_name for name in scalars}
    values = {name: getattr(module, name) for name in kernel.arg_names if name not in types}
    # as its binder says of arguments: types, and what else is known of each (aligned, a value)
    known = [
        (types[x.name], _alignment(x) if x.name in dtypes else None)
        if x.name in types
        else ("constexpr", values[x.name])
        for x in kernel.params
    ]
    bound = {name: values.get(name) for name in kernel.arg_names}
    pack = getattr(kernel, "_pack_args", None)
    if pack is None:  # of a Triton that packs them in its launch alone
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        constants, attributes = values, {(i,): _ALIGNED for i, x in enumerate(known) if x[1] == "D"}
    else:
        # by Triton itself: its cache's key depends on how it writes down what is not known, too
        _, signature, constants, attributes = pack(
            make_backend(target), dict(options), bound, known, None
        )
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=target,
        options=dict(options),
    )
    wrong = why_wrong(compiled.asm)
    if wrong:
        raise BuildError(f"{kernel.__name__} would compute something else: {wrong}")
    return compiled


_ALIGNED = [["tt.divisibility", 16]]


def _alignment(parameter: Any) -> str:
    """What the binder says of a tensor whose address is a multiple of 16."""
    return "" if parameter.do_not_specialize_on_alignment else "D"


def _compile_tilelang(
    module: ModuleType, problem: Compiled, stage_name: str, _config: Config, device: Device
) -> tuple[int, int, int, int]:
    """Registers and stack bytes per thread, shared bytes and threads per block.

    Of the TileLang programs; the most that one of several takes. A Triton kernel that the module
    has beside them is compiled, too. The binary is taken from TileLang's cache on its way there; a
    kernel that was compiled before passes through no compiler, and reports zero registers and
    stack.
    """
    if not has_compiler():
        raise FileNotFoundError(why_no_compiler())
    import tilelang
    from tilelang.cache.cuda_binary_cache import CUDABinaryCache

    hush_tilelang()
    used = [(0, 0, 0, 0)]
    binaries: list[bytes] = []
    save = CUDABinaryCache.save

    def keep(key: str, kind: str, binary: bytes) -> Any:
        binaries.append(bytes(binary))
        return save(key, kind, binary)

    CUDABinaryCache.save = keep
    try:
        # wgmma and the register hand-over between warp groups need the architecture's own target
        arch = device.arch + ("a" if device.arch in ("sm_90", "sm_100") else "")
        target = {"kind": "cuda", "arch": arch}
        passes = getattr(module, "PASSES", {}) | getattr(module, "LOADS", {})
        for name in [x for x in vars(module) if x.endswith("program")]:
            with compiler_for():
                if hasattr(module, "one_warp_loads"):
                    module.one_warp_loads()
                program = getattr(module, name)()
                kernel = tilelang.compile(program, target=target, pass_configs=passes)
            source = kernel.get_kernel_source()
            shared = _dynamic_shared_bytes(kernel.get_host_source())
            if "mbarrier_mem" in source:
                shared += _BARRIERS_BYTES
            registers = _register_use(binaries.pop()) if binaries else (0, 0)
            used.append((*registers, shared, _threads(source)))
    finally:
        CUDABinaryCache.save = save
    for name in [x for x in vars(module) if x.endswith("_kernel")]:
        compile_kernel(module, name, problem, stage_name, beside_tilelang(module), device)
    most = [max(column) for column in zip(*used, strict=True)]
    return most[0], most[1], most[2], most[3]


def beside_tilelang(module: ModuleType) -> dict[str, int]:
    """Options of a Triton kernel in a TileLang module: it may say how many warps that takes."""
    return _BESIDE_TILELANG | {"num_warps": getattr(module, "STRONG_WARPS", 4)}


def _threads(source: str) -> int:
    """Threads of a block, those that only load among them, as its CUDA source bounds them."""
    found = re.search(r"__launch_bounds__\((\d+)", source)
    if found is None:
        raise BuildError("the CUDA source that TileLang wrote bounds no number of threads")
    return int(found[1])


def _dynamic_shared_bytes(host_source: str) -> int:
    """The last integer argument of the generated launch is the dynamic shared memory, in bytes."""
    found = re.findall(r"v_int64\) = \(\(int64_t\)(\d+)\);", host_source)
    return int(found[-1]) if found else 0


def launch_options(config: Config) -> dict[str, int]:
    """The compiler's options, as the stage's `launch` passes them."""
    options = {name: config.size(name) for name in ("num_warps", "num_stages")}
    if config.get("maxnreg"):
        options["maxnreg"] = config.size("maxnreg")
    return options


def _register_use(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, read from the cubin by Triton's own cuobjdump."""
    import subprocess

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
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
