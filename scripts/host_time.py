"""What a call costs the host, and what a packed batch costs beside a plain one, on a GPU.

    python scripts/host_time.py [--op kda] [--only host] [--profile FILE]

Host time is that of calls at 64 tokens and 4 heads. `queued` is a call's share of 40 in a row, the
least of six runs: what a program pays whose GPU is behind, unless the GPU is slower than the host.
`alone` is how long a call takes to return after the GPU has finished everything before it, the
median of 40: the GPU cannot hold it back. Beside them stands how long the GPU works on it, of a
CUDA graph: where that is no less than `queued`, `queued` says nothing of the host. And how many of
its passes went the way of bound launches, of how many, counted, and how many of their launches ran
the host code of a TileLang program (none, unless GDN2GEN_BOUND=programs). A decoding step is one
token of one sequence, its state in a slot of a pool.

Autograd runs the backward of a GPU's tensors in a thread of its own: once in each `backward()`,
however many ops are in it, the caller hands over to that thread and waits for it. A lone call pays
for that in full. `one thread` has none of it (`torch.autograd.set_multithreading_enabled(False)`),
and `of a chain` is a call's share of a graph of 8 in which o is the next one's v: what is nearest
to a model of many layers.

--profile writes where the time of the host goes, by function, as a table for the docs, of the
calls in one thread: a profiler of Python does not see autograd's.

GPU time is that of CUDA graphs, the median of `triton.testing.do_bench`: a packed batch
of equal sequences beside the same tokens as a batch, and shapes of the README. Figures of two
versions compare if they are of one host, taken in turns.
"""

from __future__ import annotations

import argparse
import cProfile
import platform
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from triton.testing import do_bench

import gdn2gen
from gdn2gen.base.environment import binds_launches, verifying
from gdn2gen.codegen._ready import Program
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.family.shapes import SHAPES
from gdn2gen.measure.accuracy import public_op
from gdn2gen.runtime.bound import Bound
from gdn2gen.runtime.passes import Pass

Run = Callable[[], Any]
CALLS: Final = 40
LINKS: Final = 8
"""Ops of a chain."""
EQUAL: Final = tuple(range(0, 16384 + 1, 4096))
PROFILED: Final = 1000
ROWS: Final = 30


@dataclass(frozen=True)
class Case:
    """Calls of an op on the same inputs, at K = V = 128 in bf16."""

    function: Any
    inputs: dict[str, Any]
    do: Tensor

    @classmethod
    def of(
        cls, op: str, B: int, T: int, H: int, cu_seqlens: tuple[int, ...] | None, device: str
    ) -> Case:
        found: dict[str, Any] = {
            name: x.requires_grad_() if x.is_floating_point() else x
            for name, x in make_inputs(
                B, T, H, 128, 128, op=op, dtype=torch.bfloat16, device=device, cu_seqlens=cu_seqlens
            ).items()
        }
        if recurrence_named(op).normalises:
            found["use_qk_l2norm_in_kernel"] = True
        return cls(public_op(op), found, torch.randn_like(found["v"]))

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self.inputs.values() if isinstance(x, Tensor) and x.requires_grad]

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def forward(self) -> Tensor:
        o: Tensor = self.function(**self.inputs)[0]
        return o

    def backward(self, o: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, self.leaves, self.do)

    def both(self) -> tuple[Tensor, ...]:
        return self.backward(self.forward())

    def chain(self) -> Run:
        """Forward and backward of a graph of `LINKS` ops, each with leaves of its own but v."""
        links = [self.inputs, *(self._apart() for _ in range(LINKS - 1))]
        leaves = [
            x
            for i, link in enumerate(links)
            for name, x in link.items()
            if isinstance(x, Tensor) and x.requires_grad and (name != "v" or i == 0)
        ]

        def run() -> tuple[Tensor, ...]:
            o = self.inputs["v"]
            for link in links:
                o = self.function(**link | {"v": o})[0]
            return torch.autograd.grad(o, leaves, self.do)

        return run

    def _apart(self) -> dict[str, Any]:
        return {
            name: x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x
            for name, x in self.inputs.items()
        }


def queued_us(run: Run) -> float:
    """Microseconds for one call of many in a row."""
    best = float("inf")
    for _ in range(6):  # the first one compiles
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(CALLS):
            run()
        best = min(best, time.perf_counter() - started)
    return best / CALLS * 1e6


def alone_us(run: Callable[..., Any], given: Callable[[], tuple[Any, ...]] = tuple) -> float:
    """Microseconds until one call returns that finds the GPU idle; its arguments are `given`."""
    times = []
    for i in range(CALLS + 10):
        arguments = given()
        torch.cuda.synchronize()
        started = time.perf_counter()
        kept = run(*arguments)
        if i >= 10:  # those before bind the passes, and warm up
            times.append(time.perf_counter() - started)
        del kept, arguments
    return statistics.median(times) * 1e6


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Inside, how many passes run by bound launches, how many at all, and how many programs."""
    found = {"bound": 0, "passes": 0, "programs": 0}
    bound, itself = Bound.run, Pass.run

    def by_bound(self: Bound, addresses: list[int]) -> list[Tensor] | None:
        made = bound(self, addresses)
        found["bound"] += made is not None
        found["passes"] += made is not None
        if made is not None:
            found["programs"] += sum(isinstance(x, Program) for x in self._frames._launches)
        return made

    def by_itself(self: Pass, *of: Any, **named: Any) -> dict[str, Tensor]:
        found["passes"] += 1
        return itself(self, *of, **named)

    replaced: Any = {Bound: by_bound, Pass: by_itself}
    for owner, function in replaced.items():
        owner.run = function
    try:
        yield found
    finally:
        Bound.run, Pass.run = bound, itself  # type: ignore[method-assign]


def passes_of(run: Run) -> str:
    with counted() as found:
        run()
    return f"{found['bound']} of {found['passes']} passes bound, {found['programs']} programs"


def one_thread(run: Run) -> Run:
    """`run`, with no thread of autograd's own."""

    def alone() -> Any:
        with torch.autograd.set_multithreading_enabled(False):
            return run()

    return alone


