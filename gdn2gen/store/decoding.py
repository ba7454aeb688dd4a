"""Tuned knobs of the mode `recurrent`: tuned/<op>/decoding/<gpu>.json.

An entry is of one token a sequence in slots that indices name: of what is compiled in that moves
the speed, exactly, and of a number of programs (sequences times value heads), approximately. The
user's folder comes before the packaged one. Other calls, and those that no entry is near, have
knobs by a rule on their sizes (`kernels.recurrent`).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from gdn2gen.base import paths
from gdn2gen.base.device import Device
from gdn2gen.base.errors import Gdn2genError, StoreError, TunedFileWarning
from gdn2gen.base.files import check_replaceable, locked, replace_file
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.recurrent import RECURRENT
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.store.part_files import is_time
from gdn2gen.store.surroundings import Surroundings
from gdn2gen.store.tuned_files import digest_of, look_anew

DECODING_SCHEMA: Final = "decoding-1"
# Times as many or as few programs as an entry was measured at, for which it still serves; and from
# so many on that a GPU is full, one more program is no other call.
_FARTHEST: Final = 2.0
_FULL: Final = 4096


@dataclass(frozen=True)
class DecodingEntry:
    """Knobs of a step, as they were the fastest."""

    at: Mapping[str, str | int]
    """What is compiled in, see `known_of`."""
    programs: int
    """Sequences times value heads."""
    knobs: Mapping[str, Knob]
    template: str
    """Digest of the template that the entry was checked under."""
    measured: Mapping[str, float]
    """Microseconds of a step: `us`, that of the rule's knobs, `rule_us`, and of a copy of its
    bytes, `copy_us`."""
    errors: Mapping[str, float]
    """What the check found, by call and tensor."""

    @property
    def key(self) -> str:
        """What a file holds one entry for."""
        return json.dumps([sorted(self.at.items()), self.programs])

    def distance(self, programs: int) -> float:
        """Times more or fewer, at least 1."""
        mine, given = min(self.programs, _FULL), min(programs, _FULL)
        return max(mine / given, given / mine) if given else math.inf


def known_of(problem: DecodingProblem) -> dict[str, str | int]:
    """What of a problem decides which entries are of it."""
    return {
        "K": problem.K,
        "V": problem.V,
        "dtype": problem.dtype,
        "state": problem.dtype_of("state"),
        "layout": "V first" if problem.state_v_first else "K first",
    }


def is_filed(problem: DecodingProblem) -> bool:
    """Whether entries are of such calls at all."""
    return problem.one_token and problem.indexed and not problem.speculative


def decoding_path(folder: Path, op: str, device: Device) -> Path:
    """Where the entries of `op` on `device` lie under `folder`."""
    return folder / op / "decoding" / f"{device.slug}.json"


def nearest_of_each(
    problem: DecodingProblem, programs: int, device: Device, around: Surroundings | None = None
) -> Iterator[Config]:
    """The nearest entry of each folder that has one near, for a call of so many programs: the
    user's, which it runs by, then the packaged one."""
    if not is_filed(problem):
        return
    around = Surroundings.of() if around is None else around
    user, packaged = around.folders
    for folder in (paths.to_be_read(user), packaged):
        if folder is None:
            continue
        path = decoding_path(folder, problem.op, device)
        found = _serving(path, problem, device.arch, around.look)
        near = [x for x in found if x[0].distance(programs) <= _FARTHEST]
        if near:
            yield min(near, key=lambda x: x[0].distance(programs))[1]


@lru_cache(maxsize=256)
def _serving(
    path: Path, problem: DecodingProblem, arch: str, _look: int
) -> tuple[tuple[DecodingEntry, Config], ...]:
    """Entries of a problem that its kernels can run by, under the present template; of a file that
    cannot be read none, with a warning."""
    known, found = known_of(problem), []
    try:
        entries = read_decoding(path)
    except StoreError as error:
        warnings.warn(
            f"{error}: knobs come from a rule on sizes until then", TunedFileWarning, stacklevel=2
        )
        return ()
    for entry in entries:
        if dict(entry.at) != known:
            continue
        try:
            default = default_config(RECURRENT.name, problem, arch=arch)
            config = Config.of(RECURRENT.name, {**default, **entry.knobs})
        except Gdn2genError:
            continue
        fits = why_invalid(config, problem, arch) is None
        if fits and digest_of(config) == entry.template:
            found.append((entry, config))
    return tuple(found)


def read_decoding(path: Path) -> list[DecodingEntry]:
    """All entries of a file, none where there is none. Raises StoreError for what is no such
    file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read ({error}); mend it or move it away") from error
    if not (isinstance(document, dict) and document.get("schema") == DECODING_SCHEMA):
        raise StoreError(f"{path} has no schema {DECODING_SCHEMA}; mend it or move it away")
    try:
        entries = [DecodingEntry(**x) for x in document["entries"]]
        for entry in entries:
            check_decoding_entry(entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} does not hold entries as `decode_time.py --into` files them ({error!r}); "
            "mend it or move it away"
        ) from error
    return entries


def check_decoding_entry(entry: DecodingEntry) -> None:
    """Raises TypeError for what is of other types than it should be, StoreError for times that
    cannot be: none above 0, or less than a copy of the same bytes takes by half."""
    for name in ("at", "knobs", "measured", "errors"):
        if not isinstance(getattr(entry, name), Mapping):
            raise TypeError(f"{name} is {getattr(entry, name)!r}")
    for values in (entry.at, entry.knobs):
        if not all(type(x) in (int, str) for x in values.values()):
            raise TypeError(f"neither a number nor a text in {dict(values)!r}")
    if type(entry.programs) is not int or entry.programs < 1:
        raise TypeError(f"programs is {entry.programs!r}")
    for name in ("us", "rule_us", "copy_us"):
        if not is_time(entry.measured.get(name)):
            raise StoreError(f"{name} must be microseconds above 0, but is {entry.measured!r}")
    if entry.measured["us"] < entry.measured["copy_us"] / 2:
        raise StoreError(f"no step takes half of what a copy of its bytes does: {entry.measured!r}")


def merge_decoding(
    path: Path, metadata: Mapping[str, Any], entries: Iterable[DecodingEntry]
) -> list[DecodingEntry]:
    """Add entries to the file at `path`, and return all that it then holds; one of the same key
    takes the place of the other. Other processes may merge at the same time. Raises StoreError, and
    changes nothing, if the file there is not ours, or of another GPU."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock")):
            check_replaceable(path)
            old = read_decoding(path)
            if old:
                gpu = json.loads(path.read_text(encoding="utf-8")).get("gpu")
                if gpu != metadata["gpu"]:
                    raise StoreError(
                        f"nothing is merged: {path} is of the GPU {gpu!r}, but the new entries are "
                        f"of {metadata['gpu']!r}; give another folder"
                    )
            kept = {x.key: x for x in (*old, *entries)}
            merged = [kept[key] for key in sorted(kept)]
            replace_file(path, _format(metadata, merged))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error}; what was there is unchanged"
        ) from error
    look_anew()
    return merged


def _format(metadata: Mapping[str, Any], entries: Iterable[DecodingEntry]) -> str:
    """The text of a file: one line for an entry."""
    head = json.dumps({**metadata, "schema": DECODING_SCHEMA}, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(asdict(x))}" for x in entries)
    return f'{head},\n "entries": [\n{lines}\n ]\n}}\n'
