"""Every template in Triton's interpreter against the fp64 reference: outputs and all gradients.

The interpreter must be asked for before triton is imported, so the cases run in one process of
their own (`kernel_cases.run`), which serves all tests of this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_cases import CASES, EXTREMES, KernelCase

from gdn2gen._verify_checks import Result
from gdn2gen.inputs import REGIMES
from gdn2gen.stages import PLANS, STAGES
from gdn2gen.tune.outcome import Outcome
from gdn2gen.tune.worker import Worker

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    paths = [str(HERE.parents[1]), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    worker = Worker(
        {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "GDN2GEN_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
            "OMP_NUM_THREADS": "1",
        }
    )
    yield worker
    worker.close()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_kernels(case: KernelCase, worker: Worker) -> None:
    outcome: Outcome[Result] = worker.call("kernel_cases:run", case.name, timeout=120)
    assert outcome.ok, outcome.reason
    result = outcome.get()
    assert result.passed, result.message
    over = {name: error for name, error in result.errors.items() if not error <= case.limit}
    assert not over, f"above {case.limit}"
    if case.case.check == "accuracy":
        assert {"o", "dq", "dk", "dv", "dg", "db", "dw"} <= {*result.errors}


@pytest.mark.parametrize(
    ("plan", "knobs"),
    [
        ("lean", (("BT", 32), ("decay", "log"))),
        ("fast", (("BT", 16), ("decay", "tree"))),
    ],
    ids=["log", "tree"],
)
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_values(
    name: str, plan: str, knobs: tuple[tuple[str, int | str], ...], worker: Worker
) -> None:
    outcome: Outcome[dict[str, float]] = worker.call(
        "kernel_cases:run_extreme", name, plan, knobs, timeout=120
    )
    assert outcome.ok, outcome.reason
    limit = EXTREMES[name].limit
    over = {output: error for output, error in outcome.get().items() if not error <= limit}
    assert not over, f"above {limit}"


def test_the_list_leaves_nothing_out() -> None:
    """Every stage, every value of the knobs that change its code, every option and regime."""
    assert len({case.name for case in CASES}) == len(CASES)
    configs = [x for case in CASES for x in case.recipe.configs.values()]
    assert {x.stage for x in configs} == {*STAGES}
    assert {case.plan for case in CASES} == {*PLANS}
    for stage in STAGES:
        assert {x["BT"] for x in configs if x.stage == stage} == {16, 32, 64}
    assert {x["decay"] for x in configs if "decay" in x} == {"log", "tree"}
    for plan in PLANS:
        problems = [case.case.problem for case in CASES if case.plan == plan]
        assert {x.gate for x in problems} == {"none", "softplus", "sigmoid"}
        for flag in ("varlen", "initial_state", "final_state", "state_v_first", "has_dt_bias"):
            assert {getattr(x, flag) for x in problems} == {True, False}
    assert {case.case.regime for case in CASES} == {*REGIMES}
    assert {case.case.problem.dtype for case in CASES} == {"fp32", "fp16"}
    assert {0, 1, 15, 70} <= {case.case.shape.T for case in CASES}
