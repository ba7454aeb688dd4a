"""Tune Mamba-3: its kernels over chunks and its step; or where calls run those, its scan as that of
`chunk_simple_gla`, and the kernels around it.

That scan is filed where calls of `chunk_simple_gla` look (tuned/simple_gla); the others have few
knobs, so that a climb from the rule's to their neighbours finds the best, and go to
tuned/mamba3/parts. Kernels run in a worker: one that crashes or hangs costs its knobs, not the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gdn2gen.base.device import Device, toolchain
from gdn2gen.base.errors import TuneError
from gdn2gen.base.terminal import command_line, plain
from gdn2gen.family.mamba3_problem import MAMBA3, Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3 import (
    AROUND,
    MAMBA3_AROUND,
    MAMBA3_STEP,
    ONE_TOKEN,
    known_around,
    mamba3_knobs,
    mamba3_step_knobs,
)
from gdn2gen.kernels.mamba3_chunks import (
    CHUNKS,
    MAMBA3_CHUNK_STAGES,
    MAMBA3_GRADIENT,
    MAMBA3_REVERSE_STATES,
    by_chunks,
    chunk_knobs,
    chunk_problem,
)
from gdn2gen.kernels.mamba3_reverse_scan import (
    MAMBA3_REVERSE_SCAN,
    MAMBA3_SUMS,
    REVERSE,
    other_starts,
    reverse_rule,
    reverse_scan_problem,
    reverse_scans_at_once,
    sums_problem,
)
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.plans import LEVELS
from gdn2gen.store.mamba3 import scan_problem, scan_shape
from gdn2gen.store.part_files import PartEntry, merge_parts, parts_path
from gdn2gen.store.tuned_files import digest_of, metadata_for
from gdn2gen.tuning.gpu.parts import Call, check_parts, parts_worker, time_part
from gdn2gen.tuning.run import check_arguments
from gdn2gen.tuning.run import tune as tune_scan
from gdn2gen.tuning.views.parts import part_lines, parts_sheet
from gdn2gen.tuning.views.progress import Progress, console_progress
from gdn2gen.tuning.views.report import TuneReport

if TYPE_CHECKING:
    from rich.console import RenderableType

# Of the time, for the scan: it has thousands of configs, and the others some forty a stage.
_SCAN_PART: Final = 0.7
_STAGES: Final = {AROUND: MAMBA3_AROUND, CHUNKS: MAMBA3_CHUNK_STAGES}
# Knobs that a climb keeps as they were where it began.
_GIVEN: Final = ("BT", "num_stages", "order", "BG", "pairs")
# Sequences that a step is tuned at, for as many tokens as are decoded at once.
STEP_SEQUENCES: Final = (1, 8, 64, 256)
Knobs = dict[str, Knob]


@dataclass
class Mamba3Report:
    """What a run found."""

    problem: Mamba3Problem
    device: Device
    path: Path
    """The file that entries of all kernels but the scan were merged into."""
    scan: TuneReport | None = None
    entries: list[PartEntry] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def table(self) -> RenderableType:
        """The scan's results, and those of the other kernels beneath."""
        from rich.console import Group
        from rich.text import Text

        title = f"{MAMBA3} on {self.device.name}: its kernels, in ms"
        sheet = parts_sheet(title, part_lines(MAMBA3, self.entries))
        lines = [f"left out {x}: {why}" for x, why in self.skipped.items()]
        lines += [f"filed in {self.path}"] if self.entries else []
        parts = [*([self.scan.table()] if self.scan else []), sheet]
        return Group(*parts, *(Text(plain(x)) for x in lines))


