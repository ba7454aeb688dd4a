"""Cases for every template in Triton's interpreter, over plans, knobs, flags and patterns.

`gdn2gen verify` runs every option with the default configs; these run the options again with
configs off the default. `run` needs TRITON_INTERPRET=1 before triton is imported, so the tests call
it in a process of its own.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import not_finite
from torch import Tensor

from gdn2gen.base.errors import UnsupportedError
from gdn2gen.family.inputs import PATTERNS
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import OUTSIDE_OPS, RECURRENCES
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.operands import GIVEN_SEQUENCES
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.measure.accuracy import public_op, relative_errors, run_op, run_reference
from gdn2gen.measure.case_runs import Result, case_inputs, run_case
from gdn2gen.measure.cases import Case
from gdn2gen.measure.timing import call_of
from gdn2gen.runtime import call as calls
from gdn2gen.runtime import runner
from gdn2gen.runtime.passes import poisoned
from gdn2gen.store.dispatch import forced_recipe


@dataclass(frozen=True)
class KernelCase:
    """A case of the accuracy suite, and the plan and knobs that it is run with."""

    case: Case
    plan: str
    knobs: tuple[tuple[str, int | str], ...]
    """Given to every stage that has a knob of that name; the others keep their defaults."""
    segment: int = calls.SEGMENT
    """Chunks of a segment, at least."""
    slow: bool = False
    """Whether it does in other sizes what another case does."""

    @property
    def name(self) -> str:
        words = [f"{name}{value}" for name, value in self.knobs]
        return "-".join([self.case.name, self.plan, *words])

    @property
    def limit(self) -> float:
        """Relative error (norm of the difference over norm of the reference) that it may have."""
        if self.case.problem.dtype == "fp16":
            # worst found: correlated 2.2e-3, else 8.7e-4
            return 6e-3 if self.case.pattern == "correlated" else 3e-3
        if not self.case.problem.l2norm and RECURRENCES[self.case.problem.op].erases:
            return 3e-5  # 9.7e-6: the recurrence explodes where keys are not normalised
        if self.case.problem.has_A_log or self.case.problem.has_rate:
            return 2e-5  # dA_log 1.3e-5: a sum that cancels, of what is right to 3e-6
        return 1e-5  # strong 7.0e-6, uniform and sparse 5.1e-6, else 3.4e-6

    @property
    def recipe(self) -> Recipe:
        problem = self.case.problem
        configs: dict[str, Config] = {}
        for stage in PLANS[self.plan].stages:
            config = default_config(stage, problem)
            for name, value in self.knobs:
                if value in STAGES[stage].domains.get(name, ()):
                    given = config.replace(**{name: value})
                    if name == "decay" and value in ("anchored", "bounded") and stage == "grad_key":
                        given = given.replace(BV=min(covering(problem.V), 128), chunks=4)
                    config = config if why_invalid(given, problem) else given
            configs[stage] = config
        return Recipe.of(problem, self.plan, configs)


def run(name: str) -> Result:
    """Run the case of that name; buffers are NaN before the kernels write them."""
    case = BY_NAME[name]
    with forced_recipe(case.recipe), _segments_of(case.segment):
        return run_case(case.case, "cpu")


@contextmanager
def _segments_of(chunks: int) -> Iterator[None]:
    """Inside, segments have at least so many chunks: a few do what 32 do, in less time."""
    before, calls.SEGMENT = calls.SEGMENT, chunks
    try:
        yield
    finally:
        calls.SEGMENT = before


def _shape(B: int, T: int, HV: int, cu_seqlens: tuple[int, ...] | None = None) -> Shape:
    return Shape(f"{B}x{T}x{HV}", B, T, HV, cu_seqlens)


# Of GDN-2, whose kernels the cases are of but where they name another member.
_IN_TRITON: Final = tuple(x for x in RECURRENCES["gdn2"].plans if not PLANS[x].instead)
_PLANS: Final = tuple(x for x in _IN_TRITON if PLANS[x].every == 0)
# Plan, chunk size and decay in full product, the plan first so that neighbours differ in it; the
# tiles follow along.
_KNOBS: Final = tuple(
    (plan, (("BT", BT), ("decay", decay), ("BK", BK), ("BV", BV)))
    for (BT, decay, plan), (BK, BV) in zip(
        itertools.product((16, 32, 64), ("log", "tree", "anchored"), _PLANS),
        itertools.cycle(((32, 32), (64, 16), (32, 64), (128, 128), (64, 32))),
        strict=False,
    )
)
# All but a Latin square of these, in which every two of plan, chunk size and decay meet once.
_NOT_PAIRED: Final = tuple((i + i // 3 + i // 9) % 3 != 0 for i in range(len(_KNOBS)))
_STATES: Final = Problem(K=32, V=32, dtype="fp32", initial_state=True, final_state=True)
BOUNDED: Final = ("decay", "bounded")


def _cases() -> Iterator[KernelCase]:
    """The knobs on one problem; then options, sizes and patterns, each with the next knobs."""
    knobs = itertools.cycle(_KNOBS)

    def with_next(case: Case) -> KernelCase:
        return KernelCase(case, *next(knobs))

    wide = replace(_STATES, K=64, V=32)
    for (plan, chosen), slow in zip(_KNOBS, _NOT_PAIRED, strict=True):
        yield KernelCase(Case("knobs", wide, _shape(1, 70, 1)), plan, chosen, slow=slow)

    softplus = replace(_STATES, gate="softplus", has_A_log=True)
    sigmoid = replace(_STATES, gate="sigmoid")
    packed = _shape(1, 70, 1, (0, 0, 30, 30, 31, 70, 70))
    options = {
        "stateless": replace(_STATES, initial_state=False, final_state=False),
        "initial-only": replace(_STATES, final_state=False),
        "final-only": replace(_STATES, initial_state=False),
        "no-l2norm": replace(_STATES, l2norm=False),
        "softplus": softplus,
        "softplus-bias": replace(softplus, has_dt_bias=True, l2norm=False),
        "sigmoid": sigmoid,
        "sigmoid-A_log": replace(sigmoid, has_A_log=True),
        "sigmoid-bias": replace(sigmoid, has_dt_bias=True),
        "sigmoid-A_log-bias": replace(sigmoid, has_A_log=True, has_dt_bias=True),
        "v-first": replace(_STATES, V=64, state_v_first=True),
    }
    for name, problem in options.items():
        # of one head a gradient of what heads share would be one number, of what cancels
        heads = 1 + (problem.has_A_log or problem.has_dt_bias)
        for _ in range(2):
            yield with_next(Case(name, problem, _shape(1, 40, heads)))
    full = replace(softplus, has_dt_bias=True, varlen=True, V=64, state_v_first=True)
    for name, problem in (("packed", replace(_STATES, varlen=True)), ("packed-all", full)):
        for _ in range(3):
            yield with_next(Case(name, problem, packed))
    # 34 chunks of 16 tokens: the backward starts from two segments, as large as they always are
    long = Case("segments-of-32", _STATES, _shape(1, 530, 1))
    yield KernelCase(long, _PLANS[0], (("BT", 16), ("BV", 32)), slow=True)
    # three segments, of two chunks and one; of plans, also of 5, 5 and 4
    parallel = (("BT", 16), ("BV", 16), ("segments", "parallel"))
    for plan in _PLANS:
        long = Case("segments", _STATES, _shape(1, 75, 1))
        yield KernelCase(long, plan, (("BT", 16), ("BV", 32)), 2)
        long = Case("parallel", replace(_STATES, V=64), _shape(1, 212, 1))
        tiles = (("BT", 16), ("BV", 32), ("segments", "parallel"))
        yield KernelCase(long, plan, tiles, 5, slow=plan != "lean")
        short = Case("parallel-short", replace(_STATES, V=64), _shape(1, 75, 1))
        yield KernelCase(short, plan, tiles, 2, slow=plan == "lean")
    options = {
        "v-first": replace(_STATES, state_v_first=True),
        "stateless": replace(_STATES, initial_state=False, final_state=False),
        "fp16": replace(_STATES, dtype="fp16"),
    }
    for name, problem in options.items():
        long = Case(f"parallel-{name}", problem, _shape(1, 75, 2))
        yield KernelCase(long, "lean", parallel, 2)
    for name, problem in (("grouped", _STATES), ("grouped-all", replace(full, varlen=False))):
        yield with_next(Case(name, problem, _shape(2, 20, 4), H=2))
        yield with_next(Case(f"{name}-gates", problem, _shape(1, 20, 4), H=2, HG=2))
    for K, V in ((32, 64), (64, 32), (32, 128), (128, 32), (64, 128), (128, 64)):
        yield with_next(Case(f"K{K}-V{V}", replace(_STATES, K=K, V=V), _shape(1, 33, 1)))
    yield from _size_cases()
    for T in (1, 15, 16, 64):
        for _ in range(2):
            yield with_next(Case(f"T{T}", _STATES, _shape(2, T, 1)))
    v_first = replace(_STATES, V=64, state_v_first=True)
    for name, problem in (("T0", _STATES), ("T0-v-first", v_first)):
        yield with_next(Case(name, problem, _shape(2, 0, 1), check="empty"))
    yield with_next(Case("T0-grouped", _STATES, _shape(2, 0, 4), H=2, check="empty"))

    for pattern in PATTERNS:
        for plan, BT, decay, slow in (
            ("lean", 64, "log", True),
            ("fast", 16, "tree", False),
            ("fast", 32, "tree", True),
            ("lean", 32, "anchored", False),
            ("fast", 64, "anchored", False),
        ):
            case = Case(pattern, _STATES, _shape(1, 70, 1), pattern=pattern)
            yield KernelCase(case, plan, (("BT", BT), ("decay", decay)), slow=slow)
        half = replace(wide, dtype="fp16", gate_dtype="fp16" if pattern == "layer" else "fp32")
        yield with_next(Case(f"fp16-{pattern}", half, _shape(1, 70, 1), pattern=pattern))

    for (plan, chosen), slow in zip(_KNOBS, _NOT_PAIRED, strict=True):
        case = Case("causality", _STATES, _shape(1, 22, 1), check="causality")
        yield KernelCase(case, plan, chosen, slow=slow)
    yield from _bounded_cases()
    yield from _cases_of_blocks()
    yield from _cases_of_outside_blocks()

    yield from _cases_of_transitions()
    yield from _cases_of_less()
    yield from _cases_of_groups()
    chunks = Case("causality-chunks", replace(_STATES, dtype="fp16"), _shape(1, 70, 1))
    yield with_next(replace(chunks, check="causality"))
    yield with_next(replace(chunks, name="repeat", check="repeat"))


# No powers of two: one slice and a part of one, two, two and a part, the largest.
_SIZES: Final = ((16, 24), (40, 72), (48, 16), (80, 112), (96, 96), (104, 40), (200, 16), (16, 344))


def _size_cases() -> Iterator[KernelCase]:
    """Sizes that tiles are not as wide as: what lies past them is NaN, or another head's."""
    for (K, V), gated, (plan, chosen) in zip(
        _SIZES, itertools.cycle((False, True)), itertools.cycle(_KNOBS), strict=False
    ):
        problem = replace(_STATES, K=K, V=V)
        if gated:
            gates = {"gate": "softplus", "has_A_log": True, "has_dt_bias": True}
            problem = replace(problem, state_v_first=True, **gates)
        case = Case(f"K{K}-V{V}", problem, _shape(1, 35, 2), pattern="mixed")
        yield KernelCase(case, plan, chosen)
    # beta's gradient in slices, the last of which is a part; and one frame a chunk
    tied = replace(_STATES, op="kda", K=104, V=40, beta_sigmoid=True)
    yield KernelCase(Case("kda-K104-V40", tied, _shape(1, 35, 2)), "lean", (("BK", 32),))
    bounded = replace(_STATES, K=72, V=24, gate="sigmoid", bound=2)
    odd = Case("bounded-K72-V24", bounded, _shape(1, 70, 1), pattern="strong")
    yield KernelCase(odd, "fast", (("BT", 32), BOUNDED))
    # a decay outside of products: parallel scans and gates of one number a head, packed, in fp16
    outside = replace(_STATES, op="gated_delta_rule", K=40, V=24)
    gates = {"gate": "softplus", "has_A_log": True, "has_dt_bias": True, "beta_sigmoid": True}
    # three segments, of two chunks and one
    parallel = (("BT", 16), ("BV", 16), ("segments", "parallel"))
    for plan in ("direct", "direct_states"):
        long = Case("outside-parallel", outside, _shape(1, 75, 1))
        yield KernelCase(long, plan, parallel, 2)
        packed = replace(outside, varlen=True, **gates)
        ends = _shape(1, 70, 2, (0, 0, 30, 30, 31, 70, 70))
        yield KernelCase(Case("outside-packed", packed, ends, "mixed"), plan, (("BT", 32),))
        wide = Case("outside-64", replace(outside, dtype="fp16"), _shape(2, 75, 2), H=1)
        yield KernelCase(wide, plan, (("BT", 64), ("BK", 16)))
    for K, V in ((40, 24), (96, 40)):
        long = Case(f"parallel-K{K}-V{V}", replace(_STATES, K=K, V=V), _shape(1, 75, 1))
        yield KernelCase(long, "fast", parallel, 2)


