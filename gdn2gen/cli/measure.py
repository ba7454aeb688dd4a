"""`gdn2gen verify` and `gdn2gen bench`: is it right, and how fast is it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gdn2gen.base import terminal
from gdn2gen.base.environment import verifying
from gdn2gen.base.errors import DeviceError, Gdn2genError, InputError
from gdn2gen.base.files import check_replaceable, replace_file
from gdn2gen.cli.options import (
    ALL,
    LEVEL_WORDS,
    add_lower_bound,
    add_op,
    add_shapes,
    bound_option,
    fill_in,
    parse_head_dim,
    refuse,
    refuse_of_mamba3,
    some_path,
)
from gdn2gen.family.mamba3_problem import MAMBA3
from gdn2gen.family.problem import DTYPES, WHERE_TAKEN
from gdn2gen.family.recurrence import GATES
from gdn2gen.family.registry import OPS
from gdn2gen.family.shapes import parse_shapes
from gdn2gen.kernels.plans import LEVELS

if TYPE_CHECKING:
    from gdn2gen.base.device import Device
    from gdn2gen.family.decays import DecayPattern
    from gdn2gen.measure.case_runs import Result
    from gdn2gen.measure.rows import Row
    from gdn2gen.tuning.recheck import Rechecked

# As in `measure.peers`, which loads torch.
PEERS: Final = ("fla", "flash_qla", "mamba_ssm")
ANY_PEER: Final = "any"
RESULTS_DIR: Final = Path("docs/results")


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="names or shell patterns such as 'bf16-*' (all)"
    )
    add_op(parser, also=(MAMBA3, ALL), default=ALL)
    parser.add_argument(
        "--head-dim",
        metavar="K[,V]",
        help="the suite of this pair alone, in every dtype (what there is of all pairs of 32, 64 "
        "and 128, most of it of 128)",
    )
    parser.add_argument(
        "--pattern",
        type=some_path,
        metavar="FILE",
        help="decays that trained gates had (gdn2gen.nn.Observatory), at their head dims, instead "
        "of the suite; of their recurrence, or of that of --op",
    )
    parser.add_argument(
        "--interpreter",
        action="store_true",
        help="in Triton's interpreter, at small sizes; also what is done without a GPU",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument(
        "--tuned",
        action="store_true",
        help="check and time the tuned entries of this GPU again, instead of the accuracy suite",
    )
    parser.add_argument(
        "--renew",
        action="store_true",
        help="with --tuned: check in full only entries whose templates changed since they were "
        "filed, and file those that pass as they are now",
    )
    parser.add_argument(
        "--json", type=some_path, metavar="FILE", help="also write the results here"
    )
    parser.set_defaults(run=verify)


def verify(args: argparse.Namespace) -> int:
    """Run the accuracy suite, or check what is tuned; 0 if everything passed, else 1."""
    if args.op == ALL:
        args.op = None
    if args.tuned:
        return _verify_tuned(args)
    refuse(args, "the accuracy suite looks at no entries (--tuned does)", "renew")
    from gdn2gen.base.device import has_gpu, present_device, toolchain
    from gdn2gen.measure.suite import results_table, select_cases
    from gdn2gen.workflows.verify import verify as workflow

    interpreter = args.interpreter or not has_gpu()
    dims = None if args.head_dim is None else parse_head_dim(args.head_dim)
    chosen: dict[str, Any] = {"op": args.op, "head_dim": dims, "decays": _decays(args)}
    if args.list:
        refuse(args, "--list prints names and runs nothing", "json")
        for case in select_cases(args.cases, interpreter=interpreter, **chosen):
            print(case.name)
        return 0
    _check_json(args.json)
    where = "Triton's interpreter, small sizes" if interpreter else present_device().name
    out = terminal.console()
    out.print(f"Accuracy suite on {where}")
    cases = select_cases(args.cases, interpreter=interpreter, **chosen)
    done = set()
    with terminal.status(out) as say:

        def show(result: Result) -> None:
            done.add(result.name)
            say(f"{len(done)} of {len(cases)} cases, last {result.name}")

        verified = workflow(args.cases, interpreter=interpreter, on_result=show, **chosen)
    results = verified.results
    out.print(results_table(results))
    failed = [result for result in results if not result.passed]
    for result in failed:
        out.print(terminal.plain(f"{result.name}: {result.message}"))
    out.print(f"{len(results) - len(failed)} of {len(results)} cases passed")
    if args.json is not None:
        document = {
            "device": where,
            "versions": dict(toolchain()),
            "results": [asdict(result) for result in results],
        }
        _write_json(args.json, document)
    if verified.filed_in is not None:
        for kind, places in (("verified", verified.passed), ("failed", verified.failed)):
            for op, dtype, K, V in sorted(places):
                print(f"{kind}: {op} at K={K}, V={V} in {dtype}")
        print(f"filed in {verified.filed_in}")
    return 1 if failed else 0


def _decays(args: argparse.Namespace) -> DecayPattern | None:
    from gdn2gen.family.decays import DecayPattern

    if args.pattern is None:
        return None
    refuse(args, "--pattern brings its own head dims", "head_dim")
    return DecayPattern.load(args.pattern)


def _verify_tuned(args: argparse.Namespace) -> int:
    from gdn2gen.base.device import has_gpu, present_device
    from gdn2gen.store.sharing import all_on_file, on_file
    from gdn2gen.tuning.gpu.backend import WorkerBackend
    from gdn2gen.tuning.recheck import recheck, recheck_table

    unused = ("interpreter", "list", "head_dim", "pattern")
    refuse(args, "--tuned checks every entry of this GPU", *unused)
    if args.cases:
        raise InputError(
            f"--tuned checks every entry of this GPU, and takes no cases, but got "
            f"{', '.join(map(repr, args.cases))}"
        )
    if not has_gpu():
        raise DeviceError("--tuned times kernels, but torch sees no GPU here")
    _check_json(args.json)
    device, out = present_device(), terminal.console()
    entries = all_on_file(device) if args.op is None else [*on_file(args.op, device).entries]
    backend, results = WorkerBackend(device), []
    try:
        with terminal.status(out) as say:
            for result in recheck(entries, backend, device, renew=args.renew):
                results.append(result)
                _file_renewed(result, device)
                say(f"{len(results)} of {len(entries)} entries")
    finally:
        backend.close()
    out.print(recheck_table(results))
    failing = [x for x in results if not x.holds]
    print(f"{len(results) - len(failing)} of {len(results)} entries hold")
    if failing:
        print("To mend the others: gdn2gen tune --only-failing --shapes ...")
    if args.json is not None:
        rows = [
            {
                "entry": x.entry.label,
                "status": x.status,
                "detail": x.detail,
                "now_ms": x.now_ms,
                "default_ms": x.default_ms,
            }
            for x in results
        ]
        _write_json(args.json, {"device": device.name, "entries": rows})
    return 1 if failing else 0


def _file_renewed(result: Rechecked, device: Device) -> None:
    """At once, so that what was found is not lost with the rest."""
    from gdn2gen.base.device import toolchain
    from gdn2gen.store import tuned_files
    from gdn2gen.workflows.tune import own_folder

    if result.renewed is not None:
        path = tuned_files.tuned_path(own_folder(), str(result.entry.problem_key["op"]), device)
        metadata = tuned_files.metadata_for(device, toolchain(), "gdn2gen verify --tuned --renew")
        tuned_files.merge_entries(path, metadata, [result.renewed])


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
    _check_json(args.json)
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
        _write_json(args.json, rows_document(rows))
    if args.save:
        out.print(f"saved to {path}; now run scripts/update_readme.py")
    return int(bool(failed))


def _bench_one(args: argparse.Namespace, level: str, path: Path, device: Device) -> list[Row]:
    """Rows of one member at one level, shown and, with --save, kept as they come."""
    from gdn2gen.measure.mamba3_rows import bench_mamba3
    from gdn2gen.measure.results import rows_table, save_results
    from gdn2gen.measure.rows import bench_shapes

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
            "vs": vs, "stages": args.stages, "level": level, "on_row": show,
        }  # fmt: skip
        if args.op == MAMBA3:
            refuse_of_mamba3(args)
            rows = bench_mamba3(shapes, K, V, args.dtype, **options)
        else:
            options |= {"gate": args.gate, "l2norm": args.l2norm}
            options["bound"] = bound_option(args.gate, args.lower_bound)
            rows = bench_shapes(args.op, shapes, K, V, args.dtype, **options)
    out.print(f"{args.op} on {device.name}, K={K} V={V} {args.dtype}, level {level}")
    out.print(rows_table(rows))
    return rows


def _check_json(path: Path | None) -> None:
    """Raise before anything is measured what would be raised when it is written."""
    if path is not None:
        check_replaceable(path)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    replace_file(path, json.dumps(document, indent=1) + "\n")
