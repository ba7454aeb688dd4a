"""Tuned files between machines: all that is on file for a GPU, and what two files differ in.

Files of recipes, and those of kernels that are in no plan (`part_files`).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gdn2gen.base.device import Device, filed_device, is_name_of, known_device, named_device
from gdn2gen.base.errors import StoreError, TunedFileWarning
from gdn2gen.base.paths import packaged_tuned_dir, user_tuned_dir
from gdn2gen.family.mamba3_problem import PART_OPS
from gdn2gen.family.registry import OPS
from gdn2gen.kernels.limits import Knob
from gdn2gen.store import tuned_files
from gdn2gen.store._part_claims import check_part, op_of
from gdn2gen.store.part_files import (
    PartEntry,
    PartsFile,
    holds_parts,
    load_parts,
    parts_path,
    stale_parts,
)
from gdn2gen.store.tuned_files import Entry, TunedFile

AnyFile = TunedFile | PartsFile


def load_file(path: Path) -> AnyFile:
    """The tuned file at `path`, of either kind; StoreError if there is none or it cannot be used.

    Entries of recipes that cannot be used are skipped, with a warning; of a file of kernels that
    are in no plan every entry must be one that calls could run.
    """
    if of_parts(path):
        return _checked_parts(path)
    file = tuned_files.load_tuned(path)
    if file is None:
        raise StoreError(f"there is no tuned file {path}")
    tuned_files.warn_unread(path, file)
    return file


def of_parts(path: Path) -> bool:
    """Whether the file there says that it is of kernels that are in no plan."""
    try:
        return holds_parts(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return False  # whoever reads it next says what it is


def _checked_parts(path: Path) -> PartsFile:
    file = load_parts(path)
    if file is None:
        raise StoreError(f"there is no tuned file {path}")
    for name, kind in (("gpu", str), ("arch", str), ("sms", int)):
        if type(file.metadata.get(name)) is not kind:
            raise StoreError(
                f"{path} cannot be used: {name} must be of {kind.__name__}, but is "
                f"{file.metadata.get(name)!r}; export it again"
            )
    for entry in file.entries:
        try:
            check_part(entry, file.metadata["gpu"], file.metadata["arch"])
        except StoreError as error:
            raise StoreError(
                f"{path} cannot be used: its entry {entry.label} is not valid: {error}"
            ) from error
    return file


def ops_of(file: AnyFile) -> set[str]:
    """The ops that its entries are of, as far as this gdn2gen knows them."""
    if isinstance(file, TunedFile):
        return {str(x.problem_key["op"]) for x in file.entries}
    return {op for op in map(op_of, file.entries) if op is not None}


def device_on_file(name: str) -> Device | None:
    """The GPU of that name, by what a tuned file of it says; None if there is no such file."""
    for folder in _folders():
        for path in sorted(folder.glob("*/*.json")):
            with suppress(StoreError):
                file = tuned_files.load_tuned(path)
                if file is not None and is_name_of(name, str(file.metadata["gpu"])):
                    return device_of(file)
        for path in sorted(folder.glob("*/parts/*.json")):
            with suppress(StoreError):
                parts = _checked_parts(path)
                if is_name_of(name, parts.metadata["gpu"]):
                    return device_of(parts)
    return None


def device_called(name: str) -> Device:
    """The device of that name: in the table of GPUs, or one that a tuned file says it is of."""
    return known_device(name) or device_on_file(name) or named_device(name)


def device_of(file: AnyFile) -> Device:
    """The GPU of a tuned file."""
    metadata = file.metadata
    return filed_device(str(metadata["gpu"]), str(metadata["arch"]), int(metadata["sms"]))


def on_file(op: str, device: Device) -> TunedFile:
    """What calls on `device` find: the user's entries, and packaged ones that they do not replace.

    As in a call, a user's entry replaces a packaged one whatever their times, unless it is stale or
    was not measured and the other was. Raises StoreError if there is nothing.
    """
    paths = _paths(op, device)
    found = [file for file in map(tuned_files.read_tuned, paths) if file is not None]
    if not found:
        looked = " and ".join(map(str, paths))
        raise StoreError(f"nothing is tuned for {op} on {device.name}; looked at {looked}")
    kept: list[Entry] = []
    for file in found:
        added = _not_replaced(file.entries, kept, ties=True)
        kept = [*_not_replaced(kept, added, ties=False), *added]
    return TunedFile(found[0].metadata, tuple(sorted(kept, key=lambda x: x.key)))


def _not_replaced(entries: Sequence[Entry], rivals: Sequence[Entry], *, ties: bool) -> list[Entry]:
    """Those that calls may find beside the rivals, which win ties or do not: what serves as much
    and is less stale, or better known, comes before them."""

    def merit(entry: Entry) -> tuple[float, ...]:
        return tuned_files.rank(entry)[:2]  # not the times, which come after them

    def replaces(rival: Entry, entry: Entry) -> bool:
        wins = merit(rival) <= merit(entry) if ties else merit(rival) < merit(entry)
        return wins and tuned_files.serves_as_much(rival, entry)

    there = tuned_files.by_size(rivals)
    return [x for x in entries if not any(replaces(y, x) for y in there.get(x.size, ()))]


def all_on_file(op: str | None, device: Device) -> tuple[list[Entry], list[tuple[str, PartEntry]]]:
    """The same, and what calls find for kernels that are in no plan, with their op; of every op
    where none is named. Raises StoreError if there is neither."""
    parts = [(x, y) for x in PART_OPS if op in (x, None) for y in parts_of(x, device)]
    if op in PART_OPS:
        if not parts:
            raise _no_parts(op, device)
        return [], parts
    ops: Sequence[str] = [op] if op else [x for x in OPS if _is_tuned(x, device)]
    if not ops and not parts:
        ops = OPS  # which says what was looked for
    return [entry for x in ops for entry in on_file(x, device).entries], parts


def _is_tuned(op: str, device: Device) -> bool:
    return any(path.exists() for path in _paths(op, device))


def parts_of(op: str, device: Device) -> list[PartEntry]:
    """The same of an op's kernels that are in no plan, in order; none where nothing is tuned, and a
    warning of a file that cannot be read."""
    return _best(_parts_files(op, device))


def parts_on_device(op: str, device: Device) -> PartsFile:
    """The same as a file. Raises StoreError if there is nothing."""
    files = _parts_files(op, device)
    entries = _best(files)
    if not entries:
        raise _no_parts(op, device)
    return PartsFile(files[0].metadata, tuple(entries))


def _best(files: Sequence[PartsFile]) -> list[PartEntry]:
    best: dict[str, PartEntry] = {}
    for entry in (entry for file in files for entry in file.entries):
        rival = best.get(entry.key)
        if rival is None or (stale_parts(rival) and not stale_parts(entry)):
            best[entry.key] = entry
    return [best[key] for key in sorted(best)]


def _parts_files(op: str, device: Device) -> list[PartsFile]:
    found = []
    for folder in _folders():
        try:
            file = load_parts(parts_path(folder, op, device))
        except StoreError as error:
            warnings.warn(str(error), TunedFileWarning, stacklevel=3)
            continue
        found += [file] if file is not None else []
    return found


def _no_parts(op: str, device: Device) -> StoreError:
    looked = " and ".join(str(parts_path(x, op, device)) for x in _folders())
    return StoreError(
        f"nothing is tuned for kernels in no plan of {op} on {device.name}; looked in {looked}"
    )


def _paths(op: str, device: Device) -> list[Path]:
    return [tuned_files.tuned_path(folder, op, device) for folder in _folders()]


def _folders() -> tuple[Path, Path]:
    return user_tuned_dir(), packaged_tuned_dir()


@dataclass(frozen=True)
class Difference:
    """What one call finds in two files: of a problem, regime, level and decay, or of kernels in no
    plan. An entry is None where a file has none."""

    old: Entry | PartEntry | None
    new: Entry | PartEntry | None
    knobs: dict[str, tuple[Knob | None, Knob | None]] = field(default_factory=dict)
    """Changed knobs, as `stage.knob`: (old, new)."""

    @property
    def label(self) -> str:
        entry = self.new or self.old
        assert entry is not None
        return entry.label

    @property
    def times(self) -> tuple[float | None, float | None]:
        """Milliseconds of old and new: of forward and backward, or of all kernels of an entry."""
        return _ms(self.old), _ms(self.new)

    @property
    def ratio(self) -> float | None:
        """New time over old; None unless both were measured."""
        old, new = self.times
        return new / old if old and new else None


def _ms(entry: Entry | PartEntry | None) -> float | None:
    if isinstance(entry, PartEntry):
        return entry.ms if entry.ms < math.inf else None
    return None if entry is None else entry.measured.get("forward_backward_ms")


def diff(old: AnyFile, new: AnyFile) -> list[Difference]:
    """Every entry that differs between two files of one kind, in order.

    Where either file has one entry of a size alone, and they serve other options, these are one
    difference: the same calls find them.
    """
    before = {entry.key: entry for entry in old.entries}
    after = {entry.key: entry for entry in new.entries}
    alone = {_but_options(x): key for key, x in after.items() if key not in before}
    partners = {
        key: alone[_but_options(x)] for key, x in before.items()
        if key not in after and _but_options(x) in alone
    }  # fmt: skip
    found = []
    for key in sorted({*before, *after} - {*partners.values()}):
        a, b = before.get(key), after.get(partners.get(key, key))
        if a != b:
            found.append(Difference(a, b, _changed(a, b)))
    return found


def _but_options(entry: Entry | PartEntry) -> object:
    return entry.key[:-1] if isinstance(entry, Entry) else entry.key


def _changed(
    a: Entry | PartEntry | None, b: Entry | PartEntry | None
) -> dict[str, tuple[Knob | None, Knob | None]]:
    if a is None or b is None:
        return {}
    one, two = _knobs(a), _knobs(b)
    names = sorted({*one, *two})
    return {x: (one.get(x), two.get(x)) for x in names if one.get(x) != two.get(x)}


def _knobs(entry: Entry | PartEntry) -> dict[str, Knob]:
    by_stage: Mapping[str, Mapping[str, Knob]] = (
        entry.knobs if isinstance(entry, PartEntry) else entry.configs
    )
    return {
        f"{stage}.{name}": value
        for stage, config in by_stage.items()
        for name, value in config.items()
    }
