"""Search: compile configs of all stages in parallel, check and time them as they come.

Compiling dominates (seconds against milliseconds), so every compiled config is timed at all
shapes, and the compilers are kept busy over all stages and chunk sizes at once. The stage that has
most to win, at the chunk size that does best, gets the most trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import optuna

from gdn2gen.base import outcome
from gdn2gen.base.decay import WEAK
from gdn2gen.base.device import Device
from gdn2gen.base.outcome import Outcome
from gdn2gen.codegen.build import Resources
from gdn2gen.codegen.digests import digest_of
from gdn2gen.codegen.render import template_digest
from gdn2gen.family.decays import LAYER, Drawn
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.plans import PLANS, is_optional, level_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.tuning import space
from gdn2gen.tuning.gpu.attempt import Attempt, Result, Times, attempt
from gdn2gen.tuning.gpu.backend import MeteredBackend
from gdn2gen.tuning.records.ledger import Ledger
from gdn2gen.tuning.search.opening import Opening
from gdn2gen.tuning.search.trials import Proposal, StageTrials
from gdn2gen.tuning.views.progress import Progress, times_text

# Past the deadline, trials being compiled may still end within this part of the time.
_GRACE: Final = 0.1
_POLL_SECONDS: Final = 0.2
# Under strong decay stages of no plan within this of its level's best are not tried: grad_blocks,
# all of whose forms take frames, would get most of the trials for taking most of the time, and the
# plans with it took 2.2 times what prepare and grad_key in decay=centred are predicted to.
_LEFT_BEHIND: Final = 1.5


@dataclass
class Window:
    """A span of a clock, in seconds; the clock is a parameter so that tests need not wait."""

    clock: Callable[[], float]
    start: float
    end: float

    @property
    def used(self) -> float:
        """Part of the span that is over."""
        return (self.clock() - self.start) / max(self.end - self.start, 1e-9)


@dataclass(frozen=True)
class Context:
    """What the parts of one run of the tuner share."""

    device: Device
    backend: MeteredBackend
    ledger: Ledger
    storage: optuna.storages.BaseStorage
    progress: Progress
    seed: int = 0
    decay: str = WEAK
    """What calls expect that run what is found."""
    pattern: Drawn = LAYER
    """What the decay of inputs is drawn by that times are taken of."""


class Errand(NamedTuple):
    """What is to be done once, when a part of a search's time is over."""

    part: float
    run: Callable[[], None]


class _Asked(NamedTuple):
    """A proposal on its way through the compilers and the GPU."""

    trials: StageTrials
    proposal: Proposal
    attempt: Attempt


