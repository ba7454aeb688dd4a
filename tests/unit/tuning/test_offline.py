"""Ranking without a GPU: what is filed, what is refused, and what it says of itself."""

from __future__ import annotations

import json
from concurrent.futures import Future

import pytest

from gdn2gen.base import outcome
from gdn2gen.base.device import named_device
from gdn2gen.base.errors import TuneError
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.terminal import console
from gdn2gen.cli import program
from gdn2gen.codegen.build import Resources
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.stages import STAGES
from gdn2gen.measure.check import CheckResult
from gdn2gen.store import tuned_files
from gdn2gen.tuning import tune_without_gpu
from gdn2gen.tuning.offline.findings import Findings
from gdn2gen.tuning.records.ledger import PIPELINE, read_ledger
from gdn2gen.tuning.records.places import findings_path, open_ledger
from gdn2gen.tuning.views.progress import Progress

PROBLEM = Problem(K=64, V=64)
DEVICE = named_device("sm_80")
SHAPE = Shape("small", 4, 2048, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))


class FakeCompilers:
    def __init__(self, passes=lambda recipe: True, builds=lambda config: True, stop_after=None):
        self.slots = 2
        self._stop_after = stop_after
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
        if self._stop_after is not None and len(self.compiled) > self._stop_after:
            raise KeyboardInterrupt
        resources = Resources(64 if lean else 255, 0, 30_000, 128, 1.0)
        future.set_result(Outcome(outcome.OK, resources))
        return future

    def interpret(self, recipe):
        self.checked.append(recipe)
        passed = self._passes(recipe)
        return Outcome(outcome.OK, CheckResult(passed, {}, "" if passed else "o is off"))

    def close(self):
        self.closed = True


def rank(backend, tmp_path, minutes=3.0, device=DEVICE):
    return tune_without_gpu(
        PROBLEM,
        device,
        [SHAPE],
        budget_minutes=minutes,
        out_dir=tmp_path,
        levels=("lean",),
        backend=backend,
        clock=backend.clock,
        progress=Progress(),
    )


def test_the_default_is_that_of_the_target(tmp_path):
    """Of the target's own default, the scans' halves of V, both the ranking and the check begin."""
    backend = FakeCompilers(passes=lambda recipe: recipe["scan"] == scan)
    scan = default_config("scan", PROBLEM, arch="sm_100")
    assert scan["BV"] == 32 != default_config("scan", PROBLEM)["BV"]
    rank(backend, tmp_path, device=named_device("sm_100"))
    assert scan in backend.compiled
    assert backend.checked[-1].by_stage["scan"] == scan


def test_the_best_ranked_is_filed_as_predicted(tmp_path):
    backend = FakeCompilers()
    report = rank(backend, tmp_path, minutes=10.0)
    assert {x.get("language", "triton") for x in backend.compiled} == {"triton"}
    (entry,) = tuned_files.load_tuned(report.path, DEVICE).entries
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
    configs = report.results[0].recipe.configs
    assert {default_config(x.stage, PROBLEM) for x in configs} <= set(backend.compiled)


def test_the_default_stands_in_where_the_best_ranked_is_wrong(tmp_path):
    backend = FakeCompilers(
        passes=lambda x: all(one == default_config(one.stage, PROBLEM) for one in x.configs)
    )
    report = rank(backend, tmp_path)
    configs = report.results[0].recipe.configs
    assert all(config == default_config(config.stage, PROBLEM) for config in configs)
    assert any("o is off" in reason for reason in report.skipped.values())