def _cases_of_blocks() -> Iterator[KernelCase]:
    """Plans whose states are made again: blocks that end early, in either direction, and all else.

    Stages of blocks of 1, 2 and 4 chunks are one template: the first three cases are of one each.
    """
    gates = {"gate": "softplus", "has_A_log": True, "has_dt_bias": True}
    packed = replace(_STATES, varlen=True, state_v_first=True, **gates)
    ends = _shape(1, 70, 2, (0, 0, 34, 34, 35, 70, 70))
    small, whole = (("BT", 16), ("BK", 32)), (("BT", 32), ("BK", 64))
    wide = replace(_STATES, K=64)
    for name, problem, shape, pattern, plan, knobs in (
        ("packed", packed, ends, "sparse", "blocks2", small),
        ("strong", wide, _shape(1, 70, 1), "strong", "blocks4_states", small),
        ("stateless", replace(_STATES, **_NO_STATES), _shape(1, 40, 1), "layer", "blocks1", whole),
    ):
        yield KernelCase(Case(f"blocks-{name}", problem, shape, pattern), plan, knobs)
    # the largest bound that chunks of 32 take
    bounded = replace(_STATES, gate="sigmoid", bound=2)
    half = replace(wide, dtype="fp16", **_NO_STATES)
    odd = replace(_STATES, K=80, V=40)
    tied = replace(_STATES, op="kda", K=64, beta_sigmoid=True, varlen=True)
    parallel = (("BT", 16), ("BV", 16), ("segments", "parallel"))
    for plan in (x for x in _IN_TRITON if PLANS[x].every):
        for name, problem, shape, pattern, knobs, segment in (
            ("packed-16", packed, ends, "mixed", small, 32),
            ("bounded-32", bounded, _shape(1, 200, 1), "strong", (("BT", 32), BOUNDED), 32),
            ("fp16", half, _shape(1, 100, 2), "uniform", whole, 32),
            ("parallel", _STATES, _shape(1, 212, 1), "layer", parallel, 5),
            ("odd-64", odd, _shape(1, 75, 1), "strong", (("BT", 64), ("BK", 32)), 32),
            ("tied", tied, ends, "sparse", small, 32),
        ):
            case = Case(f"blocks-{name}", problem, shape, pattern)
            yield KernelCase(case, plan, knobs, segment, slow=True)
        causal = Case("blocks-causality", _STATES, _shape(1, 22, 1), check="causality")
        yield KernelCase(causal, plan, small, slow=True)