def tune_mamba3(
    problem: Mamba3Problem,
    shapes: Sequence[Shape],
    device: Device,
    *,
    budget_minutes: float,
    out_dir: Path,
    levels: Sequence[str] = LEVELS,
    storage: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    call: Call | None = None,
    clock: Callable[[], float] = time.monotonic,
    scan: Callable[..., TuneReport] = tune_scan,
) -> Mamba3Report:
    """Tune `problem` at `shapes` on `device`, the present GPU, and file what passes.

    `levels` are those of the scan, where there is one. `call` runs a function by its name (a
    worker's by default). Raises TuneError where nothing could be filed.
    """
    check_arguments(shapes, levels, budget_minutes)
    started, end = clock(), clock() + budget_minutes * 60
    report = Mamba3Report(problem, device, parts_path(out_dir, MAMBA3, device))
    shown = progress or console_progress()
    if not by_chunks(problem.dtype):
        try:
            report.scan = scan(
                scan_problem(replace(problem, packed=False, carried=False)),
                [scan_shape(x) for x in shapes],
                device,
                budget_minutes=budget_minutes * _SCAN_PART,
                out_dir=out_dir,
                levels=levels,
                storage=storage,
                progress=shown,
                command=command,
            )
        except TuneError as error:
            report.skipped["the scan"] = str(error)
    worker = parts_worker()
    metadata = metadata_for(device, toolchain(), command or command_line())
    shown.start(f"tuning {MAMBA3}'s own kernels on {device.name}", end - clock())
    try:
        run = _Run(problem, device, call or worker.call, clock, shown)
        jobs = [*_jobs(run.problem, shapes, CHUNKS if by_chunks(problem.dtype) else AROUND)]
        for number, (kind, shape) in enumerate(jobs):
            # a reverse scan has nothing to be searched: what it takes is no share of others
            left = sum(x != REVERSE for x, _ in jobs[number:])
            share = max(0.0, end - clock()) / max(1, left)
            entry, why = run.entry(kind, shape, clock() + share)
            if entry is None:
                report.skipped[f"{kind} at {shape.name}"] = why
                continue
            report.entries.append(entry)
            merge_parts(report.path, metadata, [entry])
    finally:
        worker.close()
        shown.close()
    if not report.entries and not (report.scan and report.scan.results):
        reasons = "; ".join(f"{name}: {why}" for name, why in report.skipped.items())
        raise TuneError(f"nothing was filed for {MAMBA3} on {device.name}: {reasons}")
    report.seconds = clock() - started
    return report


def without_gpu(
    problem: Mamba3Problem,
    shapes: Sequence[Shape],
    device: Device,
    scan: Callable[..., TuneReport],
    *,
    budget_minutes: float,
    out_dir: Path,
    levels: Sequence[str] = LEVELS,
    **options: Any,
) -> Mamba3Report:
    """The scan as `tune_without_gpu` does it, where there is one. Knobs of the other kernels are
    timed, or a rule's."""
    report = Mamba3Report(problem, device, parts_path(out_dir, MAMBA3, device))
    why = "nothing ranks them without a GPU: a rule's knobs"
    if by_chunks(problem.dtype):
        report.skipped["its kernels"] = why
        return report
    report.scan = scan(
        scan_problem(replace(problem, packed=False, carried=False)),
        [scan_shape(x) for x in shapes],
        device,
        budget_minutes=budget_minutes,
        out_dir=out_dir,
        levels=levels,
        **options,
    )
    report.skipped["kernels around the scan"] = why
    return report


def _jobs(
    problem: Mamba3Problem, shapes: Sequence[Shape], kind: str
) -> Iterator[tuple[str, Shape]]:
    """What is searched, one after the other. Packed tokens lie in the same tiles as others."""
    for shape in shapes:
        dense = replace(shape, cu_seqlens=None)
        yield kind, dense
        if kind == CHUNKS and reverse_scans_at_once(problem, 64, dense.T):
            yield REVERSE, dense
    for H, groups in dict.fromkeys((x.H, x.key_heads) for x in shapes):
        for B in STEP_SEQUENCES:
            yield ONE_TOKEN, Shape(f"{B}x1x{H}", B, 1, H, groups=groups)


