"""What a step of decoding costs: one token of B sequences at K = V = 128, on a GPU; of Mamba-2 at a
state of 128 and heads of 64, with skip, gate and one group of B and C, by selective_state_update.

    python scripts/decode_time.py [--op kda] [--batch 1 8] [--k-first] [--warm] [--in-order]
        [--save] [--knobs loads=ahead] [--sweep [BV=8,16 loads=ahead] [--into tuned]]

Time is that of a CUDA graph of many calls, for one of them: each has slots of its own, so that no
state lies in the L2 (with --warm all have the same), drawn from all of the pool, or with --in-order
one after the other, as states without a pool lie; the median of 20 replays. The floor is the
time that a copy of the same bytes would take: the state read and written, the token's tensors read,
o written. Host time is that of one call of 200, the least of six runs. Beside it the ops of other
libraries, where they are installed: flash-linear-attention's takes fp32 states and writes new ones;
of Mamba-2 mamba_ssm's, and of Gated DeltaNet vLLM's and FlashInfer's, on slots like ours.
--save keeps rows in docs/decoding/, and makes the table of docs/experiments.md of all of them.
--knobs are run in place of the rule's. --sweep times every config that has such knobs, for the rule
in kernels/recurrent.py (decode_sweep.py); with --into the fastest that is right is filed in that
folder of tuned files, as calls find it. Figures of two versions compare if they are of one GPU,
taken in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from decode_steps import STATES, Step, graph_us, host_us, peers  # noqa: E402
from decode_sweep import Timed, domain, knob, sweep  # noqa: E402
from learning.record import Row, record, recorded  # noqa: E402
from learning.report import NOTHING, put, table  # noqa: E402
from learning.rows import machine  # noqa: E402

from gdn2gen.base.device import slug_of  # noqa: E402
from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.terminal import Sheet, console  # noqa: E402
from gdn2gen.family.registry import DECODING_OPS  # noqa: E402
from gdn2gen.measure.timing import copy_gbps  # noqa: E402
from gdn2gen.runtime import decoding  # noqa: E402

RECORDS: Final = ROOT / "docs/decoding"
PAGE: Final = ROOT / "docs/experiments.md"
# What a row is of; and what peers are called, in the order of their columns.
KEY: Final = ("op", "heads", "layout", "warm", "knobs", "batch", "state")
PEERS: Final = ("FLA", "mamba_ssm", "vLLM", "FlashInfer")
COLUMNS: Final = ("member", "sequences", "state", "us", "a copy", "x a copy", "host us")


def row(step: Step, knobs: Sequence[tuple[str, Any]]) -> Row:
    """What a step takes beside its floor, and what it takes others."""
    run = step.ours()
    found: Row = {
        "op": step.op,
        "heads": step.heads,
        "layout": "V first" if step.v_first or step.stepped else "K first",
        "warm": step.warm,
        "knobs": " ".join(f"{name}={x}" for name, x in knobs),
        "batch": step.batch,
        "state": step.state,
        "us": graph_us(run, step.calls),
        "floor_us": step.floor_us(),
        "host_us": host_us(run),
        "peers": {},
    }
    del run
    for name, peer in peers(step):
        try:
            peer(0)
            found["peers"][name] = {"us": graph_us(peer, step.calls), "host_us": host_us(peer)}
        except Exception as error:  # another version's arguments: no reason to lose our own figures
            console(stderr=True).print(f"{name}'s {step.op}: {error}")
    return found


def cells_of(row: Row, names: Sequence[str]) -> list[str]:
    us, floor = row["us"], row["floor_us"]
    cells = [row["op"], str(row["batch"]), row["state"], f"{us:.2f}", f"{floor:.2f}"]
    cells += [f"{us / floor:.2f}", f"{row['host_us']:.1f}"]
    for name in names:
        peer = row["peers"].get(name)
        cells.append("-" if peer is None else f"{peer['us']:.2f} ({peer['host_us']:.0f})")
    return cells


def peers_of(rows: Sequence[Row]) -> list[str]:
    """Those that any row has, whose columns say GPU and, in brackets, host."""
    return [x for x in PEERS if any(x in row["peers"] for row in rows)]


def page(rows: Sequence[Row]) -> str:
    """A table for each GPU, number of heads, layout and what knobs were forced."""
    parts = []
    cold = [x for x in rows if not x["warm"]]
    shared = ("gpu", "heads", "layout", "knobs")
    for key in dict.fromkeys(tuple(x[name] for name in shared) for x in cold):
        mine = [x for x in cold if tuple(x[name] for name in shared) == key]
        words = ", ".join(f"{name} {value}" for name, value in mine[0]["machine"].items())
        _, heads, layout, knobs = key
        forced = f", {knobs}" if knobs else ""
        names = peers_of(mine)
        titles = (*COLUMNS, *(f"{x} us (host)" for x in names))
        lines = [cells_of(x, names) for x in mine]
        parts += [f"{heads} heads, {layout}{forced}; {words}", "", table(titles, lines), ""]
    return "\n".join(parts).rstrip() or NOTHING


def save(rows: Sequence[Row]) -> None:
    gpu = torch.cuda.get_device_name()
    with_machine = [{**x, "machine": machine()} for x in rows]
    record(RECORDS / f"{slug_of(gpu)}.json", gpu, with_machine, KEY)
    put(PAGE, "decoding", page(recorded(RECORDS)))


def timed(step: Step) -> Timed:
    us = partial(graph_us, calls=step.calls)
    return Timed(str(step), step.ours, us, step.floor_us, step.batch, step.heads)


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=DECODING_OPS, default=list(DECODING_OPS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--state", nargs="+", choices=tuple(STATES), default=list(STATES))
    parser.add_argument("--k-first", action="store_true", help="states are [HV, K, V]")
    parser.add_argument("--warm", action="store_true", help="every call takes the same states")
    parser.add_argument("--in-order", action="store_true", help="a call's slots are neighbours")
    parser.add_argument("--save", action="store_true", help="keep rows in docs/decoding")
    parser.add_argument("--knobs", nargs="+", type=knob, default=[], help="in place of the rule's")
    parser.add_argument("--sweep", nargs="*", type=domain, help="time every config, or every such")
    parser.add_argument("--into", type=Path, metavar="DIR", help="file a sweep's fastest there")
    args = parser.parse_args()
    if args.in_order and (args.save or args.into):
        parser.error("what is kept is of slots from all of the pool: no --in-order beside it")
    decoding.force(**dict(args.knobs))
    steps = [
        Step(op, batch, args.heads, state, not args.k_first, args.warm, args.in_order)
        for op in args.op
        for state in args.state
        for batch in args.batch
    ]
    with torch.no_grad():
        if args.sweep is not None:
            sweep([timed(x) for x in steps], dict(args.sweep), args.into)
            return
        # a table for each op, as soon as it is there
        for op, of_op in groupby(steps, lambda step: step.op):
            rows = [row(x, args.knobs) for x in of_op]
            names = peers_of(rows)
            sheet = Sheet(
                f"{op}: {torch.cuda.get_device_name()}, {copy_gbps():.0f} GB/s by a copy",
                (*COLUMNS, *(f"{x} us (host)" for x in names)),
                words=("member", "state"),
            )
            for x in rows:
                sheet.add(*cells_of(x, names))
            console().print(sheet)
            if args.save:
                save(rows)


if __name__ == "__main__":
    main()