def _cases_of_outside_blocks() -> Iterator[KernelCase]:
    """The same of a decay outside of products, or none; head dims past 128 are in two slices."""
    gates = {"gate": "softplus", "has_A_log": True, "has_dt_bias": True, "beta_sigmoid": True}
    gated = replace(_STATES, op="gated_delta_rule", K=40, V=24)
    packed = replace(gated, varlen=True, state_v_first=True, **gates)
    ends = _shape(1, 70, 2, (0, 0, 34, 34, 35, 70, 70))
    half = replace(gated, dtype="fp16", **_NO_STATES)
    parallel = (("BT", 16), ("BV", 16), ("segments", "parallel"))
    small = (("BT", 16),)
    served = RECURRENCES["gated_delta_rule"].plans
    for plan in (x for x in served if PLANS[x].every and not PLANS[x].instead):
        lean = not plan.endswith("_states")
        for name, problem, shape, pattern, knobs, segment, slow in (
            ("packed", packed, ends, "mixed", small, 32, False),
            ("fp16", replace(half, K=64), _shape(2, 75, 2), "layer", small, 32, lean),
            ("strong", half, _shape(1, 75, 1), "strong", (("BT", 32),), 32, lean),
            ("parallel", gated, _shape(1, 140, 1), "zero", parallel, 3, lean),
            ("wide", replace(half, K=160), _shape(1, 75, 1), "layer", small, 32, True),
            ("plain", replace(gated, l2norm=False), _shape(1, 75, 1), "uniform", small, 32, True),
            ("64", half, _shape(1, 150, 1), "sparse", (("BT", 64),), 32, True),
        ):
            heads = {"H": 1} if name == "fp16" else {}
            case = Case(f"outside-blocks-{name}", problem, shape, pattern, **heads)
            yield KernelCase(case, plan, knobs, segment, slow)
        causal = Case("outside-blocks-causality", gated, _shape(1, 22, 1), check="causality")
        yield KernelCase(causal, plan, small, slow=True)
    plain = replace(_STATES, op="delta_rule", K=40, V=24)
    for plan, problem, shape in (
        ("direct_blocks1", plain, _shape(1, 75, 1)),
        ("direct_blocks2_states", replace(plain, varlen=True), ends),
    ):
        yield KernelCase(Case("delta_rule-blocks", problem, shape), plan, small)


