"""The search without a GPU: a fake backend plays every accident that a config can cause."""

from __future__ import annotations

import re
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import optuna
import pytest
from fake_tuning import DEVICE, ERRORS, LARGE, PACKED, PROBLEM, SMALL, FakeBackend, Killed

from gdn2gen.base import outcome
from gdn2gen.base.device import has_gpu, named_device
from gdn2gen.base.errors import DeviceError, TuneError
from gdn2gen.base.outcome import Outcome
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels import plans
from gdn2gen.kernels.config import default_config, language_of
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import full_problem
from gdn2gen.measure.timing import Timing
from gdn2gen.store import tuned_files
from gdn2gen.tuning.filing import entries_of
from gdn2gen.tuning.records.ledger import read_ledger
from gdn2gen.tuning.records.storage import open_storage
from gdn2gen.tuning.run import _Run, tune
from gdn2gen.tuning.search.finalists import Finals
from gdn2gen.tuning.search.loop import Search
from gdn2gen.tuning.search.opening import Opening
from gdn2gen.tuning.search.verdicts import Measured, Verdict, better, pick
from gdn2gen.tuning.views.progress import Progress


@pytest.fixture(autouse=True)
def few_plans(request, monkeypatch):
    """Searches of three plans instead of nine, but for a test of the others."""
    if "of_blocks" not in request.node.name:
        few = {
            level: tuple(x for x in names if not (PLANS[x].every or PLANS[x].instead))
            for level, names in plans.PLANS_OF.items()
        }
        monkeypatch.setattr(plans, "PLANS_OF", few)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GDN2GEN_TUNED_DIR", raising=False)
    monkeypatch.setattr(
        "gdn2gen.tuning.records.stored.packaged_tuned_dir", lambda: tmp_path / "packaged"
    )
    # one process writes: test_storage and test_joined are of others, and of the lock
    monkeypatch.setattr("gdn2gen.tuning.records.journal._Lock.acquire", lambda self: True)
    monkeypatch.setattr("gdn2gen.tuning.records.journal._Lock.release", lambda self: None)


@pytest.fixture(autouse=True)
def studies(request, monkeypatch):
    """In memory, where no test gives a file or resumes what was killed: a third of a search's time
    went into the journal, which test_storage, test_joined and test_offline are of."""
    kept = {}

    def opened(storage, *, prune):
        if not prune or "killed" in request.node.name:
            return open_storage(storage, prune=prune)
        return kept.setdefault(storage, optuna.storages.InMemoryStorage())

    monkeypatch.setattr("gdn2gen.tuning.run.open_storage", opened)


def run(backend, tmp_path, shapes=(SMALL,), minutes=3.0, levels=("lean",), **kwargs):
    return tune(
        PROBLEM,
        list(shapes),
        DEVICE,
        budget_minutes=minutes,
        out_dir=tmp_path / "tuned",
        levels=levels,
        backend=backend,
        clock=backend.clock,
        progress=Progress(),
        **kwargs,
    )


def ledger_reasons(report):
    return [entry.reason for entry in read_ledger(report.ledger)]


def test_the_best_configs_win_and_are_filed(tmp_path):
    backend = FakeBackend()
    report = run(backend, tmp_path, minutes=6)
    (result,) = report.results
    assert result.speedup > 1.2
    file = tuned_files.load_tuned(report.path, DEVICE)
    # parallel scans may be as fast as serial ones: beside them is the best that serves all options
    entry, *others = sorted(file.entries, key=lambda x: x.measured["forward_backward_ms"])
    assert all(x.recipe_for(PROBLEM).serves_every_option for x in others) and len(others) < 2
    assert entry.provenance == "measured"
    assert entry.measured["default_forward_backward_ms"] > entry.measured["forward_backward_ms"]
    assert entry.gate == ERRORS
    assert not tuned_files.is_stale(entry)
    assert backend.closed


