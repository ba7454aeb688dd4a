"""The timing protocol, and the floor that times are held against.

Time: each run lies between two CUDA events, and before each run a buffer larger than the L2 is
zeroed, so that no run finds its inputs in the cache; the reported figure is the median. This is
the protocol of `triton.testing.do_bench`, written out here because the tuner also wants the spread
and the number of runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch

from gdn2gen.base.errors import DeviceError
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.floor import floor_bytes
from gdn2gen.kernels.scans import MAX_SEGMENTS
from gdn2gen.measure.accuracy import lower_bound_of
from gdn2gen.runtime.dtypes import TORCH_DTYPE

if TYPE_CHECKING:
    from gdn2gen.runtime.call import Call

_MIB = 2**20
# do_bench's size: at least twice the L2 of every GPU so far, and kept so that figures compare.
_FLUSH_BYTES = 256 * _MIB
_MIN_RUNS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: median, 20th and 80th percentile, over n runs."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Summarise samples in milliseconds; at least one is needed."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        fifths = quantiles(samples, n=5, method="inclusive")
        return cls(median(samples), fifths[0], fifths[3], len(samples))

    @property
    def spread(self) -> float:
        """Width between the percentiles, as a fraction of the median."""
        return (self.p80 - self.p20) / self.median if self.median > 0 else 0.0


def time_ms(fn: Callable[[], Any], warmup_ms: float = 25, rep_ms: float = 100) -> Timing:
    """Time `fn` on the present GPU, the L2 flushed before every run.

    `fn` runs for about `warmup_ms`, then for about `rep_ms` (at least 5 times). Raises DeviceError
    without a GPU; what `fn` raises passes through.
    """
    _require_gpu("timing")
    fn()
    torch.cuda.synchronize()
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    estimate = sum(_events_ms(fn, flush, 3)) / 3
    for _ in range(max(1, int(warmup_ms / max(estimate, 1e-3)))):
        fn()
    return Timing.of(_events_ms(fn, flush, max(_MIN_RUNS, int(rep_ms / max(estimate, 1e-3)))))


def _events_ms(fn: Callable[[], Any], flush: torch.Tensor, runs: int) -> list[float]:
    event: Any = torch.cuda.Event
    pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(runs)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in pairs]


def peak_mib(fn: Callable[[], Any]) -> float:
    """Peak allocated memory during a warm run of `fn`, in MiB, all live tensors included."""
    _require_gpu("measuring memory")
    fn()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated()) / _MIB


@cache
def copy_gbps() -> float:
    """Bandwidth that a plain copy of 1 GiB reaches on the present GPU (read + write), in GB/s.

    Measured once per process; the ceiling that `floor_ms` divides by.
    """
    _require_gpu("measuring the copy bandwidth")
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = time_ms(lambda: target.copy_(source))
    return 2 * source.numel() / timing.median / 1e6


@cache
def product_tflops(dtype: str) -> float:
    """Rate that a large matrix product reaches on the present GPU, in TFLOP/s; fp32 as tf32.

    8192 rows and columns of random bits, since zeros draw less power and run faster. Measured once
    per process and dtype; the ceiling of a stage's products. dtype: bf16, fp16 or fp32.
    """
    _require_gpu("measuring the rate of matrix products")
    size, kind = 8192, TORCH_DTYPE[dtype]
    left, right = (torch.randn(size, size, device="cuda", dtype=kind) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        timing = time_ms(lambda: left @ right)
    finally:
        torch.set_float32_matmul_precision(precision)
    return 2 * size**3 / timing.median / 1e9


def floor_ms(problem: Problem, shape: Shape, backward: bool, gbps: float) -> float:
    """Time to move the unavoidable bytes once at `gbps`, in ms."""
    return floor_bytes(problem, backward) * shape.B * shape.T * shape.H / gbps / 1e6


def symbol_sizes(
    problem: Problem, shape: Shape, BT: int, max_segments: int = MAX_SEGMENTS
) -> dict[str, int]:
    """The value of every symbol that the dims of a stage's operands use, at chunk size BT."""
    return call_of(problem, shape, torch.device("cpu")).sizes(problem, BT, max_segments)


def call_of(problem: Problem, shape: Shape, device: torch.device) -> Call:
    """Sizes and scalars of a benchmark call: as many heads of gates as of values."""
    from gdn2gen.runtime.call import Call

    return Call(
        B=shape.B,
        T=shape.T,
        H=shape.key_heads,
        HV=shape.H,
        HG=shape.H,
        N=shape.regime.sequences,
        scale=problem.K**-0.5,
        lower_bound=lower_bound_of(problem),
        packed=problem.varlen,
        device=device,
    )


def _require_gpu(what: str) -> None:
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{what} needs a GPU, but torch {torch.__version__} sees none; run it on a GPU host"
        )