def _cases_of_transitions() -> Iterator[KernelCase]:
    """Segments whose transitions are kept: none, one and two, of two sequences and heads."""
    wide = replace(_STATES, K=64, V=64)
    tied = replace(wide, op="kda", V=128, beta_sigmoid=True, state_v_first=True)
    uneven = replace(wide, V=128, **_NO_STATES)
    direct = replace(wide, op="gated_delta_rule")
    for name, problem, shape, pattern, BT, segment in (
        ("three", wide, _shape(1, 75, 2), "mixed", 16, 2),
        ("one", wide, _shape(1, 20, 1), "layer", 16, 2),
        ("two", tied, _shape(1, 70, 1), "strong", 32, 2),
        ("four", uneven, _shape(2, 212, 1), "sparse", 64, 1),
        ("outside", direct, _shape(1, 75, 2), "mixed", 16, 2),
        ("outside-two", replace(direct, V=128), _shape(1, 70, 1), "strong", 32, 2),
        ("outside-four", replace(direct, op="delta_rule"), _shape(2, 212, 1), "zero", 64, 1),
    ):
        case = Case(f"transitions-{name}", problem, shape, pattern)
        outside = problem.op in OUTSIDE_OPS
        for plan in ("blocks2_transitions", "blocks2_states_transitions"):
            slow = (name, plan) != ("three", "blocks2_transitions")
            plan = f"direct_{plan}" if outside else plan
            yield KernelCase(case, plan, (("BT", BT), ("BV", 32), ("BK", 32)), segment, slow=slow)


