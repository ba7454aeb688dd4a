"""One budget over every member and its head dims, in turns; a run that was stopped goes on.

What is done is on file until all is: given the same words again, the rest shares what is left of
the budget. Then the next run is a new one, which searches on from the studies of this.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, Final

from gdn2gen.base.errors import Gdn2genError
from gdn2gen.base.files import replace_file
from gdn2gen.base.terminal import Sheet
from gdn2gen.family.mamba3_problem import MAMBA3
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.family.shapes import SHAPES
from gdn2gen.kernels.mamba3 import MAMBA3_STEP
from gdn2gen.kernels.mamba3_chunks import MAMBA3_CHUNK_STAGES
from gdn2gen.kernels.plans import plan_named, plans_of

if TYPE_CHECKING:
    from gdn2gen.tuning import TuneReport
    from gdn2gen.tuning.mamba3 import Mamba3Report

# A search of no shape would still compile each kernel, as often as two shapes have them timed.
_FIXED_SHAPES: Final = 2
# Minutes that a search has at least: it says what it could not do.
_LEAST_MINUTES: Final = 1.0


@dataclass(frozen=True)
class Job:
    """One member at one pair of head dims."""

    op: str
    head_dim: str
    """K, or K,V."""
    weight: float
    """Its share of the time: stages of its plans, and shapes that each is timed at."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.head_dim}"


@dataclass(frozen=True)
class Finished:
    """What became of a job."""

    name: str
    minutes: float
    results: int = 0
    """Shapes and levels that something was filed for."""
    gain: float | None = None
    """The default's time over the tuned one's, forward+backward: the geometric mean of all."""
    failure: str = ""


def jobs(usual: Mapping[str, tuple[Sequence[str], int]], levels: Sequence[str]) -> list[Job]:
    """Of every member: its head dims and how many shapes it has, as `usual` says."""
    found = []
    for op, (head_dims, shapes) in usual.items():
        if op == MAMBA3:
            # as it is tuned, in bf16
            stages = {x.name for x in (*MAMBA3_CHUNK_STAGES, MAMBA3_STEP)}
        else:
            stages = _stages(op, levels)
        weight = len(stages) * float(_FIXED_SHAPES + shapes)
        found += [Job(op, x, weight) for x in head_dims]
    return found


def usual_sizes() -> dict[str, tuple[tuple[str, ...], int]]:
    """Head dims of every member but Mamba-3, and how many shapes it is tuned at."""
    members = {op: recurrence_named(op).usual for op in OPS}
    return {op: (x.head_dims, len(x.shapes or SHAPES)) for op, x in members.items()}


def _stages(op: str, levels: Sequence[str]) -> set[str]:
    return {
        stage
        for level in levels
        for plan in plans_of(level, op)
        for stage in plan_named(plan).stages
    }


def tune_every(
    wanted: Sequence[Job],
    search: Callable[[Job, float], TuneReport | Mamba3Report | None],
    *,
    budget_minutes: float,
    record: Path,
    asked: Mapping[str, Any],
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> list[Finished]:
    """Run `search` for each job with its part of the time; all jobs, in order.

    search: takes a job and minutes; None where nothing is to be done. What it raises as
    Gdn2genError is told, and costs its job alone. record: where what is done is kept; asked: what
    has to be the same for it to count.
    """
    done = _recorded(record, asked)
    left = [x for x in wanted if x.name not in done]
    if done:
        say(f"{len(done)} of {len(wanted)} searches were done before, by {record}")
    spent = sum(x.minutes for x in done.values())
    for number, job in enumerate(left):
        rest = sum(x.weight for x in left[number:])
        minutes = (budget_minutes - spent) * job.weight / rest
        minutes = max(min(_LEAST_MINUTES, budget_minutes), minutes)
        say(f"{job.name} ({len(done) + 1} of {len(wanted)}), {minutes:.1f} minutes")
        started = clock()
        try:
            report, failure = search(job, minutes), ""
        except Gdn2genError as error:
            report, failure = None, str(error)
            say(f"{job.name} is left out: {failure}")
        took = (clock() - started) / 60
        spent += took
        done[job.name] = _finished(job, took, report, failure)
        _keep(record, asked, done)
    with suppress(OSError):
        record.unlink()
    return [done[x.name] for x in wanted]


def _finished(
    job: Job, minutes: float, report: TuneReport | Mamba3Report | None, failure: str
) -> Finished:
    from gdn2gen.tuning.mamba3 import Mamba3Report

    entries = report.entries if isinstance(report, Mamba3Report) else []
    scan = report.scan if isinstance(report, Mamba3Report) else report
    results = scan.results if scan is not None else []
    gains = [x.speedup for x in results if x.speedup is not None]
    gains += [y["default_ms"] / y["ms"] for x in entries for y in x.measured.values()]
    gain = geometric_mean(gains) if gains else None
    return Finished(job.name, minutes, len(results) + len(entries), gain, failure)


def _recorded(record: Path, asked: Mapping[str, Any]) -> dict[str, Finished]:
    """What an earlier run of the same words did; nothing where that cannot be read."""
    try:
        document = json.loads(record.read_text(encoding="utf-8"))
        if document["asked"] != dict(asked):
            return {}
        return {x["name"]: Finished(**x) for x in document["done"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _keep(record: Path, asked: Mapping[str, Any], done: Mapping[str, Finished]) -> None:
    """Where it cannot be kept, a run that is stopped begins anew: no reason to stop this one."""
    document = {"asked": dict(asked), "done": [asdict(x) for x in done.values()]}
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        replace_file(record, json.dumps(document, indent=1) + "\n")


def finished_table(found: Sequence[Finished]) -> Sheet:
    """A line for each job."""
    table = Sheet(
        "Every member: default over tuned, forward+backward",
        ("member, head dims", "minutes", "filed", "speedup", "left out"),
        words=("member, head dims", "left out"),
    )
    for x in found:
        gain = "-" if x.gain is None or not math.isfinite(x.gain) else f"{x.gain:.2f}x"
        table.add(x.name, f"{x.minutes:.1f}", str(x.results), gain, x.failure)
    return table
