"""A real tune of one small problem on the present GPU, and the timing protocol."""

from __future__ import annotations

import pytest
import torch
from tilelang_configs import tilelang_by_chunk

from gdn2gen.base.device import present_device
from gdn2gen.base.worker import Worker
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape, parse_shapes
from gdn2gen.family.tolerances import limit_of
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stages import STAGES
from gdn2gen.measure import check, rows, timing
from gdn2gen.measure.accuracy import run_op
from gdn2gen.ops.chunk import chunk_gdn2
from gdn2gen.store import tuned_files
from gdn2gen.store.dispatch import find_recipe
from gdn2gen.tuning import tune
from gdn2gen.tuning.views.progress import Progress

pytestmark = pytest.mark.gpu


@pytest.mark.gpu_alone
def test_a_one_minute_tune_files_an_entry_that_calls_find(tmp_path, monkeypatch):
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "tuned"))
    problem, device = Problem(K=64, V=64), present_device()
    shapes = parse_shapes("2x1024x8,1x512x4")
    report = tune(
        problem,
        shapes,
        device,
        budget_minutes=1.0,
        out_dir=tmp_path / "tuned",
        levels=("lean",),
        progress=Progress(),
    )
    assert [result.shape for result in report.results] == shapes
    assert report.trials.get("ok", 0) > 0
    entries = tuned_files.load_tuned(report.path, device).entries
    for entry in entries:
        assert entry.provenance == "measured" and not tuned_files.is_stale(entry)
        slower = entry.measured["default_forward_backward_ms"]
        assert entry.measured["forward_backward_ms"] <= slower * 1.02
        # correlated keys amplify all rounding, and have a bound of their own
        assert 0 < max(entry.gate.values()) <= limit_of("bf16", "correlated")
    assert find_recipe(problem, shapes[0].regime, device).source == "exact"


def test_a_cuda_error_costs_the_worker_not_the_caller():
    worker = Worker()
    try:
        failed = worker.call("torch.cuda:set_device", 999, timeout=120)
        assert not failed.ok
        assert worker.call("torch.cuda:device_count", timeout=120).value >= 1
    finally:
        worker.close()


def test_a_candidate_that_is_forced_runs_forward_and_backward(monkeypatch):
    """The backward must run the forced recipe, too: its saved tensors depend on the chunk size."""
    recipe = Recipe.default(Problem(K=64, V=64), "lean", BT=32)
    shapes = check.check_shapes(recipe.problem)
    result = check.check_recipe(recipe, patterns=("layer",), repeats=3, shapes=shapes)
    assert result.ok, result.reason


@pytest.mark.parametrize("plan", ["lean", "states"])
@pytest.mark.parametrize("packed", [False, True])
def test_scans_in_tilelang_pass_the_gate(packed, plan):
    problem = check.full_problem(Problem(varlen=packed))
    recipe = Recipe.default(problem, plan, BT=64)
    for stage in [x for x in PLANS[plan].stages if "scan" in x]:
        config = default_config(stage, problem, BT=64).replace(language="tilelang")
        recipe = recipe.with_config(config)
    shapes = check.check_shapes(problem)
    result = check.check_recipe(recipe, patterns=check.QUICK_PATTERNS, repeats=3, shapes=shapes)
    assert result.ok, result.reason


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize(
    ("problem", "plan"),
    [
        (Problem(), "lean"),
        (Problem(K=64, state_v_first=True), "lean"),
        (Problem(V=64, dtype="fp16"), "lean"),
        (Problem(), "states"),
        (Problem(K=64, V=64), "states"),
        (Problem(), "blocks2"),
        (Problem(K=64, V=64), "blocks1_states"),
        (Problem("kda"), "blocks2_states"),
        (Problem(state_v_first=True, l2norm=False), "blocks4_states"),
    ],
    ids=[
        *("plain", "K=64", "V=64", "states", "states-64"),
        *("blocks", "blocks-of-1", "kda-blocks", "blocks-of-4"),
    ],
)
def test_segments_in_tilelang_pass_the_gate(problem, plan, num_stages):
    """Two segments, and five of 27 and 26 chunks, the last of which has eight tokens.

    A block of two chunks, or of four, lies in two segments there.
    """
    full = check.full_problem(problem)
    recipe = Recipe.default(full, plan, BT=32)
    for stage in [x for x in PLANS[plan].stages if STAGES[x].selector == "segments"]:
        config = default_config(stage, full, BT=32).replace(
            language="tilelang", segments="parallel", num_stages=num_stages
        )
        recipe = recipe.with_config(config)
    shapes = (check.RAGGED, Shape("five-segments", 2, 33 * 4 * 32 + 40, 3))
    patterns = ("layer", "sparse", "strong", "zero")
    result = check.check_recipe(recipe, patterns=patterns, repeats=10, shapes=shapes)
    assert result.ok, result.reason


