"""What a call costs the host on a machine without a GPU: all of it but the driver and the device.

    python scripts/host_python.py [--op kda | --op parts] [--profile forward]

Calls of 64 tokens and 4 heads at K = V = 128 in bf16, with the recipe that an H200 would run, on
CPU tensors that are taken for a GPU's. Nothing above the driver is left out: checks, look-ups,
autograd, Triton's launcher, TileLang's programs with their host code. In place of the driver
stands a library of functions that return at once and count (`driver_standin.c`, compiled here), and
buffers come from torch's allocator of the host, by the same C function as a GPU's. What is not in
the figures: the driver itself, and autograd's own thread for a GPU. TileLang's programs are
compiled for sm_90 first, which takes minutes, and kept in GDN2GEN_CACHE_DIR.

Launches are bound, unless GDN2GEN_BOUND=0.

The least of 400 runs of ten calls, in processor time of the thread: other processes change it by
some 10%, so figures of two versions compare if they are taken in turns. `host_time.py` times the
whole on a GPU.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

import gdn2gen
from gdn2gen.base.environment import verifying
from gdn2gen.codegen import background, programs
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.measure.accuracy import public_op
from gdn2gen.ops import _call, _decode
from gdn2gen.ops import parts as part_ops
from gdn2gen.runtime import decoding, layout, lookup, parts, passes

Run = Callable[[], Any]
CALLS: Final = 10
RUNS: Final = 400
PROFILED: Final = 2000
PARTS: Final = "parts"
STANDIN: Final = "GDN2GEN_DRIVER_STANDIN"
"""The environment's word for where the stand-in lies, in the process that runs with it."""


def with_standin() -> None:
    """Run this script anew, in a process that takes the stand-in for the driver."""
    if STANDIN in os.environ:
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(__file__).with_name("driver_standin.c")
        library = Path(folder) / "libcuda.so.1"
        command = ["cc", "-O2", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        for name in ("libcuda.so", "libcudart.so", "libcudart.so.12", "libcudart.so.13"):
            (Path(folder) / name).symlink_to(library)
        paths = filter(None, (folder, os.environ.get("LD_LIBRARY_PATH")))
        found = {
            **os.environ,
            STANDIN: folder,
            "LD_LIBRARY_PATH": os.pathsep.join(paths),
            "TRITON_LIBCUDA_PATH": folder,
            "CUDA_VISIBLE_DEVICES": "",
            # as a caching allocator: no call of the system for a buffer of megabytes
            "MALLOC_MMAP_THRESHOLD_": str(2**25),
            "MALLOC_TRIM_THRESHOLD_": str(2**30),
            "MALLOC_TOP_PAD_": str(2**26),
        }
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=found, check=False).returncode)


def stub() -> Callable[[], int]:
    """Have kernels run by the driver's stand-in, on CPU tensors; returns how many were launched."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    from gdn2gen.base.device import named_device

    standin = ctypes.CDLL("libcuda.so.1")
    _take_for_gpus(standin)
    allocate: Any = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]

    def maker(shape: tuple[int, ...], dtype: torch.dtype, _: torch.device) -> Callable[[], Any]:
        return partial(allocate, shape, layout.strides_of(shape), dtype)

    driver._active = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=nvidia.CudaLauncher,
        utils=nvidia.CudaUtils(),
    )
    replaced: dict[Any, tuple[str, Any]] = {
        background: ("compiled_program", _kept_program),
        passes: ("maker", maker),
        decoding: ("maker", maker),
        lookup: ("device_of", lambda _: named_device("H200")),
        _call: ("by_kernels", lambda _: True),
        _decode: ("by_kernels", lambda _: True),
        part_ops: ("by_kernels", lambda _: True),
        parts: ("device_of", lambda _: named_device("H200")),
    }
    for module, (name, value) in replaced.items():
        setattr(module, name, value)
    standin.standin_launches.restype = ctypes.c_long
    return standin.standin_launches


def _kept_program(module: Any, name: str, compile_it: Any) -> Any:
    """A program for sm_90, compiled unless it is kept."""
    alone = ModuleType(module.__name__)
    setattr(alone, name, compile_it)
    programs.keep_for(alone, "sm_90")
    kept = programs._kept(programs._name(module, name, (9, 0)))
    assert kept is not None
    return programs._load(kept)


_CAPSULE: Final = b"dlpack_exchange_api"


def _take_for_gpus(standin: Any) -> None:
    """Have TileLang's programs take torch's CPU tensors for a GPU's."""
    address, words, thing = ctypes.c_void_p, ctypes.c_char_p, ctypes.py_object
    get, new = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_New
    get.restype, get.argtypes = address, (thing, words)
    new.restype, new.argtypes = thing, (address, words, address)
    tensor: Any = Tensor
    standin.standin_exchange.restype = address
    standin.standin_exchange.argtypes = (address,)
    own = standin.standin_exchange(get(tensor.__dlpack_c_exchange_api__, _CAPSULE))
    tensor.__dlpack_c_exchange_api__ = new(own, _CAPSULE, None)


