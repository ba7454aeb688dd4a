"""`gdn2gen tuned`: export, import, merge and compare tuned files."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdn2gen.base.errors import StoreError
from gdn2gen.base.terminal import Sheet, console
from gdn2gen.cli.options import add_device, add_op, present_or_target, say_where, some_path
from gdn2gen.family.mamba3_problem import PART_OPS
from gdn2gen.store.format import Entry, TunedFile, entry_to

if TYPE_CHECKING:
    from gdn2gen.store.part_files import PartEntry
    from gdn2gen.store.sharing import AnyFile, Difference


def add_tuned(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    export = _action(
        actions,
        "export",
        "write all that calls find for one GPU as one file",
        "gdn2gen tuned export --device H200 --to h200.json",
    )
    add_op(export, also=PART_OPS)
    add_device(export)
    export.add_argument(
        "--to", type=some_path, metavar="FILE", help="the file to write (standard output)"
    )
    export.set_defaults(run=export_tuned)
    take = _action(
        actions,
        "import",
        "merge a file into the folder that calls look at",
        "gdn2gen tuned import h200.json",
    )
    take.add_argument("file", type=some_path, metavar="FILE", help="what `tuned export` wrote")
    add_op(take, also=PART_OPS)
    take.add_argument(
        "--out",
        type=some_path,
        metavar="DIR",
        help="folder of tuned files (GDN2GEN_TUNED_DIR, else the user's cache)",
    )
    take.set_defaults(run=import_tuned)
    merge = _action(
        actions,
        "merge",
        "merge files of one GPU; the faster valid entry stays",
        "gdn2gen tuned merge mine.json theirs.json --to both.json",
    )
    merge.add_argument(
        "files", type=some_path, nargs="+", metavar="FILE", help="tuned files of one GPU"
    )
    merge.add_argument(
        "--to",
        type=some_path,
        metavar="FILE",
        required=True,
        help="the file to merge into; what it holds counts, too",
    )
    merge.set_defaults(run=merge_tuned)
    compare = _action(
        actions, "diff", "show what two files differ in", "gdn2gen tuned diff old.json new.json"
    )
    compare.add_argument("old", type=some_path, metavar="OLD", help="a tuned file")
    compare.add_argument("new", type=some_path, metavar="NEW", help="another one")
    compare.add_argument(
        "--json", action="store_true", help="one JSON object per line, one for each difference"
    )
    compare.set_defaults(run=diff_tuned)


def _action(actions: Any, name: str, words: str, example: str) -> argparse.ArgumentParser:
    sentence = f"{words[0].upper()}{words[1:]}."
    added: argparse.ArgumentParser = actions.add_parser(
        name, help=words, description=sentence, epilog=f"Example: {example}"
    )
    return added


def export_tuned(args: argparse.Namespace) -> int:
    """Write what is on file for a GPU."""
    from gdn2gen.base.files import replace_file
    from gdn2gen.store.format import format_file
    from gdn2gen.store.part_files import format_parts
    from gdn2gen.store.sharing import on_file, parts_on_device
    from gdn2gen.store.tuned_files import write_tuned

    device, _ = present_or_target(args.device)
    file: AnyFile = (parts_on_device if args.op in PART_OPS else on_file)(args.op, device)
    if args.to is None:
        sys.stdout.write(format_file(file) if isinstance(file, TunedFile) else format_parts(file))
        return 0
    if isinstance(file, TunedFile):
        write_tuned(args.to, file)
    else:
        replace_file(args.to, format_parts(file))
    print(f"wrote {len(file.entries)} entries of {device.name} to {args.to}")
    return 0


def import_tuned(args: argparse.Namespace) -> int:
    """Merge a file into the user's own of the same GPU."""
    from gdn2gen.base.paths import user_tuned_dir
    from gdn2gen.store.part_files import parts_path
    from gdn2gen.store.sharing import device_of, load_file, ops_of
    from gdn2gen.store.tuned_files import tuned_path

    file = load_file(args.file)
    device, others = device_of(file), ops_of(file) - {args.op}
    if others:
        raise StoreError(
            f"{args.file} holds entries of {', '.join(sorted(others))}, and those of {args.op} "
            "were to be imported; give the --op that it is of"
        )
    folder = args.out or user_tuned_dir()
    place = tuned_path if isinstance(file, TunedFile) else parts_path
    _merge(place(folder, args.op, device), [args.file])
    say_where(folder)
    return 0


def merge_tuned(args: argparse.Namespace) -> int:
    """Merge files into one."""
    _merge(args.to, args.files)
    return 0