@pytest.mark.parametrize(
    ("problem", "plan"),
    [
        (Problem(), "lean"),
        (Problem(varlen=True), "lean"),
        (
            Problem(V=64, gate="softplus", gate_dtype="bf16", has_A_log=True, has_dt_bias=True),
            "fast",
        ),
        (Problem(K=64, V=32, gate="sigmoid", has_A_log=True, varlen=True), "lean"),
        (Problem(varlen=True), "states"),
    ],
    ids=["plain", "packed", "softplus", "sigmoid-packed", "packed-states"],
)
def test_stages_by_chunk_in_tilelang_pass_the_gate(problem, plan):
    """Strong decay, which a Triton kernel beside some of them takes over, among the patterns.

    Both ways to invert, by turns.
    """
    full = check.full_problem(problem)
    recipe = _by_chunk_in_tilelang(full, plan)
    if plan != "lean":
        recipe = recipe.with_config(recipe["prepare"].replace(solve="ieee"))
    shapes = check.check_shapes(full)
    patterns = ("layer", "sparse", "strong", "mixed", "zero")
    result = check.check_recipe(recipe, patterns=patterns, repeats=10, shapes=shapes)
    assert result.ok, result.reason


@pytest.mark.parametrize("language", ["triton", "tilelang"])
@pytest.mark.parametrize("changes", [{}, {"K": 64, "V": 32, "varlen": True}], ids=["", "packed"])
def test_bounded_placement_passes_the_gate(language, changes):
    """Decays close to the gate's bound, the largest that chunks of 32 tokens take."""
    gated = {"gate": "sigmoid", "bound": 2, "has_A_log": True, "has_dt_bias": True}
    full = check.full_problem(Problem(**gated, **changes))
    recipe = Recipe.default(full, "lean", BT=32)
    if language == "tilelang":
        recipe = _by_chunk_in_tilelang(full)
    for config in recipe.configs:
        if "decay" in config:
            recipe = recipe.with_config(config.replace(decay="bounded"))
    shapes = check.check_shapes(full)
    result = check.check_recipe(recipe, patterns=("layer", "strong"), repeats=10, shapes=shapes)
    assert result.ok, result.reason


def test_forward_in_tilelang_is_causal_bit_for_bit():
    """One token's decay takes its chunk out of the first frame; tokens before it must not move."""
    problem, token = check.full_problem(Problem()), 700
    inputs, gradients = check.drawn(problem, check.RAGGED, "layer", "cuda")
    changed = {name: x.clone() for name, x in inputs.items()}
    changed["g"][:, token] -= 300.0
    with check.forced(_by_chunk_in_tilelang(problem)):
        before, after = (run_op(chunk_gdn2, problem, x, gradients)["o"] for x in (inputs, changed))
    assert torch.equal(before[:, :token], after[:, :token])
    assert not torch.equal(before[:, token:], after[:, token:])


def _by_chunk_in_tilelang(problem, plan="lean"):
    recipe = Recipe.default(problem, plan, BT=32)
    for stage in recipe.by_stage:
        if "scan" not in stage:
            recipe = recipe.with_config(tilelang_by_chunk(stage, problem))
    return recipe


@pytest.mark.gpu_alone
def test_timing_agrees_with_the_clock():
    cycles = int(2e6)
    timed = timing.time_ms(lambda: torch.cuda._sleep(cycles), 5, 20)
    assert timed.n >= 5
    assert timed.p20 <= timed.median <= timed.p80
    assert 0.2 < timed.median < 20


@pytest.mark.gpu_alone
def test_peak_memory_counts_what_a_run_allocates():
    base = torch.empty(2**20, device="cuda")
    peak = timing.peak_mib(lambda: torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda"))
    assert peak >= 64 + base.numel() * 4 / 2**20


@pytest.mark.gpu_alone
def test_stages_are_timed_with_their_bytes():
    problem, (shape,) = Problem(K=64, V=64), parse_shapes("2x1024x8")
    found = rows.bench_stages(problem, shape)
    assert {"prepare", "scan", "grad_key"} <= {row.stage for row in found}
    assert all(0 < row.gbps < 2 * timing.copy_gbps() for row in found)
