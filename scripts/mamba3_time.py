"""What Mamba-3 costs on a GPU: the op, the kernels around its scan, the scan itself; milliseconds.

    python scripts/mamba3_time.py [--batch 4] [--tokens 4096] [--heads 64] [--alone]
        [--sweep | --forms | --profile] [--back {apart,once}] [--turn {before,within}]
        [--with STAGE:KNOB=VALUE,...]

bf16, N = 128, P = 64, 32 angles that heads share, one group, D and Z. The op is beside mamba_ssm's
where that can be imported; the kernels are beside the time that a copy of their bytes would take
(`kernels.mamba3`, every operand once). Every run begins with the L2 flushed. --sweep times configs
of the kernels, for the rules in kernels/mamba3.py; --forms the few arrangements of those over
chunks that the rules choose among. `apart` are states and outputs in two stages where calls like
these run one, and `backward at once` has the products of its backward in one stage. --profile says
what each kernel of the op takes within it; with --back, whether these products are one stage, and
with --turn, whether the scan turns queries and keys itself (`turned within`).
--with has a stage run with knobs that no entry and no rule has chosen: give it once for each stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gdn2gen import chunk_simple_gla, mamba3_siso_combined
from gdn2gen.base.environment import verifying
from gdn2gen.base.terminal import Sheet, console
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3 import AROUND, MAMBA3_AROUND, tile_of
from gdn2gen.kernels.mamba3_chunks import CHUNKS, MAMBA3_CHUNK_STAGES, chunk_of
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.plans import LEVELS
from gdn2gen.measure.mamba3_times import (
    chunk_runs,
    kernel_runs,
    layer_inputs,
    runs_of,
    stage_bytes,
)
from gdn2gen.measure.timing import copy_gbps, time_ms
from gdn2gen.runtime import mamba3
from gdn2gen.runtime.mamba3_chunk_ops import chunks_forced
from gdn2gen.runtime.mamba3_loaded import force, force_scan
from gdn2gen.runtime.mamba3_reverse_scan import force_reverse_scan
from gdn2gen.runtime.mamba3_turning_scan import force_turning_scan

Run = Callable[[], Any]
PROBLEM = Mamba3Problem(state_size=128, head_dim=64, angles=32, skip=True, gate=True)


# Beside the rule's own.
FORMS: dict[str, tuple[dict[str, Any], ...]] = {
    "mamba3_turns": ({"BH": 1}, {"BH": 2}, {"BH": 8}),
    "mamba3_rotate": ({"BH": 1}, {"BH": 2}, {"BH": 8}),
    "mamba3_states": ({"BV": 32}, {"BV": 32, "num_warps": 4}),
    "mamba3_output": (
        *({"maxnreg": 0}, {"maxnreg": 168}, {"BH": 4, "maxnreg": 0}),
        {"BH": 4, "maxnreg": 0, "num_stages": 2},
        {"BH": 8, "maxnreg": 0, "num_stages": 2},
    ),
    "mamba3_gate": (
        {"BR": 32},
        {"BR": 128},
        {"BR": 32, "num_warps": 2},
        {"BR": 128, "num_warps": 8},
    ),
    "mamba3_reverse_states": ({"BV": 32}, {"BV": 32, "num_warps": 4}),
    "mamba3_gradient": (
        *({"maxnreg": 128}, {"maxnreg": 0}, {"BH": 4}, {"BH": 2}),
        *({"parts": 2}, {"parts": 2, "maxnreg": 0}, {"parts": 2, "maxnreg": 128}),
    ),
}


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


def scan_times(x: dict[str, Tensor], BT: int, *, fast: bool) -> tuple[float, float]:
    numbers, biases = [x["ADT"], x["DT"], x["Trap"]], [x["Q_bias"], x["K_bias"]]
    made = mamba3.prologue(x["Q"], x["K"], numbers, biases, x["Angles"], x["D"], None, [], BT)
    q, k, decay = (y.detach().requires_grad_() for y in made[:3])
    v = x["V"].detach().requires_grad_()

    def run() -> Tensor:
        found = chunk_simple_gla(
            q, k, v, decay, scale=1.0, state_v_first=True, disable_recompute=fast
        )
        return found[0]

    do = torch.randn_like(v)
    return ms(torch.no_grad()(run)), ms(lambda: torch.autograd.grad(run(), [q, k, v, decay], do))


def floors(shape: Shape, BT: int, kind: str) -> dict[str, float]:
    """Milliseconds that a copy of the bytes of each stage's operands takes."""
    moved = stage_bytes(PROBLEM, shape, BT, kind)
    return {name: found / copy_gbps() / 1e6 for name, found in moved.items()}