class _Run:
    """Climbs over the knobs of one problem's stages."""

    def __init__(
        self,
        problem: Mamba3Problem,
        device: Device,
        call: Call,
        clock: Callable[[], float],
        shown: Progress,
    ) -> None:
        # as a layer calls them: no states in, which a step has
        self.problem = replace(problem, packed=False, carried=False)
        self.device, self.call, self.clock, self.shown = device, call, clock, shown
        # of each shape what the two stages took that a reverse scan stands for, on tiles of so many
        self.beside: dict[str, tuple[int, float]] = {}
        # of the last reverse scan the forms that it has without a search
        self.usual: dict[str, tuple[Knobs, float, float]] = {}

    def entry(self, kind: str, shape: Shape, end: float) -> tuple[PartEntry | None, str]:
        """What is to be filed, or why nothing is."""
        if kind == REVERSE:
            found, why = self._reverse(shape, end)
            if why:
                return None, why
        else:
            found = self._step(shape, end) if kind == ONE_TOKEN else self._tiled(kind, shape, end)
        if not found:
            return None, "no knobs ran"
        if kind == CHUNKS:
            stood_for = (found[x.name] for x in (MAMBA3_REVERSE_STATES, MAMBA3_GRADIENT))
            tile = int(found[MAMBA3_GRADIENT.name][0]["BT"])
            self.beside[shape.name] = tile, sum(ms for _, ms, _ in stood_for)
        BT = None if kind == ONE_TOKEN else int(next(iter(found.values()))[0]["BT"])
        problem = self._problem(kind)
        knobs, errors, wrong = self._checked(problem, shape, BT, found)
        if wrong and kind == REVERSE and found != self.usual:
            # a form that is faster and wrong costs its time, not the entry
            self.shown.phase(f"{kind} at {shape.name}: {wrong}; once more with the rule's forms")
            found = self.usual
            if _sum(found) < self.beside[shape.name][1]:
                knobs, errors, wrong = self._checked(problem, shape, BT, found)
        if wrong:
            return None, wrong
        of_stages = [(x, y, _own(x, kind, problem)) for x, y in knobs.items()]
        return PartEntry(
            kind=kind,
            at=known_around(problem, shape.H, shape.key_heads),
            tokens=shape.B * shape.T,
            knobs=knobs,
            templates={
                x: digest_of(default_config(x, own).replace(**y)) for x, y, own in of_stages
            },
            measured={x: {"ms": y, "default_ms": z} for x, (_, y, z) in found.items()},
            errors=errors,
        ), ""

    def _checked(
        self, problem: Mamba3Problem, shape: Shape, BT: int | None, found: Mapping[str, Any]
    ) -> tuple[dict[str, Knobs], dict[str, float], str]:
        """Knobs by stage, errors with them, and what is wrong, if anything is."""
        knobs = {stage: x for stage, (x, _, _) in found.items()}
        checked = check_parts(self.call, problem, shape, BT, knobs)
        errors, wrong = checked.value if checked.value is not None else ({}, checked.reason)
        return knobs, errors, wrong

    def _problem(self, kind: str) -> Mamba3Problem:
        return replace(self.problem, carried=kind == ONE_TOKEN)

    def _tiled(self, kind: str, shape: Shape, end: float) -> dict[str, tuple[Knobs, float, float]]:
        """Of the tile that is the fastest in sum: by stage its knobs, their time and the rule's."""
        best: dict[str, tuple[Knobs, float, float]] = {}
        rule: dict[str, float] = {}
        sizes = (shape.H, shape.key_heads, self.device.sms)
        stages, by_rule = _STAGES[kind], chunk_knobs if kind == CHUNKS else mamba3_knobs
        tiles = [x for x in stages[0].chunks if isinstance(x, int)]
        usual = by_rule(stages[0], self.problem, 1, *sizes)["BT"]
        for BT in sorted(tiles, key=lambda x: x != usual):
            found: dict[str, tuple[Knobs, float, float]] = {}
            for stage in stages:
                count = shape.B * -(-shape.T // BT)
                start = by_rule(stage, self.problem, count, *sizes) | {"BT": BT}
                climbed = self._climb(stage, kind, shape, start, end, len(tiles) * len(stages))
                if climbed is None:
                    break
                rule.setdefault(stage.name, climbed[2])
                found[stage.name] = (*climbed[:2], rule[stage.name])
            whole = len(found) == len(stages)
            if whole and (not best or _sum(found) < _sum(best)):
                best = found
        return best

    def _reverse(
        self, shape: Shape, end: float
    ) -> tuple[dict[str, tuple[Knobs, float, float]], str]:
        """The backward's products in one stage, where that and what adds up what it leaves take
        less than the stages that they stand for; and why they are not filed."""
        tile, beside = self.beside.get(shape.name, (0, 0.0))
        rule = reverse_rule(shape.B * shape.T, shape.H, shape.key_heads, self.device.sms)
        if tile != (BT := rule[MAMBA3_REVERSE_SCAN.name]["BT"]):
            return {}, f"it takes tiles of {BT} tokens, and those of {tile} are faster"
        found: dict[str, tuple[Knobs, float, float]] = {}
        others = other_starts(rule, shape.H, shape.key_heads)
        for stage in (MAMBA3_REVERSE_SCAN, MAMBA3_SUMS):
            usual = self._climb(stage, REVERSE, shape, rule[stage.name], end, 1)
            if usual is None:
                return {}, f"{stage.name} did not run"
            self.usual[stage.name] = found[stage.name] = usual
            # few, and each worth more than a step of a climb: timed whatever time is left
            for start in others[stage.name]:
                climbed = self._climb(stage, REVERSE, shape, start, end, 1)
                if climbed is not None and climbed[1] < found[stage.name][1]:
                    found[stage.name] = (*climbed[:2], usual[2])
        if _sum(found) >= beside:
            return {}, f"{_sum(found):.4f} ms, and the stages that it stands for {beside:.4f}"
        return found, ""

    def _step(self, shape: Shape, end: float) -> dict[str, tuple[Knobs, float, float]]:
        start = mamba3_step_knobs(self.problem, shape.B, shape.H, self.device.sms)
        climbed = self._climb(MAMBA3_STEP, ONE_TOKEN, shape, start, end, 1)
        return {} if climbed is None else {MAMBA3_STEP.name: climbed}

    def _climb(
        self, stage: PartStage, kind: str, shape: Shape, start: Knobs, end: float, turns: int
    ) -> tuple[Knobs, float, float] | None:
        """The best knobs, their time and that of `start`; None where these do not run. It goes to
        the best neighbour until none is better, or its part of the time is over."""
        stop = self.clock() + max(0.0, end - self.clock()) / turns
        first = self._time(stage, kind, shape, start)
        if first is None:
            return None
        tried = {_frozen(start)}
        best = (start, first)
        while self.clock() < stop:
            near = [x for x in neighbours(stage, best[0], shape) if _frozen(x) not in tried]
            timed = []
            for knobs in near:
                if self.clock() >= stop:
                    break
                tried.add(_frozen(knobs))
                took = self._time(stage, kind, shape, knobs)
                timed += [] if took is None else [(knobs, took)]
            found = min(timed, key=lambda x: x[1], default=best)
            if found[1] >= best[1]:
                break
            best = found
        self.shown.best_so_far(f"{stage.name} BT={start['BT']} {shape.name}", best[1], first)
        return (*best, first)

    def _time(self, stage: PartStage, kind: str, shape: Shape, knobs: Knobs) -> float | None:
        outcome = time_part(self.call, self._problem(kind), shape, stage.name, knobs)
        own = _own(stage.name, kind, self.problem)
        config = default_config(stage.name, own).replace(**knobs)
        said = f"{outcome.value:.4f} ms" if outcome.ok else outcome.detail
        self.shown.trial(config, outcome.status, said)
        return outcome.value


def _own(stage: str, kind: str, problem: Mamba3Problem) -> Mamba3Problem:
    """What is compiled into a stage over chunks; of the others templates say no less of a whole."""
    if kind == REVERSE:
        of_scan = stage == MAMBA3_REVERSE_SCAN.name
        return reverse_scan_problem(problem) if of_scan else sums_problem(problem)
    by_name = {x.name: x for x in MAMBA3_CHUNK_STAGES}
    return chunk_problem(by_name[stage], problem) if kind == CHUNKS else problem


def neighbours(stage: PartStage, knobs: Mapping[str, Knob], shape: Shape) -> Iterator[Knobs]:
    """Knobs one step away, of those that serve the shape: a program's heads are of one group."""
    for name, domain in stage.domains.items():
        if name in _GIVEN or name not in knobs or len(domain) < 2:
            continue
        place = domain.index(knobs[name])
        for there in (place - 1, place + 1):
            if not 0 <= there < len(domain):
                continue
            value = domain[there]
            if name == "BH" and (shape.H // shape.key_heads) % int(value):
                continue
            yield {**knobs, name: value}


def _frozen(knobs: Mapping[str, Knob]) -> tuple[tuple[str, Knob], ...]:
    return tuple(sorted(knobs.items()))


def _sum(found: Mapping[str, tuple[Knobs, float, float]]) -> float:
    return sum(ms for _, ms, _ in found.values())
