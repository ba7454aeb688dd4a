"""Training passes of one op on several streams at once: whether all of them end, and to what bits.

    python scripts/beside.py gdn2:64,64 64x256x2
    python scripts/beside.py kda:128 4x1024x4 --level fast --streams 4 --seconds 60

Each stream replays a graph of passes of its own, on its own inputs, first alone and then beside the
others for so many seconds. Kernels of other streams hold up any warp for any time, so that one that
relies on not being held up waits here for ever: what does not end within half a minute is said to,
and the process ends with exit code 3; with 1 where results are not the same bits as alone, and with
2 where what is asked for cannot be run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from stage_times import one_shape, problem_of  # noqa: E402
from torch import Tensor  # noqa: E402

from gdn2gen.base.device import present_device  # noqa: E402
from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.errors import Gdn2genError, InputError  # noqa: E402
from gdn2gen.family.problem import Problem  # noqa: E402
from gdn2gen.family.shapes import Shape  # noqa: E402
from gdn2gen.measure.accuracy import inputs_of, output_gradients, public_op, run_op  # noqa: E402

PASSES: Final = 8
"""In a graph."""
_PATIENCE_S: Final = 30.0


class Lane:
    """A stream, its graph, and what the last pass of it left."""

    def __init__(self, problem: Problem, shape: Shape, level: str, seed: int) -> None:
        inputs = inputs_of(problem, shape, "layer", seed, "cuda")
        gradients = output_gradients(problem, shape, seed, "cuda")
        op = partial(public_op(problem.op), disable_recompute=level == "fast")
        # A graph keeps no tensor that it reads: another lane's would come to lie there.
        self.read = inputs, gradients

        def once() -> dict[str, Tensor]:
            return run_op(op, problem, inputs, gradients)

        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # the inputs are made on another
        with torch.cuda.stream(self.stream):
            once()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            for _ in range(PASSES):
                self.results = once()

    def replay(self) -> torch.cuda.Event:
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            self.graph.replay()
            done.record()
        return done


def wait_for(events: Sequence[torch.cuda.Event]) -> bool:
    """Whether all came within the time that any of them may take."""
    until = time.monotonic() + _PATIENCE_S
    while not all(x.query() for x in events):  # type: ignore[no-untyped-call]
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("member", help="an op, with head dims where they are not its usual ones")
    parser.add_argument("shape", help="BxTxH")
    parser.add_argument("--level", choices=("lean", "fast"), default="lean")
    parser.add_argument("--streams", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args(words)
    try:
        if args.streams < 1 or not args.seconds > 0:
            raise InputError(
                "--streams must be 1 at least and --seconds above 0, but got "
                f"{args.streams} and {args.seconds:g}"
            )
        problem, shape = problem_of(args.member), one_shape(args.shape)
        present_device()
        with verifying():
            lanes = [Lane(problem, shape, args.level, seed) for seed in range(args.streams)]
    except (Gdn2genError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return run(lanes, args.seconds)


def run(lanes: Sequence[Lane], seconds: float) -> int:
    """The exit code of lanes that ran alone and then beside each other; not at all, what hangs."""
    alone = []
    for lane in lanes:
        if not wait_for([lane.replay()]):
            return _gave_up(0, "alone")
        alone.append({name: x.clone() for name, x in lane.results.items()})
    torch.cuda.synchronize()
    replays, until = 0, time.monotonic() + seconds
    while not replays or time.monotonic() < until:
        events = [lane.replay() for lane in lanes for _ in range(4)]
        if not wait_for(events):
            return _gave_up(replays, f"{len(lanes)} streams")
        replays += len(events)
    different = [
        f"{name} of stream {i}"
        for i, (lane, kept) in enumerate(zip(lanes, alone, strict=True))
        for name, x in lane.results.items()
        if not torch.equal(x.view(torch.uint8), kept[name].view(torch.uint8))
    ]
    print(f"{replays * PASSES} passes on {len(lanes)} streams ended", flush=True)
    if different:
        print(f"not the bits of a pass alone: {', '.join(different)}")
    return int(bool(different))


def _gave_up(replays: int, how: str) -> int:
    """End the process: what hangs in the driver would keep its exit waiting, too."""
    print(f"after {replays * PASSES} passes, {how}: no end within {_PATIENCE_S:g} s", flush=True)
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