def sweep(x: dict[str, Tensor]) -> None:
    """The fastest configs of each kernel over chunks, and around a scan."""
    for kind, stages in ((CHUNKS, MAMBA3_CHUNK_STAGES), (AROUND, MAMBA3_AROUND)):
        for stage in stages:
            names = [y for y in ("BH", "BV", "num_warps", "maxnreg") if y in stage.domains]
            found = []
            for BT, knobs in configs(stage, names):
                force(stage.name, knobs)
                try:
                    took = ms(runs_of(kind, PROBLEM, x, BT)[stage.name])
                    found.append((took, BT, knobs))
                except Exception as error:  # what does not fit shared memory is no config
                    console(stderr=True).print(f"{stage.name} BT={BT} {knobs}: {error}")
                force(stage.name, None)
            sheet = Sheet(stage.name, ("BT", *names, "ms"), words=())
            for took, BT, knobs in sorted(found, key=lambda y: y[0])[:8]:
                sheet.add(str(BT), *(str(knobs[y]) for y in names), f"{took:.4f}")
            console().print(sheet)


def forms(x: dict[str, Tensor]) -> None:
    """Each kernel over chunks by the rule, and in its other arrangements."""
    runs = chunk_runs(x, chunk_of("bf16", PROBLEM.state_size))
    sheet = Sheet("arrangements", ("kernel", "knobs", "ms"), words=("kernel", "knobs"))
    for stage, others in FORMS.items():
        for knobs in ({}, *others):
            force(stage, knobs)
            try:
                took = f"{ms(runs[stage]):.4f}"
            except Exception as error:  # what does not fit shared memory is no config
                took = str(error).splitlines()[0][:40]
            force(stage, None)
            sheet.add(stage, ", ".join(f"{y}={z}" for y, z in knobs.items()) or "the rule's", took)
    console().print(sheet)