_NO_STATES: Final = {"initial_state": False, "final_state": False}


def _cases_of_less() -> Iterator[KernelCase]:
    """Members that lack a decay, or erase nothing: every plan and form of theirs."""
    ends = _shape(1, 45, 2, (0, 0, 20, 20, 21, 45, 45))
    # three segments, of two chunks and one
    parallel = (("BT", 16), ("BV", 16), ("segments", "parallel"))
    plain = replace(_STATES, op="delta_rule", K=40, V=24)
    for problem, plans in (
        (plain, ("direct", "direct_states")),
        (_linear("simple_gla", 40, 24), ("linear_direct", "linear_direct_states")),
    ):
        op = problem.op
        long = Case(f"{op}-parallel", problem, _shape(1, 75, 1))
        yield KernelCase(long, plans[0], parallel, 2)
        half = Case(f"{op}-grouped", replace(problem, dtype="fp16"), _shape(1, 75, 2), H=1)
        yield KernelCase(half, plans[1], (("BT", 64), ("BK", 16)))
        packed = Case(f"{op}-packed", replace(problem, varlen=True), ends, "sparse")
        yield KernelCase(packed, plans[0], (("BT", 32),))
        causal = Case(f"{op}-causality", problem, _shape(1, 22, 1), check="causality")
        yield KernelCase(causal, plans[1], (("BT", 16),))
    gla = _linear("gla", 40, 24)
    for plan, BT, decay in (
        ("linear", 16, "log"), ("linear_fast", 32, "tree"), ("linear_states", 64, "anchored")
    ):  # fmt: skip
        knobs = (("BT", BT), ("decay", decay), ("BK", 32), ("BV", 16))
        yield KernelCase(Case("gla", gla, _shape(1, 70, 1)), plan, knobs)
    yield KernelCase(Case("gla-parallel", gla, _shape(1, 75, 1)), "linear_states", parallel, 2)
    anchored = (("BT", 32), ("decay", "anchored"))
    yield KernelCase(Case("gla-strong", gla, _shape(1, 45, 1), "strong"), "linear", anchored)
    causal = Case("gla-causality", gla, _shape(1, 22, 1), check="causality")
    yield KernelCase(causal, "linear", anchored)
    packed = Case("gla-packed", replace(gla, varlen=True, state_v_first=True), ends, "sparse")
    yield KernelCase(packed, "linear_fast", anchored)
    half = Case("gla-grouped", replace(gla, dtype="fp16"), _shape(1, 45, 2), H=1, HG=1)
    yield KernelCase(half, "linear", (("BT", 64), ("decay", "tree")))


def _cases_of_groups() -> Iterator[KernelCase]:
    """Heads that share the scores of a group, in programs of two of its three; every stage."""
    plain = replace(_linear("mamba2", 40, 24), has_rate=True)
    full = replace(plain, gate="softplus", has_dt_bias=True, has_D=True, has_z=True)
    knobs = (("BT", 16), ("BK", 32), ("BV", 16), ("heads", 2))
    # three segments, of two chunks and one
    yield KernelCase(Case("groups", full, _shape(1, 75, 6), H=2), "grouped", knobs, 2)
    yield KernelCase(Case("groups-plain", plain, _shape(2, 45, 6), H=2), "grouped", knobs)
    # where each slice of channels makes pairs of tokens anew, and the gate waits for the scan
    inside = (*knobs, ("pairs", "inside"), ("gating", "inside"))
    yield KernelCase(Case("groups", full, _shape(1, 45, 6), H=2), "grouped", inside)
    ends = _shape(1, 45, 6, (0, 0, 20, 20, 21, 45, 45))
    # values in two slices, and more of them than channels of a program
    packed = replace(full, V=40, varlen=True, state_v_first=True)
    packed_knobs = (("BT", 32), ("BK", 32), ("heads", 1))
    yield KernelCase(Case("groups-packed", packed, ends, "sparse", H=3), "grouped", packed_knobs)
    # values in two slices, no more of them than channels of a program
    half = replace(full, V=40, dtype="fp16", gate_dtype="bf16")
    yield KernelCase(Case("groups-fp16", half, _shape(1, 75, 4), H=1), "grouped", (("BT", 64),))
    causal = Case("groups-causality", full, _shape(1, 22, 2), check="causality")
    yield KernelCase(causal, "grouped", knobs)


