"""What a small prefill costs: one sequence of 16 to 1024 tokens at K = V = 128, on a GPU.

    python scripts/prefill_time.py [--op gdn2 kda] [--tokens 16 64 256 1024] [--heads 16]

Time is that of a CUDA graph of 20 forwards without gradients, each on inputs of its own, for one of
them; the median of 20 replays. `launches` are the kernels of one, as the profiler saw them, and
`alone` is what the GPU spent in each: what is left of the time is between them. Beside it
flash-linear-attention's op, where it is installed. What runs is what is on file for the nearest
sizes: `gdn2gen tune --op gdn2 --head-dim 128 --shapes 1x64x16,1x1024x16` files entries of their
own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from decode_steps import graph_us  # noqa: E402

from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.terminal import Sheet, console  # noqa: E402
from gdn2gen.family.inputs import make_inputs  # noqa: E402
from gdn2gen.family.registry import DECODING_OPS, STEP_OPS, recurrence_named  # noqa: E402
from gdn2gen.ops import chunk  # noqa: E402

Run = Callable[[int], Any]
DIM: Final = 128
CALLS: Final = 20


def forward(op: str, tokens: int, heads: int, function: Callable[..., Any], device: str) -> Run:
    """Call number i of an op, forward, with the final state."""
    made = [
        make_inputs(1, tokens, heads, DIM, DIM, op=op, dtype=torch.bfloat16, device=device)
        for _ in range(CALLS)
    ]
    flags: dict[str, Any] = {"output_final_state": True}
    if recurrence_named(op).takes("use_qk_l2norm_in_kernel"):
        flags["use_qk_l2norm_in_kernel"] = True

    def run(i: int) -> Any:
        with torch.no_grad():
            return function(**made[i % CALLS], **flags)

    return run


def launches(run: Run) -> list[tuple[str, float]]:
    """The kernels of a call in their order, and microseconds of each."""
    run(0)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run(1)
        torch.cuda.synchronize()
    events = sorted(seen.events() or (), key=lambda x: x.time_range.start)
    on_gpu = [x for x in events if x.device_type.name == "CUDA"]
    return [(x.name, x.time_range.elapsed_us()) for x in on_gpu]


def theirs(op: str) -> Callable[..., Any] | None:
    """flash-linear-attention's op; None where it cannot be imported."""
    public = recurrence_named(op).public
    try:
        found: Callable[..., Any] = getattr(import_module(public.fla), public.chunk)
    except (ImportError, AttributeError) as error:
        console(stderr=True).print(f"without flash-linear-attention's {public.chunk}: {error}")
        return None
    return found


def row(op: str, tokens: int, heads: int, fla: Callable[..., Any] | None) -> list[str]:
    ours = forward(op, tokens, heads, getattr(chunk, recurrence_named(op).public.chunk), "cuda")
    us, kernels = graph_us(ours, CALLS), launches(ours)
    alone = ", ".join(f"{name.removesuffix('_kernel')[:24]} {x:.1f}" for name, x in kernels)
    beside = "-"
    if fla is not None:
        try:
            beside = f"{graph_us(forward(op, tokens, heads, fla, 'cuda'), CALLS):.1f}"
        except Exception as error:  # another version's arguments: no reason to lose our own figures
            console(stderr=True).print(f"flash-linear-attention's {op}: {error}")
    return [op, str(tokens), f"{us:.1f}", beside, str(len(kernels)), alone]


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    ops = [op for op in DECODING_OPS if op not in STEP_OPS]  # of flash-linear-attention
    parser.add_argument("--op", nargs="+", choices=ops, default=["gdn2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 256, 1024])
    parser.add_argument("--heads", type=int, default=16)
    args = parser.parse_args()
    sheet = Sheet(
        f"{args.heads} heads: {torch.cuda.get_device_name()}",
        ("op", "tokens", "us", "FLA us", "launches", "alone, us"),
        words=("op", "alone, us"),
    )
    for op in args.op:
        fla = theirs(op)
        for tokens in args.tokens:
            cells = row(op, tokens, args.heads, fla)
            console().print("  ".join(cells))
            sheet.add(*cells)
    console().print(sheet)


if __name__ == "__main__":
    main()
