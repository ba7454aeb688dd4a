"""tune_without_gpu: what can be done for a named target where no GPU is: compile, check, rank.

The result is filed as `predicted`: never timed, and replaced by the first measured entry. The chunk
size stays the default's: compiled resources and bytes say little about the chain over the chunks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from gdn2gen.base import outcome
from gdn2gen.base.device import Device, toolchain
from gdn2gen.base.errors import TuneError
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.terminal import command_line
from gdn2gen.base.worker import CompilePool, Worker, compile_slots
from gdn2gen.codegen.build import Resources
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, default_config, language_of
from gdn2gen.kernels.plans import PLANS, filed_levels, plans_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import CheckResult
from gdn2gen.measure.compiling import compile_in
from gdn2gen.store import tuned_files
from gdn2gen.tuning import space
from gdn2gen.tuning.filing import predicted_entry, predicted_of
from gdn2gen.tuning.gpu.attempt import fitting, right
from gdn2gen.tuning.offline.findings import Findings
from gdn2gen.tuning.offline.predict import predicted_bytes
from gdn2gen.tuning.records.places import findings_path, open_ledger
from gdn2gen.tuning.run import check_arguments
from gdn2gen.tuning.search.loop import Window
from gdn2gen.tuning.views.progress import Progress, console_progress
from gdn2gen.tuning.views.report import ShapeResult, TuneReport

_COMPILE_PART: Final = 0.7
_INTERPRETER_SECONDS: Final = 300.0


def _ranked(level: str, op: str) -> list[str]:
    """The plans of a level that are ranked without a GPU.

    Not those with states of blocks: by their bytes they would come first by far, and what
    grad_blocks computes leaves 4 to 8% of that on an H200, in TileLang alone. Nor those that the
    interpreter, which knows Triton alone, could not check.
    """
    return [x for x in plans_of(level, op) if not PLANS[x].every and not PLANS[x].instead]


class OfflineBackend(Protocol):
    """Compilers and the interpreter; tests put a fake in their place."""

    slots: int

    def compile(self, problem: Problem, config: Config) -> Future[Outcome[Resources]]: ...

    def interpret(self, recipe: Recipe) -> Outcome[CheckResult]: ...

    def close(self) -> None: ...


class ProcessBackend:
    """The real one: compilers for the target, and one process with Triton's interpreter."""

    def __init__(self, device: Device) -> None:
        self.device, self.slots = device, compile_slots()
        self._pool = CompilePool(self.slots)
        self._interpreter = Worker({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})

    def compile(self, problem: Problem, config: Config) -> Future[Outcome[Resources]]:
        return compile_in(self._pool, problem, config, self.device)

    def interpret(self, recipe: Recipe) -> Outcome[CheckResult]:
        target = "gdn2gen.measure.check:check_interpreted"
        return self._interpreter.call(target, recipe, timeout=_INTERPRETER_SECONDS)

    def close(self) -> None:
        self._pool.close()
        self._interpreter.close()


def tune_without_gpu(
    problem: Problem,
    device: Device,
    shapes: Sequence[Shape],
    *,
    budget_minutes: float,
    out_dir: Path,
    levels: Sequence[str] = ("lean", "fast"),
    progress: Progress | None = None,
    backend: OfflineBackend | None = None,
    clock: Callable[[], float] = time.monotonic,
    seed: int = 0,
    command: str | None = None,
) -> TuneReport:
    """Rank configs of `problem` for the named `device` and file the best as `predicted`.

    The default of every stage is compiled whatever the budget. A later run of the same problem
    goes on where this one ended, or was killed. Raises TuneError if a default does not compile for
    the target, or if no recipe passes in the interpreter.
    """
    check_arguments(shapes, levels, budget_minutes)
    path = tuned_files.tuned_path(out_dir, problem.op, device)
    tuned_files.check_mergeable(path, device.name)
    begun, seconds = clock(), budget_minutes * 60
    progress = progress or console_progress()
    progress.start(f"ranking {problem.op} for {device.name} without a GPU", seconds)
    backend = backend or ProcessBackend(device)
    # Packed batches add a table of a few bytes; their kernels are taken to rank alike.
    problem = replace(problem, varlen=False)
    ledger = open_ledger(problem.op, device)
    findings = Findings(findings_path(problem.op, device), problem, ledger)
    ranking = _Ranking(findings, shapes, device, levels, backend, progress, seed)
    if findings.compiled:
        progress.phase(f"goes on from {len(findings.compiled)} configs that were compiled before")
    try:
        ranking.compile(Window(clock, begun, begun + _COMPILE_PART * seconds))
        results = [x for shape in shapes for x in ranking.results(shape)]
    finally:
        backend.close()
        progress.close()
    if not results:
        raise TuneError(
            f"no recipe passed in Triton's interpreter: {ranking.skipped}; run "
            "`gdn2gen verify` to see which outputs are wrong"
        )
    metadata = tuned_files.metadata_for(device, toolchain(), command or command_line())
    tuned_files.merge_entries(path, metadata, [predicted_entry(result) for result in results])
    return TuneReport(
        problem=problem,
        device=device,
        path=path,
        results=results,
        ledger=ledger.path,
        trials=dict(progress.counts),
        skipped=ranking.skipped,
        seconds=clock() - begun,
    )