class Search:
    """The trials of one problem over a set of shapes: per chunk size, each stage by itself."""

    def __init__(
        self, context: Context, problem: Problem, shapes: Sequence[Shape], plans: Sequence[str]
    ) -> None:
        self.context, self.problem = context, problem
        self.shapes, self.plans = list(shapes), tuple(plans)
        self.stages = tuple(dict.fromkeys(x for plan in plans for x in PLANS[plan].stages))
        self.trials: dict[int, dict[str, StageTrials]] = {}
        self.default_ms: dict[tuple[int, str], float] = {}
        self.skipped: dict[str, str] = {}
        self.seeds: list[Config] = []
        self._opening = Opening(self)

    def base(self, plan: str, BT: int | None = None) -> Recipe:
        """The plan with every stage at its default, for chunks of BT tokens."""
        return Recipe.default(self.problem, plan, BT, arch=self.context.device.arch)

    def default(self, stage: str, BT: int | None = None) -> Config:
        """Where the search of a stage begins."""
        return default_config(stage, self.problem, BT=BT, arch=self.context.device.arch)

    def measure_defaults(self) -> None:
        """Open the first chunk size whose default passes; TuneError if none does."""
        self._opening.first()

    def seed(self, configs: Iterable[Config]) -> None:
        """Have these configs tried first, each at its own chunk size, once that is open."""
        for config in configs:
            self.seeds.append(config)
            trials = self.trials.get(config.size("BT"), {}).get(config.stage)
            if trials is not None:
                trials.suggest_first(config)

    def run(self, window: Window, errands: Sequence[Errand] = ()) -> None:
        """Try configs until the window ends or nothing is left to try.

        A thread has the GPU try one after the other while this one asks the sampler for more: with
        both in one, an H200 waited for 23 to 45% of a search. `errands` are in order of time.
        """
        self.context.progress.phase(f"search over {len(self.stages)} stages at {self._at()}")
        compiling: dict[Future[Outcome[Resources]], _Asked] = {}
        trying: dict[Future[Result], _Asked] = {}
        slots = self.context.backend.slots
        depth = slots + max(1, slots // 4)
        gpu, waiting = ThreadPoolExecutor(1), list(errands)
        try:
            while window.used < 1 + _GRACE:
                self._opening.more(window)
                while waiting and window.used > waiting[0].part:
                    waiting.pop(0).run()
                while window.used < 1 and len(compiling) < depth and len(trying) < slots:
                    if not self._submit(compiling):
                        break
                waited_for: list[Future[Any]] = [*compiling, *trying, *self._opening.compiling]
                if not waited_for:
                    break
                wait(waited_for, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for compiled in [future for future in compiling if future.done()]:
                    asked = compiling.pop(compiled)
                    trying[gpu.submit(self._try, asked, compiled.result())] = asked
                for tried in [future for future in trying if future.done()]:
                    self._settle(trying.pop(tried), tried.result())
            gpu.shutdown(cancel_futures=True)  # waits for the one that runs
            for tried in [future for future in trying if not future.cancelled()]:
                self._settle(trying.pop(tried), tried.result())
        finally:
            gpu.shutdown(cancel_futures=True)
            self._opening.close()
            for compiled in compiling:
                compiled.cancel()
            for asked in (*compiling.values(), *trying.values()):
                asked.trials.abandon(asked.proposal)
        for by_stage in self.trials.values():
            for trials in by_stage.values():
                trials.refresh()

    def left_to_try(self) -> str:
        """How much of the space was tried at the best chunk size, the dearest stage first."""
        best = min(self.trials, key=self.total_ms)
        total = self.total_ms(best)
        stages = sorted(self.trials[best].values(), key=lambda trials: -trials.best_ms())
        words = []
        for trials in stages:
            tried, worth = trials.tried()
            words.append(
                f"{trials.stage} ({trials.best_ms() / total:.0%} of a pass) {tried} of {worth}"
            )
        return f"tried of the configs worth compiling, in chunks of {best}: {', '.join(words)}"

    def total_ms(self, BT: int) -> float:
        """Sum over the stages of their best times at chunk size BT, in ms.

        Of each level's first plan, which every chunk size has.
        """
        first = [plan for plan in self.plans if not is_optional(plan, self.problem.op)]
        stages = {stage for plan in first for stage in PLANS[plan].stages}
        return sum(trials.best_ms() for x, trials in self.trials[BT].items() if x in stages)

    def _submit(self, compiling: dict[Future[Outcome[Resources]], _Asked]) -> bool:
        """Queue one more compile; False where no stage has anything left to try."""
        while True:
            trials = self._neediest()
            if trials is None:
                return False
            proposal = trials.propose()
            if proposal is not None:
                future = self.context.backend.compile(self.problem, proposal.config)
                compiling[future] = _Asked(trials, proposal, self._attempt(proposal.config))
                return True

    def _neediest(self) -> StageTrials | None:
        """The trials with the fewest asked for their weight: stage's share, chunk size's rank."""
        totals = {BT: self.total_ms(BT) for BT in self.trials}
        best = min(totals.values())
        chosen, least = None, float("inf")
        for BT, by_stage in self.trials.items():
            promising = self._promising(BT)
            for trials in (x for stage, x in by_stage.items() if stage in promising):
                weight = trials.best_ms() / totals[BT] * (best / totals[BT]) ** 2
                load = (trials.asked + 1) / weight
                if not trials.exhausted and load < least:
                    chosen, least = trials, load
        if chosen is not None:
            self.context.progress.working_on(f"{chosen.stage}, BT={chosen.BT}, at {self._at()}")
        return chosen

    def _promising(self, BT: int) -> set[str]:
        """Stages that are worth trials at a chunk size."""
        by_stage = self.trials[BT]
        if self.context.decay == WEAK:
            return {*by_stage}
        plans = [x for x in self.plans if by_stage.keys() >= {*PLANS[x].stages}]
        totals = {x: sum(by_stage[y].best_ms() for y in PLANS[x].stages) for x in plans}
        best = {
            level: min(ms for x, ms in totals.items() if level_of(x) == level)
            for level in map(level_of, plans)
        }
        kept = [x for x, ms in totals.items() if ms <= _LEFT_BEHIND * best[level_of(x)]]
        return {stage for plan in kept for stage in PLANS[plan].stages}

    def _at(self) -> str:
        return ", ".join(shape.name for shape in self.shapes)

    def _attempt(self, config: Config) -> Attempt:
        """The config in its plan's defaults; a stage whose time it moves at its best so far."""
        plan = self._plan_with(config.stage)
        recipe = self.base(plan, config.size("BT"))
        known = {}
        for stage in space.stages_moved(config, plan):
            best, known[stage] = self.trials[recipe.BT][stage].best()
            recipe = recipe.with_config(best)
        return Attempt(config, recipe.with_config(config), known)

    def _try(self, asked: _Asked, compiled: Outcome[Resources]) -> Result:
        backend, device = self.context.backend, self.context.device
        return attempt(
            asked.attempt, compiled, self.shapes, backend, device, asked.trials.is_hopeless
        )

    def _settle(self, asked: _Asked, result: Result) -> None:
        """File what came of an attempt; in the ledger only what the config itself caused."""
        trials, proposal = asked.trials, asked.proposal
        if result.status == outcome.OK:
            trials.succeed(proposal, result.times)
            self.context.progress.trial(proposal.config, outcome.OK, times_text(result.times))
            self.show_best(trials)
            return
        if result.status == outcome.CANCELLED:
            trials.abandon(proposal)
            return
        if result.status == outcome.ERROR:
            trials.abandon(proposal, again=False)
        else:
            trials.refuse(proposal, result.reason)
            recipe = asked.attempt.recipe if result.ran else None
            self.file(proposal.config, result.reason, recipe, result.errors)
        self.context.progress.trial(proposal.config, result.status, result.reason)

    def file(
        self,
        config: Config,
        reason: str,
        recipe: Recipe | None = None,
        errors: Times | None = None,
    ) -> None:
        self.context.ledger.add(
            reason,
            self.problem,
            config,
            template_digest(config),
            errors=errors,
            recipe=recipe,
        )

    def file_recipe(self, recipe: Recipe, reason: str) -> None:
        self.context.ledger.add_recipe(reason, recipe, digest_of(recipe))

    def _plan_with(self, stage: str) -> str:
        return next(plan for plan in self.plans if stage in PLANS[plan].stages)

    def show_best(self, trials: StageTrials) -> None:
        label = f"{trials.stage} BT={trials.BT}"
        default = self.default_ms[trials.BT, trials.stage]
        self.context.progress.best_so_far(label, trials.best_ms(), default)
