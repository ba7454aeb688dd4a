"""Every template in Triton's interpreter against the fp64 reference: outputs and all gradients.

The interpreter must be asked for before triton is imported, so the cases run in a process of their
own, the fixture `interpreter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from kernel_cases import BOUNDED, CASES, EXTREMES, NOT_FINITE, KernelCase

from gdn2gen.family.inputs import PATTERNS
from gdn2gen.family.registry import RECURRENCES, recurrence_named
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.stages import STAGES
from gdn2gen.measure.case_runs import Result

_ALL_PLANS: Final = tuple(x for x in RECURRENCES["gdn2"].plans if not PLANS[x].instead)
# Measured: db up to 6.1e-3; correlated keys amplify all rounding (2.3e-2). The rest is below 5e-3.
BF16_LIMITS = {"db": 8e-3}
BF16_CORRELATED = dict.fromkeys(("o", "final_state", "dq", "dk", "dv", "dg", "db", "dw"), 3e-2)


@pytest.mark.parametrize(
    "case",
    [pytest.param(x, id=x.name, marks=[pytest.mark.slow] * x.slow) for x in CASES],
)
def test_kernels(case: KernelCase, interpreter: Callable[..., Any]) -> None:
    result: Result = interpreter("kernel_cases:run", case.name)
    assert result.passed, result.message
    over = {name: error for name, error in result.errors.items() if not error <= case.limit}
    assert not over, f"above {case.limit}"
    if case.case.check == "accuracy":
        required = recurrence_named(case.case.problem.op).required
        assert {"o", *(f"d{x.name}" for x in required)} <= {*result.errors}
    # a sum over all tokens in fp32: of what was rounded to fp16 first it is off by 2e-4
    assert result.errors.get("dD", 0.0) < 1e-5


@pytest.mark.parametrize(
    "given",
    [(pattern, "lean", 32) for pattern in PATTERNS]
    + [("mixed", "fast", 32), ("mixed", "lean", 64), ("mixed", "fast", 16)]
    + [
        ("strong", "lean", 32, "sigmoid", 2, "bounded"),
        ("strong", "fast", 16, "sigmoid", 4, "bounded"),
        ("strong", "fast", 64, "sigmoid", 1, "bounded"),
        # some nats a token, where dg is a small difference of sums over the chunk
        ("layer", "lean", 32, "sigmoid"),
        ("layer", "fast", 64, "sigmoid", 0, "log"),
    ],
    ids=lambda given: "-".join(map(str, given)),
)
def test_kernels_in_bf16(given: tuple[str | int, ...], interpreter: Callable[..., Any]) -> None:
    """What rounding does to every output and gradient, by an interpreter that knows bf16."""
    errors = interpreter("kernel_cases:run_bf16", *given).errors
    assert {"o", "dq", "dk", "dv", "dg", "db", "dw"} <= {*errors}
    limits = BF16_CORRELATED if given[0] == "correlated" else BF16_LIMITS
    over = {name: error for name, error in errors.items() if not error <= limits.get(name, 6e-3)}
    assert not over, over


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", ["layer", "sparse", "strong"])
def test_later_frames_leave_the_first_one_alone(
    pattern: str, packed: bool, interpreter: Callable[..., Any]
) -> None:
    """The Triton part of the TileLang prepare: forward outputs stay causal bit for bit."""
    found = interpreter("kernel_cases:later_rows", pattern, packed)
    assert found["moved"] == 0
    assert (found["rows"] > 0) == (pattern != "layer")
    if found["rows"]:
        # other anchors round other factors to 8 bits
        assert found["A"] < 1e-2 and found["Aqk"] < 1e-2


_FORMS: Final = (
    ("lean", (("BT", 32), ("decay", "log"))),
    ("fast", (("BT", 16), ("decay", "tree"))),
    ("lean", (("BT", 64), ("decay", "anchored"))),
)
# Of decays, which the forms place each in their own way; the others go through them in turn.
_OF_DECAYS: Final = ("some-resets", "all-resets", "sigmoid-saturated", "softplus-saturated")


def _extremes() -> Iterator[Any]:
    for i, name in enumerate(EXTREMES):
        for j, (plan, knobs) in enumerate(_FORMS):
            slow = name not in _OF_DECAYS and i % 3 != j
            marks = [pytest.mark.slow] * slow
            yield pytest.param(name, plan, knobs, id=f"{name}-{dict(knobs)['decay']}", marks=marks)


@pytest.mark.parametrize(("name", "plan", "knobs"), [*_extremes()])
def test_extreme_values(
    name: str, plan: str, knobs: tuple[tuple[str, int | str], ...], interpreter: Callable[..., Any]
) -> None:
    errors = interpreter("kernel_cases:run_extreme", name, plan, knobs)
    # anchored factors come from differences of G, which has 24 bits: dg 1.1e-5 where G is -1000
    limit = EXTREMES[name].limit * (2.0 if dict(knobs)["decay"] == "anchored" else 1.0)
    over = {output: error for output, error in errors.items() if not error <= limit}
    assert not over, f"above {limit}"


@pytest.mark.parametrize(
    "plan",
    [pytest.param(x, marks=[pytest.mark.slow] * (PLANS[x].every in (1, 4))) for x in _ALL_PLANS],
)
def test_bounded_chunks_that_lose_all_they_can(plan: str, interpreter: Callable[..., Any]) -> None:
    """2^-92.3 in every other channel, with pairs that met as far from the anchor."""
    errors = interpreter("kernel_cases:run_extreme", "at-the-bound", plan, (("BT", 32), BOUNDED))
    over = {output: error for output, error in errors.items() if not error <= 1e-5}
    assert not over


# anchored and bounded chunks, and packed ones of the other member, say most of it
_SLOW: Final = ("log", "parallel", "packed", "kda-log")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in _SLOW)) for x in NOT_FINITE]
)
def test_nan_comes_out_and_goes_no_further_than_its_chunk(
    name: str, interpreter: Callable[..., Any]
) -> None:
    assert not interpreter("kernel_cases:run_not_finite", name)


HALF = 1.5e-3


@pytest.mark.parametrize(
    ("state", "gradient", "scale"),
    [(65000.0, 1.0, 1.0), (1.0, 2.0**-10, 1.0), (131072.0, 2.0**-25, 2.0**15)],
    ids=["largest", "least", "scaled"],
)
def test_the_range_of_fp16(
    state: float, gradient: float, scale: float, interpreter: Callable[..., Any]
) -> None:
    """As the op's docstring has it; states and o are linear in v and the initial state."""
    found = interpreter("kernel_cases:run_half_range", state, gradient, scale)
    assert max(found[name] for name in ("o", "final_state", "dinitial_state")) < HALF, found