def profiled(x: dict[str, Tensor], runs: int = 5) -> None:
    """Microseconds of each kernel within the op, as torch's profiler has them."""
    leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
    dout, op = torch.randn_like(x["V"]), cast("Any", mamba3_siso_combined)

    def both(*, fast: bool) -> None:
        out = op(**leaves, disable_recompute=fast)
        torch.autograd.grad(out, [*leaves.values()], dout)

    ways: dict[str, Run] = {"forward": torch.no_grad()(lambda: op(**x))}
    ways |= {f"both, {LEVELS[y]}": partial(both, fast=y) for y in (True, False)}
    for way, run in ways.items():
        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(runs):
                run()
            torch.cuda.synchronize()
        sheet = Sheet(way, ("kernel", "launches", "us"), words=("kernel",))
        events = sorted(found.key_averages(), key=lambda y: -y.self_device_time_total)
        for y in events[:16]:
            sheet.add(y.key[:60], str(y.count // runs), f"{y.self_device_time_total / runs:.1f}")
        console().print(sheet)


def configs(stage: PartStage, names: Sequence[str]) -> Iterator[tuple[int, dict[str, Knob]]]:
    """Of what is tried of each knob what the stage takes; all that it takes where that is none."""
    tried = {"BH": (1, 4, 8, 16), "BV": (32, 64), "num_warps": (4, 8), "maxnreg": (0, 168, 128)}
    taken = [[x for x in tried[y] if x in stage.domains[y]] or stage.domains[y] for y in names]
    for BT in (32, 64):
        for values in product(*taken):
            yield BT, dict(zip(names, values, strict=True))


def stage_knobs(given: str) -> tuple[str, dict[str, Knob]]:
    """A stage, and its knobs by their names."""
    stage, _, listed = given.partition(":")
    pairs = [x.partition("=") for x in listed.split(",") if x]
    return stage, {name: int(x) if x.isdigit() else x for name, _, x in pairs}


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--alone", action="store_true", help="without mamba_ssm's op")
    parser.add_argument("--sweep", action="store_true", help="time configs of the kernels instead")
    parser.add_argument("--forms", action="store_true", help="time a few arrangements instead")
    parser.add_argument("--profile", action="store_true", help="time kernels within the op instead")
    parser.add_argument("--back", choices=("apart", "once"), help="the backward's products")
    parser.add_argument("--turn", choices=("before", "within"), help="where q and k are turned")
    parser.add_argument(
        "--with", dest="forced", action="append", default=[], metavar="STAGE:KNOB=VALUE,..."
    )
    args = parser.parse_args()
    for stage, knobs in map(stage_knobs, args.forced):
        force(stage, knobs)
    torch.manual_seed(0)
    shape = Shape("asked", args.batch, args.tokens, args.heads, groups=1)
    x = layer_inputs(PROBLEM, shape)
    if args.back:
        force_reverse_scan(args.back == "once")
    if args.turn:
        force_turning_scan(args.turn == "within")
    if args.sweep or args.forms or args.profile:
        (sweep if args.sweep else forms if args.forms else profiled)(x)
        return
    time_kernels(x, shape)
    time_ops(x, alone=args.alone)


def time_kernels(x: dict[str, Tensor], shape: Shape) -> None:
    """Each kernel of both ways, beside a copy of its bytes."""
    sheet = Sheet("kernels", ("kernel", "ms", "of a copy", "times"), words=("kernel",))
    around, chunk = tile_of("bf16", PROBLEM.state_size), chunk_of("bf16", PROBLEM.state_size)
    force_reverse_scan(True)  # beside the stages that it stands for
    force_turning_scan(True)
    beside = floors(shape, around, AROUND) | floors(shape, chunk, CHUNKS)
    for name, run in (kernel_runs(PROBLEM, x, around) | chunk_runs(x, chunk)).items():
        took = ms(run)
        sheet.add(name, f"{took:.4f}", f"{beside[name]:.4f}", f"{took / beside[name]:.2f}")
    force_reverse_scan(None)
    force_turning_scan(None)
    console().print(sheet)


def time_ops(x: dict[str, Tensor], *, alone: bool) -> None:
    """The op by both ways, its scan alone, and mamba_ssm's; a line as soon as it is known."""

    def told(of: str, times: tuple[float, float]) -> None:
        console().print(f"{of:<48}{times[0]:9.3f}{times[1]:9.3f}")

    console().print(f"{'Mamba-3':<48}{'forward':>9}{'and back':>9}")
    for chosen in (True, False):
        way = "over chunks" if chosen else "around a scan"
        ways = {"": (None, False, False), ", apart": (False, False, False)}
        ways |= {", backward at once": (None, True, False), ", turned within": (None, True, True)}
        for fast, (said, (at_once, back, within)) in product((False, True), ways.items()):
            if said and not chosen:
                continue
            own = partial(mamba3_siso_combined, disable_recompute=fast)
            force_scan(at_once)
            force_reverse_scan(back)
            force_turning_scan(within)
            with chunks_forced(chosen):
                told(f"gdn2gen, {way}{said}, {LEVELS[fast]}", op_times(own, x))
    force_scan(None)
    force_reverse_scan(None)
    force_turning_scan(None)
    for fast in (False, True):
        BT = tile_of("bf16", PROBLEM.state_size)
        told(f"chunk_simple_gla, {LEVELS[fast]}", scan_times(x, BT, fast=fast))
    if alone:
        return
    try:
        theirs = import_module("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined")
        told("mamba_ssm", op_times(theirs.mamba3_siso_combined, x))
    except Exception as error:  # not installed, or another version: no reason to lose our figures
        console(stderr=True).print(f"without mamba_ssm: {error}")


if __name__ == "__main__":
    main()