def test_the_default_is_always_evaluated_even_if_the_ledger_refuses_it(tmp_path):
    first = FakeBackend(verdict=lambda config: "wrong" if config["BT"] == 64 else None)
    report = run(first, tmp_path)
    assert "BT=64" in report.skipped
    second = FakeBackend()
    run(second, tmp_path)
    default = Recipe.default(PROBLEM, "lean")
    assert any(recipe == default for recipe, _ in second.checked)
    assert any(recipe == default for recipe, _, _ in second.timed)


@pytest.mark.parametrize(
    ("accident", "status"),
    [
        ("crash", outcome.CRASHED),
        ("hang", outcome.TIMEOUT),
        ("memory", outcome.OUT_OF_MEMORY),
        ("wrong", outcome.WRONG),
        ("no build", outcome.BUILD_ERROR),
        ("spills", outcome.RESOURCES),
    ],
)
def test_each_accident_is_survived_and_goes_to_the_ledger(tmp_path, accident, status):
    backend = FakeBackend(verdict=lambda config: accident if config["num_warps"] == 8 else None)
    report = run(backend, tmp_path)
    assert report.trials[status] > 0
    assert any(reason.startswith(status) for reason in ledger_reasons(report))
    (result,) = report.results
    assert all(config["num_warps"] != 8 for config in result.recipe.configs)
    if accident in ("no build", "spills"):
        gated = [config for recipe, _ in backend.checked for config in recipe.configs]
        assert all(config["num_warps"] != 8 for config in gated)


def test_what_is_refused_is_not_tried_again(tmp_path):
    def verdict(config):
        return "crash" if config["num_warps"] == 8 else None

    def named(configs):
        return {(x.stage, tuple(sorted(x.items()))) for x in configs}

    # in three minutes of a search few configs have so many warps, or none
    first, second = FakeBackend(verdict), FakeBackend(verdict)
    report = run(first, tmp_path, minutes=6, storage=tmp_path / "one.journal")
    refused = {(x.stage, tuple(sorted(x.config.items()))) for x in read_ledger(report.ledger)}
    assert refused and refused <= named(first.compiled)
    run(second, tmp_path, storage=tmp_path / "two.journal")
    assert not refused & named(second.compiled)


def test_a_killed_run_resumes_with_nothing_lost_but_the_trials_in_flight(tmp_path):
    first = FakeBackend(kill_after=60)
    with pytest.raises(Killed):
        run(first, tmp_path, minutes=30)
    done = {config for _, _, config in _single_stage(first)}
    assert done
    second = FakeBackend()
    run(second, tmp_path, minutes=6)
    defaults = {default_config(x.stage, PROBLEM, BT=x.size("BT")) for x in second.compiled}
    searched = [x for x in _before_finals(second) if x not in defaults]
    assert not done & set(searched)


def _single_stage(backend):
    return [
        (recipe, shape, recipe.by_stage[stages[0]])
        for recipe, stages, shape in backend.timed
        if len(stages) == 1
    ]


def _before_finals(backend):
    """Configs compiled for single trials: each is timed alone."""
    return [config for _, _, config in _single_stage(backend)]


def test_the_budget_is_kept(tmp_path):
    for minutes in (1.0, 4.0):
        backend, folder = FakeBackend(), tmp_path / str(minutes)
        run(backend, folder, minutes=minutes, storage=folder / "study.journal")
        assert backend.now < minutes * 60 * 1.25 + 10


def test_the_budget_is_kept_where_finals_are_slow(tmp_path):
    """As on an H200: 1 s for each full check and 0.9 s for three rounds, six finalists at first."""

    class Slow(FakeBackend):
        def check(self, recipe, *, full):
            self.now += 0.8 * full
            return super().check(recipe, full=full)

    backend = Slow()
    shapes = (SMALL, LARGE, Shape("third", 1, 512, 2), Shape("fourth", 1, 1024, 2))
    report = run(backend, tmp_path, shapes=shapes, levels=("lean", "fast"), minutes=2)
    assert len(report.results) == 8
    assert backend.now < 120 * 1.1