def _linear(op: str, K: int, V: int) -> Problem:
    """Of a member that erases nothing; its kernels normalise nothing, either."""
    return Problem(op=op, K=K, V=V, dtype="fp32", initial_state=True, final_state=True)


def _bounded_cases() -> Iterator[KernelCase]:
    """Decays close to the gate's bound, the largest that each chunk size takes."""
    sigmoid = replace(_STATES, gate="sigmoid", bound=2)

    def case(
        name: str, problem: Problem, plan: str, BT: int, slow: bool = False, **changes: Any
    ) -> KernelCase:
        made = Case(f"bounded-{name}", problem, _shape(1, 70, 1), pattern="strong")
        return KernelCase(replace(made, **changes), plan, (("BT", BT), BOUNDED), slow=slow)

    gated = replace(sigmoid, has_A_log=True, has_dt_bias=True)
    # dA_log of one head would be one number, of what cancels
    packed = _shape(1, 70, 4, (0, 0, 30, 30, 31, 70, 70))
    # what decays is in kernels that all plans have: each of them says two of the six, in turn
    for i, plan in enumerate(_PLANS):
        first, second, third = (i != x for x in range(3))
        yield case("16", replace(sigmoid, K=64, bound=4), plan, 16, first)
        yield case("32", replace(sigmoid, V=64), plan, 32, second)
        yield case("64", replace(sigmoid, bound=1), plan, 64, third)
        yield case("gated", gated, plan, 32, first)
        yield case("packed", replace(gated, varlen=True), plan, 32, second, shape=packed)
        yield case("causality", sigmoid, plan, 32, third, check="causality")
    # 64 bits, without the norm
    yield case("no-l2norm-16", replace(sigmoid, l2norm=False), "lean", 16)
    yield case("no-l2norm-32", replace(sigmoid, l2norm=False, bound=1), "fast", 32)
    yield case("grouped", gated, "lean", 32, shape=_shape(2, 20, 4), H=2, HG=2)
    yield case("layer", gated, "fast", 32, pattern="layer")


CASES: Final = tuple(_cases())
BY_NAME: Final = {case.name: case for case in CASES}


def run_bf16(
    pattern: str, plan: str, BT: int, gate: str = "none", bound: int = 0, decay: str = ""
) -> Result:
    """The accuracy suite's check in bf16; the test holds its errors to bounds of their own."""
    problem = Problem(K=64, V=64, gate=gate, bound=bound)
    knobs = (("BT", BT), *((("decay", decay),) if decay else ()))
    case = Case("bf16", problem, _shape(1, 70, 2), pattern=pattern)
    with forced_recipe(KernelCase(case, plan, knobs).recipe):
        return run_case(case, "cpu")


# Values that no pattern draws


@dataclass(frozen=True)
class Extreme:
    """A change of the inputs, and the error that outputs and gradients may have after it."""

    problem: Problem
    change: Callable[[dict[str, Tensor]], None]
    limit: float = 1e-5


def later_rows(pattern: str, packed: bool) -> dict[str, float]:
    """What later_frames_kernel, the Triton part of the TileLang prepare, makes of A and Aqk.

    They are given as the Triton prepare makes them, with NaN where some channel is out of the first
    frame and 7 elsewhere. Returns by name the relative error of the rows that were NaN, "rows" how
    many there were, and "moved" how many elements of the others changed.
    """
    import torch

    from gdn2gen.codegen.build import load
    from gdn2gen.codegen.render import render
    from gdn2gen.kernels.recipe import Recipe

    problem = Problem(K=64, V=64, varlen=packed)
    shape = _shape(1, 70, 2, (0, 21, 21, 70) if packed else None)
    inputs, _ = case_inputs(Case("later", problem, shape, pattern), "cpu")
    loaded = runner.Runner(Recipe.default(problem))
    call = call_of(problem, shape, torch.device("cpu"))
    given = {**inputs}
    if packed:
        given[GIVEN_SEQUENCES] = given.pop("cu_seqlens")
    names = [x.name for x in STAGES["prepare"].outputs]
    right = loaded.sized_pass(("prepare",), problem, call, (*names, "chunk_table")).run(given)
    given |= {"chunk_table": right.pop("chunk_table")} if packed else {}

    config = default_config("prepare", problem).replace(
        language="tilelang", BK=64, num_warps=4, solve="ieee"
    )
    module = load(render(problem, "prepare", config))
    module.compiled = lambda: lambda *_: None
    later = _out_of_frame(inputs["g"], given.get("chunk_table"), loaded.BT)
    made = {name: x.clone() for name, x in right.items()}
    for name in ("A", "Aqk"):
        made[name] = torch.where(later[..., None], torch.nan, 7.0).expand(right[name].shape)
        made[name] = made[name].to(right[name].dtype).contiguous()
    operands = {x.name for x in config.operands(problem)}
    asked = {"n_chunks", *STAGES["prepare"].scalars}
    scalars = {x: y for x, y in call.scalars(loaded.BT).items() if x in asked}
    module.launch(**{x: y for x, y in {**given, **made}.items() if x in operands}, **scalars)
    found = {"rows": float(later.sum())}
    found["moved"] = float(sum((made[x][~later] != 7.0).sum() for x in ("A", "Aqk")))
    exact = {name: right[name][later] for name in ("A", "Aqk")}
    return found | relative_errors({name: made[name][later] for name in exact}, exact)


