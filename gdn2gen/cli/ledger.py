"""`gdn2gen ledger`: configs that the tuner refused, why, and whether they still would be."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from gdn2gen.base.errors import DeviceError, InputError, TunedFileWarning
from gdn2gen.base.terminal import Sheet, console
from gdn2gen.cli.options import add_device, add_op, refuse, target_device
from gdn2gen.kernels.stages import STAGES

if TYPE_CHECKING:
    from gdn2gen.tuning.records.ledger import Ledger, Refusal

# what the ledger files whole recipes under, see `tuning.records.ledger`
WHOLE: Final = "pipeline"


def add_ledger(parser: argparse.ArgumentParser) -> None:
    add_op(parser)
    add_device(parser, "GPU whose ledger is shown (the present one; all there are without a GPU)")
    parser.add_argument(
        "--stage",
        choices=(*STAGES, WHOLE),
        metavar="NAME",
        help=f"only refusals of this stage: {', '.join(STAGES)}, or {WHOLE} for whole recipes",
    )
    parser.add_argument("--reason", metavar="TEXT", help="only refusals whose reason has this text")
    parser.add_argument(
        "--all", action="store_true", help="also those that are not in force any more"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument(
        "--retest",
        nargs="*",
        metavar="ID",
        help="try these again (all that are listed, if none is named) on the present GPU; what "
        "passes is taken out of the ledger",
    )
    parser.set_defaults(run=ledger)


def ledger(args: argparse.Namespace) -> int:
    """List refusals, or try them again."""
    if args.retest is not None:
        refuse(args, "--retest runs configs on the present GPU", "device", "json")
        return _retest(args)
    shown = [found for book in _books(args.op, args.device) for found in _chosen(args, book)]
    if args.json:
        for refusal, why in shown:
            extra = {"id": refusal.id, "reproduce": refusal.command, "not_in_force": why}
            print(json.dumps({**asdict(refusal), **extra}))
        return 0
    if not shown:
        print(_none(args))
        return 0
    _print(shown)
    print(f"To try one again: {shown[0][0].command}")
    return 0


def _none(args: argparse.Namespace) -> str:
    asked = [f"--{x} {getattr(args, x)}" for x in ("stage", "reason") if getattr(args, x)]
    of = f" of {' '.join(asked)}" if asked else ""
    return f"no refusals{of}" + (" on file" if args.all else " in force (--all shows the rest)")


def _books(op: str, name: str | None) -> list[Ledger]:
    from gdn2gen.base.device import has_gpu, is_name_of, present_device
    from gdn2gen.tuning.records.places import ledgers, open_ledger

    if name is not None:
        named = [x for x in ledgers(op) if is_name_of(name, x.gpu)]
        return named or [open_ledger(op, target_device(name))]
    return [open_ledger(op, present_device())] if has_gpu() else ledgers(op)


def _chosen(args: argparse.Namespace, book: Ledger) -> list[tuple[Refusal, str]]:
    """Refusals of one GPU that the options ask for, and why each is not in force (or nothing)."""
    from gdn2gen.tuning.records.ledger import read_lines
    from gdn2gen.tuning.retest import why_not_in_force

    refusals, odd = read_lines(book.path)
    for words in odd:
        warnings.warn(words, TunedFileWarning, stacklevel=1)
    own = [x for x in refusals if x.gpu == book.gpu]
    found = [(x, why_not_in_force(x, book)) for x in own]
    return [
        (refusal, why)
        for refusal, why in found
        if (args.all or not why or args.retest is not None)
        and args.stage in (None, refusal.stage)
        and (args.reason is None or args.reason in refusal.reason)
    ]


def _print(shown: list[tuple[Refusal, str]]) -> None:
    names = ("id", "date", "stage", "config", "reason")
    table = Sheet("Configs that were refused", names, words=names)
    for refusal, why in shown:
        config = " ".join(f"{name}={value}" for name, value in sorted(refusal.config.items()))
        reason = f"{refusal.reason} (not in force: {why})" if why else refusal.reason
        config = config or f"plan {refusal.plan}, {len(refusal.configs)} stages"
        table.add(refusal.id, refusal.date[:10], refusal.stage, config, reason)
    console().print(table)


def _retest(args: argparse.Namespace) -> int:
    from gdn2gen.base.device import has_gpu, present_device
    from gdn2gen.tuning.gpu.backend import WorkerBackend
    from gdn2gen.tuning.records.places import open_ledger
    from gdn2gen.tuning.retest import retest

    if not has_gpu():
        raise DeviceError("--retest runs the refused kernels, but torch sees no GPU here")
    device = present_device()
    book = open_ledger(args.op, device)
    listed = [refusal for refusal, _ in _chosen(args, book)]
    missing = {*args.retest} - {x.id for x in listed}
    if missing:
        raise InputError(
            f"no refusal {', '.join(sorted(missing))} in {book.path}; `gdn2gen ledger --all` "
            "shows what there is"
        )
    wanted = [x for x in listed if not args.retest or x.id in args.retest]
    backend = WorkerBackend(device)
    passed = 0
    try:
        for result in retest(wanted, book, backend, device):
            passed += result.passed
            verdict = "passes now, and is out of the ledger" if result.passed else result.reason
            print(f"{result.refusal.id} {result.refusal.stage}: {verdict}")
    finally:
        backend.close()
    print(f"{passed} of {len(wanted)} pass now")
    return 0
