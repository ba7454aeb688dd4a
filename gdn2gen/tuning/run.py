"""tune: search the present GPU for the best configs of a problem, and file them.

The budget is divided over two groups of shapes (plain and packed batches are compiled apart); in
each group the search takes half of it or more, and the finalists the rest. Results are merged into
the tuned file shape by shape, so a run that is cut short keeps what it decided.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gdn2gen.base.decay import WEAK, check_decay
from gdn2gen.base.device import Device, present_device, toolchain
from gdn2gen.base.errors import TuneError
from gdn2gen.base.terminal import command_line
from gdn2gen.family.decays import PATTERN_UNDER, DecayPattern, Drawn
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import CHANNEL_OPS
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.plans import PLANS_OF, filed_levels, level_of, plans_of
from gdn2gen.kernels.recipe import has_use, is_served
from gdn2gen.store import tuned_files
from gdn2gen.tuning.filing import entries_of, result_of
from gdn2gen.tuning.gpu.backend import Backend, MeteredBackend, WorkerBackend
from gdn2gen.tuning.records.places import open_ledger, storage_path
from gdn2gen.tuning.records.storage import open_storage
from gdn2gen.tuning.records.stored import lent_configs, steady_recipes, stored_recipes
from gdn2gen.tuning.search.finalists import Finals
from gdn2gen.tuning.search.loop import Context, Errand, Search, Window
from gdn2gen.tuning.search.verdicts import Verdict, better
from gdn2gen.tuning.views.progress import Progress, console_progress
from gdn2gen.tuning.views.report import TuneReport

if TYPE_CHECKING:
    import optuna

# Of a group's time, for its finalists: at least a quarter, and at most half, in between what they
# take: compiling for states in and out, the full check, three rounds of some. On an H200 14
# verdicts took 98 s, half of which the GPU waited for kernels that are compiled ahead now.
_FINALS_PART: Final = (0.25, 0.5)
_VERDICT_SECONDS: Final = 6.0
# The first verdict of a group makes the references, too, and waits for what still compiles: of a
# packed shape alone, which had 18 s for three verdicts, it was not over 33 s past their end (H100).
_FIRST_SECONDS: Final = 15.0
# Verdicts whose kernels compile during the search, and after which parts of its time: what is known
# from the start, then what is the best by then.
_AHEAD: Final = 3
_KNOWN_AT: Final = 0.5
_LIKELY_AT: Final = 0.9
# A group of one packed shape still compiles every kernel once.
_LEAST_GROUP: Final = 0.25
# Best configs that one group of shapes hands on to the next, per stage and chunk size.
_HANDED_ON: Final = 3


def tune(
    problem: Problem,
    shapes: Sequence[Shape],
    device: Device,
    *,
    budget_minutes: float,
    out_dir: Path,
    storage: str | Path | optuna.storages.BaseStorage | None = None,
    levels: Sequence[str] = ("lean", "fast"),
    progress: Progress | None = None,
    backend: Backend | None = None,
    clock: Callable[[], float] = time.monotonic,
    seed: int = 0,
    command: str | None = None,
    decay: str = WEAK,
    pattern: Drawn | None = None,
) -> TuneReport:
    """Tune `problem` at `shapes` on `device`, the present GPU, and merge into `out_dir`.

    `problem.varlen` follows each shape. A run that was killed goes on where it stopped if the
    storage (by default a file in the cache folder) is the same.

    `decay`: what calls expect that find the entries. Times are taken under `pattern`, by default
    what a layer has as it is drawn, or -20 nats in every token. Raises TuneError if no default
    config works or an argument is wrong, and DeviceError without a GPU; what single configs do is
    survived and reported.
    """
    check_arguments(shapes, levels, budget_minutes)
    check_tunable_decay(problem, decay, pattern)
    drawn = PATTERN_UNDER[decay] if pattern is None else pattern
    if backend is None:
        _check_present(device)
    path = tuned_files.tuned_path(out_dir, problem.op, device)
    tuned_files.check_mergeable(path, device.name)
    # one that is named may be shared with hosts whose locks do not reach here
    opened = open_storage(storage or storage_path(problem.op, device), prune=storage is None)
    started, seconds = clock(), budget_minutes * 60
    metered = MeteredBackend(backend or WorkerBackend(device, pattern=drawn), clock)
    context = Context(
        device=device,
        backend=metered,
        ledger=open_ledger(problem.op, device),
        storage=opened,
        progress=progress or console_progress(),
        # processes that join one study must not all draw the same configs
        seed=seed if storage is None else seed + os.getpid(),
        decay=decay,
        pattern=drawn,
    )
    metadata = tuned_files.metadata_for(device, toolchain(), command or command_line())
    report = TuneReport(problem, device, path, [], ledger=context.ledger.path, decay=decay)
    names = ", ".join(shape.name for shape in shapes)
    context.progress.start(f"tuning {problem.op} on {device.name} at {names}", seconds)
    handed: list[Config] = []
    try:
        for variant, group, window in _groups(problem, shapes, clock, started, seconds):
            run = _Run(context, variant, group, levels, path, metadata, report)
            try:
                handed = run.go(window, handed)
            except TuneError as error:
                # The other group's shapes are other kernels, and may well work.
                for shape in group:
                    report.skipped[shape.name] = str(error)
    finally:
        context.backend.close()
        context.progress.close()
    if not report.results:
        reasons = "; ".join(f"{name}: {why}" for name, why in report.skipped.items())
        raise TuneError(f"nothing was filed for {names} on {device.name}: {reasons}")
    return replace(
        report,
        trials=dict(context.progress.counts),
        seconds=clock() - started,
        check_seconds=metered.checking,
        timing_seconds=metered.timing,
        phases=metered.phases,
    )


class _Run:
    """One group of shapes: defaults, search, finalists, results."""

    def __init__(
        self,
        context: Context,
        problem: Problem,
        shapes: Sequence[Shape],
        levels: Sequence[str],
        path: Path,
        metadata: Mapping[str, Any],
        report: TuneReport,
    ) -> None:
        self.context, self.problem = context, problem
        self.path, self.metadata, self.report = path, metadata, report
        filed = filed_levels(levels, problem.op)
        given = [plan for level in filed for plan in plans_of(level, problem.op)]
        served = [x for x in given if is_served(x, problem, context.device.arch)]
        self.plans = [x for x in served if any(has_use(x, shape.regime) for shape in shapes)]
        self.search = Search(context, problem, shapes, self.plans)

    def go(self, window: Window, handed: Iterable[Config]) -> list[Config]:
        """Run the group within its window; return the configs worth trying elsewhere."""
        seconds = window.end - window.start
        least, most = (part * seconds for part in _FINALS_PART)
        verdicts = len(self._turns())
        deciding = min(most, max(least, _FIRST_SECONDS + verdicts * _VERDICT_SECONDS))
        searching = Window(window.clock, window.start, window.end - deciding)
        with self.context.backend.phase("defaults"):
            self.search.measure_defaults()
        wanted, device = self.search.shapes, self.context.device
        places = self.path, device, self.context.decay
        stored = list(stored_recipes(self.problem, self.plans, wanted, *places))
        if self.context.decay != WEAK:
            found = steady_recipes(self.problem, self.plans, wanted, device, stored)
            stored = [*found, *stored]
        self.search.seed([config for x in stored for config in x.recipe.configs])
        self.search.seed(handed)
        lent = lent_configs(self.problem, self.plans, self.search.stages, wanted, *places)
        self.search.seed(lent)
        finals = Finals(self.search, stored)
        errands = [
            Errand(_KNOWN_AT, lambda: finals.compile_known(self._turns()[:_AHEAD])),
            Errand(_LIKELY_AT, lambda: finals.compile_ahead(self._turns()[:_AHEAD])),
        ]
        with self.context.backend.phase("search"):
            self.search.run(searching, errands)
        self.report.skipped.update(self.search.skipped)
        self.report.left_to_try.append(self.search.left_to_try())
        with self.context.backend.phase("finals"):
            self._decide(finals, window)
        return [
            config
            for by_stage in self.search.trials.values()
            for trials in by_stage.values()
            for shape in self.search.shapes
            for config, _ in trials.ranked(shape)[:_HANDED_ON]
        ]

    def _turns(self) -> list[tuple[Shape, str]]:
        """What is decided, one after the other: a plan at a shape."""
        return [(shape, plan) for shape in self.search.shapes for plan in self.plans]

    def _last(self, plan: str) -> str:
        """The last plan of the same level."""
        return [x for x in self.plans if level_of(x) == level_of(plan)][-1]

    def _decide(self, finals: Finals, window: Window) -> None:
        turns = self._turns()
        finals.compile_ahead(turns)
        found: list[Verdict] = []
        for number, (shape, plan) in enumerate(turns):
            now = window.clock()
            share = max(0.0, window.end - now) / (len(turns) - number)
            if not (found and finals.is_behind(shape, plan)):
                verdict = finals.verdict(shape, plan, Window(window.clock, now, now + share))
                if verdict is None:
                    self.report.skipped[f"{shape.name} {plan}"] = finals.why_none(plan)
                else:
                    found.append(verdict)
            if found and plan == self._last(plan):
                best = better(found)
                self.report.results.append(result_of(best))
                entries = entries_of(best, self.context.decay, self.context.pattern)
                tuned_files.merge_entries(self.path, self.metadata, entries)
                found = []


def _groups(
    problem: Problem,
    shapes: Sequence[Shape],
    clock: Callable[[], float],
    started: float,
    seconds: float,
) -> Iterator[tuple[Problem, list[Shape], Window]]:
    """Plain shapes, then packed ones, each with its part of the time that is left."""
    plain = [shape for shape in shapes if shape.cu_seqlens is None]
    packed = [shape for shape in shapes if shape.cu_seqlens is not None]
    part = len(plain) / len(shapes)
    if plain and packed:
        part = min(1 - _LEAST_GROUP, max(_LEAST_GROUP, part))
    if plain:
        window = Window(clock, started, started + part * seconds)
        yield replace(problem, varlen=False), plain, window
    if packed:
        yield replace(problem, varlen=True), packed, Window(clock, clock(), started + seconds)


def check_arguments(shapes: Sequence[Shape], levels: Sequence[str], budget_minutes: float) -> None:
    """Raise TuneError unless there is something to tune, and time for it."""
    if not shapes:
        raise TuneError("no shape was given; name at least one, such as train4k or 4x4096x16")
    unknown = [level for level in levels if level not in PLANS_OF]
    if unknown or not levels:
        raise TuneError(f"levels must be some of {tuple(PLANS_OF)}, but got {tuple(levels)}")
    if not budget_minutes > 0:
        raise TuneError(f"the budget must be positive, but got {budget_minutes} minutes")


def check_tunable_decay(problem: Problem, decay: str, pattern: Drawn | None) -> None:
    """Raise InputError for an unknown word, and TuneError where strong decay makes no difference or
    a pattern cannot be drawn."""
    check_decay(decay, "decay")
    if decay != WEAK and problem.op not in CHANNEL_OPS:
        raise TuneError(
            f"kernels of {problem.op} take as long under any decay, so that there is nothing to "
            f"tune for {decay} decay; it matters for {', '.join(CHANNEL_OPS)}"
        )
    if isinstance(pattern, DecayPattern) and problem.gate != "none":
        raise TuneError(
            f"the pattern {pattern.name} has decays, and a gate in the kernels (gate="
            f"{problem.gate}) takes what they are made of: leave the gate or the pattern out"
        )
    if pattern is not None and decay == WEAK:
        raise TuneError(f"a pattern is drawn for strong decay, but decay is {decay!r}")
    if isinstance(pattern, DecayPattern):
        _check_strong(problem, pattern)


def _check_strong(problem: Problem, pattern: DecayPattern) -> None:
    """Raise TuneError for decays under which entries for weak decay are as fast."""
    from gdn2gen.family.inputs import make_inputs
    from gdn2gen.family.strength import STRONG_SHARE, strength_of, strong_share

    drawn = make_inputs(1, 1024, 16, problem.K, 16, op=problem.op, pattern=pattern)["g"]
    share = float(strong_share(drawn))
    if strength_of(share) == WEAK:
        raise TuneError(
            f"{pattern.name} is no pattern of strong decay: {share:.1%} of the chunks of 32 tokens "
            f"have a channel that loses more than 2^-96, and from {STRONG_SHARE:.0%} on its decay "
            "would be strong: its decay is weak, which the entries that there are were tuned for"
        )


def _check_present(device: Device) -> None:
    present = present_device()
    if present != device:
        raise TuneError(
            f"tuning runs on the present GPU, {present.name}, but {device.name} was asked for; "
            "use tune_without_gpu for a target that is not here"
        )