def directions(op: str, cu_seqlens: tuple[int, ...] | None) -> tuple[Run, Run]:
    """A forward without gradients, and a forward with a backward."""
    inputs: dict[str, Any] = {
        name: x.requires_grad_() if x.is_floating_point() else x
        for name, x in make_inputs(
            1, 64, 4, 128, 128, op=op, dtype=torch.bfloat16, cu_seqlens=cu_seqlens
        ).items()
    }
    function, flags = public_op(op), norm_of(op)
    leaves = [x for x in inputs.values() if x.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(**inputs, **flags)[0]

    do = torch.randn_like(inputs["v"])

    def both() -> tuple[Tensor, ...]:
        o, _ = function(**inputs, **flags)
        return torch.autograd.grad(o, leaves, do)

    return forward, both


def norm_of(op: str) -> dict[str, bool]:
    """The norm in the kernel, where there is one."""
    return {"use_qk_l2norm_in_kernel": True} if recurrence_named(op).normalises else {}


def step(op: str) -> Run:
    """One token of one sequence, its state in a slot of a pool."""
    rows = make_inputs(1, 1, 4, 128, 128, op=op, dtype=torch.bfloat16)
    pool = torch.zeros(8, 4, 128, 128)
    slots = torch.zeros(1, dtype=torch.int32)
    function: Any = getattr(gdn2gen, str(recurrence_named(op).public.recurrent))

    def decode() -> Any:
        with torch.no_grad():
            return function(
                **rows,
                **norm_of(op),
                state_pool=pool,
                ssm_state_indices=slots,
                output_final_state=True,
            )

    return decode


def selective_step() -> Run:
    """The same of Mamba-2 in mamba_ssm's words, as its layers give them: slices of a projection."""
    h, P, N = 16, 64, 128
    z, x, B, C, dt = torch.split(
        torch.randn(1, h * (2 * P + 1) + 2 * N, dtype=torch.bfloat16), [h * P, h * P, N, N, h], -1
    )
    A, D, bias = -torch.ones(h), torch.ones(h), torch.zeros(h)
    state = torch.zeros(8, h, P, N)
    given: dict[str, Any] = {
        "x": x.view(1, h, P), "dt": dt[..., None].expand(1, h, P), "B": B[:, None],
        "A": A[:, None, None].expand(h, P, N), "C": C[:, None], "D": D[:, None].expand(h, P),
        "z": z.view(1, h, P), "dt_bias": bias[:, None].expand(h, P), "dt_softplus": True,
        "state_batch_indices": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip

    def decode() -> Any:
        with torch.no_grad():
            return gdn2gen.selective_state_update(state, **given)

    return decode


def part_calls() -> dict[str, Run]:
    """A layer's convolutions and its gated norm, of as many tokens and heads."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()

    x, weight = ([drawn(*shape) for _ in range(3)] for shape in ((1, 64, 512), (512, 4)))
    rows, gate, scale = drawn(1, 64, 4, 128), drawn(1, 64, 4, 128), drawn(128)

    def convolve() -> list[Tensor]:
        return gdn2gen.short_convolution(x, weight)[0]

    def norm() -> list[Tensor]:
        return [gdn2gen.gated_rms_norm(rows, gate, scale)]

    calls: dict[str, Run] = {}
    for name, run, into in (
        ("convolve", convolve, [*x, *weight]),
        ("norm", norm, [rows, gate, scale]),
    ):
        towards = [torch.randn_like(y) for y in x[:3]] if name == "convolve" else [gate.detach()]

        def both(run: Any = run, into: Any = into, towards: Any = towards) -> Any:
            return torch.autograd.grad(run(), into, towards)

        calls[f"{name} forward"] = torch.no_grad()(run)
        calls[f"{name} forward+backward"] = both
    return calls


def microseconds(run: Run) -> float:
    best = float("inf")
    for _ in range(RUNS):
        started = time.thread_time()
        for _ in range(CALLS):
            run()
        best = min(best, time.thread_time() - started)
    return best / CALLS * 1e6


def calls_of(op: str) -> dict[str, Run]:
    """What is timed, by name; compiled when it is first run."""
    runs: dict[str, Run] = {}
    if hasattr(gdn2gen, str(recurrence_named(op).public.recurrent)):
        runs["decode"] = step(op)
    if recurrence_named(op).stepped:
        runs["selective_state_update"] = selective_step()
    for name, lengths in (("", None), ("packed ", (0, 20, 64))):
        runs[f"{name}forward"], runs[f"{name}forward+backward"] = directions(op, lengths)
    return runs


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--op", choices=(*OPS, PARTS), default=OPS[0], help="(%(default)s)")
    parser.add_argument("--only", action="append", metavar="NAME", help="only calls of that name")
    parser.add_argument("--profile", metavar="NAME", help="also profile the calls of that name")
    args = parser.parse_args()
    launches = stub()
    for name, run in (part_calls() if args.op == PARTS else calls_of(args.op)).items():
        if args.only and name not in args.only:
            continue
        run()
        before = launches()
        run()
        made = launches() - before
        print(f"{name:24} {microseconds(run):7.1f} us, {made} launches", flush=True)
        if name == args.profile:
            profile = cProfile.Profile()
            with profile:
                for _ in range(PROFILED):
                    run()
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    with_standin()
    main()
