"""What launches cost that begin before the one before them has ended, on a GPU.

    python scripts/dependent_time.py prefill [--op gdn2 kda] [--tokens 16 64 256 1024] [--heads 16]
    python scripts/dependent_time.py passes [--op gdn2] [--shapes few8k,train4k] [--level lean fast]

What a call would run (from what is on file for the nearest sizes, and changed for few chunks), and
the same with `pdl` in its stages, in turns: kernels that begin as the programs before them end
(`wait`), and as these say that they may (`signal`). `prefill`: one sequence at K = V = 128,
forward, microseconds of one of 20 calls of a CUDA graph, each on its own inputs (prefill_time.py).
`passes`: forward, and forward and backward, ms of a CUDA graph of one, the L2 flushed before it.
All recipes must make the same bits, in 20 calls each, and pass the tuner's quick check; what does
not is said, and not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from decode_steps import graph_us  # noqa: E402
from prefill_time import CALLS, DIM, forward, launches  # noqa: E402

from gdn2gen.base.device import present_device  # noqa: E402
from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.terminal import Sheet, console  # noqa: E402
from gdn2gen.family.problem import Problem, gate_parameters  # noqa: E402
from gdn2gen.family.registry import DECODING_OPS, OPS, STEP_OPS, recurrence_named  # noqa: E402
from gdn2gen.family.shapes import Shape, parse_shapes  # noqa: E402
from gdn2gen.kernels.recipe import Recipe  # noqa: E402
from gdn2gen.measure.accuracy import public_op, run_op  # noqa: E402
from gdn2gen.measure.check import drawn, forced  # noqa: E402
from gdn2gen.ops import chunk  # noqa: E402
from gdn2gen.store.dispatch import find_recipe  # noqa: E402
from gdn2gen.tuning.gpu.jobs import RecipeTiming, check_quick, time_recipe  # noqa: E402

REPEATS: Final = 20
TURNS: Final = 2
NAMES: Final = ("as it is", "wait", "signal")


def recipes_of(problem: Problem, shape: Shape, level: str) -> list[Recipe]:
    """What a call runs, with launches that follow each other, and with those that depend on
    programs of the one before."""
    device = present_device()
    plain = find_recipe(problem, shape.regime, device, level=level).recipe.independent()
    return [plain, *(plain.dependent(device.arch, signals=x) for x in (False, True))]


def differs(problem: Problem, shape: Shape, recipes: list[Recipe]) -> str:
    """Why they are not to be timed; "" where all make the bits of the first."""
    inputs, grads = drawn(problem, shape, "layer", "cuda")
    with forced(recipes[0]):
        expected = run_op(public_op(problem.op), problem, inputs, grads)
    for recipe, name in zip(recipes[1:], NAMES[1:], strict=True):
        checked = check_quick(recipe)
        if not checked.ok:
            return f"{name}: {checked.reason}"
        with forced(recipe):
            for turn in range(REPEATS):
                found = run_op(public_op(problem.op), problem, inputs, grads)
                moved = [x for x, y in expected.items() if not torch.equal(y, found[x])]
                if moved:
                    return f"{name}: other bits of {', '.join(moved)} in call {turn + 1}"
    return ""


def prefill(op: str, tokens: int, heads: int) -> list[str]:
    shape = Shape(f"1x{tokens}x{heads}", 1, tokens, heads)
    problem = Problem(op, DIM, DIM, final_state=True)
    recipes = recipes_of(problem, shape, "lean")
    reason = differs(problem, shape, recipes)
    if reason:
        return [f"{op} {shape.name}", *"---", f"wrong: {reason}"]
    function: Callable[..., Any] = getattr(chunk, recurrence_named(op).public.chunk)
    times: list[list[float]] = [[] for _ in recipes]
    for _ in range(TURNS):
        for recipe, found in zip(recipes, times, strict=True):
            with forced(recipe):
                found.append(graph_us(forward(op, tokens, heads, function, "cuda"), CALLS))
    with forced(recipes[-1]):
        seen = launches(forward(op, tokens, heads, function, "cuda"))
    alone = ", ".join(f"{name.removesuffix('_kernel')[:24]} {x:.1f}" for name, x in seen)
    return [f"{op} {shape.name}", *(f"{min(x):.1f}" for x in times), alone]


def passes(op: str, shape: Shape, level: str) -> list[str]:
    member = recurrence_named(op)
    K, _, V = member.usual.head_dims[0].partition(",")
    gate: dict[str, Any] = dict(gate_parameters(op, member.usual.gate))
    problem = Problem(op, int(K), int(V or K), gate=member.usual.gate, **gate)
    problem = replace(problem, varlen=shape.cu_seqlens is not None)
    recipes = recipes_of(problem, shape, level)
    reason = differs(problem, shape, recipes)
    name = f"{op} {shape.name} {level} ({recipes[0].plan.name})"
    if reason:
        return [name, *"---", f"wrong: {reason}"]
    found: list[list[RecipeTiming]] = [[] for _ in recipes]
    for _ in range(TURNS):
        for recipe, times in zip(recipes, found, strict=True):
            times.append(time_recipe(recipe, shape, with_peak=False))
    cells = [
        f"{min(x.forward.median for x in times):.3f} / "
        f"{min(x.forward_backward.median for x in times):.3f}"
        for times in found
    ]
    spread = [f"{x.forward.median:.3f} / {x.forward_backward.median:.3f}" for y in found for x in y]
    return [name, *cells, ", ".join(spread)]


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("prefill", "passes"))
    parser.add_argument("--op", nargs="+", choices=OPS, default=["gdn2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 256, 1024])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--shapes", type=parse_shapes, default=parse_shapes("few8k,train4k"))
    parser.add_argument("--level", nargs="+", choices=("lean", "fast"), default=["lean"])
    args = parser.parse_args()
    last = "alone, us" if args.what == "prefill" else "every time"
    sheet = Sheet(torch.cuda.get_device_name(), ("call", *NAMES, last), words=("call", last))
    for op in args.op:
        if args.what == "prefill":
            if op in STEP_OPS:
                of = ", ".join(x for x in DECODING_OPS if x not in STEP_OPS)
                parser.error(f"prefill is of {of}, not of {op}")
            rows = (prefill(op, x, args.heads) for x in args.tokens)
        else:
            rows = (passes(op, x, level) for x in args.shapes for level in args.level)
        for cells in rows:
            console().print("  ".join(cells))
            sheet.add(*cells)
    console().print(sheet)


if __name__ == "__main__":
    main()
