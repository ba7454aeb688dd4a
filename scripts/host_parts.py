"""Where the host's time of a forward and backward goes: what is ours, torch's, and the threads'.

    python scripts/host_parts.py [--op kda] [--packed]

A call of 64 tokens and 4 heads, as `host_time.py` times it, with the time taken where it comes to
`Function.apply`, into and out of the Function's own forward and backward, and back to the caller.
What lies between these is torch's: it makes the node, wraps what is saved, and goes through the
graph. Once with autograd's own thread for a GPU, and once without: what its two wake-ups cost is
the difference on the way to the backward and back. Medians of 500 calls, after 100; a mark takes
0.1 us of what is before it. Calls are in a row, so that the GPU does not fall asleep: it works for
less than the host does at this size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

import torch
from host_time import Case, one_thread

from gdn2gen.base.environment import verifying
from gdn2gen.family.registry import OPS
from gdn2gen.runtime import autograd

PARTS: Final = (
    ("until Function.apply", True),
    ("until the forward's body", False),
    ("forward's body", True),
    ("until o is returned", False),
    ("until the backward's body", False),
    ("backward's body", True),
    ("until gradients are returned", False),
    ("gradients and o are freed", False),
)
"""What lies between two marks, and whether most of it is this package's own code."""
WARM: Final = 100
CALLS: Final = 500


@contextmanager
def marked() -> Iterator[list[int]]:
    """Inside, calls note in it, in nanoseconds, when they come to each border of `PARTS` that lies
    inside of them."""
    marks: list[int] = []
    now = time.perf_counter_ns
    function, apply = autograd._Function, autograd._apply
    bodies = {x: vars(function)[x].__func__ for x in ("forward", "backward")}

    def applied(*given: Any) -> Any:
        marks.append(now())
        return apply(*given)

    def noting(body: Callable[..., Any]) -> Any:
        def noted(*given: Any) -> Any:
            marks.append(now())
            found = body(*given)
            marks.append(now())
            return found

        return staticmethod(noted)

    for name, body in bodies.items():
        setattr(function, name, noting(body))
    autograd._apply = applied
    try:
        yield marks
    finally:
        autograd._apply = apply
        for name, body in bodies.items():
            setattr(function, name, staticmethod(body))


def call_of(case: Case, marks: list[int]) -> Callable[[], list[int]]:
    """A forward and backward, which returns how long each of `PARTS` took."""
    leaves, now = case.leaves, time.perf_counter_ns

    def run() -> list[int]:
        marks.clear()
        marks.append(now())
        o = case.forward()
        marks.append(now())
        found = torch.autograd.grad(o, leaves, case.do)
        marks.append(now())
        del found, o
        marks.append(now())
        return [after - before for before, after in pairwise(marks)]

    return run


def parts_of(call: Callable[[], list[int]], calls: int = CALLS, warm: int = WARM) -> list[float]:
    """Microseconds of each part. Raises ValueError where a call went another way, past one of the
    borders."""
    found = [call() for _ in range(warm + calls)][warm:]
    if any(len(x) != len(PARTS) for x in found):
        raise ValueError("a call did not come to every border: are its launches bound?")
    return [statistics.median(x) / 1e3 for x in zip(*found, strict=True)]


def table(columns: dict[str, list[float]]) -> str:
    """In Markdown, with the sums of what is ours and what is not."""
    lines = [f"| us | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    own = [whose for _, whose in PARTS]

    def row(name: str, values: list[float]) -> None:
        lines.append(f"| {name} | {' | '.join(f'{x:.1f}' for x in values)} |")

    for name, values in zip(
        (x for x, _ in PARTS), zip(*columns.values(), strict=True), strict=True
    ):
        row(name, [*values])
    for name, whose in (("ours", True), ("torch's and the threads'", False)):
        row(
            name,
            [sum(x for x, y in zip(c, own, strict=True) if y is whose) for c in columns.values()],
        )
    row("all", [*map(sum, columns.values())])
    return "\n".join(lines)


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--op", choices=OPS, default=OPS[0], help="(%(default)s)")
    parser.add_argument("--packed", action="store_true", help="two sequences, packed")
    args = parser.parse_args()
    case = Case.of(args.op, 1, 64, 4, (0, 20, 64) if args.packed else None, "cuda")
    with marked() as marks:
        call = call_of(case, marks)
        columns = {"autograd's thread": parts_of(call), "one thread": parts_of(one_thread(call))}
    print(table(columns))


if __name__ == "__main__":
    main()
