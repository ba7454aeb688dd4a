"""Plans whose forward is one kernel: what they serve, what they keep, what runs in their place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import pytest
from tilelang_configs import tilelang_config

from gdn2gen.base.device import named_device
from gdn2gen.codegen.render import render
from gdn2gen.family.prefill import PrefillProblem
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.family.registry import OPS, RECURRENCES
from gdn2gen.kernels.config import default_config, language_of
from gdn2gen.kernels.plans import PLANS, is_optional, keeps_least, level_of
from gdn2gen.kernels.recipe import Recipe, is_served
from gdn2gen.kernels.schedule import saved_by
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.transitions import TRANSITION_STAGES
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.runtime import _loading
from gdn2gen.store.dispatch import Found, find_recipe, forced_recipe, in_triton
from gdn2gen.tuning import space

OUTSIDE = tuple(name for name in PLANS if name.startswith("whole_direct"))
WHOLE = tuple(name for name in PLANS if name.startswith("whole") and name not in OUTSIDE)
H200 = named_device("H200")


def test_they_are_of_two_members_and_nobody_s_default() -> None:
    assert (
        *("whole", "whole_blocks1", "whole_blocks2"),
        *("whole_blocks1_states", "whole_blocks2_states"),
    ) == WHOLE
    for op in OPS:
        served = {*WHOLE} <= {*RECURRENCES[op].plans}
        assert served == (op in ("gdn2", "kda"))
        assert served or not {*WHOLE} & {*RECURRENCES[op].plans}
    for plan in WHOLE:
        lean = not plan.endswith("states")
        assert level_of(plan) == ("lean" if lean else "fast") and is_optional(plan, "gdn2")
        assert keeps_least(PLANS[plan]) == lean


def test_those_whose_decay_is_outside_of_products_are_of_two_others() -> None:
    assert (
        *("whole_direct", "whole_direct_blocks1", "whole_direct_blocks2"),
        "whole_direct_blocks2_states",
    ) == OUTSIDE
    for op in OPS:
        served = {*OUTSIDE} <= {*RECURRENCES[op].plans}
        assert served == (op in ("gated_delta_rule", "delta_rule"))
        assert served or not {*OUTSIDE} & {*RECURRENCES[op].plans}
    for plan in OUTSIDE:
        lean = not plan.endswith("states")
        assert level_of(plan) == ("lean" if lean else "fast") and is_optional(plan, "delta_rule")
        assert keeps_least(PLANS[plan]) == lean


@pytest.mark.parametrize("op", ["gated_delta_rule", "delta_rule"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("plan", OUTSIDE)
def test_they_keep_what_scans_of_q_and_k_keep(op: str, size: int, plan: str) -> None:
    problem = Problem(op, K=size, V=size, initial_state=True, final_state=True)
    recipe = Recipe.default(problem, plan)
    apart = recipe.everywhere()
    assert apart.plan.name == PLANS[plan].instead == plan.removeprefix("whole_")
    assert saved_by(recipe) == saved_by(apart)
    assert recipe.saved_segments == apart.saved_segments
    assert recipe.plan.backward == apart.plan.backward
    assert all(why_invalid(x, problem) is None for x in (*recipe.configs, *apart.configs))
    assert not recipe.serves_every_option and recipe.for_few(Regime(64, 1, 4)) == recipe


@pytest.mark.parametrize(
    ("changes", "arch", "words"),
    [
        ({"varlen": True}, None, "varlen of False, not True: packed sequences take prepare"),
        ({"dtype": "fp16"}, None, "dtype of bf16, not fp16"),
        ({"gate": "softplus", "has_A_log": True}, None, "gate of none, not softplus"),
        ({"K": 64}, None, "V of 64, not 128: it scans values in tiles as wide as keys"),
        ({"V": 64}, None, "V of 128, not 64"),
        ({"V": 256}, None, "V of 128, not 256"),
        ({"K": 96, "V": 96}, None, "K of 64, 128, not 96: its slots are of tiles so wide"),
        ({"K": 32, "V": 32}, None, "K of 64, 128, not 32"),
        ({}, "sm_80", "not 2: its waits for asynchronous copies"),
        ({}, "sm_100", "not sm_100"),
    ],
)
def test_what_scans_of_q_and_k_in_one_kernel_do_not_serve(
    changes: dict[str, Any], arch: str | None, words: str
) -> None:
    plain = Problem("gated_delta_rule")
    config = default_config("forward_outside", plain)
    problem = replace(plain, **changes)
    reason = why_invalid(config, problem, arch)
    assert reason is not None and words in reason
    assert is_served("whole_direct", plain, "sm_90")
    assert not is_served("whole_direct", problem, arch)
    assert is_served("direct", problem, arch)
    assert why_invalid(config, replace(plain, l2norm=False, gate_dtype="bf16")) is None
    assert "BT of 32, not 64" in str(why_invalid(config.replace(BT=64), plain))
    assert "num_stages of 2, not 3" in str(why_invalid(config.replace(num_stages=3), plain))


@pytest.mark.parametrize("op", ["gdn2", "kda"])
@pytest.mark.parametrize("plan", WHOLE)
def test_they_keep_what_is_kept_instead(op: str, plan: str) -> None:
    """So that a forward of either serves a backward of the other."""
    size = 128 if plan == "whole_blocks2_states" else 64
    problem = Problem(op, K=size, V=size, initial_state=True, final_state=True)
    recipe = Recipe.default(problem, plan)
    apart = recipe.everywhere()
    assert apart.plan.name == PLANS[plan].instead
    assert saved_by(recipe) == saved_by(apart)
    assert recipe.saved_segments == apart.saved_segments
    assert recipe.plan.backward == apart.plan.backward
    assert [recipe[x] for x in recipe.plan.backward] == [apart[x] for x in apart.plan.backward]
    assert all(why_invalid(x, problem) is None for x in (*recipe.configs, *apart.configs))
    assert recipe.for_few(Regime(64, 1, 4)) == recipe


@pytest.mark.parametrize(
    ("changes", "arch", "words"),
    [
        ({"varlen": True}, None, "varlen of False, not True: packed sequences take prepare"),
        ({"dtype": "fp16"}, None, "dtype of bf16, not fp16"),
        ({"gate_dtype": "bf16"}, None, "gate_dtype of fp32, not bf16"),
        ({"l2norm": False}, None, "l2norm of True, not False"),
        ({"gate": "sigmoid"}, None, "gate of none, not sigmoid: the gate's activation is in prep"),
        ({"V": 256}, None, "V of 64, 128, not 256: one program scans 64 values, and two 128"),
        ({"K": 40, "V": 136}, None, "V of 64, 128, not 192"),
        ({"K": 136, "V": 136}, None, "K of 64, 128, not 192: its slots are of tiles so wide"),
        ({}, "sm_80", "not 2: its waits for asynchronous copies"),
        ({}, "sm_100", "not sm_100"),
    ],
)
def test_what_it_does_not_serve_is_refused_in_words(
    changes: dict[str, Any], arch: str | None, words: str
) -> None:
    problem = replace(Problem(), **changes)
    config = default_config("forward", Problem())
    reason = why_invalid(config, problem, arch)
    assert reason is not None and words in reason
    assert is_served("whole", Problem(), "sm_90")
    assert not is_served("whole", problem, arch)
    assert is_served("lean", problem, arch)


@pytest.mark.parametrize("op", ["gdn2", "kda"])
@pytest.mark.parametrize(
    ("K", "V", "groups"),
    [
        *((128, 64, 2), (96, 48, 2), (72, 24, 2), (128, 16, 2)),
        *((64, 128, 3), (48, 104, 3), (16, 72, 3)),
    ],
)
def test_values_in_other_tiles_than_keys_are_served_where_a_recipe_says_so(
    op: str, K: int, V: int, groups: int
) -> None:
    """By what is tuned for 128 x 128, too; but no call comes to it before an entry does."""
    problem = Problem(op, K=K, V=V, initial_state=True, final_state=True)
    config = default_config("forward", problem)
    assert config["num_stages"] == groups and why_invalid(config, problem, "sm_90") is None
    assert [*space.valid_configs("forward", problem, H200, 32)] == [
        config.replace(num_stages=x) for x in range(2, groups + 1)
    ]
    kept = "whole_blocks2_states" if K > 64 else "whole_blocks1_states"
    for plan in ("whole", "whole_blocks2", kept):
        assert is_served(plan, problem, "sm_90")
    recipe = Recipe.default(Problem(op), "whole_blocks2").fitted(problem, "sm_90")
    assert recipe.plan.name == "whole_blocks2"
    for level in ("lean", "fast"):
        found = find_recipe(problem, Regime(16384, 4, 16), H200, level=level)
        filed = (64, 64) if found.entry is None else tuple(found.entry.problem_key[x] for x in "KV")
        same = [x > 64 for x in filed] == [K > 64, V > 64]
        assert same or not found.recipe.plan.name.startswith("whole")


def test_of_64_values_one_program_of_two_scans() -> None:
    """Copies go one way, and who made a slot alone is told that it was scanned."""
    sources = {
        (K, V): render(Problem(K=K, V=V), "forward", default_config("forward", Problem(K=K, V=V)))
        for K, V in ((128, 128), (128, 64), (64, 128), (64, 64))
    }
    text = {size: x.source for size, x in sources.items()}
    for size, one in {(128, 128): 0, (128, 64): 1, (64, 128): 0, (64, 64): 1}.items():
        assert ("empty = tile.alloc_cluster_barrier([WARPS] * SLOTS)" in text[size]) == one
        assert text[size].count("dst_block=0,") == 5 * one
        assert text[size].count("dst_block=1 - own.i_v,") == 5 * (1 - one)
        assert ("own.i_v * BV" in text[size]) == (not one)
    assert "own.empty[slot], slot % 2)" in text[128, 64]
    assert "own.empty[slot], 1 - slot % 2)" in text[64, 64]
    assert all(
        ("SLOTS, COPIES = 2 * GROUPS + 1" in x) == (size == (64, 64)) for size, x in text.items()
    )


@pytest.mark.parametrize("op", ["gdn2", "kda"])
def test_options_that_add_arguments_are_served(op: str) -> None:
    tied = {"beta_sigmoid": True, "neg_eigval": True, "beta_fp32": True} if op == "kda" else {}
    problem = Problem(op, initial_state=True, final_state=True, state_v_first=True, **tied)
    config = default_config("forward", problem)
    assert why_invalid(config, problem, "sm_90") is None
    source = render(problem, "forward", config).source
    assert ("2.0 / (1.0 + tile.exp(-mine.x_beta[0]))" in source) == (op == "kda")
    assert "x.initial_state[own.i_b, own.i_h, own.i_v * BV + i, j]" in source


def test_other_head_dims_and_chunks_take_two_kernels() -> None:
    recipe = Recipe.default(Problem(), "whole_blocks2")
    assert recipe.fitted(Problem(), "sm_90") == recipe
    found = recipe.fitted(Problem(K=64, V=256), "sm_90")
    assert found.plan.name == "blocks2"
    assert all(why_invalid(x, found.problem, "sm_90") is None for x in found.configs)
    config = default_config("forward", Problem())
    assert "BT of 32, not 64" in str(why_invalid(config.replace(BT=64), Problem()))


def test_what_keeps_states_is_of_64_channels() -> None:
    config = default_config("forward_blocks1", Problem(K=64, V=64))
    assert why_invalid(config, Problem(K=64, V=64), "sm_90") is None
    reason = why_invalid(config, Problem())
    assert reason is not None and "K of 64, not 128: no shared memory is left" in reason
    assert "num_stages of 2, not 3" in str(
        why_invalid(config.replace(num_stages=3), Problem(K=64, V=64))
    )
    assert not is_served("whole_blocks1_states", Problem(), "sm_90")


def test_what_keeps_a_state_of_two_chunks_is_of_65_to_128_channels() -> None:
    for K, V in ((128, 128), (96, 96), (72, 120), (128, 64), (96, 48), (128, 16)):
        assert is_served("whole_blocks2_states", Problem(K=K, V=V), "sm_90")
    recipe = Recipe.default(Problem(), "whole_blocks2_states")
    for K, V in ((64, 64), (128, 256), (48, 96)):
        problem = Problem(K=K, V=V)
        assert not is_served("whole_blocks2_states", problem, "sm_90")
        assert recipe.fitted(problem, "sm_90").plan == PLANS["blocks2_states"]
    reason = why_invalid(default_config("forward_blocks2", Problem()), Problem(K=64, V=64))
    assert reason is not None and "forward_blocks1 keeps every state" in reason


# Below tiles of 128, of 64, and of both.
BELOW: Final = [(120, 120), (112, 128), (128, 104), (104, 112), (48, 48), (40, 64), (56, 128)]
# By more than the 32 channels of other tiles.
FAR_BELOW: Final = [(96, 96), (72, 72), (80, 96), (96, 128), (32, 32), (16, 16), (24, 64), (16, 88)]


@pytest.mark.parametrize(("K", "V"), BELOW + FAR_BELOW)
@pytest.mark.parametrize("op", ["gdn2", "kda"])
def test_blocks_and_one_kernel_take_head_dims_below_their_tiles(op: str, K: int, V: int) -> None:
    """As much as tiles of 64 and of 128 do that are full, and in the same configs."""
    full, problem = (
        Problem(op, K=k, V=v, initial_state=True, final_state=True)
        for k, v in ((128 if K > 64 else 64, 128 if V > 64 else 64), (K, V))
    )
    # kept transitions alone are of heads that fill their tiles
    served = {*STAGES} - {x.name for x in TRANSITION_STAGES}
    for stage in (x for x in served if STAGES[x].every or x.startswith("forward")):
        if stage.startswith("forward_outside"):
            continue  # of other members
        wanted, found = (
            [x for x in space.valid_configs(stage, y, H200, 32) if language_of(x) == "tilelang"]
            for y in (full, problem)
        )
        assert wanted == found, stage
        assert wanted or stage.startswith("forward") or stage.endswith("4")
    for plan in WHOLE:
        assert is_served(plan, problem, "sm_90") == is_served(plan, full, "sm_90")


@pytest.mark.parametrize("size", [136, 160, 192, 256])
def test_blocks_in_tilelang_have_no_tiles_of_other_widths(size: int) -> None:
    config = tilelang_config("grad_blocks2", Problem())
    for sizes in ({"K": size}, {"V": size}):
        reason = why_invalid(config, Problem(**sizes), "sm_90")
        assert reason and "tiles of other widths were not compiled for" in reason, reason
    assert not any(
        language_of(x) == "tilelang"
        for x in space.valid_configs("scan_blocks2", Problem(K=size, V=size), H200, 32)
    )


def test_channels_past_the_head_dim_have_lost_nothing() -> None:
    """Loads give zeros there: as a chunk's whole decay they would be taken for strong, and the
    gradients left to a kernel that has none to write."""
    for stage, K, BK, at in (
        ("grad_blocks2", 112, 128, {96}),
        ("grad_blocks1", 48, 64, {32}),
        ("grad_blocks2", 96, 128, {96}),
        ("grad_blocks2", 72, 128, {64, 96}),
        # of slices of 64 the second one
        ("grad_blocks1", 72, 64, {0, 32}),
        ("grad_blocks1", 96, 64, {32}),
        ("grad_blocks1", 24, 64, {0, 32}),
        ("grad_blocks1", 32, 64, {32}),
    ):
        config = tilelang_config(stage, Problem(K=K, V=K)).replace(BK=BK)
        source = render(Problem(K=K, V=K), stage, config).source
        full = render(Problem(K=128 if K > 64 else 64, V=BK), stage, config).source
        assert "kept = tile.if_then_else" not in full
        for lane in range(0, BK, 32):
            offset = f" + {lane}" if lane else ""
            own = f"s_gamma[i_lane{offset}]"
            masked = f" = tile.if_then_else(o_k + i_lane{offset} < K, {own}, 1.0)"
            assert (masked in source) == (lane in at), (K, BK, lane)
            assert source.count(own) == full.count(own) == 1


@pytest.mark.parametrize(("K", "V"), BELOW)
@pytest.mark.parametrize("level", ["lean", "fast"])
def test_a_call_below_full_tiles_finds_what_is_tuned_for_these(K: int, V: int, level: str) -> None:
    full = Problem(K=128 if K > 64 else 64, V=128 if V > 64 else 64)
    wanted, found = (
        find_recipe(x, Regime(16384, 4, 16), H200, level=level) for x in (full, Problem(K=K, V=V))
    )
    assert (wanted.source == "exact") == (full.K == full.V)
    assert found.source == ("nearest" if wanted.source == "exact" else "default")
    assert (found.recipe.plan, found.recipe.configs) == (wanted.recipe.plan, wanted.recipe.configs)
    assert bool(found.recipe.plan.every) == (found.source == "nearest")


def test_a_scan_that_can_keep_states_on_the_way_is_that_of_two_kernels() -> None:
    problem = Problem(initial_state=True, final_state=True)
    recipe = Recipe.default(problem, "whole").serial("scan")
    assert recipe.plan.name == "lean" and recipe["scan"]["segments"] == "serial"
    assert why_invalid(recipe["scan"], PrefillProblem.of(problem, "bf16", False)) is None


def test_where_triton_is_asked_for_two_kernels_run() -> None:
    found = in_triton(Found(Recipe.default(Problem(), "whole"), "exact", "it is on file"))
    assert found.recipe.plan.name == "lean" and found.recipe.needs_triton_alone
    assert "defaults stand in for forward in TileLang" in found.why


def test_where_nothing_compiles_it_two_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.default(Problem(), "whole")
    monkeypatch.setattr(_loading, "interpreted", lambda: False)
    for name, found in (("has_compiler", False), ("has_tilelang", False)):
        monkeypatch.setattr(_loading, name, lambda found=found: found)
    with pytest.warns(RuntimeWarning, match="the tuned forward is written in TileLang"):
        assert _loading.runnable(recipe) == recipe.everywhere()
    monkeypatch.setattr(_loading, "has_compiler", lambda: True)
    assert _loading.runnable(recipe) == recipe
    monkeypatch.setattr(_loading, "interpreted", lambda: True)
    assert _loading.runnable(recipe) == recipe.everywhere()


def test_it_is_in_the_search() -> None:
    config = default_config("forward", Problem())
    assert [*space.valid_configs("forward", Problem(), H200, 32)] == [config]
    assert space.starts("forward", Problem(), H200, 32) == (config,)
    assert "num_stages of 2, not 3" in str(why_invalid(config.replace(num_stages=3), Problem()))
    small = Problem(K=64, V=64)
    configs = [*space.valid_configs("forward", small, H200, 32)]
    assert [x["num_stages"] for x in configs] == [2, 3]
    assert space.starts("forward", small, H200, 32) == (configs[1],)
    assert not [*space.valid_configs("forward", Problem(varlen=True), H200, 32)]


@pytest.mark.parametrize("op", ["gated_delta_rule", "delta_rule"])
@pytest.mark.parametrize(("K", "V"), [x for x in BELOW if min(x) > 64 or max(x) <= 64])
@pytest.mark.parametrize("stage", ["forward_outside", "forward_outside_blocks2"])
def test_scans_of_q_and_k_take_head_dims_below_their_tiles(
    op: str, K: int, V: int, stage: str
) -> None:
    size = 128 if K > 64 else 64
    full, problem = Problem(op, K=size, V=size), Problem(op, K=K, V=V)
    configs = [*space.valid_configs(stage, full, H200, 32)]
    assert [x["num_stages"] for x in configs] == ([2, 3] if size == 64 else [2])
    assert configs[-1:] == [*space.starts(stage, full, H200, 32)]
    assert configs == [*space.valid_configs(stage, problem, H200, 32)]
    assert all(is_served(x, problem, "sm_90") for x in OUTSIDE)


def test_no_launch_of_it_depends_on_another() -> None:
    config = default_config("forward", Problem())
    for value in ("wait", "signal"):
        reason = why_invalid(config.replace(pdl=value), Problem(), "sm_90")
        assert reason is not None and "its groups begin by turns" in reason
    recipe = Recipe.default(Problem(), "whole", arch="sm_90").dependent("sm_90")
    assert "pdl" not in recipe["forward"] and recipe["rescan"]["pdl"] == "signal"


def test_a_call_runs_what_was_forced() -> None:
    recipe = Recipe.default(Problem(), "whole", arch="sm_90")
    with forced_recipe(recipe):
        found = find_recipe(Problem(), Regime(16384, 4, 16), H200)
    assert found.recipe == recipe and language_of(found.recipe["forward"]) == "tilelang"
