"""Tuned knobs of kernels that are in no plan: tuned/<op>/parts/<gpu>.json.

An entry is of what is compiled in and of heads and groups, exactly, and of a number of tokens (of
a step: of sequences), approximately. The user's folder comes before the packaged one. Kernels that
no entry is of have knobs by a rule on their sizes.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeGuard

from gdn2gen.base import paths
from gdn2gen.base.device import Device
from gdn2gen.base.errors import Gdn2genError, StoreError, TunedFileWarning
from gdn2gen.base.files import check_replaceable, locked, replace_file
from gdn2gen.family.compiled import Compiled
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.stages import EVERY_STAGE
from gdn2gen.store.tuned_files import current_look, digest_of, look_anew

PARTS_SCHEMA: Final = "parts-1"
# What stands in for the digest of a template where a kernel takes no such knobs.
_NO_KNOBS: Final = "<no such knobs>"
# Times as many or as few tokens as an entry was measured at, for which it still serves.
_FARTHEST: Final = 2.0


@dataclass(frozen=True)
class PartEntry:
    """Knobs of the kernels of a call, as they were the fastest."""

    kind: str
    """Which kernels of the op: those that share a tile of tokens are searched together."""
    at: Mapping[str, str | int]
    """What is compiled in, heads and groups."""
    tokens: int
    knobs: Mapping[str, Mapping[str, Knob]]
    """By stage."""
    templates: Mapping[str, str]
    """Digest of the template of each stage that the entry was checked under."""
    measured: Mapping[str, Mapping[str, float]]
    """By stage: milliseconds, `ms`, and those of the rule's knobs, `default_ms`."""
    errors: Mapping[str, float]
    """What the check found, by output."""

    @property
    def key(self) -> str:
        """What a file holds one entry for."""
        return json.dumps([self.kind, sorted(self.at.items()), self.tokens])

    @property
    def label(self) -> str:
        """For people."""
        at = ", ".join(f"{x}={y}" for x, y in self.at.items())
        return f"{self.kind}, {at}, tokens={self.tokens}"

    def config(self, stage: str, problem: Compiled) -> Config:
        """Raises ConfigError where the stage takes no such knobs."""
        return default_config(stage, problem).replace(**self.knobs[stage])

    def serves(self, kind: str, known: Mapping[str, str | int]) -> bool:
        """Whether it is of such a call, as far as is known of that."""
        return self.kind == kind and all(self.at.get(x) == y for x, y in known.items())

    @property
    def ms(self) -> float:
        """Of all of its kernels together; infinite where a time is none."""
        times = [self.measured[x].get("ms") for x in self.knobs]
        return sum(x for x in times if is_time(x)) if all(map(is_time, times)) else math.inf

    def distance(self, tokens: int) -> float:
        """Times more or fewer, at least 1."""
        return max(self.tokens / tokens, tokens / self.tokens) if tokens else math.inf


@dataclass(frozen=True)
class PartsFile:
    """Everything in one file. `metadata` says of which GPU, toolchain, command and date."""

    metadata: Mapping[str, Any]
    entries: tuple[PartEntry, ...]


def is_time(value: object) -> TypeGuard[float]:
    """Whether a file gives milliseconds that something may have taken."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value <= sys.float_info.max  # an int may be beyond all floats, and below infinity


def parts_path(folder: Path, op: str, device: Device) -> Path:
    """Where the entries of `op` on `device` lie under `folder`."""
    return folder / op / "parts" / f"{device.slug}.json"


def nearest_parts(
    op: str, kind: str, known: Mapping[str, str | int], tokens: int, device: Device
) -> PartEntry | None:
    """The entry that a call runs by, of this GPU or failing that of another of its architecture;
    None where none is of at most twice, or half, the tokens."""
    found = tuned_parts(op, kind, known, tokens, device)
    return found or transferred_parts(op, kind, known, tokens, device)


def tuned_parts(
    op: str, kind: str, known: Mapping[str, str | int], tokens: int, device: Device
) -> PartEntry | None:
    """The nearest of this GPU's own."""
    look = current_look()
    files = (_on_file(parts_path(x, op, device), look) for x in _folders())
    return _nearest(files, kind, known, tokens)


def transferred_parts(
    op: str, kind: str, known: Mapping[str, str | int], tokens: int, device: Device
) -> PartEntry | None:
    """The nearest of other GPUs of its architecture, those first that have as many
    multiprocessors. An entry of a GPU is what it was measured to be there alone, but rules know
    less: Mamba-3's backward in one stage runs by an entry or not at all."""
    files = (y for x in _folders() for y in _of_others(x, op, device, current_look()))
    return _nearest(files, kind, known, tokens)


def _folders() -> list[Path]:
    user, packaged = paths.to_be_read(paths.user_tuned_dir()), paths.packaged_tuned_dir()
    return [x for x in (user, packaged) if x is not None]


def _nearest(
    files: Iterable[tuple[PartEntry, ...]], kind: str, known: Mapping[str, str | int], tokens: int
) -> PartEntry | None:
    """Of the first file that has one that serves."""
    for entries in files:
        found = [x for x in entries if x.serves(kind, known) and x.distance(tokens) <= _FARTHEST]
        if found:
            return min(found, key=lambda x: x.distance(tokens))
    return None