def test_nothing_is_filed_where_nothing_passes(tmp_path):
    with pytest.raises(TuneError, match="o is off"):
        rank(FakeCompilers(passes=lambda recipe: False), tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_a_default_that_does_not_compile_is_an_error(tmp_path):
    default = default_config("scan", PROBLEM)
    with pytest.raises(TuneError, match="default scan"):
        rank(FakeCompilers(builds=lambda config: config != default), tmp_path)


def test_a_run_that_was_stopped_goes_on(tmp_path):
    stopped = FakeCompilers(stop_after=12)
    with pytest.raises(KeyboardInterrupt):
        rank(stopped, tmp_path)
    assert not list(tmp_path.rglob("*.json"))
    again = FakeCompilers()
    rank(again, tmp_path)
    # the last two were in flight
    assert len(stopped.compiled) == 13 and not {*stopped.compiled[:10]} & {*again.compiled}
    assert {*stopped.compiled[:10], *again.compiled[:10]} <= {*findings(tmp_path).compiled}


def test_what_a_later_run_ranks_better_takes_the_place(tmp_path):
    costs = []
    for _ in range(4):
        report = rank(FakeCompilers(), tmp_path, minutes=0.5)
        (entry,) = tuned_files.load_tuned(report.path, DEVICE).entries
        assert entry.configs == report.results[0].recipe.by_stage
        costs.append(entry.measured["predicted_bytes"])
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


def findings(tmp_path):
    path = findings_path("gdn2", DEVICE)
    return Findings(path, PROBLEM, open_ledger("gdn2", DEVICE))


def test_what_was_checked_is_not_checked_again(tmp_path):
    first = FakeCompilers()
    rank(first, tmp_path, minutes=0.001)
    assert len(first.checked) == 1
    again = FakeCompilers()
    rank(again, tmp_path, minutes=0.001)
    assert not {*first.compiled} & {*again.compiled}
    assert not {*first.checked} & {*again.checked}


def test_refusals_are_in_the_ledger_and_not_tried_again(tmp_path, capsys):
    odd = {"builds": lambda config: config["num_warps"] != 8}
    first = FakeCompilers(**odd)
    rank(first, tmp_path, minutes=10.0)
    refused = [x for x in first.compiled if x["num_warps"] == 8]
    assert refused
    assert program.main(["ledger", "--device", "sm_80", "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    filed = {Config.of(x["stage"], x["config"]) for x in said}
    assert filed <= {*refused} and len(filed) >= len(refused) - 3, "up to three were in flight"
    assert {x["reason"] for x in said} == {"build error: no"}
    again = FakeCompilers(**odd)
    rank(again, tmp_path, minutes=10.0)
    assert not filed & {*again.compiled}


def test_a_pipeline_that_was_wrong_is_in_the_ledger(tmp_path):
    right = {default_config(x, PROBLEM) for x in STAGES}
    wrong = FakeCompilers(passes=lambda x: {*x.configs} <= right)
    rank(wrong, tmp_path)
    (refusal,) = [x for x in read_ledger(open_ledger("gdn2", DEVICE).path) if x.stage == PIPELINE]
    assert refusal.reason == "wrong result: o is off (in Triton's interpreter)"


def test_findings_of_other_templates_or_tools_do_not_count(tmp_path, monkeypatch):
    rank(FakeCompilers(), tmp_path, minutes=0.001)
    assert findings(tmp_path).compiled
    path = findings_path("gdn2", DEVICE)
    path.write_text(path.read_text() + '{"key": 5}\n[]\n{"passed": ["x"]}\ntorn')
    assert findings(tmp_path).compiled
    monkeypatch.setattr("gdn2gen.tuning.records.places.toolchain", lambda: {"triton": "99"})
    assert not findings(tmp_path).compiled


def test_it_says_what_it_expects_and_report_shows_it(tmp_path, capsys, monkeypatch):
    report = rank(FakeCompilers(), tmp_path / "tuned", minutes=10.0)
    (result,) = report.results
    assert result.expected > 1.0
    expects = f"expects {result.expected:.2f}x"
    console().print(report.table())
    said = capsys.readouterr().out
    assert expects in said and "without --target" in said and "same command" not in said
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "tuned"))
    out = tmp_path / "page.html"
    assert program.main(["report", "--device", "sm_80", "--out", str(out)]) == 0
    assert expects in capsys.readouterr().out
    assert "Ranked without a GPU" in out.read_text()
    assert f"<td>{result.expected:.2f}x</td>" in out.read_text()
    assert program.main(["report", "--device", "sm_80", "--json"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["expected"] == pytest.approx(result.expected, rel=1e-3)
    assert row["tuned_ms"] is None and row["entry"]["provenance"] == "predicted"


def test_what_cannot_run_has_no_expectation(tmp_path):
    """Where not one block fits on a multiprocessor the cost is infinite, which JSON cannot hold."""
    monster = Resources(1000, 0, 10**9, 1024, 1.0)
    backend = FakeCompilers()
    real = backend.compile

    def compile(problem, config):
        real(problem, config)
        future = Future()
        future.set_result(Outcome(outcome.OK, monster))
        return future

    backend.compile = compile
    report = rank(backend, tmp_path, minutes=0.001)
    assert report.results[0].expected is None
    (entry,) = tuned_files.load_tuned(report.path, DEVICE).entries
    assert "predicted_bytes" not in entry.measured