def _out_of_frame(g: Tensor, chunk_table: Tensor | None, BT: int) -> Tensor:
    """[NT, HV, BT]: rows in which some channel has lost more than 2^-96 since the chunk's start."""
    import torch

    rows = []
    starts = [(t, min(BT, g.shape[1] - t)) for t in range(0, g.shape[1], BT)]
    for start, n_rows in starts if chunk_table is None else chunk_table.tolist():
        G = torch.zeros(BT, *g.shape[2:])
        G[:n_rows] = g[0, start : start + n_rows].float() / math.log(2.0)
        lowest = G.clamp(min=-150.0).cumsum(0).amin(-1)
        rows.append((lowest < -96.0).T & (n_rows > 0))
    return torch.stack(rows)


def run_extreme(name: str, plan: str, knobs: tuple[tuple[str, int | str], ...]) -> dict[str, float]:
    """Relative errors of the outputs and gradients."""
    from gdn2gen.ops.chunk import chunk_gdn2

    extreme = EXTREMES[name]
    case = KernelCase(Case(name, extreme.problem, _shape(1, 40, 1), "layer"), plan, knobs)
    inputs, gradients = case_inputs(case.case, "cpu")
    extreme.change(inputs)
    with poisoned(), forced_recipe(case.recipe):
        results = run_op(chunk_gdn2, extreme.problem, inputs, gradients)
    return relative_errors(results, run_reference(extreme.problem, inputs, gradients))


NOT_FINITE: Final[dict[str, tuple[Problem, str, tuple[tuple[str, int | str], ...]]]] = {
    "log": (_STATES, "lean", (("decay", "log"),)),
    "anchored": (replace(_STATES, gate="softplus", has_A_log=True), "states", ()),
    "bounded": (
        replace(_STATES, gate="sigmoid", has_dt_bias=True, bound=2),
        "fast",
        (BOUNDED,),
    ),
    "parallel": (_STATES, "fast", (("decay", "tree"), ("BV", 32), ("segments", "parallel"))),
    "packed": (replace(_STATES, varlen=True), "lean", (("decay", "anchored"),)),
    "kda-log": (replace(_STATES, op="kda"), "lean", (("decay", "log"),)),
    "kda-packed": (
        replace(_STATES, op="kda", varlen=True, beta_sigmoid=True, neg_eigval=True),
        "fast",
        (("decay", "anchored"),),
    ),
}


def run_not_finite(name: str) -> list[str]:
    """What is wrong with where NaN comes out; segments are of one chunk."""
    problem, plan, knobs = NOT_FINITE[name]
    named = Case(name, problem, _shape(1, 40, 1))
    recipe = KernelCase(named, plan, (("BT", 16), *knobs)).recipe
    chosen = [x for x in not_finite.spots(problem) if x.name not in ("q", "k", "b", "w")]
    op = public_op(problem.op)
    with forced_recipe(recipe), _segments_of(1):
        return not_finite.faults(
            problem, 16, lambda *given: run_op(op, problem, *given), "cpu", chosen
        )