def test_a_short_budget_still_decides(tmp_path):
    backend = FakeBackend()
    report = run(backend, tmp_path, shapes=(SMALL, LARGE), minutes=0.2)
    assert [result.shape.name for result in report.results] == ["small", "large"]


def test_a_compiled_candidate_is_timed_at_all_shapes_and_gated_once(tmp_path):
    # by the knobs nothing is further from the best than 1.3 times, the bound of what is hopeless
    backend = FakeBackend(speed=lambda config, shape: 1.0 + 0.02 * config["num_warps"])
    run(backend, tmp_path, shapes=(SMALL, LARGE))
    assert set(_shapes_timed(backend).values()) == {("small", "large")}
    quick = [recipe for recipe, full in backend.checked if not full]
    assert len(quick) == len(set(quick))


def test_what_is_hopeless_at_one_shape_is_not_timed_at_the_next(tmp_path):
    def speed(config, shape):
        return 9.0 if shape == SMALL and config["num_warps"] == 8 else 1.0

    backend = FakeBackend(speed=speed)
    run(backend, tmp_path, shapes=(SMALL, LARGE))
    timed = _shapes_timed(backend)
    slow = {config for config in timed if config["num_warps"] == 8}
    assert {timed[config] for config in slow} == {("small",)}
    assert {timed[config] for config in timed.keys() - slow} == {("small", "large")}


def _shapes_timed(backend):
    """For each config that was searched for, the shapes that it was timed at, in order."""
    timed: dict[object, tuple[str, ...]] = {}
    for _, shape, config in _single_stage(backend):
        if config != default_config(config.stage, PROBLEM, BT=config.size("BT")):
            timed[config] = (*timed.get(config, ()), shape)
    return timed


def test_levels_share_the_trials_of_their_stages(tmp_path):
    backend = FakeBackend()
    report = run(backend, tmp_path, levels=("lean", "fast"), minutes=6)
    assert {result.level for result in report.results} == {"lean", "fast"}
    singles = [config for _, _, config in _single_stage(backend)]
    assert len(singles) == len(set(singles))


@pytest.mark.parametrize(
    ("op", "plans"), [("mamba2", ["grouped"]), ("gla", ["linear", "linear_fast", "linear_states"])]
)
def test_a_plan_that_serves_both_levels_is_tuned_once(op, plans, monkeypatch):
    monkeypatch.setattr("gdn2gen.tuning.run.Search", lambda *given: given[-1])
    problem = Problem(op=op, gate="softplus" if op == "mamba2" else "none")
    context = SimpleNamespace(device=named_device("H200"))
    turns = _Run(context, problem, [SMALL], ("lean", "fast"), None, {}, None)
    assert turns.search == turns.plans == plans


def test_packed_shapes_are_tuned_apart_and_seeded_from_the_others(tmp_path):
    backend = FakeBackend()
    report = run(backend, tmp_path, shapes=(SMALL, PACKED), minutes=8)
    packed = next(result for result in report.results if result.shape == PACKED)
    assert packed.recipe.problem.varlen
    assert packed.speedup > 1.1


def test_a_config_that_fails_only_the_full_gate_is_replaced(tmp_path):
    def verdict(config):
        fast = config["num_warps"] == 8 and config["num_stages"] == 2
        return "wrong in full" if config.stage == "scan" and fast else None

    report = run(FakeBackend(verdict), tmp_path, minutes=10)
    (result,) = report.results
    assert result.speedup > 1.1
    assert verdict(result.recipe["scan"]) is None


