"""The accuracy suite: its list of cases, and that it sees what it is there to see."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from reference_op import ReferenceOp
from torch import Tensor

from gdn2gen.base.errors import InputError
from gdn2gen.base.outcome import CRASHED, OK, Outcome
from gdn2gen.family.inputs import PATTERNS
from gdn2gen.family.problem import DTYPES, USUAL_DIMS, Problem
from gdn2gen.family.recurrence import GATES
from gdn2gen.family.tolerances import LIMITS, over, roundings_of
from gdn2gen.measure import suite
from gdn2gen.measure.case_runs import Result, errors_in_range, run_case
from gdn2gen.measure.cases import CASES, CHECKS, Case, cases_of
from gdn2gen.ops import chunk, recurrent
from gdn2gen.store.verified import Place

BY_NAME = {case.name: case for case in CASES}
SMALL = [case for case in CASES if case.interpreter]
LARGE = [case for case in CASES if not case.interpreter]


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("cases", [SMALL, LARGE], ids=["interpreter", "gpu"])
def test_the_list_leaves_nothing_out(cases: list[Case]) -> None:
    assert {case.pattern for case in cases} == {*PATTERNS}
    dims = {(case.problem.K, case.problem.V) for case in cases}
    assert dims == {(K, V) for K in USUAL_DIMS for V in USUAL_DIMS}
    assert {case.problem.gate for case in cases} == {*GATES}
    given = ("varlen", "initial_state", "state_v_first", "has_dt_bias")
    for name in (*given, "l2norm", "beta_sigmoid", "neg_eigval", "beta_fp32"):
        assert {getattr(case.problem, name) for case in cases} == {True, False}
    assert {case.check for case in cases} == {*CHECKS}
    assert any(case.shape.T % 64 for case in cases)
    assert any(case.HG is not None for case in cases)


@pytest.mark.parametrize("cases", [SMALL, LARGE], ids=["interpreter", "gpu"])
def test_every_dtype_in_every_pattern(cases: list[Case]) -> None:
    found = {(case.problem.dtype, case.pattern) for case in cases}
    assert found == {(dtype, pattern) for dtype in DTYPES for pattern in PATTERNS}


def test_selection() -> None:
    chosen = suite.select_cases(["small-fp32-K*", "small-fp16-zero"], interpreter=True)
    names = [case.name for case in chosen]
    assert "small-fp32-K32-V64" in names
    assert "small-fp16-zero" in names
    assert "small-fp32-layer" not in names
    members = [case for case in suite.select_cases([], interpreter=False) if isinstance(case, Case)]
    assert members == LARGE
    with pytest.raises(InputError, match=r"there are \d+, such as .*bf16-varlen.*verify --list"):
        suite.select_cases(["fp32-vralen"], interpreter=False)
    with pytest.raises(InputError, match=r"no case matches 'bf16-\*'; .*such as small-bf16-"):
        suite.select_cases(["bf16-*"], interpreter=True)


# The checks themselves, with an op on CPU tensors that can be made wrong


@pytest.mark.parametrize("check", ["layer", "varlen", "grouped-gates", "causality", "empty"])
def test_the_op_on_cpu_tensors_passes(check: str) -> None:
    result = run_case(BY_NAME[f"small-fp32-{check}"], "cpu")
    assert result.passed, result.message


def _right(*, output_final_state: bool, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The op as the suite calls it, from the reference."""
    o, state = ReferenceOp("gdn2")(**arguments)
    return o, state if output_final_state else None


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("small-fp32-layer", lambda o, _: o * 1.001, "above 1.0e-04: o"),
        ("small-fp32-layer", lambda o, x: o + 1e-3 * x["w"], "dw"),
        ("small-fp32-layer", lambda o, _: o * float("nan"), "o inf"),
        ("small-fp32-causality", lambda o, x: o + 1e-7 * x["v"].sum(), "o"),
        ("small-fp32-repeat", lambda o, _: o + torch.rand(()), "call 2 of 2 differs in o"),
        ("small-fp32-repeat", lambda o, _: o / 0, "not finite: o"),
    ],
    ids=["scaled", "wrong-gradient", "nan", "future", "race", "inf"],
)
def test_what_is_wrong_is_found(
    name: str, change: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        o, state = _right(**arguments)
        return change(o, arguments), state

    monkeypatch.setattr(chunk, "chunk_gdn2", wrong)
    result = run_case(BY_NAME[name], "cpu")
    assert not result.passed
    assert said in result.message


def test_a_gradient_that_sees_the_future_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leak(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor) -> Tensor:
            ctx.save_for_backward(q)
            return q.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            (q,) = ctx.saved_tensors
            return grads[0] + 1e-6 * q.sum()

    monkeypatch.setattr(chunk, "chunk_gdn2", lambda q, **x: _right(q=Leak.apply(q), **x))
    result = run_case(BY_NAME["small-fp32-causality"], "cpu")
    assert result.message == "token 21 moved earlier tokens of dq"


def test_what_fp16_cannot_hold_is_no_error() -> None:
    exact: Mapping[str, Tensor] = {"db": torch.full((100,), 2e-9, dtype=torch.float64)}
    lost = {"db": torch.zeros(100)}
    assert errors_in_range(lost, exact, "fp16")["db"] < LIMITS["fp16"]
    assert errors_in_range(lost, exact, "bf16")["db"] == pytest.approx(1.0)
    large = {"db": exact["db"] * 1e6}
    assert errors_in_range(lost, large, "fp16")["db"] > 0.9


# The suite in the interpreter


def one_of_each() -> list[str]:
    """Names of cases: the first of every check and dtype, and of every op in bf16."""
    found = {(x.check, x.problem.dtype): x.name for x in reversed(SMALL)}
    of_ops = {x.problem.op: x.name for x in reversed(SMALL) if x.problem.dtype == "bf16"}
    return [x.name for x in SMALL if x.name in {*found.values(), *of_ops.values()}]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(one_of_each(), id="one of each"),
        pytest.param([x.name for x in SMALL], id="all", marks=pytest.mark.slow),
    ],
)
def test_the_interpreter_passes(names: list[str]) -> None:
    seen: list[str] = []
    results = suite.verify(
        names, interpreter=True, on_result=lambda result: seen.append(result.name)
    )
    assert [f"{x.name}: {x.message}" for x in results if not x.passed] == []
    assert [result.name for result in results] == names
    assert sorted(seen) == sorted(names)


