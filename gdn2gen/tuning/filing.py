"""What a verdict or a ranking leaves behind: a line of the report, an entry of the tuned file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gdn2gen.base.decay import WEAK
from gdn2gen.codegen.digests import templates_of
from gdn2gen.family.decays import PATTERN_UNDER, Drawn, name_of
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store import tuned_files
from gdn2gen.tuning.search.verdicts import Measured, Verdict
from gdn2gen.tuning.views.lines import COST, DEFAULT_COST, is_number
from gdn2gen.tuning.views.report import ShapeResult

PATTERN: Final = "pattern"
"""In `measured`, what the decay was drawn by."""
NOTE: Final = (
    "predicted: compiled for the target, checked in fp32 in Triton's interpreter and ranked by "
    "registers, spills, shared memory and bytes; nothing ran on a GPU, so no time is known and "
    "16-bit rounding and races were not checked. To measure, run it on that GPU without --target."
)


def result_of(verdict: Verdict) -> ShapeResult:
    winner, default = verdict.winner, verdict.default
    return ShapeResult(
        shape=verdict.shape,
        level=verdict.level,
        recipe=winner.recipe,
        forward_ms=winner.forward.median,
        forward_backward_ms=winner.forward_backward.median,
        default_forward_backward_ms=default.forward_backward.median if default else None,
        spread=winner.forward_backward.spread,
        peak_mib=winner.peak_mib,
        errors=winner.errors,
        tied=verdict.tied,
    )


def entries_of(
    verdict: Verdict, decay: str = WEAK, pattern: Drawn | None = None
) -> list[tuned_files.Entry]:
    """The winner's; if it does not need Triton alone, that of the best which does, and if it does
    not serve every option, that of the best which does. Timed by `pattern`, by default that
    for calls that expect such a decay."""
    drawn = PATTERN_UNDER[decay] if pattern is None else pattern
    filed = (verdict.winner, verdict.in_triton, verdict.serving_all)
    found = {x.recipe: x for x in filed if x is not None}
    return [
        entry_for(
            x.recipe,
            verdict.shape,
            measured=_measured(x, verdict.default) | _drawn_by(drawn, decay),
            gate={name: float(f"{error:.3g}") for name, error in x.errors.items()},
            provenance="measured",
            decay=decay,
        )
        for x in found.values()
    ]


def entry_for(
    recipe: Recipe,
    shape: Shape,
    *,
    measured: Mapping[str, Any],
    gate: Mapping[str, Any],
    provenance: tuned_files.Provenance,
    decay: str = WEAK,
) -> tuned_files.Entry:
    """A recipe as the entry of its plan's level at a shape."""
    return tuned_files.Entry(
        problem_key=recipe.problem.key,
        regime_key=shape.regime.key,
        level=recipe.level,
        plan=recipe.plan.name,
        configs=recipe.by_stage,
        templates=templates_of(recipe),
        measured=measured,
        gate=gate,
        provenance=provenance,
        decay=decay,
    )


def _drawn_by(pattern: Drawn, decay: str) -> dict[str, str]:
    """Of entries for strong decay: what their times were taken under."""
    return {} if decay == WEAK else {PATTERN: name_of(pattern)}


def _measured(winner: Measured, default: Measured | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "forward_ms": round(winner.forward.median, 5),
        "forward_backward_ms": round(winner.forward_backward.median, 5),
        "spread": round(winner.forward_backward.spread, 4),
        "peak_mib": round(winner.peak_mib, 1),
        "n": winner.forward_backward.n,
    }
    if default is not None:
        found["default_forward_ms"] = round(default.forward.median, 5)
        found["default_forward_backward_ms"] = round(default.forward_backward.median, 5)
    return found


def predicted_of(
    recipe: Recipe, shape: Shape, level: str, cost: float, default_cost: float
) -> ShapeResult:
    """A recipe that was ranked without a GPU, by its cost and the default's."""
    return ShapeResult(
        shape=shape,
        level=level,
        recipe=recipe,
        forward_ms=None,
        forward_backward_ms=None,
        default_forward_backward_ms=None,
        spread=None,
        peak_mib=None,
        errors={},
        note=NOTE,
        predicted_bytes=cost,
        default_predicted_bytes=default_cost,
    )


def predicted_entry(result: ShapeResult) -> tuned_files.Entry:
    costs = {COST: result.predicted_bytes, DEFAULT_COST: result.default_predicted_bytes}
    return entry_for(
        result.recipe,
        result.shape,
        measured={name: round(x) for name, x in costs.items() if is_number(x)},
        gate={"checked": "interpreter, fp32"},
        provenance="predicted",
    )