def test_the_search_begins_while_other_chunk_sizes_compile(tmp_path):
    class Slow(FakeBackend):
        """Defaults in chunks of 64 tokens compile for 30 s of the clock."""

        late: ClassVar[list] = []

        def compile(self, problem, config):
            future = super().compile(problem, config)
            first = not self.checked and config == default_config(config.stage, PROBLEM, BT=64)
            if first:
                self.late.append((future.result(), waiting := Future()))
                return waiting
            if self.now > 30:
                for found, waiting in self.late:
                    waiting.set_result(found)
                self.late.clear()
            return future

    backend = Slow()
    run(backend, tmp_path, minutes=4)
    sizes = [recipe.BT for recipe, _, _ in backend.timed]
    assert sizes.index(64) > 5, "nothing was timed before the slow defaults"
    default = Recipe.default(PROBLEM, "lean", 64)
    singles = [x for x, stages, _ in backend.timed if len(stages) == 1 and x.BT == 64]
    assert any(x != default for x in singles), "chunks of 64 were never searched"


def test_what_the_finals_measure_in_any_case_compiles_during_the_search(tmp_path):
    class Watching(FakeBackend):
        tried_before: ClassVar[dict] = {}

        def compile(self, problem, config):
            if problem == full_problem(PROBLEM):
                self.tried_before.setdefault(config, len(_before_finals(self)))
            return super().compile(problem, config)

    backend = Watching()
    run(backend, tmp_path)
    tried = len(_before_finals(backend))
    default = Recipe.default(PROBLEM, "lean").configs
    assert all(backend.tried_before[config] < tried - 5 for config in default)


def test_the_sampler_is_asked_while_the_gpu_tries(tmp_path):
    class Watching(FakeBackend):
        grew: ClassVar[list] = []

        def time_stages(self, recipe, stages, shape):
            before = len(self.compiled)
            time.sleep(0.02 * (len(stages) == 1))
            self.grew.append(len(self.compiled) > before)
            return super().time_stages(recipe, stages, shape)

    backend = Watching()
    run(backend, tmp_path)
    assert any(backend.grew)


def test_a_scan_is_ranked_with_what_its_segments_cost_the_rescan(tmp_path):
    """One that is faster alone and makes rescan slower by more is not chosen."""

    class Coupled(FakeBackend):
        def time_stages(self, recipe, stages, shape):
            timed = super().time_stages(recipe, stages, shape)
            segments = recipe["scan"]["max_segments"]
            if not timed.ok or "rescan" not in stages or segments == 132:
                return timed
            slower = timed.get() | {"rescan": self._timing(timed.get()["rescan"].median + 0.5)}
            return Outcome(outcome.OK, slower)

    def speed(config, shape):
        parallel = config.get("segments") == "parallel"
        return 1.0 - 0.2 * parallel - 0.1 * (config.get("max_segments", 132) != 132)

    report = run(Coupled(speed=speed), tmp_path, minutes=12)
    scan = report.results[0].recipe["scan"]
    assert (scan["segments"], scan["max_segments"]) == ("parallel", 132)
    assert report.results[0].recipe["reverse_scan"]["max_segments"] != 132


def test_no_working_default_is_an_error_that_says_why(tmp_path):
    with pytest.raises(TuneError, match="dg is off"):
        run(FakeBackend(verdict=lambda config: "wrong"), tmp_path)


