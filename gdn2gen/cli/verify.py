"""`gdn2gen verify`: is it right, and do tuned entries still hold."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gdn2gen.base import terminal
from gdn2gen.base.errors import DeviceError, InputError
from gdn2gen.cli.options import (
    ALL,
    add_op,
    check_json,
    parse_head_dim,
    refuse,
    some_path,
    write_json,
)
from gdn2gen.family.mamba3_problem import MAMBA3

if TYPE_CHECKING:
    from gdn2gen.base.device import Device
    from gdn2gen.family.decays import DecayPattern
    from gdn2gen.measure.case_runs import Result
    from gdn2gen.store.part_files import PartEntry
    from gdn2gen.store.tuned_files import Entry
    from gdn2gen.tuning.recheck import Rechecked
    from gdn2gen.tuning.recheck_parts import RecheckedParts


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
    check_json(args.json)
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
        write_json(args.json, document)
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
    from gdn2gen.store.sharing import all_on_file
    from gdn2gen.tuning.recheck import recheck_table
    from gdn2gen.tuning.recheck_parts import RecheckedParts, parts_table

    unused = ("interpreter", "list", "head_dim", "pattern")
    refuse(args, "--tuned checks every entry of this GPU", *unused)
    if args.cases:
        raise InputError(
            f"--tuned checks every entry of this GPU, and takes no cases, but got "
            f"{', '.join(map(repr, args.cases))}"
        )
    if not has_gpu():
        raise DeviceError("--tuned times kernels, but torch sees no GPU here")
    check_json(args.json)
    device, out = present_device(), terminal.console()
    entries, parts = all_on_file(args.op, device)
    results: list[Rechecked | RecheckedParts] = []
    with terminal.status(out) as say:
        for result in _rechecked(entries, parts, device, args.renew):
            results.append(result)
            _file_renewed(result, device)
            say(f"{len(results)} of {len(entries) + len(parts)} entries")
    others = [x for x in results if isinstance(x, RecheckedParts)]
    wholes = [x for x in results if not isinstance(x, RecheckedParts)]
    if wholes or not others:
        out.print(recheck_table(wholes))
    if others:
        out.print(parts_table(others))
    failing = [x for x in results if not x.holds]
    print(f"{len(results) - len(failing)} of {len(results)} entries hold")
    if any(not x.holds for x in wholes):
        print("To mend the others: gdn2gen tune --only-failing --shapes ...")
    for op in dict.fromkeys(x.op for x in others if not x.holds):
        print(f"To mend those of kernels in no plan: gdn2gen tune --op {op} --shapes ...")
    if args.json is not None:
        names = ("status", "detail", "now_ms", "default_ms")
        rows = [{"entry": x.entry.label, **{y: getattr(x, y) for y in names}} for x in results]
        write_json(args.json, {"device": device.name, "entries": rows})
    return 1 if failing else 0


def _rechecked(
    entries: list[Entry], parts: list[tuple[str, PartEntry]], device: Device, renew: bool
) -> Iterator[Rechecked | RecheckedParts]:
    """One after the other: two workers on a GPU would disturb each other's times."""
    from gdn2gen.family.decays import PATTERN_UNDER
    from gdn2gen.tuning.gpu.backend import WorkerBackend
    from gdn2gen.tuning.gpu.parts import parts_worker
    from gdn2gen.tuning.recheck import recheck
    from gdn2gen.tuning.recheck_parts import recheck_parts

    for decay, pattern in PATTERN_UNDER.items():
        alike = [x for x in entries if x.decay == decay]
        if not alike:
            continue
        backend = WorkerBackend(device, pattern=pattern)
        try:
            yield from recheck(alike, backend, device, renew=renew)
        finally:
            backend.close()
    if parts:
        worker = parts_worker()
        try:
            yield from recheck_parts(parts, device, worker.call, renew=renew)
        finally:
            worker.close()


def _file_renewed(result: Rechecked | RecheckedParts, device: Device) -> None:
    """At once, so that what was found is not lost with the rest."""
    from gdn2gen.base.device import toolchain
    from gdn2gen.store import tuned_files
    from gdn2gen.store.part_files import merge_parts, parts_path
    from gdn2gen.tuning.recheck import Rechecked
    from gdn2gen.workflows.tune import own_folder

    if result.renewed is None:
        return
    metadata = tuned_files.metadata_for(device, toolchain(), "gdn2gen verify --tuned --renew")
    if isinstance(result, Rechecked):
        path = tuned_files.tuned_path(own_folder(), str(result.entry.problem_key["op"]), device)
        tuned_files.merge_entries(path, metadata, [result.renewed])
    else:
        path = parts_path(own_folder(), result.op, device)
        merge_parts(path, metadata, [result.renewed])