class _Ranking:
    """Compiled configs of every stage, and the recipes made of the best."""

    def __init__(
        self,
        findings: Findings,
        shapes: Sequence[Shape],
        device: Device,
        levels: Sequence[str],
        backend: OfflineBackend,
        progress: Progress,
        seed: int,
    ) -> None:
        self.findings, self.problem = findings, findings.problem
        self.device, self.levels = device, filed_levels(levels, self.problem.op)
        self.backend, self.progress = backend, progress
        self.shapes = list(shapes)
        plans = [PLANS[plan] for level in self.levels for plan in _ranked(level, self.problem.op)]
        self.stages = tuple(dict.fromkeys(x for plan in plans for x in plan.stages))
        self.compiled = findings.compiled
        self.skipped: dict[str, str] = {}
        self._checked: dict[Recipe, str | None] = {}
        self._random = random.Random(seed)

    def compile(self, window: Window) -> None:
        """Compile the defaults, then as many other configs as the window allows."""
        queue = self._queue()
        pending: dict[Future[Outcome[Resources]], Config] = {}
        needed = {self._default(stage) for stage in self.stages}
        open_ended = True
        while True:
            while open_ended and len(pending) < self.backend.slots + 1:
                config = next(queue, None)
                if config is None or (window.used >= 1 and config not in needed):
                    open_ended = False
                    break
                self.progress.working_on(f"compile {config.stage} for {self.device.arch}")
                pending[self.backend.compile(self.problem, config)] = config
            if not pending or (window.used >= 1 and needed.isdisjoint(pending.values())):
                break
            done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                config = pending.pop(future)
                self._file(config, future.result(), config in needed)
        for future in pending:
            future.cancel()

    def results(self, shape: Shape) -> Iterator[ShapeResult]:
        """The best recipe of each level that passes in the interpreter."""
        for level in self.levels:
            for number, recipe in enumerate(self._recipes(level, shape)):
                reason = self._why_wrong(recipe)
                if reason is None:
                    default = self._default_recipe(level)
                    costs = self._cost(recipe, shape), self._cost(default, shape)
                    yield predicted_of(recipe, shape, level, *costs)
                    break
                which = "default" if number else "best ranked"
                self.skipped[f"{shape.name} {level}, {which}"] = reason

    def _queue(self) -> Iterator[Config]:
        """Defaults first, then one config of each stage in turn, at random within the stage."""
        decks = []
        for stage in self.stages:
            default = self._default(stage)
            found = space.valid_configs(stage, self.problem, self.device, default.size("BT"))
            # Triton's interpreter cannot check TileLang, and what was not checked is not filed.
            rest = [x for x in found if x != default and language_of(x) == "triton"]
            self._random.shuffle(rest)
            decks.append([default, *rest])
        for turn in range(max(map(len, decks))):
            configs = [deck[turn] for deck in decks if turn < len(deck)]
            yield from (x for x in configs if self._is_new(x, is_default=turn == 0))

    def _is_new(self, config: Config, *, is_default: bool) -> bool:
        """Whether nothing is known of it; a default that was refused is an error each time anew."""
        if config in self.compiled:
            return False
        return is_default or self.findings.why_refused(config) is None

    def _file(self, config: Config, compiled: Outcome[Resources], needed: bool) -> None:
        if needed and not compiled.ok:
            raise TuneError(
                f"the default {config.stage} [{config}] does not compile for {self.device.name}: "
                f"{compiled.reason}"
            )
        built = fitting(compiled, self.device)
        kept = built.ok or needed
        if kept:
            self.findings.compiles(config, compiled.get())
        elif built.lasts:
            self.findings.refuse(config, built.reason)
        detail = f"{built.get().registers} registers" if built.ok else built.reason
        self.progress.trial(config, outcome.OK if kept else built.status, detail)

    def _default(self, stage: str) -> Config:
        return default_config(stage, self.problem, arch=self.device.arch)

    def _default_recipe(self, level: str) -> Recipe:
        return Recipe.default(
            self.problem, plans_of(level, self.problem.op)[0], arch=self.device.arch
        )

    def _recipes(self, level: str, shape: Shape) -> Iterator[Recipe]:
        """Of the level's plans the one of least predicted cost, each of the stages with the least;
        then the default, which is kept at equal cost.
        """
        best = [self._least(plan, shape) for plan in _ranked(level, self.problem.op)]
        least = min(best, key=lambda recipe: self._cost(recipe, shape))
        yield from dict.fromkeys((least, self._default_recipe(level)))

    def _least(self, plan: str, shape: Shape) -> Recipe:
        configs: dict[str, Config] = {}
        for stage in PLANS[plan].stages:
            first = self._default(stage)
            alike = [x for x in self.compiled if (x.stage, x["BT"]) == (stage, first["BT"])]
            found = [first, *alike]
            configs[stage] = min(found, key=lambda x: self._stage_cost(x, shape))
        return Recipe.of(self.problem, plan, configs)

    def _stage_cost(self, config: Config, shape: Shape) -> float:
        resources = self.compiled[config]
        return predicted_bytes(self.problem, config, shape, resources, self.device)

    def _cost(self, recipe: Recipe, shape: Shape) -> float:
        return sum(self._stage_cost(config, shape) for config in recipe.configs)

    def _why_wrong(self, recipe: Recipe) -> str | None:
        if recipe not in self._checked:
            self._checked[recipe] = self._check(recipe)
        return self._checked[recipe]

    def _check(self, recipe: Recipe) -> str | None:
        if self.findings.has_passed(recipe):
            return None
        before = self.findings.why_wrong(recipe)
        if before is not None:
            return before
        self.progress.phase(f"check in the interpreter, BT={recipe.BT}")
        checked = right(self.backend.interpret(recipe))
        if checked.ok:
            self.findings.passes(recipe)
            return None
        if checked.status != outcome.WRONG:
            return checked.reason
        reason = f"{checked.reason} (in Triton's interpreter)"
        self.findings.is_wrong(recipe, reason)
        return reason