def run_half_range(state: float, gradient: float, scale: float = 1.0) -> dict[str, float]:
    """Errors in fp16 where a state and a gradient of it have these largest values.

    With `scale`, of what is computed from v and the initial state by so much less, and from the
    gradient by so much more. "finite" is the part of o that is, "moved" how far that is off.
    """
    import torch

    from gdn2gen.ops.chunk import chunk_gdn2

    problem = replace(_STATES, dtype="fp16", gate_dtype="fp32")
    case = KernelCase(Case("half", problem, _shape(1, 70, 1), "zero"), "lean", (("BT", 32),))
    inputs, grads = case_inputs(case.case, "cpu")
    inputs["initial_state"] *= state / inputs["initial_state"].abs().max()
    grads["o"].zero_()
    grads["final_state"] *= gradient / grads["final_state"].abs().max()
    exact = run_reference(problem, inputs, grads)
    for name in ("v", "initial_state"):
        inputs[name] = inputs[name] / scale
    grads["final_state"] = grads["final_state"] * scale
    with forced_recipe(case.recipe):
        results = run_op(chunk_gdn2, problem, inputs, grads)
    whole = ("o", "final_state", "dinitial_state")
    powers = dict(zip(whole, (scale, scale, 1 / scale), strict=True))
    found = {name: results[name].double() * powers[name] for name in whole}
    finite = found["o"].isfinite()
    off = torch.where(finite, found["o"] - exact["o"], 0.0).norm() / exact["o"].norm()
    errors = relative_errors(found, {name: exact[name] for name in whole})
    return errors | {"finite": float(finite.double().mean()), "moved": float(off)}


def _some_resets(inputs: dict[str, Tensor]) -> None:
    inputs["g"][:, 5] = -float("inf")
    inputs["g"][:, 20, :, ::2] = -float("inf")


def _all_resets(inputs: dict[str, Tensor]) -> None:
    inputs["g"].fill_(-float("inf"))


def _zero_keys(inputs: dict[str, Tensor]) -> None:
    inputs["k"][:, 7] = 0
    inputs["q"][:, 3] = 0


def _erase_twice(inputs: dict[str, Tensor]) -> None:
    inputs["b"].fill_(2)


def _saturated(inputs: dict[str, Tensor]) -> None:
    inputs["g"][:, ::3] = 100
    inputs["g"][:, 1::3] = -100


def _at_the_bound(inputs: dict[str, Tensor]) -> None:
    """Every other channel exactly, the others nearly, so that g has a gradient."""
    inputs["g"].fill_(4)
    inputs["g"][..., ::2] = 100
    inputs["A_log"].zero_()
    inputs["dt_bias"].zero_()


def _hardly_forgetting(inputs: dict[str, Tensor]) -> None:
    inputs["g"].fill_(-12)
    inputs["dt_bias"].zero_()


def _unchanged(inputs: dict[str, Tensor]) -> None:
    pass


_SOFTPLUS: Final = replace(_STATES, gate="softplus", has_A_log=True, has_dt_bias=True)
EXTREMES: Final = {
    "some-resets": Extreme(_STATES, _some_resets),
    "all-resets": Extreme(_STATES, _all_resets),
    "zero-keys": Extreme(_STATES, _zero_keys),
    "erase-twice": Extreme(_STATES, _erase_twice),
    "sigmoid-saturated": Extreme(replace(_SOFTPLUS, gate="sigmoid"), _saturated),
    "at-the-bound": Extreme(replace(_SOFTPLUS, gate="sigmoid", bound=2), _at_the_bound),
    # dA_log 1.6e-3: what rounding leaves of a dg that is 0 under full decay is multiplied by 1600
    "softplus-saturated": Extreme(_SOFTPLUS, _saturated, 5e-3),
    "softplus-hardly": Extreme(_SOFTPLUS, _hardly_forgetting, 1e-4),
    # dg itself is rounded: 3.4e-3 and 2.0e-4
    "gate-bf16": Extreme(replace(_STATES, gate_dtype="bf16"), _unchanged, 4e-3),
    "gate-fp16": Extreme(replace(_STATES, gate_dtype="fp16"), _unchanged, 4e-4),
}


def unverified_call(value: str) -> tuple[str, list[str]]:
    """What a call of head dims that were not verified ends in with GDN2GEN_UNVERIFIED, and twice
    gives of warnings."""
    problem = replace(_STATES, K=48, V=40)
    case = Case("unverified", problem, _shape(1, 20, 1))
    inputs, _ = case_inputs(case, "cpu")
    with warnings.catch_warnings(record=True) as caught, _environment(value):
        warnings.simplefilter("always")
        try:
            for _ in range(2):
                o, _ = public_op(problem.op)(**inputs, use_qk_l2norm_in_kernel=True)
        except UnsupportedError as error:
            return str(error), []
    messages = [str(x.message) for x in caught if "head dim" in str(x.message)]
    return f"finite {bool(o.isfinite().all())}", messages


@contextmanager
def _environment(unverified: str) -> Iterator[None]:
    before = os.environ.pop("GDN2GEN_UNVERIFIED", None)
    os.environ["GDN2GEN_UNVERIFIED"] = unverified
    try:
        yield
    finally:
        del os.environ["GDN2GEN_UNVERIFIED"]
        if before is not None:
            os.environ["GDN2GEN_UNVERIFIED"] = before