@lru_cache(maxsize=64)
def _of_others(
    folder: Path, op: str, device: Device, look: int
) -> tuple[tuple[PartEntry, ...], ...]:
    """Entries of other GPUs of an architecture, file by file, the most alike first."""
    own, found = parts_path(folder, op, device), []
    for path in sorted(own.parent.glob("*.json")):
        entries = () if path == own else _on_file(path, look)
        said = _metadata(path) if entries else {}
        sms = said.get("sms")
        if said.get("arch") == device.arch and isinstance(sms, int):
            found.append((abs(sms - device.sms), path.name, entries))
    return tuple(x for _, _, x in sorted(found))


def _metadata(path: Path) -> Mapping[str, Any]:
    """Of a file that has been read; of one that is gone since, or another, nothing."""
    try:
        file = load_parts(path)
    except StoreError:
        return {}
    return {} if file is None else file.metadata


def parts_on_file(path: Path) -> list[PartEntry]:
    """All entries of a file, none where there is none. Raises StoreError for what is no such
    file."""
    file = load_parts(path)
    return [] if file is None else [*file.entries]


def load_parts(path: Path) -> PartsFile | None:
    """The file at `path`, or None where there is none. Raises StoreError for what is no such
    file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read ({error}); mend it or move it away") from error
    if not holds_parts(document):
        raise StoreError(f"{path} has no schema {PARTS_SCHEMA}; mend it or move it away")
    try:
        entries = [PartEntry(**x) for x in document["entries"]]
        for entry in entries:
            _check(entry)
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{path} does not hold entries as `gdn2gen tune` files them ({error!r}); mend it or "
            "move it away"
        ) from error
    return PartsFile({x: y for x, y in document.items() if x != "entries"}, tuple(entries))


def holds_parts(document: object) -> bool:
    """Whether what a file holds says that it is such a file."""
    return isinstance(document, dict) and document.get("schema") == PARTS_SCHEMA


def _check(entry: PartEntry) -> None:
    """TypeError for what is of other types than it should be; figures may still be anything."""
    for name in ("at", "knobs", "templates", "measured", "errors"):
        if not isinstance(getattr(entry, name), Mapping):
            raise TypeError(f"{name} is {getattr(entry, name)!r}")
    for stage in entry.knobs:
        if not all(isinstance(x.get(stage), Mapping) for x in (entry.knobs, entry.measured)):
            raise TypeError(f"knobs or measured.{stage} is none")
    if not isinstance(entry.kind, str) or type(entry.tokens) is not int or entry.tokens < 1:
        raise TypeError(f"kind is {entry.kind!r}, tokens {entry.tokens!r}")


@lru_cache(maxsize=64)
def _on_file(path: Path, _look: int) -> tuple[PartEntry, ...]:
    """Entries whose templates are the present ones; of a file that cannot be read none, with a
    warning."""
    try:
        return tuple(x for x in parts_on_file(path) if not stale_parts(x))
    except StoreError as error:
        warnings.warn(
            f"{error}: knobs come from a rule on sizes until then", TunedFileWarning, stacklevel=2
        )
        return ()


def stale_parts(entry: PartEntry) -> list[str]:
    """Stages whose template changed, or whose knobs are none, since the entry was checked."""
    found = {x: part_digest(x, entry) for x in entry.knobs}
    return [x for x, y in found.items() if y == _NO_KNOBS or entry.templates.get(x) != y]


def part_digest(stage: str, entry: PartEntry) -> str:
    """That of the stage's present template."""
    try:
        part = EVERY_STAGE[stage]
        assert isinstance(part, PartStage)
        return digest_of(entry.config(stage, part.made_for()))
    except (AssertionError, Gdn2genError, KeyError, TypeError):
        return _NO_KNOBS


def rank_parts(entry: PartEntry) -> tuple[bool, float]:
    """Less is better: not stale, then milliseconds."""
    return bool(stale_parts(entry)), entry.ms


def merge_parts(
    path: Path,
    metadata: Mapping[str, Any],
    entries: Iterable[PartEntry],
    *,
    keep_better: bool = False,
) -> list[PartEntry]:
    """Add entries to the file at `path`, and return all that it then holds.

    One of the same key takes the place of the other, or, with `keep_better`, only if `rank_parts`
    is less. A merge that changes no entry leaves the file alone. Other processes may merge at the
    same time. Raises StoreError, and changes nothing, if the file there is not ours, is of another
    GPU, or cannot be written.
    """
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock")):
            check_replaceable(path)
            old = load_parts(path)
            if old is not None:
                _check_gpu(path, old, str(metadata["gpu"]))
            kept = {x.key: x for x in (old.entries if old else ())}
            for x in entries:
                rival = kept.get(x.key)
                if rival is None or not keep_better or rank_parts(x) < rank_parts(rival):
                    kept[x.key] = x
            merged = [kept[key] for key in sorted(kept)]
            if old is None or merged != sorted(old.entries, key=lambda x: x.key):
                replace_file(path, format_parts(PartsFile(metadata, tuple(merged))))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error}; what was there is unchanged"
        ) from error
    look_anew()
    return merged


def _check_gpu(path: Path, file: PartsFile, gpu: str) -> None:
    found = file.metadata.get("gpu")
    if found != gpu:
        raise StoreError(
            f"nothing is merged: {path} is of the GPU {found!r}, but the new entries are of "
            f"{gpu!r}; give another folder"
        )


def format_parts(file: PartsFile) -> str:
    """The text of a file: one line for an entry."""
    head = json.dumps({**file.metadata, "schema": PARTS_SCHEMA}, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(asdict(x))}" for x in file.entries)
    return f'{head},\n "entries": [\n{lines}\n ]\n}}\n'
