"""What a call costs the host in Python, on a machine without a GPU: launches are stubbed.

    python scripts/host_python.py [--op kda] [--profile forward]

Calls of 64 tokens and 4 heads at K = V = 128 in bf16, with the recipe that an H200 would run, on
CPU tensors that are taken for a GPU's. Kernels are compiled and found as ever; then their launches,
and TileLang's programs, do nothing, and buffers are made once and given again. So what is timed is
checks, look-ups, autograd, and the Python around each launch, and neither the driver nor the
allocator. The least of 40 runs, in processor time of the thread: other processes change it by some
10%, so figures of two versions compare if they are taken in turns. `host_time.py` times the whole
on a GPU.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

import gdn2gen
from gdn2gen.base.environment import verifying
from gdn2gen.codegen import background
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.measure.accuracy import public_op
from gdn2gen.ops import _call, _decode
from gdn2gen.runtime import decoding, lookup, passes

Run = Callable[[], Any]
CALLS: Final = 60
RUNS: Final = 40
PROFILED: Final = 2000

launches = 0


def stub() -> None:
    """Have kernels run that do nothing, on CPU tensors."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from gdn2gen.base.device import named_device

    def nothing(*_: Any) -> None:
        global launches
        launches += 1

    def made_once(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        made = torch.zeros(shape, dtype=dtype, device=device)
        return lambda: made

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 2, 0, 0, 1024),
        unload_module=lambda _: None,
        get_device_properties=lambda _: {"max_shared_mem": 232448},
    )
    driver._active = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda *_: nothing,
        utils=utils,
    )
    replaced: dict[Any, tuple[str, Any]] = {
        background: ("compiled_program", lambda *_: nothing),
        passes: ("maker", made_once),
        decoding: ("maker", made_once),
        lookup: ("device_of", lambda _: named_device("H200")),
        _call: ("by_kernels", lambda _: True),
        _decode: ("by_kernels", lambda _: True),
    }
    for module, (name, value) in replaced.items():
        setattr(module, name, value)


def directions(op: str, cu_seqlens: tuple[int, ...] | None) -> tuple[Run, Run]:
    """A forward without gradients, and a forward with a backward."""
    inputs: dict[str, Any] = {
        name: x.requires_grad_() if x.is_floating_point() else x
        for name, x in make_inputs(
            1, 64, 4, 128, 128, op=op, dtype=torch.bfloat16, cu_seqlens=cu_seqlens
        ).items()
    }
    function = public_op(op)
    leaves = [x for x in inputs.values() if x.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(**inputs, use_qk_l2norm_in_kernel=True)[0]

    do = torch.randn_like(forward())

    def both() -> tuple[Tensor, ...]:
        o, _ = function(**inputs, use_qk_l2norm_in_kernel=True)
        return torch.autograd.grad(o, leaves, do)

    return forward, both


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
                use_qk_l2norm_in_kernel=True,
                state_pool=pool,
                ssm_state_indices=slots,
                output_final_state=True,
            )

    return decode


def microseconds(run: Run) -> float:
    best = float("inf")
    for _ in range(RUNS):
        started = time.thread_time()
        for _ in range(CALLS):
            run()
        best = min(best, time.thread_time() - started)
    return best / CALLS * 1e6


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--op", choices=OPS, default=OPS[0], help="(%(default)s)")
    parser.add_argument("--profile", metavar="NAME", help="also profile the calls of that name")
    args = parser.parse_args()
    stub()
    runs: dict[str, Run] = {}
    if hasattr(gdn2gen, str(recurrence_named(args.op).public.recurrent)):
        runs["decode"] = step(args.op)
    for name, lengths in (("", None), ("packed ", (0, 20, 64))):
        runs[f"{name}forward"], runs[f"{name}forward+backward"] = directions(args.op, lengths)
    for name, run in runs.items():
        run()
        before = launches
        run()
        made = launches - before
        print(f"{name:24} {microseconds(run):7.1f} us, {made} launches", flush=True)
        if name == args.profile:
            profile = cProfile.Profile()
            with profile:
                for _ in range(PROFILED):
                    run()
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    main()
