"""`gdn2gen bench`: how fast is it."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gdn2gen.base import terminal
from gdn2gen.base.decay import WEAK
from gdn2gen.base.environment import verifying
from gdn2gen.base.errors import Gdn2genError
from gdn2gen.cli.options import (
    ALL,
    LEVEL_WORDS,
    add_decay,
    add_lower_bound,
    add_op,
    add_shapes,
    bound_option,
    check_json,
    fill_in,
    parse_head_dim,
    refuse,
    refuse_of_mamba3,
    some_path,
    write_json,
)
from gdn2gen.family.mamba3_problem import MAMBA3
from gdn2gen.family.problem import DTYPES, WHERE_TAKEN
from gdn2gen.family.recurrence import GATES
from gdn2gen.family.registry import CHANNEL_OPS, OPS
from gdn2gen.family.shapes import parse_shapes
from gdn2gen.kernels.plans import LEVELS

if TYPE_CHECKING:
    from gdn2gen.base.device import Device
    from gdn2gen.measure.rows import Row

# As in `measure.peers`, which loads torch.
PEERS: Final = ("fla", "flash_qla", "mamba_ssm")
ANY_PEER: Final = "any"
RESULTS_DIR: Final = Path("docs/results")


def add_bench(parser: argparse.ArgumentParser) -> None:
    add_op(parser, also=(MAMBA3, ALL))
    add_shapes(parser)
    parser.add_argument("--head-dim", metavar="K[,V]", help="(128; mamba2, mamba3: 128,64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(%(default)s)")
    parser.add_argument("--gate", choices=GATES, help="(none; mamba2: softplus)")
    add_lower_bound(parser, "least decay a token with --gate sigmoid, in [-5, 0); whole nats (-5)")
    parser.add_argument(
        "--no-l2norm",
        dest="l2norm",
        action="store_false",
        default=WHERE_TAKEN,
        help="q and k are not normalised, where kernels can",
    )
    parser.add_argument(
        "--vs",
        choices=(*PEERS, ANY_PEER),
        help="measure flash-linear-attention, for gated_delta_rule FlashQLA, or for mamba2 and "
        f"mamba3 mamba_ssm, in the same run; {ANY_PEER}: the fastest that has the op and can be "
        "imported",
    )
    parser.add_argument(
        "--level",
        choices=tuple(LEVEL_WORDS),
        default=LEVELS[0],
        help="lean; fast as with disable_recompute=True, FLA likewise; or both, one after the "
        "other (%(default)s)",
    )
    add_decay(parser, "what our calls expect of their decay, whatever it is")
    parser.add_argument(
        "--stages",
        action="store_true",
        help="also time stage by stage, beside the rates of a copy and of a large product",
    )
    parser.add_argument("--json", type=some_path, metavar="FILE", help="also write the rows here")
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"merge the rows into {RESULTS_DIR}/<gpu>.json, from which the README's table is made",
    )
    parser.add_argument(
        "--turn",
        type=some_path,
        metavar="FILE",
        help="of several benches that share a GPU: say in FILE.ready that all is compiled and "
        "checked, and time once FILE is there, one bench at a time",
    )
    parser.set_defaults(run=bench)


def bench(args: argparse.Namespace) -> int:
    """Measure on the present GPU and print the tables."""
    from gdn2gen.base.device import present_device
    from gdn2gen.measure.results import check_saveable, rows_document

    ops = (*OPS, MAMBA3) if args.op == ALL else (args.op,)
    if args.op == ALL:
        refuse(args, "--op all takes the head dims and the gate of each member", "head_dim", "gate")
    asked = [argparse.Namespace(**vars(args) | {"op": op}) for op in ops]
    for one in asked:
        fill_in(one)
        parse_shapes(one.shapes)
    device, out = present_device(), terminal.console()
    path = RESULTS_DIR / f"{device.slug}.json"
    if args.save:
        check_saveable(path, device.name)
    check_json(args.json)
    rows: list[Row] = []
    failed = {}
    for one, level in product(asked, LEVEL_WORDS[args.level]):
        try:
            rows += _bench_one(one, level, path, device)
        except Gdn2genError as error:
            if args.op != ALL:
                raise
            failed[f"{one.op} at level {level}" if args.level == "both" else one.op] = str(error)
    for left_out, why in failed.items():
        out.print(terminal.plain(f"{left_out} is left out: {why}"))
    if args.json is not None:
        write_json(args.json, rows_document(rows))
    if args.save:
        out.print(f"saved to {path}; now run scripts/update_readme.py")
    return int(bool(failed))


def _bench_one(args: argparse.Namespace, level: str, path: Path, device: Device) -> list[Row]:
    """Rows of one member at one level, shown and, with --save, kept as they come."""
    from gdn2gen.measure.mamba3_rows import bench_mamba3
    from gdn2gen.measure.results import rows_table, save_results
    from gdn2gen.measure.rows import bench_shapes
    from gdn2gen.workflows.wanted import expected_from

    shapes = parse_shapes(args.shapes)
    K, V = parse_head_dim(args.head_dim)
    vs = args.vs
    out = terminal.console()
    done: list[Row] = []
    if vs == ANY_PEER:
        from gdn2gen.measure.peers import any_peer

        vs, why = any_peer(args.op, level)
        if vs is None:
            out.print(terminal.plain(why))
    with terminal.status(out) as say, verifying():
        say(f"measuring {args.op} at {shapes[0].name} on {device.name}")

        def show(row: Row) -> None:
            say(f"{row.shape.name} is measured, {len(shapes)} shapes in all")
            done.append(row)
            if args.save:
                save_results(path, done)  # at once: a run that is cut short keeps what it has

        options: dict[str, Any] = {
            "vs": vs, "stages": args.stages, "level": level, "on_row": show, "turn": args.turn,
        }  # fmt: skip
        by_channel, decay = args.op in CHANNEL_OPS, WEAK
        if args.op == MAMBA3:
            refuse_of_mamba3(args)
            rows = bench_mamba3(shapes, K, V, args.dtype, **options)
        else:
            options |= {"gate": args.gate, "l2norm": args.l2norm}
            options["bound"] = bound_option(args.gate, args.lower_bound)
            options["decay"] = decay = expected_from(args.decay) if by_channel else WEAK
            rows = bench_shapes(args.op, shapes, K, V, args.dtype, **options)
    under = "" if decay == WEAK else f", expecting {decay} decay"
    out.print(f"{args.op} on {device.name}, K={K} V={V} {args.dtype}, level {level}{under}")
    out.print(rows_table(rows))
    return rows