def test_what_fails_beside_others_is_run_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers that share a GPU may want more of its memory than there is: neither is wrong."""
    running, lock = 0, threading.Lock()

    class Crowded:
        def __init__(self, _env: object) -> None:
            pass

        def call(
            self, _target: str, case: Case, _device: str, *, timeout: float
        ) -> Outcome[Result]:
            nonlocal running
            with lock:
                running += 1
            time.sleep(0.05)
            beside = running > 1
            time.sleep(0.05)
            with lock:
                running -= 1
            assert timeout == suite.TIMEOUT_S
            if beside:
                return Outcome(CRASHED, detail="out of memory")
            return Outcome(OK, Result(case.name, case.check, passed=True))

        def close(self) -> None:
            pass

    monkeypatch.setattr(suite, "Worker", Crowded)
    seen: list[Result] = []
    results = suite.verify(["small-fp32-*"], interpreter=True, workers=3, on_result=seen.append)
    assert all(x.passed for x in results)
    told = Counter(x.name for x in seen)
    assert set(told) == {x.name for x in results} and max(told.values()) == 2


@pytest.mark.parametrize("what", ["o", "state", "guard", "padding"])
def test_a_wrong_decoding_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["small-fp32-decoding"]
    assert run_case(case, "cpu").passed
    right = recurrent.fused_recurrent_gdn2

    def wrong(*args: Any, **given: Any) -> Any:
        o, state = right(*args, **given)
        if what == "o":
            o[-1, -1] *= 1.001
        elif "state_pool" in given and what == "state":
            state *= torch.where(state == 1024, 1.0, 1.001)
        elif "state_pool" in given and what == "guard":
            state[0, 0, 0, 0] += 1
        elif what == "padding" and o.shape[0] == 5:
            o[-1] = 1.0
        return o, state

    monkeypatch.setattr(recurrent, "fused_recurrent_gdn2", wrong)
    assert not run_case(case, "cpu").passed


def test_decoding_has_its_own_verdict() -> None:
    """What failed of it leaves the op over chunks verified, and the other way about."""
    suite_of_it = [x for x in LARGE if x.problem.op == "kda" and x.problem.dtype == "fp16"]
    results = [Result(x.name, x.check, passed=x.check != "decoding") for x in suite_of_it]
    passed, failed = suite.verdicts(suite_of_it, results)
    assert {x.op for x in passed} == {"kda"} and {x.op for x in failed} == {"fused_recurrent_kda"}
    assert len(passed) == len(failed) == len(USUAL_DIMS) ** 2
    assert next(iter(failed)).command.startswith("gdn2gen verify --op kda --head-dim")


def test_the_suite_of_all_does_not_clear_what_a_pairs_own_found() -> None:
    """Of 64 x 64 it has one case in bf16, whose packed batches may have failed in the 25."""
    places = {Place("gdn2", "bf16", 64, 64), Place("gdn2", "bf16", 128, 128)}
    decoding = Place("fused_recurrent_gdn2", "bf16", 64, 64)
    assert suite.less_than_their_own(LARGE, [*places, decoding]) == [x for x in places if x.K == 64]
    own = [x for x in cases_of(64, 64) if not x.interpreter]
    assert suite.less_than_their_own(own, [Place("gdn2", "bf16", 64, 64)]) == []


def test_a_case_that_hangs_is_lost_alone() -> None:
    first, second = suite.verify(
        ["small-fp32-one-token", "small-fp32-empty"], interpreter=True, timeout_s=0.01
    )
    assert not first.passed
    assert "timeout" in first.message
    assert not second.passed


def test_a_sum_that_cancels_may_be_further_off_and_nan_never_passes() -> None:
    errors = {"o": 0.9e-2, "dq": 1.1e-2, "dA_log": 2.9e-2, "dk": float("nan")}
    assert over(errors, 1e-2, "gdn2").keys() == {"dq", "dk"}
    assert over({"dA_log": 3.1e-2}, 1e-2, "gdn2") == {"dA_log": 3.1e-2}


def test_a_gradient_in_fewer_bits_than_q_may_lose_what_rounding_takes() -> None:
    wide, same = (Problem("gdn2", dtype=x, gate_dtype="bf16") for x in ("fp32", "bf16"))
    assert roundings_of(wide) == {"dg": 2.0**-8} and not roundings_of(same)
    errors = {"dq": 2e-3, "dg": 2e-3, "o": 1e-5}
    assert over(errors, 1e-4, "gdn2", roundings_of(wide)) == {"dq": 2e-3}
    assert over({"dg": 4.1e-3}, 1e-4, "gdn2", roundings_of(wide)) == {"dg": 4.1e-3}