def say(name: str, what: str, run: Run, queued: float, alone: float | None) -> None:
    beside = " " * 17 if alone is None else f"{alone:8.1f} us alone"
    print(
        f"host  {name:8} {what:30} {queued:8.1f} us queued {beside}  {passes_of(run)}", flush=True
    )


def tell_host(name: str, case: Case) -> None:
    """All that a call costs the host, and the GPU."""
    both, infer = case.both, case.infer
    say(name, "forward", infer, queued_us(infer), alone_us(infer))
    say(name, "forward+backward", both, queued_us(both), alone_us(both))
    apart = one_thread(both)
    say(name, "forward+backward, one thread", apart, queued_us(apart), alone_us(apart))
    print(
        f"host  {name:8} {'parts':34} {alone_us(case.forward):8.1f} us forward with gradients "
        f"{alone_us(case.backward, lambda: (case.forward(),)):8.1f} us backward alone"
    )
    chain = case.chain()
    say(name, f"forward+backward, of a chain of {LINKS}", chain, queued_us(chain) / LINKS, None)
    print(
        f"gpu   {name:8} {'of these calls':34} {graph_ms(infer) * 1e3:8.1f} us forward "
        f"{graph_ms(both) * 1e3:8.1f} us forward+backward",
        flush=True,
    )


def tell_decode(op: str, device: str = "cuda") -> None:
    """What a decoding step costs the host, where the op has one."""
    recurrence = recurrence_named(op)
    function: Any = getattr(gdn2gen, str(recurrence.public.recurrent), None)
    if function is None:
        return
    given: dict[str, Any] = {
        **make_inputs(1, 1, 4, 128, 128, op=op, dtype=torch.bfloat16, device=device),
        "state_pool": torch.zeros(8, 4, 128, 128, device=device),
        "ssm_state_indices": torch.zeros(1, dtype=torch.int32, device=device),
        "output_final_state": True,
    }
    if recurrence.normalises:
        given["use_qk_l2norm_in_kernel"] = True

    @torch.no_grad()
    def steps() -> None:
        for _ in range(CALLS):  # entered once, as a generation enters it
            function(**given)

    print(
        f"host  {'step':8} {'decoding, one token':30} {queued_us(steps) / CALLS:8.1f} us queued "
        f"{alone_us(torch.no_grad()(lambda: function(**given))):8.1f} us alone",
        flush=True,
    )


def profile_of(case: Case) -> str:
    """Tables of where the host's time goes, in Markdown."""
    runs = {"forward": case.infer, "forward+backward, one thread": one_thread(case.both)}
    return "\n".join(map(_table, runs, runs.values()))


def _table(name: str, run: Run) -> str:
    unwatched = queued_us(run)
    profile = cProfile.Profile()
    with profile:
        for _ in range(PROFILED):
            run()
    found: Any = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in found.values())
    rows = sorted(found.items(), key=lambda x: -x[1][2])[:ROWS]
    lines = [
        f"{name}: {unwatched:.1f} us a call without the profiler, {total / PROFILED * 1e6:.1f} "
        f"with it (Python {platform.python_version()}, torch {torch.__version__})",
        "",
        "| function | calls | own | with what it calls |",
        "|---|---:|---:|---:|",
    ]
    for (file, line, function), (_, calls, own, whole, _) in rows:
        where = function if file == "~" else f"{Path(file).name}:{line} {function}"
        shares = f"{own / total:.1%} | {whole / total:.1%}"
        lines.append(f"| `{where}` | {calls / PROFILED:g} | {shares} |")
    return "\n".join([*lines, ""])


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
    parser.add_argument("--only", choices=("host", "graph"), help="only what begins with that word")
    parser.add_argument("--profile", metavar="FILE", type=Path, help="also write a profile there")
    args = parser.parse_args()
    op = args.op
    if args.only != "graph":
        print(f"passes are bound to their launches: {'yes' if binds_launches() else 'no'}")
        for name, lengths in (("batch", None), ("packed", (0, 20, 64))):
            tell_host(name, Case.of(op, 1, 64, 4, lengths, "cuda"))
        tell_decode(op)
    if args.profile is not None:
        args.profile.write_text(profile_of(Case.of(op, 1, 64, 4, None, "cuda")))
    if args.only == "host":
        return
    shapes = {name: SHAPES[name] for name in ("train4k", "varlen8k", "few8k")}
    cases = {name: (x.B, x.T, x.H, x.cu_seqlens) for name, x in shapes.items()}
    cases["train4k packed"] = (1, 16384, 16, EQUAL)
    for name, sizes in cases.items():
        case = Case.of(op, *sizes, "cuda")
        forward, both = graph_ms(case.infer), graph_ms(case.both)
        print(f"graph {name:14} {forward:8.4f} ms forward {both:8.4f} ms forward+backward")


if __name__ == "__main__":
    main()
