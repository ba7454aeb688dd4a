"""Chunk sizes of a search: before its trials open, its default is compiled, checked and timed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from statistics import geometric_mean
from typing import TYPE_CHECKING, Final

from gdn2gen.base import outcome
from gdn2gen.base.decay import WEAK
from gdn2gen.base.errors import TuneError
from gdn2gen.base.outcome import Outcome
from gdn2gen.codegen.build import Resources
from gdn2gen.codegen.render import stage_digest
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.plans import PLANS, is_optional
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.measure.timing import Timing
from gdn2gen.tuning import space
from gdn2gen.tuning.gpu.attempt import right
from gdn2gen.tuning.search.trials import StageTrials

if TYPE_CHECKING:
    from gdn2gen.tuning.search.loop import Search, Window

Compiles = dict[str, Future[Outcome[Resources]]]

# Part of the search's time after which no further chunk size is begun.
_LAST_START: Final = 0.4


class Opening:
    """Opens the trials of one chunk size after the other.

    The search begins with the first while the others compile: it waited for all of them for 23 to
    34 s of a budget of 4.5 minutes.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._waiting: dict[int, Compiles] = {}

    @property
    def compiling(self) -> list[Future[Outcome[Resources]]]:
        """What further chunk sizes wait for."""
        return [x for by_stage in self._waiting.values() for x in by_stage.values() if not x.done()]

    def first(self) -> None:
        """Open the default's chunk size, or if that fails the next; TuneError if none passes."""
        search = self._search
        preferred = search.default(search.stages[0]).size("BT")
        self._waiting = {BT: self._compile(BT) for BT in space.chunk_sizes(preferred)}
        while self._waiting and not search.trials:
            self._open_next()
        if not search.trials:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in search.skipped.items())
            raise TuneError(
                f"no default config works on {search.context.device.name}, so there is nothing to "
                f"start from: {reasons}. `gdn2gen verify` shows which outputs are wrong"
            )

    def more(self, window: Window) -> None:
        """Open what has been compiled since; give the rest up when time runs short."""
        while self._waiting:
            if window.used > _LAST_START:
                self.close()
                return
            BT = next(iter(self._waiting))
            if not all(future.done() for future in self._waiting[BT].values()):
                return
            self._open_next()

    def close(self) -> None:
        """Give up what is not open yet."""
        for BT, compiles in self._waiting.items():
            self._search.skipped[f"BT={BT}"] = "the budget is too short for another chunk size"
            for future in compiles.values():
                future.cancel()
        self._waiting = {}

    def _open_next(self) -> None:
        BT = next(iter(self._waiting))
        self._search.context.progress.phase(f"default configs, BT={BT}: compile, check, time")
        reason = self._measure(BT, self._waiting.pop(BT))
        if reason is not None:
            self._search.skipped[f"BT={BT}"] = reason

    def _compile(self, BT: int) -> Compiles:
        search = self._search
        plans = [x for x in search.plans if self._why_invalid(x, BT) is None]
        return {
            stage: search.context.backend.compile(search.problem, search.default(stage, BT))
            for stage in dict.fromkeys(x for plan in plans for x in PLANS[plan].stages)
        }

    def _why_invalid(self, plan: str, BT: int) -> str | None:
        """Why some stage of a plan cannot serve in such chunks, as is known without a try."""
        search = self._search
        given = (search.default(stage, BT) for stage in PLANS[plan].stages)
        arch = search.context.device.arch
        return next(filter(None, (why_invalid(x, search.problem, arch) for x in given)), None)

    def _measure(self, BT: int, compiles: Compiles) -> str | None:
        """Measure the default of one chunk size; why it cannot serve, or None if it can.

        A plan beside its level's first is left out where its default fails.
        """
        search, plans = self._search, []
        for plan in search.plans:
            reason = self._why_fails(plan, BT, compiles)
            if reason is None:
                plans.append(plan)
            elif is_optional(plan, search.problem.op):
                search.skipped[f"plan {plan}, BT={BT}"] = reason
            else:
                return reason
        stages = dict.fromkeys(x for plan in plans for x in PLANS[plan].stages)
        times: dict[str, dict[str, float]] = {stage: {} for stage in stages}
        for shape in list(search.shapes):
            failed = self._time(plans, BT, shape, times)
            if failed is None:
                continue
            if search.trials or failed.status != outcome.OUT_OF_MEMORY:
                return f"the default cannot be timed at {shape.name}: {failed.reason}"
            # No config can change what the inputs take, so the shape is given up, not the config.
            search.shapes.remove(shape)
            search.skipped[shape.name] = failed.reason
        if not search.shapes:
            return "no shape can be timed"
        self._open(BT, times)
        return None

    def _why_fails(self, plan: str, BT: int, compiles: Compiles) -> str | None:
        """Why a plan's default does not compile or pass the check, filed in the ledger; or None.

        What is known to be invalid there is neither compiled nor run, nor filed.
        """
        search, invalid = self._search, self._why_invalid(plan, BT)
        if invalid is not None:
            return invalid
        for stage in PLANS[plan].stages:
            compiled = compiles[stage].result()
            if not compiled.ok:
                if compiled.lasts:
                    search.file(search.default(stage, BT), compiled.reason)
                return f"the default {stage} does not compile: {compiled.reason}"
        base = search.base(plan, BT)
        checked = right(search.context.backend.check(base, full=False))
        if checked.ok:
            return None
        if checked.lasts:
            search.file_recipe(base, checked.reason)
        return f"the default of plan {plan} fails the check: {checked.reason}"

    def _time(
        self, plans: Sequence[str], BT: int, shape: Shape, times: dict[str, dict[str, float]]
    ) -> Outcome[dict[str, Timing]] | None:
        """Add the default's times at one shape to `times`; what went wrong, or None."""
        search = self._search
        for plan in plans:
            wanted = tuple(x for x in PLANS[plan].stages if shape.name not in times[x])
            if not wanted:
                continue
            timed = search.context.backend.time_stages(search.base(plan, BT), wanted, shape)
            if not timed.ok:
                return timed
            for stage, timing in timed.get().items():
                times[stage][shape.name] = timing.median
        return None

    def _open(self, BT: int, times: dict[str, dict[str, float]]) -> None:
        search = self._search
        opened = search.trials[BT] = {stage: self._trials(stage, BT) for stage in times}
        for stage, found in times.items():
            kept = {shape.name: found[shape.name] for shape in search.shapes}
            search.default_ms[BT, stage] = geometric_mean(list(kept.values()))
            opened[stage].record(search.default(stage, BT), kept)
            search.show_best(opened[stage])
            for start in self._starts(stage, BT):
                opened[stage].suggest_first(start)
        for config in search.seeds:
            if config["BT"] == BT and config.stage in opened:
                opened[config.stage].suggest_first(config)

    def _starts(self, stage: str, BT: int) -> list[Config]:
        """Where each form begins; under strong decay those first whose time does not depend on
        it."""
        search = self._search
        found = [*space.starts(stage, search.problem, search.context.device, BT)]
        if search.context.decay != WEAK:
            found.sort(key=lambda x: not x.form.steady)
        return found

    def _trials(self, stage: str, BT: int) -> StageTrials:
        search, context = self._search, self._search.context
        return StageTrials(
            search.problem,
            stage,
            BT,
            search.shapes,
            context.device,
            context.ledger,
            stage_digest(stage),
            context.storage,
            context.seed,
            context.pattern,
        )
