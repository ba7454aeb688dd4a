"""Mamba-3 in the accuracy suite: its list, its checks, and the gate that they open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from gdn2gen.family.inputs import PATTERNS
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.problem import DTYPES, USUAL_DIMS
from gdn2gen.family.shapes import Shape
from gdn2gen.measure import mamba3_rows, mamba3_runs, mamba3_times, results, suite
from gdn2gen.measure.accuracy import relative_errors
from gdn2gen.measure.case_runs import Result
from gdn2gen.measure.cases import CASES
from gdn2gen.measure.mamba3_cases import CHECKS, MAMBA3_CASES, Mamba3Case, mamba3_cases_of
from gdn2gen.measure.mamba3_runs import run_mamba3_case
from gdn2gen.measure.sides import Errors, Side
from gdn2gen.measure.timing import Timing
from gdn2gen.ops.mamba3 import mamba3_siso_combined, mamba3_siso_step
from gdn2gen.store.verified import Place

BY_NAME = {x.name: x for x in MAMBA3_CASES}
SMALL = [x for x in MAMBA3_CASES if x.interpreter]
LARGE = [x for x in MAMBA3_CASES if not x.interpreter]


def test_names_are_unique() -> None:
    assert len({*BY_NAME} | {x.name for x in CASES}) == len(MAMBA3_CASES) + len(CASES)


@pytest.mark.parametrize("cases", [SMALL, LARGE], ids=["interpreter", "gpu"])
def test_the_list_leaves_nothing_out(cases: list[Mamba3Case]) -> None:
    found = {(x.problem.dtype, x.pattern) for x in cases}
    assert found == {(dtype, pattern) for dtype in DTYPES for pattern in PATTERNS}
    assert {x.check for x in cases} == {*CHECKS}
    for name in ("skip", "gate", "carried", "packed", "rotated"):
        assert {getattr(x.problem, name) for x in cases} == {True, False}, name
    assert {x.shape.key_heads for x in cases} >= {1, 3}
    assert {"fp32", "bf16"} <= {x.problem.trap_dtype for x in cases}
    assert {(x.level, x.problem.packed) for x in cases} == {
        *product(("lean", "fast"), (True, False))
    }
    if cases is LARGE:
        dims = {(x.problem.dtype, x.problem.K, x.problem.V, x.op) for x in cases}
        ops = ("mamba3", "mamba3_siso_step")
        assert dims == {(d, K, V, op) for d in DTYPES for K in USUAL_DIMS for V in USUAL_DIMS
                        for op in ops}  # fmt: skip


def test_a_suite_of_any_head_dims() -> None:
    cases = [x for x in mamba3_cases_of(96, 40) if not x.interpreter]
    assert {(x.problem.K, x.problem.V) for x in cases} == {(96, 40)}
    assert {x.problem.dtype for x in cases} == {*DTYPES}


def test_selection_and_verdicts() -> None:
    chosen = suite.select_cases([], interpreter=False, op="mamba3")
    assert chosen == LARGE
    assert not {*LARGE} & {*suite.select_cases([], interpreter=False, op="mamba2")}
    failing = "mamba3-fp16-K64-V64-steps"
    results = [Result(x.name, x.check, x.name != failing) for x in chosen]
    passed, failed = suite.verdicts(chosen, results)
    step = Place("mamba3_siso_step", "fp16", 64, 64)
    assert failed == {step} and step not in passed
    assert Place("mamba3", "fp16", 64, 64) in passed
    assert step.command == "gdn2gen verify --op mamba3 --head-dim 64,64"


@pytest.mark.parametrize("name", ["packed", "groups", "empty", "causality", "steps"])
def test_the_op_on_cpu_tensors_passes(name: str) -> None:
    result = run_mamba3_case(BY_NAME[f"mamba3-small-K32-V16-fp32-{name}"], "cpu")
    assert result.passed, result.message


def test_a_gradient_in_fewer_bits_than_q_is_as_near_as_those_are() -> None:
    """Of fp32 beside Trap and Angles in bf16: their gradients are bf16, which rounds to 1.6e-3."""
    result = run_mamba3_case(BY_NAME["mamba3-small-K32-V16-fp32-narrow-logits"], "cpu")
    assert result.passed, result.message
    narrow = {x for x, y in result.errors.items() if y > result.limit}
    assert narrow == {"dTrap", "dAngles"}
    assert all(result.errors[x] < 2e-3 for x in narrow)
    # what is shown of it is the limit that was its own
    assert result.worst is not None
    assert result.worst[0] in narrow and result.worst[1] < result.worst[2] > result.limit


def _off(**arguments: Any) -> Any:
    """A token too strong, and every other call another one."""
    _off.calls += 1  # type: ignore[attr-defined]
    found = mamba3_siso_combined(**arguments)
    out = found[0] if isinstance(found, tuple) else found
    out = out + 0.01 * _off.calls * out.detach().mean(1, keepdim=True)  # type: ignore[attr-defined]
    return (out, *found[1:]) if isinstance(found, tuple) else out


@pytest.mark.parametrize(
    ("name", "words"),
    [("layer", "above"), ("repeat", "differs in out"), ("causality", "moved out of earlier")],
)
def test_what_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    _off.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(mamba3_runs, "_combined", _off)
    result = run_mamba3_case(BY_NAME[f"mamba3-small-K32-V16-fp32-{name}"], "cpu")
    assert not result.passed and words in result.message


def test_a_wrong_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(**arguments: Any) -> Any:
        out, states = mamba3_siso_step(**arguments)
        return out, [*states[:3], torch.zeros_like(states[3])]

    monkeypatch.setattr("gdn2gen.ops.mamba3.mamba3_siso_step", forgets)
    result = run_mamba3_case(BY_NAME["mamba3-small-K32-V16-fp32-steps"], "cpu")
    assert not result.passed and "last v" in result.message


def test_calls_are_refused_until_verified(interpreter: Callable[..., Any]) -> None:
    combined, step = interpreter("mamba3_checks:refusals")
    assert "mamba3's kernels for head dims K=24, V=16 in fp32 were not verified" in combined
    assert "mamba3_siso_step's kernels" in step
    assert all("gdn2gen verify --op mamba3 --head-dim 24,16" in x for x in (combined, step))


# The benchmark, on the CPU


def test_a_peer_whose_states_have_no_gradient_is_compared_by_the_rest() -> None:
    def detached(**arguments: Any) -> Any:
        out, *states = mamba3_siso_combined(**arguments)
        return (out, *(x.detach() for x in states))

    shape = Shape("small", 1, 4, 2, groups=1)
    problem = Mamba3Problem(dtype="fp32", state_size=16, head_dim=16, angles=4, gate=True)
    made = mamba3_runs.mamba3_inputs(problem, shape, "layer", 0, "cpu")
    found = relative_errors(*mamba3_runs.mamba3_results(made, detached, peer=True))
    assert max(found.values()) < 1e-5
    with pytest.raises(RuntimeError, match="does not require grad"):
        mamba3_runs.mamba3_results(made, detached)


@pytest.mark.parametrize("level", ["lean", "fast"])
def test_rows_of_both_sides(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps = set()

    def ours(**arguments: Any) -> Any:
        keeps.add(arguments["disable_recompute"])
        return mamba3_siso_combined(**arguments)

    def time_ms(run: Any) -> Timing:
        run()
        return Timing(2.0, 2.0, 2.0, 5)

    def peer(_: str) -> Any:
        return mamba3_siso_combined

    asked = []
    drawn = mamba3_rows.layer_inputs

    def inputs(problem: Any, shape: Any, pattern: str = "layer") -> Any:
        asked.append(pattern)
        return drawn(problem, shape, pattern)

    for module in (mamba3_rows, mamba3_times):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "time_ms", time_ms)
    monkeypatch.setattr(mamba3_rows, "layer_inputs", inputs)
    monkeypatch.setattr(mamba3_rows, "peak_mib", lambda run: 10.0)
    monkeypatch.setattr(mamba3_rows, "copy_gbps", lambda: 4000.0)
    monkeypatch.setattr(mamba3_rows, "mamba3_op", peer)
    monkeypatch.setattr("gdn2gen.ops.mamba3.mamba3_siso_combined", ours)
    monkeypatch.setattr(mamba3_rows, "_recipe_name", lambda *_: "linear_direct (default)")
    monkeypatch.setattr(mamba3_rows, "ACCURACY_SHAPE", Shape("a", 1, 4, 2, groups=1))
    monkeypatch.setattr(mamba3_rows, "ACCURACY_PATTERNS", ("layer",))
    shapes = [Shape("dense", 2, 9, 2, groups=1), Shape("packed", 1, 9, 2, (0, 4, 9), groups=1)]
    found = mamba3_rows.bench_mamba3(shapes, 16, 16, "fp32", vs="mamba_ssm", level=level)
    assert {x.level for x in found} == {level} and keeps == {level == "fast"}
    identities = {results._identity(results._row_document(x)) for x in found}
    others = {results._identity(results._row_document(replace(x, level="-"))) for x in found}
    assert len(identities) == 2 and not identities & others
    assert [x.problem.varlen for x in found] == [False, True]
    assert asked == ["layer", "zero", "strong"] * 2
    for row in found:
        assert row.ratio_to_fla == (1.0, 1.0) and row.peer == "mamba_ssm"
        assert {*row.ours.decays} == {"weak", "strong"}
        assert max(x.error for x in row.ours.errors.values()) < 1e-4
        assert {"out", "last ssm", "dTrap"} <= {*row.ours.errors}
        # V, Z and out of 16 numbers, and three more
        assert row.floor_forward_ms == pytest.approx((3 * 64 + 12) * 18 * (
            row.shape.B / 2) * 2 / 4000 / 1e6)  # fmt: skip
        assert results._row_document(row)["problem"]["op"] == "mamba3"


def test_bench_leaves_out_a_peer_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, refusing, measured = object(), [True], []

    def worst_errors(op: object, *_: Any, peer: bool) -> dict[str, Errors]:
        if peer and refusing:
            raise RuntimeError("no such GPU")
        return {"out": Errors(1e-3, "layer")}

    def measure_in_turns(given: Any, *_: Any) -> list[Side]:
        measured.append(len(given))
        if len(given) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        time = Timing(1.0, 1.0, 1.0, 9)
        return [Side(time, time, 1.0, {})]

    monkeypatch.setattr(mamba3_rows, "mamba3_op", lambda _: peer)
    monkeypatch.setattr(mamba3_rows, "worst_errors", worst_errors)
    monkeypatch.setattr(mamba3_rows, "measure_in_turns", measure_in_turns)
    monkeypatch.setattr(mamba3_rows, "copy_gbps", lambda: 4000.0)
    monkeypatch.setattr(mamba3_rows, "_recipe_name", lambda *_: "")
    shape = Shape("few", 2, 9, 2, groups=1)
    for said in (
        "mamba_ssm is left out: it raised RuntimeError: no such GPU",
        "mamba_ssm is left out at few: it raised OutOfMemoryError",
    ):
        with pytest.warns(UserWarning, match=said):
            (row,) = mamba3_rows.bench_mamba3([shape], 16, 16, "fp32", vs="mamba_ssm")
        assert row.fla is None and row.ours.forward.median == 1.0
        refusing.clear()
    assert measured == [1, 2, 1]


def test_least_bytes_are_those_of_the_notes() -> None:
    problem = Mamba3Problem(gate=True)
    assert mamba3_times.floor_bytes(problem, backward=False) == 396
    moved = mamba3_times.stage_bytes(
        replace(problem, skip=True), Shape("x", 4, 4096, 64, groups=1), 32
    )
    per_head = {x: y / (4 * 4096 * 64) for x, y in moved.items()}
    assert per_head["mamba3_epilogue"] == pytest.approx(516, abs=1)
    assert per_head["mamba3_epilogue_backward"] == pytest.approx(904, abs=1)
