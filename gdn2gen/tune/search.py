"""Search: compile candidates of all stages in parallel, gate and time them as they come.

Compiling dominates (seconds against milliseconds), so every compiled candidate is timed at all
shapes, and the compilers are kept busy over all stages and chunk sizes at once. The stage that has
most to win, at the chunk size that does best, gets the most trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Final

import optuna

from gdn2gen.bench import Timing
from gdn2gen.build import Resources
from gdn2gen.config import Config, default_config
from gdn2gen.device import Device
from gdn2gen.errors import TuneError
from gdn2gen.problem import Problem
from gdn2gen.render import stage_digest, template_digest
from gdn2gen.shapes import Shape
from gdn2gen.stages import PLANS
from gdn2gen.tune import outcome, space
from gdn2gen.tune.backend import Backend
from gdn2gen.tune.candidate import Candidate
from gdn2gen.tune.ledger import Ledger
from gdn2gen.tune.outcome import Outcome
from gdn2gen.tune.progress import Progress, times_text
from gdn2gen.tune.trials import Proposal, StageTrials

# Part of the search's time after which no further chunk size is begun.
_LAST_START: Final = 0.4
# Past the deadline, trials being compiled may still end within this part of the time.
_GRACE: Final = 0.1
_POLL_SECONDS: Final = 0.2


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
    backend: Backend
    ledger: Ledger
    storage: optuna.storages.BaseStorage
    progress: Progress
    seed: int = 0


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

    def base(self, plan: str, BT: int) -> Candidate:
        """The plan with every stage at its default, for chunks of BT tokens."""
        return Candidate.default(self.problem, plan, BT)

    def measure_defaults(self, window: Window) -> None:
        """Compile, gate and time the default of each chunk size; TuneError if none passes.

        The default size comes first and is never skipped; the others are, when time runs short.
        """
        preferred = default_config(self.stages[0], self.problem).size("BT")
        sizes = space.chunk_sizes(preferred)
        compiles = {BT: self._compile_defaults(BT) for BT in sizes}
        for BT in sizes:
            if self.trials and window.used > _LAST_START:
                self.skipped[f"BT={BT}"] = "the budget is too short for another chunk size"
                for future in compiles[BT].values():
                    future.cancel()
                continue
            self.context.progress.phase(f"default configs, BT={BT}: compile, gate, time")
            reason = self._measure_default(BT, compiles[BT])
            if reason is not None:
                self.skipped[f"BT={BT}"] = reason
        if not self.trials:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            raise TuneError(
                f"no default config works on {self.context.device.name}, so there is nothing to "
                f"start from: {reasons}. `gdn2gen verify` shows which outputs are wrong"
            )

    def seed(self, configs: Iterable[Config]) -> None:
        """Have these configs tried first, each at its own chunk size."""
        for config in configs:
            trials = self.trials.get(config.size("BT"), {}).get(config.stage)
            if trials is not None:
                trials.suggest_first(config)

    def run(self, window: Window) -> None:
        """Try candidates until the window ends or nothing is left to try."""
        pending: dict[Future[Outcome[Resources]], tuple[StageTrials, Proposal]] = {}
        self.context.progress.phase(f"search over {len(self.stages)} stages at {self._at()}")
        slots = self.context.backend.slots
        depth = slots + max(1, slots // 4)
        try:
            while window.used < 1 + _GRACE:
                while window.used < 1 and len(pending) < depth and self._submit(pending):
                    pass
                if not pending:
                    break
                done, _ = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    trials, proposal = pending.pop(future)
                    self._evaluate(trials, proposal, future.result())
        finally:
            for future, (trials, proposal) in pending.items():
                future.cancel()
                trials.abandon(proposal)
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
        """Sum over the stages of their best times at chunk size BT, in ms."""
        return sum(trials.best_ms() for trials in self.trials[BT].values())

    def _compile_defaults(self, BT: int) -> dict[str, Future[Outcome[Resources]]]:
        backend, problem = self.context.backend, self.problem
        return {
            stage: backend.compile(problem, default_config(stage, problem, BT=BT))
            for stage in self.stages
        }

    def _measure_default(
        self, BT: int, compiles: dict[str, Future[Outcome[Resources]]]
    ) -> str | None:
        """Measure the default of one chunk size; why it cannot serve, or None if it can."""
        for stage, future in compiles.items():
            compiled = future.result()
            if not compiled.ok:
                if compiled.status not in (outcome.ERROR, outcome.CANCELLED):
                    self._file(default_config(stage, self.problem, BT=BT), compiled.reason)
                return f"the default {stage} does not compile: {compiled.reason}"
        for plan in self.plans:
            base = self.base(plan, BT)
            checked = self.context.backend.gate(base, full=False)
            if not (checked.ok and checked.get().ok):
                reason = checked.get().reason if checked.ok else checked.reason
                if checked.status not in (outcome.ERROR, outcome.CANCELLED):
                    self._file_pipeline(base, reason)
                return f"the default of plan {plan} fails the gate: {reason}"
        times: dict[str, dict[str, float]] = {stage: {} for stage in self.stages}
        for shape in list(self.shapes):
            failed = self._time_default(BT, shape, times)
            if failed is None:
                continue
            if self.trials or failed.status != outcome.OUT_OF_MEMORY:
                return f"the default cannot be timed at {shape.name}: {failed.reason}"
            # No config can change what the inputs take, so the shape is given up, not the config.
            self.shapes.remove(shape)
            self.skipped[shape.name] = failed.reason
        if not self.shapes:
            return "no shape can be timed"
        self.trials[BT] = {stage: self._open(stage, BT) for stage in self.stages}
        for stage, found in times.items():
            kept = {shape.name: found[shape.name] for shape in self.shapes}
            self.default_ms[BT, stage] = geometric_mean(list(kept.values()))
            self.trials[BT][stage].record(default_config(stage, self.problem, BT=BT), kept)
            self._show_best(self.trials[BT][stage])
            for form in space.forms(stage, self.problem, self.context.device, BT):
                self.trials[BT][stage].suggest_first(form)
        return None

    def _time_default(
        self, BT: int, shape: Shape, times: dict[str, dict[str, float]]
    ) -> Outcome[dict[str, Timing]] | None:
        """Add the default's times at one shape to `times`; what went wrong, or None."""
        for plan in self.plans:
            wanted = tuple(x for x in PLANS[plan].stages if shape.name not in times[x])
            if not wanted:
                continue
            timed = self.context.backend.time_stages(self.base(plan, BT), wanted, shape)
            if not timed.ok:
                return timed
            for stage, timing in timed.get().items():
                times[stage][shape.name] = timing.median
        return None

    def _open(self, stage: str, BT: int) -> StageTrials:
        context = self.context
        return StageTrials(
            self.problem,
            stage,
            BT,
            self.shapes,
            context.device,
            context.ledger,
            stage_digest(stage),
            context.storage,
            context.seed,
        )

    def _submit(
        self, pending: dict[Future[Outcome[Resources]], tuple[StageTrials, Proposal]]
    ) -> bool:
        """Queue one more compile; False where no stage has anything left to try."""
        while True:
            trials = self._neediest()
            if trials is None:
                return False
            proposal = trials.propose()
            if proposal is not None:
                future = self.context.backend.compile(self.problem, proposal.config)
                pending[future] = (trials, proposal)
                return True

    def _neediest(self) -> StageTrials | None:
        """The trials with the fewest asked for their weight: stage's share, chunk size's rank."""
        totals = {BT: self.total_ms(BT) for BT in self.trials}
        best = min(totals.values())
        chosen, least = None, float("inf")
        for BT, by_stage in self.trials.items():
            for trials in by_stage.values():
                weight = trials.best_ms() / totals[BT] * (best / totals[BT]) ** 2
                load = (trials.asked + 1) / weight
                if not trials.exhausted and load < least:
                    chosen, least = trials, load
        if chosen is not None:
            self.context.progress.working_on(f"{chosen.stage}, BT={chosen.BT}, at {self._at()}")
        return chosen

    def _at(self) -> str:
        return ", ".join(shape.name for shape in self.shapes)

    def _evaluate(
        self, trials: StageTrials, proposal: Proposal, compiled: Outcome[Resources]
    ) -> None:
        """Resources, then the gate, then times at every shape; file what comes of it."""
        config = proposal.config
        if not compiled.ok:
            self._fail(trials, proposal, compiled.status, compiled.reason)
            return
        unfit = space.why_unfit(compiled.get(), self.context.device)
        if unfit is not None:
            self._fail(trials, proposal, outcome.RESOURCES, f"{outcome.RESOURCES}: {unfit}")
            return
        candidate = self.base(self._plan_with(config.stage), trials.BT).with_config(config)
        checked = self.context.backend.gate(candidate, full=False)
        if not checked.ok:
            self._fail(trials, proposal, checked.status, checked.reason, candidate)
            return
        gate = checked.get()
        if not gate.ok:
            reason = f"{outcome.WRONG}: {gate.reason}"
            self._fail(trials, proposal, outcome.WRONG, reason, candidate, gate.errors)
            return
        times: dict[str, float] = {}
        for shape in self.shapes:
            timed = self.context.backend.time_stages(candidate, (config.stage,), shape)
            if not timed.ok:
                self._fail(trials, proposal, timed.status, timed.reason, candidate)
                return
            times[shape.name] = timed.get()[config.stage].median
            if trials.is_hopeless(times):
                break
        trials.succeed(proposal, times)
        self.context.progress.trial(config, outcome.OK, times_text(times))
        self._show_best(trials)

    def _fail(
        self,
        trials: StageTrials,
        proposal: Proposal,
        status: str,
        reason: str,
        candidate: Candidate | None = None,
        errors: dict[str, float] | None = None,
    ) -> None:
        """File a failed trial. Only what the config itself caused goes to the ledger."""
        if status == outcome.CANCELLED:
            trials.abandon(proposal)
            return
        if status == outcome.ERROR:
            trials.abandon(proposal, again=False)
        else:
            trials.refuse(proposal, reason)
            self._file(proposal.config, reason, candidate, errors)
        self.context.progress.trial(proposal.config, status, reason)

    def _file(
        self,
        config: Config,
        reason: str,
        candidate: Candidate | None = None,
        errors: dict[str, float] | None = None,
    ) -> None:
        self.context.ledger.add(
            reason,
            self.problem,
            config,
            template_digest(config),
            errors=errors,
            plan=candidate.plan if candidate else "",
            configs=candidate.by_stage if candidate else None,
        )

    def _file_pipeline(self, candidate: Candidate, reason: str) -> None:
        digest = candidate.digest
        self.context.ledger.add_pipeline(
            reason, candidate.problem, candidate.plan, candidate.by_stage, digest
        )

    def _plan_with(self, stage: str) -> str:
        return next(plan for plan in self.plans if stage in PLANS[plan].stages)

    def _show_best(self, trials: StageTrials) -> None:
        label = f"{trials.stage} BT={trials.BT}"
        default = self.default_ms[trials.BT, trials.stage]
        self.context.progress.best_so_far(label, trials.best_ms(), default)
