"""What a layer's time goes to on a GPU: every kernel of its forward and its backward.

    python scripts/layer_kernels.py [gdn2 kda gated_delta_rule] [--batch 4] [--tokens 4096]

The layers of layer_time.py. Microseconds of a run by torch's profiler, the mean of five, by kernel,
and what was launched how often; "between" is what is left of the time from the first kernel's
begin to the last one's end, when the GPU had nothing to do.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from layer_parts import DTYPE, HIDDEN, tokens  # noqa: E402
from layer_time import OURS, SIZES  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.terminal import Sheet, console  # noqa: E402
from gdn2gen.nn.model import MIXERS  # noqa: E402

RUNS: Final = 5
WIDE: Final = 64
Kernel = tuple[str, float, float]
"""Its name, when it began, and how long it took, in microseconds."""


def account(kernels: Iterable[Kernel], runs: int) -> list[tuple[str, float, float]]:
    """Of each kernel launches and time of a run, the longest first; then what lay between all."""
    found: dict[str, list[float]] = defaultdict(list)
    lying = sorted(kernels, key=lambda x: x[1])
    for name, _, took in lying:
        found[name].append(took)
    rows = [(name, len(took) / runs, sum(took) / runs) for name, took in found.items()]
    rows.sort(key=lambda x: -x[2])
    busy, end = 0.0, float("-inf")
    for _, begin, took in lying:  # side by side counts once
        busy += max(0.0, begin + took - max(begin, end))
        end = max(end, begin + took)
    between = end - lying[0][1] - busy if lying else 0.0
    return [*rows, ("between", 0.0, between / runs)]


def profiled(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels of RUNS runs, one after the other without a pause."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        for _ in range(RUNS):
            run()
        torch.cuda.synchronize()
    return [
        (x.name, float(x.time_range.start), float(x.time_range.elapsed_us()))
        for x in seen.events() or ()
        if str(x.device_type).endswith("CUDA")
    ]


def show(title: str, rows: list[tuple[str, float, float]]) -> None:
    sheet = Sheet(title, ("kernel", "launches", "us"), words=("kernel",))
    for name, launches, took in rows:
        sheet.add(name[:WIDE], f"{launches:g}" if launches else "", f"{took:.1f}")
    sheet.add("all", "", f"{sum(x[2] for x in rows):.1f}")
    console().print(sheet)


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    usual = ["gdn2", "kda", "gated_delta_rule"]
    parser.add_argument("layers", nargs="*", default=usual, metavar="layer", help=", ".join(MIXERS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    torch.manual_seed(0)
    x = tokens(args.batch, args.tokens, HIDDEN).requires_grad_()
    for member in args.layers:
        layer = MIXERS[member](HIDDEN, **OURS.get(member, SIZES)).to(x.device, DTYPE)
        into = [x, *layer.parameters()]
        y = layer(x)
        dy = torch.randn_like(y)
        forward = torch.no_grad()(lambda layer=layer: layer(x))
        show(f"{member}, forward without gradients", account(profiled(forward), RUNS))

        def backward(y: Any = y, dy: Any = dy, into: Any = into) -> None:
            torch.autograd.grad(y, into, dy, retain_graph=True)

        show(f"{member}, backward", account(profiled(backward), RUNS))


if __name__ == "__main__":
    main()
