"""What batch-invariant mode costs: passes and steps of decoding with it and without. Needs a GPU.

    python scripts/invariant_time.py [--op gdn2 kda] [--shapes train4k,varlen8k] [--level lean fast]
        [--decode 1 8 64 256]

Forward alone, and forward and backward, in ms of a CUDA graph, the L2 flushed before each; what the
call runs in either case stands beside. Then a step of decoding of so many sequences in us
(decode_time.py, bf16 states with V first), where the mode takes one tile for every batch. Both in
turns, the median of each, and the mode's over the usual. Kernels are compiled first, side by side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from decode_steps import Step, graph_us  # noqa: E402

from gdn2gen import batch_invariant  # noqa: E402
from gdn2gen.base.device import present_device  # noqa: E402
from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.terminal import Sheet, console  # noqa: E402
from gdn2gen.family.problem import Problem, gate_parameters  # noqa: E402
from gdn2gen.family.registry import OPS, recurrence_named  # noqa: E402
from gdn2gen.family.shapes import Shape, parse_shapes  # noqa: E402
from gdn2gen.kernels.recipe import Recipe  # noqa: E402
from gdn2gen.measure.accuracy import (  # noqa: E402
    inputs_of,
    op_flags,
    output_gradients,
    public_op,
    run_op,
)
from gdn2gen.measure.compiling import compile_all  # noqa: E402
from gdn2gen.measure.timing import time_ms  # noqa: E402
from gdn2gen.store.dispatch import find_recipe  # noqa: E402

TURNS: Final = 3
SIDES: Final = (False, True)
"""Without the mode, and with it."""


def problem_of(op: str, shape: Shape) -> Problem:
    """As `gdn2gen bench` has it."""
    usual = recurrence_named(op).usual
    K, _, V = usual.head_dims[0].partition(",")
    gate: dict[str, Any] = dict(gate_parameters(op, usual.gate))
    problem = Problem(op, int(K), int(V or K), gate=usual.gate, **gate)
    return replace(problem, varlen=shape.cu_seqlens is not None)


def recipes_of(problem: Problem, shape: Shape, level: str) -> list[Recipe]:
    """What a call runs without the mode, and with it."""
    found = []
    for invariant in SIDES:
        with batch_invariant(invariant):
            found.append(find_recipe(problem, shape.regime, present_device(), level=level).recipe)
    return found


def passes(problem: Problem, shape: Shape, level: str) -> tuple[Callable[[], Any], ...]:
    """A forward, and a forward and backward, through the public op."""
    inputs = inputs_of(problem, shape, "layer", 0, "cuda")
    gradients = output_gradients(problem, shape, 0, "cuda")
    op = partial(public_op(problem.op), disable_recompute=level == "fast")

    def forward() -> None:
        with torch.no_grad():
            op(**inputs, **op_flags(problem))

    return forward, partial(run_op, op, problem, inputs, gradients)


def replay_of(run: Callable[[], Any]) -> Callable[[], None]:
    """A graph of one call, which compiles and loads before it is captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def in_turns(made: Sequence[Callable[[], float]]) -> list[float]:
    """The median of each, one after the other, again and again."""
    times: list[list[float]] = [[] for _ in made]
    for _ in range(TURNS):
        for take, found in zip(made, times, strict=True):
            found.append(take())
    return [median(x) for x in times]


def both_sides(run: Callable[[], Any]) -> list[float]:
    """ms of a pass without the mode, and with it."""
    replays = []
    for invariant in SIDES:
        with batch_invariant(invariant):
            replays.append(replay_of(run))
    return in_turns([partial(_ms, x) for x in replays])


def _ms(replay: Callable[[], None]) -> float:
    return time_ms(replay, 5, 30).median


def step_sides(op: str, batch: int) -> list[float]:
    """us of a step of decoding, likewise."""
    step = Step(op, batch, 16, "bf16", v_first=True, warm=False)
    run = step.ours()

    def take(invariant: bool) -> float:
        with batch_invariant(invariant):
            return graph_us(run, step.calls)

    return in_turns([partial(take, x) for x in SIDES])


def cells(times: Sequence[float], digits: int) -> list[str]:
    usual, invariant = times
    return [f"{usual:.{digits}f}", f"{invariant:.{digits}f}", f"{invariant / usual:.2f}"]


def rows(
    ops: Sequence[str], shapes: Sequence[Shape], levels: Sequence[str], batches: Sequence[int]
) -> Iterator[list[str]]:
    wanted = [(problem_of(x, y), y, level) for x in ops for y in shapes for level in levels]
    found = [recipes_of(*x) for x in wanted]
    compile_all((y.problem, z) for x in found for y in x for z in y.configs)
    for (problem, shape, level), (usual, invariant) in zip(wanted, found, strict=True):
        what = f"{problem.op} {shape.name} {level}"
        plans = f"{usual.plan.name}; {invariant.plan.name}"
        forward, both = passes(problem, shape, level)
        yield [what, "forward, ms", *cells(both_sides(forward), 3), plans]
        yield [what, "forward+backward, ms", *cells(both_sides(both), 3), plans]
    for op in ops:
        for batch in batches:
            yield [f"{op} {batch} sequences", "a token, us", *cells(step_sides(op, batch), 2), ""]


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=["gdn2"])
    parser.add_argument("--shapes", type=parse_shapes, default=parse_shapes("train4k,varlen8k"))
    parser.add_argument("--level", nargs="+", choices=("lean", "fast"), default=["lean"])
    parser.add_argument("--decode", nargs="*", type=int, default=[1, 256])
    args = parser.parse_args()
    sheet = Sheet(
        f"batch-invariant mode: {torch.cuda.get_device_name()}",
        ("call", "what", "usual", "invariant", "x usual", "plans"),
        words=("call", "what", "plans"),
    )
    for row in rows(args.op, args.shapes, args.level, args.decode):
        console().print("  ".join(row))
        sheet.add(*row)
    console().print(sheet)


if __name__ == "__main__":
    main()
