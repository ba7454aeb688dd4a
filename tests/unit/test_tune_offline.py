"""Ranking without a GPU: what is filed, what is refused, and what it says of itself."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from gdn2gen import store
from gdn2gen.build import Resources
from gdn2gen.config import default_config
from gdn2gen.device import named_device
from gdn2gen.errors import TuneError
from gdn2gen.problem import Problem
from gdn2gen.shapes import Shape
from gdn2gen.tune import outcome, tune_without_gpu
from gdn2gen.tune.gate import GateResult
from gdn2gen.tune.outcome import Outcome
from gdn2gen.tune.progress import Progress

PROBLEM = Problem(K=64, V=64)
DEVICE = named_device("sm_80")
SHAPE = Shape("small", 4, 2048, 8)


class FakeCompilers:
    def __init__(self, passes=lambda candidate: True, builds=lambda config: True):
        self.slots = 2
        self.now = 0.0
        self.compiled, self.checked = [], []
        self._passes, self._builds = passes, builds

    def clock(self):
        return self.now

    def compile(self, problem, config):
        self.now += 1.0
        self.compiled.append(config)
        future = Future()
        if not self._builds(config):
            future.set_result(Outcome(outcome.BUILD_ERROR, detail="no"))
            return future
        lean = config["num_warps"] == 4 and config["num_stages"] == 2
        resources = Resources(64 if lean else 255, 0, 30_000, 128, 1.0)
        future.set_result(Outcome(outcome.OK, resources))
        return future

    def interpret(self, candidate):
        self.checked.append(candidate)
        passed = self._passes(candidate)
        return Outcome(outcome.OK, GateResult(passed, {}, "" if passed else "o is off"))

    def close(self):
        self.closed = True


def rank(backend, tmp_path, minutes=3.0):
    return tune_without_gpu(
        PROBLEM,
        DEVICE,
        [SHAPE],
        budget_minutes=minutes,
        out_dir=tmp_path,
        levels=("lean",),
        backend=backend,
        clock=backend.clock,
        progress=Progress(),
    )


def test_the_best_ranked_is_filed_as_predicted(tmp_path):
    backend = FakeCompilers()
    report = rank(backend, tmp_path, minutes=10.0)
    assert {x.get("language", "triton") for x in backend.compiled} == {"triton"}
    (entry,) = store.load_tuned(report.path, DEVICE).entries
    assert entry.provenance == "predicted"
    assert "forward_backward_ms" not in entry.measured
    assert entry.configs["grad_value"]["num_stages"] == 2
    (result,) = report.results
    assert result.forward_backward_ms is None and result.speedup is None
    assert "nothing ran on a GPU" in result.note
    assert backend.closed


def test_defaults_are_compiled_whatever_the_budget(tmp_path):
    backend = FakeCompilers()
    report = rank(backend, tmp_path, minutes=0.001)
    configs = report.results[0].candidate.configs
    assert {default_config(x.stage, PROBLEM) for x in configs} <= set(backend.compiled)


def test_the_default_stands_in_where_the_best_ranked_is_wrong(tmp_path):
    backend = FakeCompilers(
        passes=lambda x: all(one == default_config(one.stage, PROBLEM) for one in x.configs)
    )
    report = rank(backend, tmp_path)
    configs = report.results[0].candidate.configs
    assert all(config == default_config(config.stage, PROBLEM) for config in configs)
    assert any("o is off" in reason for reason in report.skipped.values())


def test_nothing_is_filed_where_nothing_passes(tmp_path):
    with pytest.raises(TuneError, match="o is off"):
        rank(FakeCompilers(passes=lambda candidate: False), tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_a_default_that_does_not_compile_is_an_error(tmp_path):
    default = default_config("scan", PROBLEM)
    with pytest.raises(TuneError, match="default scan"):
        rank(FakeCompilers(builds=lambda config: config != default), tmp_path)
