"""Finalists: recipes of the best stages, checked in full and timed in turns at each shape.

The winner of a search is often noise, so the default and the best few run interleaved, forward and
backward, until their intervals part; what is within 1% of the best ties, and a tie goes to what
serves every option, then to the default, else to what differs from it in the fewest knobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from statistics import mean
from typing import Final

from gdn2gen.base.outcome import Outcome
from gdn2gen.codegen.build import Resources
from gdn2gen.codegen.digests import digest_of
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.plans import PLANS, level_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import CheckResult, full_problem
from gdn2gen.measure.timing import Timing
from gdn2gen.tuning.gpu.attempt import right
from gdn2gen.tuning.records.stored import Stored
from gdn2gen.tuning.search.loop import Search, Window
from gdn2gen.tuning.search.sums import Kept, Sums, any_config, in_triton
from gdn2gen.tuning.search.verdicts import Measured, Verdict, combine, is_decided, pick

_MOST: Final = 6
_MIN_ROUNDS: Final = 3
_MAX_ROUNDS: Final = 12
# A runner-up this close by its own time may well be the better one in the whole.
_CLOSE: Final = 0.05
# Runners-up that compile ahead.
_LIKELY_CLOSE: Final = 2
# Chunk sizes whose stages take this much longer have no chance: sums and whole passes agree to 1%.
_FAR: Final = 1.1
# Neighbours of a config that fails only here were tried, too, and may fail with it.
_MAX_REPAIRS: Final = 12


class Finals:
    """Chooses finalists from a finished search and measures them."""

    def __init__(self, search: Search, stored: Sequence[Stored] = ()) -> None:
        self._search = search
        self._stored = list(stored)
        self._checks: dict[Recipe, CheckResult] = {}
        self._compiles: dict[Config, Future[Outcome[Resources]]] = {}
        self._sums = Sums(search)
        self._won: dict[Shape, Recipe] = {}
        """Who won at each shape for the plan that was first: its stages have proved themselves."""
        self._seconds: list[float] = []
        """What each verdict so far took for each of its finalists."""

    def compile_known(self, turns: Sequence[tuple[Shape, str]]) -> None:
        """Queue the compile of what verdicts to come measure in any case, and do not wait for it.

        Kernels of the full check have states in and out, and nothing of the search serves for them:
        the GPU waited for their compile at every verdict.
        """
        for shape, plan in turns:
            self._compile(self._known(shape, plan))

    def compile_ahead(self, turns: Sequence[tuple[Shape, str]]) -> None:
        """The same, and of what the search holds for the best by now."""
        for shape, plan in turns:
            self._compile(self._likely(shape, plan))

    def is_behind(self, shape: Shape, plan: str) -> bool:
        """Whether a plan need not be decided.

        By its stages it is slower than another of its level, also of what serves every option, and
        no recipe of it is on file.
        """
        if self._on_file(shape, plan):
            return False
        return self._sums.is_behind(shape, plan) and not self._is_widest(shape, plan)

    def _is_widest(self, shape: Shape, plan: str) -> bool:
        """Whether the best recipe that serves every option is of this plan, by its stages."""
        own = not PLANS[plan].instead
        return own and not self._sums.is_behind(shape, plan, self._sums.wide)

    def verdict(self, shape: Shape, plan: str, window: Window) -> Verdict | None:
        """Winner at one shape, or None if nothing passed the full check."""
        progress = self._search.context.progress
        progress.phase(f"finalists at {shape.name}, plan {plan}: check in full")
        started = window.clock()
        finalists = self.choose(shape, plan, self._affordable(window))
        progress.phase(f"finalists at {shape.name}, plan {plan}: {len(finalists)} in turns")
        measured = self._measure(finalists, shape, window)
        if not measured:
            return None  # `why_none` says more.
        self._seconds.append((window.clock() - started) / len(finalists))
        default = next((x for x in measured if x.recipe == self._default(plan)), None)
        winner, tied = pick(measured, self._default(plan))
        alone = [x for x in measured if x.recipe.needs_triton_alone]
        wide = [x for x in measured if x.recipe.serves_every_option]
        in_triton, serving_all = (
            pick(x, self._default(plan))[0] if x else None for x in (alone, wide)
        )
        self._won.setdefault(shape, winner.recipe)
        label = f"{shape.name} {plan} forward+backward"
        default_ms = default.forward_backward.median if default else None
        progress.best_so_far(label, winner.forward_backward.median, default_ms)
        return Verdict(shape, level_of(plan), winner, default, tied, in_triton, serving_all)

    def why_none(self, plan: str) -> str:
        """Why there is no verdict: what the default failed at."""
        found = self._checks.get(self._default(plan))
        if found is None or found.ok:
            return "every finalist failed while it was timed"
        return f"no recipe passed the full check; the default: {found.reason}"

    def _affordable(self, window: Window) -> int:
        """Finalists that the time left is enough for, by what earlier ones took; two at least,
        beside what is on file.
        """
        if not self._seconds:
            return _MOST
        left = window.end - window.clock()
        return max(2, min(_MOST, int(left / max(mean(self._seconds), 1e-9))))

    def choose(self, shape: Shape, plan: str, most: int = _MOST) -> list[Recipe]:
        """The default, what is on file, the best in Triton and the best that serves every option,
        then the best by the sum of their stages; all pass the check.
        """
        sizes = self._sums.sizes(shape, plan)
        best: list[Recipe] = []
        for BT in sizes[: most - 1]:
            sum_ms = self._sums.at(shape, plan, BT)
            if best and sum_ms > _FAR * self._sums.at(shape, plan, best[0].BT):
                break
            found = self._best_passing(shape, plan, BT)
            if found is not None:
                best.append(found)
        known = [*self._known(shape, plan), *self._in_triton(shape, plan)]
        known += self._serving_all(shape, plan)
        chosen = [*known, *self._carried(shape, plan), *best]
        if sizes:
            chosen += self._runners_up(shape, plan, sizes[0])
        unique = list(dict.fromkeys(chosen))[: max(most, 1 + len(set(known)))]
        self._warm(unique)
        return [x for x in unique if self._passes(x)]

    def _on_file(self, shape: Shape, plan: str) -> list[Recipe]:
        """The recipes on file for this shape, two at most, whatever time is left, and of those that
        need Triton alone or serve every option one; those of the problem itself before those of one
        near it, in whatever files they are.

        Without, a search of 37 s over nine stages ended at 0.665 ms (head dim 64, train2k, fast)
        where 0.615 was on file.
        """
        there = [x for x in self._stored if x.is_for(shape, plan)]
        found = [x.recipe for x in sorted(there, key=lambda x: not x.own)]
        alone = [x for x in found if x.needs_triton_alone]
        others = [x for x in found if not x.needs_triton_alone]
        wide = [x for x in others if x.serves_every_option]
        return list(dict.fromkeys([*list(dict.fromkeys(others))[:2], *wide[:1], *alone[:1]]))

    def _in_triton(self, shape: Shape, plan: str) -> list[Recipe]:
        """The best by the sum of its stages of those that need Triton alone."""
        sizes = self._sums.sizes(shape, plan, in_triton)
        best = self._sums.best(shape, plan, sizes[0], in_triton) if sizes else None
        return [best] if best else []

    def _serving_all(self, shape: Shape, plan: str) -> list[Recipe]:
        """The same of those that serve every option, unless another plan has a faster one. What
        fails the check is replaced, as of the best.

        Without, calls with an option ran another size's entry, or Triton alone: of train4k, where
        blocks of two in TileLang won, packed batches took 2.09 ms in place of 1.42.
        """
        if not self._is_widest(shape, plan):
            return []
        BT = self._sums.sizes(shape, plan, self._sums.wide)[0]
        found = self._best_passing(shape, plan, BT, self._sums.wide)
        return [found] if found else []

    def _carried(self, shape: Shape, plan: str) -> list[Recipe]:
        """What won for the plan that was first, completed by this plan's best.

        Where the time is enough for one finalist beside the default, a winner from what was on file
        was lost to a search of few trials: varlen8k took 3.55 ms with 784 bytes a token saved, and
        3.04 without.
        """
        won = self._won.get(shape)
        if won is None:
            return []
        problem = self._search.problem
        # a winner from what was on file may have chunks that were not searched
        found = self._sums.best(shape, plan, won.BT) if won.BT in self._search.trials else None
        best = found or self._search.base(plan, won.BT)
        return [Recipe.of(problem, plan, {**best.by_stage, **won.by_stage})]

    def _default(self, plan: str) -> Recipe:
        return self._search.base(plan)

    def _best_passing(
        self, shape: Shape, plan: str, BT: int, kept: Kept = any_config
    ) -> Recipe | None:
        """Best composition that passes in full; a stage that is to blame is replaced."""
        for _ in range(_MAX_REPAIRS):
            recipe = self._sums.best(shape, plan, BT, kept)
            if recipe is None or self._passes(recipe):
                return recipe
            if not self._withdraw_guilty(recipe):
                return None
        return None

    def _withdraw_guilty(self, recipe: Recipe) -> bool:
        """Find which stage alone fails the full check, and drop its config from the trials."""
        base = self._search.base(recipe.plan.name, recipe.BT)
        found = False
        for config in recipe.configs:
            alone = base.with_config(config)
            if alone != base and not self._passes(alone):
                trials = self._search.trials[recipe.BT][config.stage]
                trials.withdraw(config, self._checks[alone].reason)
                found = True
        return found

    def _runners_up(self, shape: Shape, plan: str, BT: int) -> list[Recipe]:
        """The best recipe with one close second in place of a stage's first."""
        best = self._sums.best(shape, plan, BT)
        if best is None:
            return []
        found = []
        for stage in PLANS[plan].stages:
            ranked = self._sums.ranked(stage, shape, BT)
            if len(ranked) > 1 and ranked[1][1] < ranked[0][1] * (1 + _CLOSE):
                found.append((ranked[0][1], best.with_config(ranked[1][0])))
        return [x for _, x in sorted(found, key=lambda pair: -pair[0])]

    def _passes(self, recipe: Recipe) -> bool:
        """The full check, once per recipe; a failure is filed in the ledger."""
        if recipe not in self._checks:
            self._checks[recipe] = self._check(recipe)
        return self._checks[recipe].ok

    def _check(self, recipe: Recipe) -> CheckResult:
        context = self._search.context
        digest = digest_of(recipe)
        refused = context.ledger.why_recipe_refused(recipe, digest)
        if refused is not None and recipe != self._default(recipe.plan.name):
            return CheckResult(False, {}, refused)
        self._warm([recipe])
        checked = right(context.backend.check(recipe, full=True))
        result = checked.value or CheckResult(False, {}, checked.reason)
        if not checked.ok and checked.lasts:
            context.ledger.add_recipe(result.reason, recipe, digest, result.errors)
        return result

    def _warm(self, recipes: Sequence[Recipe]) -> None:
        """Compile for the full check in parallel; what fails there, the check itself reports."""
        wait(self._compile(recipes))

    def _compile(self, recipes: Sequence[Recipe]) -> list[Future[Outcome[Resources]]]:
        configs = dict.fromkeys(config for recipe in recipes for config in recipe.configs)
        full = full_problem(self._search.problem)
        for config in configs:
            if config not in self._compiles:
                self._compiles[config] = self._search.context.backend.compile(full, config)
        return [self._compiles[config] for config in configs]

    def _known(self, shape: Shape, plan: str) -> list[Recipe]:
        return [self._default(plan), *self._on_file(shape, plan)]

    def _likely(self, shape: Shape, plan: str) -> list[Recipe]:
        """What `choose` will look at, if all of it passes the check."""
        sizes = self._sums.sizes(shape, plan)
        likely = [self._sums.best(shape, plan, BT) for BT in sizes[:1]]
        if self._is_widest(shape, plan):
            wide = self._sums.wide
            likely.append(
                self._sums.best(shape, plan, self._sums.sizes(shape, plan, wide)[0], wide)
            )
        close = self._runners_up(shape, plan, sizes[0])[:_LIKELY_CLOSE] if sizes else []
        known = [*self._known(shape, plan), *self._in_triton(shape, plan)]
        known += self._carried(shape, plan)
        return [*known, *(x for x in likely if x is not None), *close]

    def _measure(self, finalists: Sequence[Recipe], shape: Shape, window: Window) -> list[Measured]:
        """Time in turns: three rounds, then until decided, out of rounds or out of time."""
        rounds: dict[Recipe, list[tuple[Timing, Timing]]] = {x: [] for x in finalists}
        peaks: dict[Recipe, float] = {}
        for number in range(_MAX_ROUNDS):
            for recipe in list(rounds):
                timed = self._search.context.backend.time_recipe(
                    recipe, shape, with_peak=number == 0
                )
                if not timed.ok:
                    del rounds[recipe]
                    self._search.context.progress.phase(f"a finalist fell out: {timed.reason}")
                    continue
                found = timed.get()
                peaks.setdefault(recipe, found.peak_mib)
                rounds[recipe].append((found.forward, found.forward_backward))
            over = window.used >= 1
            if number + 1 >= _MIN_ROUNDS and (over or is_decided(list(rounds.values()))):
                break
        return [
            Measured(
                recipe,
                combine([forward for forward, _ in timings]),
                combine([both for _, both in timings]),
                peaks[recipe],
                self._checks[recipe].errors,
            )
            for recipe, timings in rounds.items()
        ]