def _merge(path: Path, sources: list[Path]) -> None:
    """Merge `sources` into `path`, and say what came of each; StoreError before any is merged."""
    from gdn2gen.store.sharing import load_file, ops_of

    files = [(source, load_file(source)) for source in sources]
    gpus = {str(file.metadata["gpu"]) for _, file in files}
    if len(gpus) > 1:
        raise StoreError(
            f"a tuned file is of one GPU, but these are of {', '.join(sorted(gpus))}; merge those "
            "of each GPU by themselves"
        )
    ops = set().union(*(ops_of(file) for _, file in files))
    if len(ops) > 1:
        raise StoreError(
            f"a tuned file is of one op, but these are of {', '.join(sorted(ops))}; merge those of "
            "each op by themselves"
        )
    _check_kinds([*sources, *([path] if path.is_file() else [])])
    for source, file in files:
        merged, stale = _merge_one(path, file)
        taken = sum(entry in merged for entry in file.entries)
        note = f"; {stale} are of other templates, and calls pass over them" if stale else ""
        print(f"{source}: {taken} of {len(file.entries)} entries are now in {path}{note}")


def _merge_one(path: Path, file: AnyFile) -> tuple[list[Entry] | list[PartEntry], int]:
    """What the file at `path` then holds, and how many of the merged entries are stale."""
    from gdn2gen.store import part_files, tuned_files

    if isinstance(file, TunedFile):
        merged = tuned_files.merge_entries(path, file.metadata, file.entries)
        return [*merged.entries], sum(map(tuned_files.is_stale, file.entries))
    parts = part_files.merge_parts(path, file.metadata, file.entries, keep_better=True)
    return parts, sum(bool(part_files.stale_parts(x)) for x in file.entries)


def _check_kinds(paths: list[Path]) -> None:
    """StoreError unless all are files of recipes, or all of kernels that are in no plan."""
    from gdn2gen.store.sharing import of_parts

    parts = [str(x) for x in paths if of_parts(x)]
    recipes = [str(x) for x in paths if str(x) not in parts]
    if recipes and parts:
        raise StoreError(
            f"{', '.join(parts)} holds kernels that are in no plan, and {', '.join(recipes)} "
            "recipes of plans; give files of one kind"
        )


def diff_tuned(args: argparse.Namespace) -> int:
    """Print the differences; exit code 1 if there are any, as `diff` has it."""
    from gdn2gen.store.sharing import diff, load_file

    old, new = load_file(args.old), load_file(args.new)
    _check_kinds([args.old, args.new])
    found = diff(old, new)
    unread = _unread(old) != _unread(new)
    if args.json:
        for x in found:
            print(json.dumps(_document(x)))
    else:
        _say_gpus(old, new)
        if found:
            _print(found, args)
    if unread:  # what is read from stdout is one object a line
        out = sys.stderr if args.json else sys.stdout
        print("entries that this gdn2gen cannot read differ", file=out)
    elif not found and not args.json:
        print("the same entries")
    return 1 if found or unread else 0


def _unread(file: AnyFile) -> list[Any]:
    return [x.raw for x in file.unread] if isinstance(file, TunedFile) else []


def _say_gpus(old: AnyFile, new: AnyFile) -> None:
    names = [str(file.metadata["gpu"]) for file in (old, new)]
    if names[0] != names[1]:
        print(f"note: {names[0]} against {names[1]}")


def _print(found: list[Difference], args: argparse.Namespace) -> None:
    names = ("entry", "time", "changed")
    table = Sheet(f"{args.old} against {args.new}", names, words=names)
    for x in found:
        table.add(x.label, _time(x), _what(x))
    console().print(table)


def _document(x: Difference) -> dict[str, Any]:
    sides = {}
    for name, entry in (("old", x.old), ("new", x.new)):
        sides[name] = None if entry is None else _raw(entry)
    knobs = {name: {"old": old, "new": new} for name, (old, new) in x.knobs.items()}
    return {"entry": x.label, **sides, "knobs": knobs, "ratio": x.ratio}


def _raw(entry: Entry | PartEntry) -> dict[str, Any]:
    """As a file holds it."""
    return entry_to(entry) if isinstance(entry, Entry) else asdict(entry)


def _what(x: Difference) -> str:
    changed = [f"{name} {a} -> {b}" for name, (a, b) in x.knobs.items()]
    if x.old is not None and x.new is not None and x.old.templates != x.new.templates:
        changed.append("made from other templates")
    return ", ".join(changed)


def _time(x: Difference) -> str:
    if x.old is None or x.new is None:
        return f"only in the {'new' if x.old is None else 'old'} file"
    before, after = x.times
    if before is None or after is None:
        return " -> ".join(y.provenance if isinstance(y, Entry) else "-" for y in (x.old, x.new))
    digits = 3 if isinstance(x.new, Entry) else 4
    return f"{before:.{digits}f} -> {after:.{digits}f} ms ({x.ratio:.2f}x)"