def test_states_beyond_fp16_show(interpreter: Callable[..., Any]) -> None:
    """Nothing comes out finite and wrong."""
    found = interpreter("kernel_cases:run_half_range", 131072.0, 1.0)
    assert found["finite"] < 1
    assert found["moved"] < HALF


def test_the_list_leaves_nothing_out() -> None:
    """Every stage, every value of the knobs that change its code, every option and pattern.

    What is slow adds to that only the plans that keep a state of every so many chunks.
    """
    assert len({case.name for case in CASES}) == len(CASES)
    in_triton = {x for x in PLANS if not x.startswith("whole")}
    in_plans = {x for x in STAGES if not x.startswith("forward")}
    assert {case.plan for case in CASES} == in_triton
    configs = [x for case in CASES for x in case.recipe.configs]
    assert {x.stage for x in configs} == in_plans
    slow = {
        x for x in in_plans if STAGES[x].every or x in ("reprepare_factors", "scan_transitions")
    }
    for stage in slow:
        assert {x["BT"] for x in configs if x.stage == stage} == {16, 32, 64}
    usual = [case for case in CASES if not case.slow]
    assert {x for x in in_triton if PLANS[x].every == 0} < {case.plan for case in usual}
    configs = [x for case in usual for x in case.recipe.configs]
    for stage in in_plans - slow:
        assert {x["BT"] for x in configs if x.stage == stage} == {16, 32, 64}
    assert {x["decay"] for x in configs if "decay" in x} == {
        "log",
        "tree",
        "anchored",
        "bounded",
        "outside",
    }
    for case in CASES:
        if BOUNDED in case.knobs:
            stages = ("prepare", case.recipe.plan.backward[-1])
            assert {case.recipe[x]["decay"] for x in stages} == {"bounded"}, case.name
    assert {x["segments"] for x in configs if "segments" in x} == {"serial", "parallel"}
    for plan in (x for x in _ALL_PLANS if PLANS[x].every == 0):
        problems = [case.case.problem for case in usual if case.plan == plan]
        assert {x.gate for x in problems} == {"none", "softplus", "sigmoid"}
        for flag in ("varlen", "initial_state", "final_state", "state_v_first", "has_dt_bias"):
            assert {getattr(x, flag) for x in problems} == {True, False}
    assert {case.case.pattern for case in usual} == {*PATTERNS}
    assert {case.case.problem.dtype for case in usual} == {"fp32", "fp16"}
    assert {0, 1, 15, 70} <= {case.case.shape.T for case in usual}
