"""What Mamba-3 costs on a GPU: the op, the kernels around its scan, the scan itself; milliseconds.

    python scripts/mamba3_time.py [--batch 4] [--tokens 4096] [--heads 64] [--sweep]

bf16, N = 128, P = 64, 32 angles that heads share, one group, D and Z. The op is beside mamba_ssm's
where that can be imported; the kernels are beside the time that a copy of their bytes would take
(`kernels.mamba3`, every operand once). Every run begins with the L2 flushed. --sweep times configs
of the kernels, for the rules in kernels/mamba3.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gdn2gen import chunk_simple_gla, mamba3_siso_combined
from gdn2gen.base.environment import verifying
from gdn2gen.base.terminal import Sheet, console
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3 import MAMBA3_STAGES, tile_of
from gdn2gen.measure.timing import copy_gbps, time_ms
from gdn2gen.runtime import mamba3

Run = Callable[[], Any]
N, P, S = 128, 64, 32
PROBLEM = Mamba3Problem(state_size=N, head_dim=P, angles=S, skip=True, gate=True)
# Of operands that heads share: bytes of one head are those of all.
SHARED = ("Angles",)


def inputs(B: int, T: int, H: int) -> dict[str, Tensor]:
    """As a layer that begins to learn has them."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device="cuda")

    DT = 0.001 + 0.1 * torch.rand(B, H, T, device="cuda")
    return {
        "Q": normal(B, T, 1, N).bfloat16(), "K": normal(B, T, 1, N).bfloat16(),
        "V": normal(B, T, H, P).bfloat16(), "ADT": -DT * normal(B, H, T).exp(), "DT": DT,
        "Trap": normal(B, H, T), "Q_bias": 1.0 + normal(H, N), "K_bias": 1.0 + normal(H, N),
        "Angles": normal(B, T, 1, S).expand(B, T, H, S), "D": normal(H),
        "Z": normal(B, T, H, P).bfloat16(),
    }  # fmt: skip


def ms(run: Run) -> float:
    return time_ms(run).median


def op_times(op: Any, x: dict[str, Tensor]) -> tuple[float, float]:
    """Forward, and forward and backward of everything."""
    leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
    leaves["Angles"] = x["Angles"][:, :, :1].clone().requires_grad_()

    def run() -> Tensor:
        shared = leaves["Angles"].expand(x["Angles"].shape)
        out: Tensor = op(**leaves | {"Angles": shared})
        return out

    dout = torch.randn_like(x["V"])
    both = partial(lambda: torch.autograd.grad(run(), [*leaves.values()], dout))
    return ms(torch.no_grad()(run)), ms(both)


def kernel_runs(x: dict[str, Tensor], BT: int) -> dict[str, Run]:
    """Each of the kernels around the scan, by its stage."""
    numbers, biases = [x["ADT"], x["DT"], x["Trap"]], [x["Q_bias"], x["K_bias"]]
    before = (x["Q"], x["K"], numbers, biases, x["Angles"])
    q, k, decay, own, last, turns = mamba3.prologue(*before, x["D"], None, [], BT)
    after: Any = (torch.randn_like(x["V"]), x["V"], own, x["Z"], None, [], BT)
    gradients = [torch.randn_like(y) for y in (q, k, decay, own, last)]
    dout = torch.randn_like(x["V"])
    return {
        "mamba3_prologue": lambda: mamba3.prologue(*before, x["D"], None, [], BT),
        "mamba3_prologue_backward": lambda: mamba3.prologue_backward(
            gradients, *before, None, [], turns, BT
        ),
        "mamba3_epilogue": lambda: mamba3.epilogue(*after),
        "mamba3_epilogue_backward": lambda: mamba3.epilogue_backward(dout, *after),
    }


def scan_times(x: dict[str, Tensor], BT: int) -> tuple[float, float]:
    numbers, biases = [x["ADT"], x["DT"], x["Trap"]], [x["Q_bias"], x["K_bias"]]
    made = mamba3.prologue(x["Q"], x["K"], numbers, biases, x["Angles"], x["D"], None, [], BT)
    q, k, decay = (y.detach().requires_grad_() for y in made[:3])
    v = x["V"].detach().requires_grad_()

    def run() -> Tensor:
        return chunk_simple_gla(q, k, v, decay, scale=1.0, state_v_first=True)[0]

    do = torch.randn_like(v)
    return ms(torch.no_grad()(run)), ms(lambda: torch.autograd.grad(run(), [q, k, v, decay], do))


def floors(x: dict[str, Tensor], BT: int) -> dict[str, float]:
    """Milliseconds that a copy of the bytes of each stage's operands takes."""
    B, T, H, _ = x["V"].shape
    sizes = dict(B=B, T=T, H=H, G=1, N=N, P=P, S=S, n=B, M=B * -(-T // BT), R=1)
    found = {}
    for stage in MAMBA3_STAGES[:4]:
        moved = [
            y.nbytes(PROBLEM, sizes) / (H if y.name in SHARED else 1)
            for y in stage.operands(PROBLEM)
        ]
        found[stage.name] = sum(moved) / copy_gbps() / 1e6
    return found


def sweep(x: dict[str, Tensor]) -> None:
    for stage in MAMBA3_STAGES[:4]:
        found = []
        for BT, knobs in configs():
            mamba3.force(stage.name, knobs)
            found.append((ms(kernel_runs(x, BT)[stage.name]), BT, knobs))
            mamba3.force(stage.name, None)
        sheet = Sheet(stage.name, ("BT", "BH", "num_warps", "ms"), words=())
        for took, BT, knobs in sorted(found, key=lambda y: y[0])[:8]:
            sheet.add(str(BT), *map(str, knobs.values()), f"{took:.4f}")
        console().print(sheet)


def configs() -> Iterator[tuple[int, dict[str, Knob]]]:
    for BT in (16, 32, 64):
        for BH in (1, 4, 8, 16, 32, 64):
            for warps in (2, 4, 8):
                yield BT, {"BH": BH, "num_warps": warps}


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--sweep", action="store_true", help="time configs of the kernels instead")
    args = parser.parse_args()
    torch.manual_seed(0)
    x = inputs(args.batch, args.tokens, args.heads)
    if args.sweep:
        sweep(x)
        return
    sheet = Sheet("Mamba-3", ("of", "forward", "forward+backward"), words=("of",))
    sheet.add("gdn2gen", *(f"{y:.3f}" for y in op_times(mamba3_siso_combined, x)))
    try:
        theirs = import_module("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined")
        sheet.add("mamba_ssm", *(f"{y:.3f}" for y in op_times(theirs.mamba3_siso_combined, x)))
    except Exception as error:  # not installed, or another version: no reason to lose our figures
        console(stderr=True).print(f"without mamba_ssm: {error}")
    BT = tile_of("bf16", N)
    sheet.add("chunk_simple_gla", *(f"{y:.3f}" for y in scan_times(x, BT)))
    console().print(sheet)
    kernels = Sheet(
        "kernels around the scan", ("kernel", "ms", "of a copy", "times"), words=("kernel",)
    )
    beside = floors(x, BT)
    for name, run in kernel_runs(x, BT).items():
        took = ms(run)
        kernels.add(name, f"{took:.4f}", f"{beside[name]:.4f}", f"{took / beside[name]:.2f}")
    console().print(kernels)


if __name__ == "__main__":
    main()