def test_a_shape_that_does_not_fit_is_left_out(tmp_path):
    class Small(FakeBackend):
        def time_stages(self, recipe, stages, shape):
            if shape is LARGE:
                return Outcome(outcome.OUT_OF_MEMORY, detail="tried to allocate 1 TiB")
            return super().time_stages(recipe, stages, shape)

    report = run(Small(), tmp_path, shapes=(LARGE, SMALL))
    assert [result.shape for result in report.results] == [SMALL]
    assert "1 TiB" in report.skipped["large"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shapes": ()}, "no shape"),
        ({"levels": ("huge",)}, "huge"),
        ({"minutes": 0.0}, "positive"),
        ({"storage": "nonsense://x"}, "cannot be opened"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, words):
    with pytest.raises(TuneError, match=words):
        run(FakeBackend(), tmp_path, **arguments)


def _measured(recipe, ms, forward_ms=0.5):
    forward, both = Timing(forward_ms, forward_ms, forward_ms, 10), Timing(ms, ms, ms, 10)
    return Measured(recipe, forward, both, 0.0, {})


def test_the_search_begins_at_the_default_of_the_architecture():
    context = SimpleNamespace(device=named_device("B200"))
    search = Search(context, PROBLEM, [SMALL], ["lean"])
    configs = Recipe.default(PROBLEM, arch="sm_100").by_stage
    assert search.base("lean").by_stage == configs
    assert {stage: search.default(stage) for stage in search.stages} == configs


def test_the_second_plan_is_tried_with_what_won_for_the_first(monkeypatch):
    """In whatever time there is: the default and one more are measured at least."""
    found = SimpleNamespace(ranked=lambda shape: [])
    trials = {32: dict.fromkeys(PLANS["fast"].stages, found)}
    base = partial(Recipe.default, PROBLEM)
    search = SimpleNamespace(problem=PROBLEM, trials=trials, base=base)
    finals = Finals(search)
    monkeypatch.setattr(finals, "_warm", lambda candidates: None)
    monkeypatch.setattr(finals, "_passes", lambda recipe: True)
    default = Recipe.default(PROBLEM, "lean", 32)
    won = default.with_config(default.by_stage["scan"].replace(num_stages=3))
    finals._won[SMALL] = won
    first, second = finals.choose(SMALL, "fast", 2)
    assert first == Recipe.default(PROBLEM, "fast")
    assert (second.plan.name, second["scan"]) == ("fast", won["scan"])
    assert [x.plan.name for x in finals.choose(LARGE, "fast", 2)] == ["fast"]
    # from what was on file, in chunks that were not searched
    finals._won[LARGE] = Recipe.default(PROBLEM, "lean", 16)
    assert [x.BT for x in finals.choose(LARGE, "fast", 2)] == [first.BT, 16]


def test_what_the_next_verdict_may_want_compiles_while_this_one_is_measured(tmp_path):
    """Each shape has a winner of its own; the second's is compiled before the first is decided."""
    best = {SMALL.name: 4, LARGE.name: 8}

    class Logged(FakeBackend):
        events: ClassVar[list] = []

        def compile(self, problem, config):
            if problem.initial_state:  # as the full check has it
                self.events.append(config)
            return super().compile(problem, config)

        def time_recipe(self, recipe, shape, *, with_peak):
            self.events.append(shape.name)
            return super().time_recipe(recipe, shape, with_peak=with_peak)

    def speed(config, shape):
        return 1.0 + 0.3 * (config["num_warps"] != best[shape.name])

    backend = Logged(speed=speed)
    report = run(backend, tmp_path, shapes=(SMALL, LARGE), minutes=10)
    first, second = ({*x.recipe.configs} for x in report.results)
    last = max(n for n, event in enumerate(backend.events) if event == SMALL.name)
    assert second - first and second <= {*backend.events[:last]}


@pytest.mark.parametrize(("states_ms", "plan"), [(0.9, "states"), (0.995, "fast"), (1.2, "fast")])
def test_of_a_levels_plans_the_fastest_wins_or_what_keeps_less(states_ms, plan):
    fast, states = (Recipe.default(PROBLEM, x) for x in ("fast", "states"))
    default = _measured(fast, 2.0)
    verdicts = [
        Verdict(SMALL, "fast", _measured(fast, 1.0), default, False),
        Verdict(SMALL, "fast", _measured(states, states_ms), _measured(states, 1.9), False),
    ]
    best = better(verdicts)
    assert best.winner.recipe.plan.name == plan
    assert best.default == default


@pytest.mark.parametrize("tilelang", [0.5, 1.5])
def test_the_best_in_triton_is_filed_beside_the_best(tmp_path, tilelang):
    """Where the best needs TileLang; else it is the best itself."""

    def speed(config, shape):
        if config.get("segments") == "parallel":  # or another would serve packed batches
            return 2.0
        if language_of(config) == "tilelang":
            return tilelang
        return 1.0 - 0.3 * (config["num_warps"] == 8)

    report = run(FakeBackend(speed=speed), tmp_path, levels=("lean",), minutes=8)
    *others, alone = tuned_files.read_tuned(report.path).entries
    assert alone.needs_triton_alone and len(others) == (tilelang < 1)
    assert not any(x.needs_triton_alone for x in others)
    measured = alone.measured
    assert measured["forward_backward_ms"] < measured["default_forward_backward_ms"]


@pytest.mark.parametrize(("fast_ms", "states_ms"), [(1.8, 1.9), (1.9, 1.8), (1.9, None)])
def test_of_a_levels_plans_the_fastest_in_triton_is_kept(fast_ms, states_ms):
    fast, states = (Recipe.default(PROBLEM, x) for x in ("fast", "states"))
    mixed = fast.with_config(fast.by_stage["rescan"].replace(language="tilelang"))
    default = _measured(fast, 2.0)
    in_triton = states_ms and _measured(states, states_ms)
    verdicts = [
        Verdict(SMALL, "fast", _measured(mixed, 1.0), default, False, _measured(fast, fast_ms)),
        Verdict(SMALL, "fast", _measured(mixed, 1.5), default, False, in_triton),
    ]
    kept = better(verdicts).in_triton
    assert kept.forward_backward.median == (1.8 if states_ms else 1.9)
    winner, second = entries_of(better(verdicts))
    assert not winner.needs_triton_alone and second.needs_triton_alone
    (only,) = entries_of(better([replace(verdicts[1], winner=_measured(states, 0.5))]))
    assert only.needs_triton_alone


def test_plans_of_a_level_are_ranked_and_one_is_filed(tmp_path):
    def speed(config, shape):
        return 2.0 if config.stage == "rescan" else 1.0

    report = run(FakeBackend(speed=speed), tmp_path, levels=("fast",), minutes=8)
    (result,) = report.results
    assert (result.level, result.recipe.plan.name) == ("fast", "states")
    (entry,) = tuned_files.read_tuned(report.path).entries
    assert (entry.level, entry.plan) == ("fast", "states")


@pytest.mark.slow
def test_plans_with_states_of_blocks_are_ranked_beside_the_others(tmp_path):
    """Stages that all take as long: the plans with the fewest of them."""
    report = run(FakeBackend(), tmp_path, levels=("fast",), minutes=8)
    (result,) = report.results
    assert result.recipe.plan.every and result.level == "fast"


def test_a_plan_beside_its_levels_first_is_left_out_where_its_default_fails(tmp_path):
    def verdict(config):
        return {"scan_states": "no build"}.get(config.stage)

    report = run(FakeBackend(verdict), tmp_path, levels=("lean", "fast"), minutes=6)
    assert [x.recipe.plan.name for x in report.results] == ["lean", "fast"]
    assert "ptxas died" in report.skipped["plan states, BT=32"]
    (words,) = report.left_to_try
    assert "scan_states" not in words


def test_a_plan_that_is_known_to_be_wrong_at_a_chunk_size_is_not_run_there():
    """Seen on an H200: the plans of blocks in chunks of 64, two of which took the worker down."""
    backend = FakeBackend()
    context = SimpleNamespace(device=DEVICE, backend=backend)
    opening = Opening(Search(context, PROBLEM, [SMALL], ["lean", "blocks2"]))
    compiles = opening._compile(64)
    assert {x.stage for x in backend.compiled} == set(PLANS["lean"].stages) == set(compiles)
    assert "operands at wrong addresses" in str(opening._why_fails("blocks2", 64, compiles))
    assert backend.checked == []
    assert "grad_blocks2" in opening._compile(32)


def test_a_plan_that_is_behind_by_its_stages_is_not_decided(tmp_path):
    class Watching(FakeBackend):
        plans: ClassVar[set] = set()

        def time_recipe(self, recipe, shape, *, with_peak):
            self.plans.add(recipe.plan.name)
            return super().time_recipe(recipe, shape, with_peak=with_peak)

    def speed(config, shape):
        return 9.0 if config.stage == "scan_states" else 1.0

    backend = Watching(speed=speed)
    report = run(backend, tmp_path, levels=("fast",), minutes=8)
    assert backend.plans == {"fast"} == {x.recipe.plan.name for x in report.results}


def test_a_tie_goes_to_the_default():
    default = Recipe.default(PROBLEM, "lean")
    other = default.with_config(default.by_stage["scan"].replace(num_warps=8))
    winner, tied = pick([_measured(default, 1.009), _measured(other, 1.0)], default)
    assert tied and winner.recipe == default
    winner, tied = pick([_measured(default, 1.02), _measured(other, 1.0)], default)
    assert not tied and winner.recipe == other


def test_a_tie_of_whole_passes_goes_to_the_faster_forward():
    default = Recipe.default(PROBLEM, "lean")
    other = default.with_config(default.by_stage["scan"].replace(num_warps=8))
    measured = [_measured(default, 2.0, 0.51), _measured(other, 2.01, 0.44)]
    winner, tied = pick(measured, default)
    assert tied and winner.recipe == other


def test_a_tie_without_the_default_goes_to_the_simpler():
    default = Recipe.default(PROBLEM, "lean")
    simple = default.with_config(default.by_stage["scan"].replace(num_warps=8))
    complex_ = simple.with_config(simple.by_stage["rescan"].replace(num_warps=8))
    measured = [_measured(default, 2.0), _measured(complex_, 1.0), _measured(simple, 1.005)]
    assert pick(measured, default)[0].recipe == simple


def test_a_journal_with_a_torn_last_line_still_opens(tmp_path):
    storage = tmp_path / "one.journal"
    first = FakeBackend()
    run(first, tmp_path, minutes=1, storage=storage)
    with storage.open("a") as file:
        file.write('{"op_code": 4, "wor')
    second = FakeBackend()
    run(second, tmp_path, minutes=1, storage=storage)
    done = {config for _, _, config in _single_stage(first)}
    assert done and not done & {config for _, _, config in _single_stage(second)}


def test_tuning_without_a_gpu_is_refused_at_once(tmp_path):
    if has_gpu():
        pytest.skip("asks what happens without a GPU")
    with pytest.raises(DeviceError, match="no GPU"):
        tune(PROBLEM, [SMALL], DEVICE, budget_minutes=1, out_dir=tmp_path)


def test_the_report_says_how_long_the_gpu_was_at_work(tmp_path):
    from rich.console import Console

    backend = FakeBackend()
    report = run(backend, tmp_path)
    # 0.2 s a check, 0.1 s a stage, 0.3 s a recipe; a compile is not the GPU's
    assert report.check_seconds == pytest.approx(0.2 * len(backend.checked))
    assert 0.1 * len(backend.timed) < report.timing_seconds < report.seconds - report.check_seconds
    assert {*report.phases} == {"defaults", "search", "finals"}
    assert sum(x.seconds for x in report.phases.values()) == pytest.approx(report.seconds, rel=0.1)
    busy = sum(x.busy for x in report.phases.values())
    assert busy == pytest.approx(report.check_seconds + report.timing_seconds)
    console = Console(width=400)
    with console.capture() as said:
        console.print(report.table())
    assert "% of the time in accuracy checks" in said.get()
    (words,) = report.left_to_try
    found = re.findall(r"(\w+) \(\d+% of a pass\) (\d+) of (\d+)", words)
    counts = {stage: (int(tried), int(worth)) for stage, tried, worth in found}
    assert {*counts} == {*PLANS["lean"].stages}
    assert all(0 < tried <= worth for tried, worth in counts.values())
    assert words in said.get()
