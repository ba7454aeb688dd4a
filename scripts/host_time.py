"""What a call costs the host, and what a packed batch costs beside a plain one, on a GPU.

    python scripts/host_time.py [--op kda]

Host time is that of calls at 64 tokens and 4 heads, which the GPU never holds back; the least of
six runs. GPU time is that of CUDA graphs, the median of `triton.testing.do_bench`: a packed batch
of equal sequences beside the same tokens as a batch, and shapes of the README. Figures of two
versions compare if they are of one host, taken in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from triton.testing import do_bench

from gdn2gen.base.environment import verifying
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.family.shapes import SHAPES
from gdn2gen.measure.accuracy import public_op

Run = Callable[[], Any]
CALLS: Final = 40
EQUAL: Final = tuple(range(0, 16384 + 1, 4096))


def directions(
    op: str, B: int, T: int, H: int, cu_seqlens: tuple[int, ...] | None
) -> tuple[Run, Run]:
    """A forward without gradients, and a forward with a backward, at K = V = 128 in bf16."""
    inputs: dict[str, Any] = {
        name: x.requires_grad_() if x.is_floating_point() else x
        for name, x in make_inputs(
            B, T, H, 128, 128, op=op, dtype=torch.bfloat16, device="cuda", cu_seqlens=cu_seqlens
        ).items()
    }
    function = public_op(op)
    flags = {"use_qk_l2norm_in_kernel": True} if recurrence_named(op).normalises else {}
    leaves = [x for x in inputs.values() if x.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(**inputs, **flags)[0]

    do = torch.randn_like(forward())

    def both() -> tuple[Tensor, ...]:
        o, _ = function(**inputs, **flags)
        return torch.autograd.grad(o, leaves, do)

    return forward, both


def host_us(run: Run) -> float:
    """Microseconds of the host for one call."""
    best = float("inf")
    for _ in range(6):  # the first one compiles
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(CALLS):
            run()
        best = min(best, time.perf_counter() - started)
    return best / CALLS * 1e6


def graph_ms(run: Run) -> float:
    """Milliseconds of the GPU for one call: the lower of two medians."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _kept = run()
    times: Any = [do_bench(graph.replay, rep=200, return_mode="median") for _ in range(2)]
    return float(min(times))


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--op", choices=OPS, default=OPS[0], help="(%(default)s)")
    op = parser.parse_args().op
    for name, lengths in (("batch", None), ("packed", (0, 20, 64))):
        forward, both = (host_us(x) for x in directions(op, 1, 64, 4, lengths))
        print(f"host  {name:14} {forward:8.1f} us forward {both:8.1f} us forward+backward")
    shapes = {name: SHAPES[name] for name in ("train4k", "varlen8k", "few8k")}
    cases = {name: (x.B, x.T, x.H, x.cu_seqlens) for name, x in shapes.items()}
    cases["train4k packed"] = (1, 16384, 16, EQUAL)
    for name, sizes in cases.items():
        forward, both = (graph_ms(x) for x in directions(op, *sizes))
        print(f"graph {name:14} {forward:8.4f} ms forward {both:8.4f} ms forward+backward")


if __name__ == "__main__":
    main()
