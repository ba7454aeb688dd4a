"""The same of kernels that are in no plan, those of Mamba-3: do their entries hold?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gdn2gen.base.device import Device
from gdn2gen.base.errors import Gdn2genError
from gdn2gen.base.terminal import Sheet
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import NAMED_SHAPES, Shape
from gdn2gen.kernels.mamba3 import AROUND, ONE_TOKEN
from gdn2gen.kernels.mamba3_chunks import CHUNKS
from gdn2gen.kernels.mamba3_reverse_scan import REVERSE
from gdn2gen.store.mamba3 import ruled
from gdn2gen.store.part_files import PartEntry, part_digest, stale_parts
from gdn2gen.tuning.gpu.parts import Call, check_parts, time_part
from gdn2gen.tuning.recheck import Status, why_slower
from gdn2gen.tuning.views.lines import is_number


@dataclass(frozen=True)
class RecheckedParts:
    """What became of one entry; times are sums over its kernels in ms, None where not taken."""

    op: str
    entry: PartEntry
    status: Status
    detail: str = ""
    now_ms: float | None = None
    default_ms: float | None = None
    """By the knobs of the rule on sizes."""
    renewed: PartEntry | None = None

    @property
    def holds(self) -> bool:
        return self.status in ("holds", "renewed")


def recheck_parts(
    entries: Iterable[tuple[str, PartEntry]], device: Device, call: Call, *, renew: bool = False
) -> Iterator[RecheckedParts]:
    """Check the knobs of each op's entry, and time them beside the rule's; what becomes of an entry
    when, and `renew`, are as in `recheck`. `call` runs a function by its name, as a worker's does.
    """
    for op, entry in entries:
        stale = stale_parts(entry)
        if stale and not renew:
            detail = f"other templates since: {', '.join(stale)}"
            yield RecheckedParts(op, entry, "stale", detail)
        elif stale or not renew:
            yield _recheck(op, entry, device, call)


def _recheck(op: str, entry: PartEntry, device: Device, call: Call) -> RecheckedParts:
    stale = bool(stale_parts(entry))
    try:
        problem, shape = _problem(entry), _shape(entry)
        rule = ruled(
            problem, shape, device, entry.kind if entry.kind in (AROUND, REVERSE) else CHUNKS
        )
        for stage in entry.knobs:
            entry.config(stage, problem)
            int(rule[stage]["BT"]), int(entry.knobs[stage]["BT"])
    except (Gdn2genError, KeyError, TypeError, ValueError) as error:
        words = f"it is of no kernels that there are ({error})"
        return RecheckedParts(op, entry, "failed", words)
    BT = None if entry.kind == ONE_TOKEN else int(next(iter(entry.knobs.values()))["BT"])
    checked = check_parts(call, problem, shape, BT, entry.knobs)
    if checked.value is None:
        return RecheckedParts(op, entry, "failed", checked.reason)
    errors, wrong = checked.value
    if wrong:
        return RecheckedParts(op, entry, "wrong", wrong)
    measured: dict[str, dict[str, float]] = {}
    for stage, knobs in entry.knobs.items():
        own, usual = (time_part(call, problem, shape, stage, x) for x in (knobs, rule[stage]))
        if not own.ok:
            return RecheckedParts(op, entry, "failed", f"{stage}: {own.reason}")
        # knobs of the rule that do not run are no reason against those on file
        measured[stage] = {"ms": own.get(), "default_ms": (usual if usual.ok else own).get()}
    now, default = (sum(x[name] for x in measured.values()) for name in ("ms", "default_ms"))
    detail = why_slower(_filed(entry), now, default, "the rule's knobs")
    status: Status = "slower" if detail else "renewed" if stale else "holds"
    renewed = None
    if status == "renewed":
        templates = {x: part_digest(x, entry) for x in entry.knobs}
        renewed = replace(entry, templates=templates, measured=measured, errors=errors)
    return RecheckedParts(op, entry, status, detail, now, default, renewed)


def _problem(entry: PartEntry) -> Mamba3Problem:
    """As the tuner poses it: a layer's, with D and Z; a step has states."""
    at = {x: y for x, y in entry.at.items() if x not in ("heads", "groups")}
    given: dict[str, Any] = {**at, "skip": True, "gate": True, "carried": entry.kind == ONE_TOKEN}
    return Mamba3Problem(**given)


def _shape(entry: PartEntry) -> Shape:
    """Of so many tokens: a named one, or all of them in one row; of a step, of so many rows."""
    H, G, tokens = int(entry.at["heads"]), int(entry.at["groups"]), entry.tokens
    if entry.kind == ONE_TOKEN:
        return Shape(f"{tokens}x1x{H}", tokens, 1, H, groups=G)
    for shape in NAMED_SHAPES.values():
        plain = shape.cu_seqlens is None
        if plain and (shape.B * shape.T, shape.H, shape.key_heads) == (tokens, H, G):
            return shape
    return Shape(f"1x{tokens}x{H}", 1, tokens, H, groups=G)


def _filed(entry: PartEntry) -> float | None:
    """None where a time is none."""
    times = [x.get("ms") for x in entry.measured.values()]
    return sum(x for x in times if x) if all(is_number(x) for x in times) else None


def parts_table(results: Iterable[RecheckedParts]) -> Sheet:
    """What `gdn2gen verify --tuned` prints of them."""
    results = list(results)
    sheet = Sheet(
        f"Entries on file for kernels in no plan of {', '.join({x.op: 0 for x in results})}, "
        "checked and timed again (ms)",
        ("kernels", "filed", "now", "rule", "verdict"),
        words=("kernels", "verdict"),
    )
    for x in results:
        filed = _filed(x.entry)
        times = ["-" if ms is None else f"{ms:.4f}" for ms in (filed, x.now_ms, x.default_ms)]
        verdict = f"{x.status}: {x.detail}" if x.detail else x.status
        sheet.add(x.entry.label, *times, verdict)
    return sheet
