"""Knobs that a config may have beside those of its form."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tilelang_configs import tilelang_by_chunk, tilelang_config

from gdn2gen.base.errors import ConfigError
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.extras import EXTRAS
from gdn2gen.kernels.limits import Place
from gdn2gen.kernels.recipe import Recipe, fitted
from gdn2gen.kernels.stages import EVERY_STAGE
from gdn2gen.kernels.validity import valid_configs, why_invalid
from gdn2gen.store.format import configs_from


def test_a_config_is_without_them_unless_they_are_on() -> None:
    config = default_config("scan", Problem())
    assert config == config.replace(pdl="off") and "pdl" not in config
    on = config.replace(pdl="wait")
    assert on["pdl"] == "wait" and on != config and on.replace(pdl="off") == config
    # as files have it
    assert configs_from({"scan": dict(on)}) == {"scan": on}
    with pytest.raises(ConfigError, match=r"pdl must be one of .*'off'.*, but got 'always'"):
        config.replace(pdl="always")
    with pytest.raises(ConfigError, match=r"scan takes the knobs .*, but got .*'other'"):
        Config.of("scan", {**config, "other": 1})


def test_none_is_a_knob_of_a_form() -> None:
    """Nor does a search ask for any."""
    for stage in EVERY_STAGE.values():
        assert not {*stage.domains} & {*EXTRAS}
    place = Place(Problem(K=32, V=32), 32, "sm_90")
    assert not any({*x} & {*EXTRAS} for x in valid_configs("scan", place))


def test_recipes_with_and_without() -> None:
    recipe = Recipe.default(Problem())
    other = recipe.dependent("sm_90")
    assert [x["pdl"] for x in other.configs] == ["signal", "wait", *["signal"] * 4, "wait"]
    waiting = recipe.dependent("sm_90", signals=False)
    assert [x.get("pdl") for x in waiting.configs] == [None, "wait", None, *["wait"] * 4]
    assert other.independent() == waiting.independent()
    assert other.independent() == recipe == recipe.independent()
    assert recipe.distance(other) == other.distance(recipe) == len(recipe.configs)
    assert other.dependent("sm_90") == other


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "gfx942"])
def test_no_launch_overlaps_before_sm_90(arch: str) -> None:
    """On no architecture, those among them that no table lists: ptxas knows no such instruction."""
    recipe = Recipe.default(Problem())
    assert recipe.dependent(arch) == recipe
    reason = why_invalid(recipe["scan"].replace(pdl="wait"), Problem(), arch)
    assert reason is not None and f"pdl=wait: {arch} has no launches" in reason
    assert Recipe.default(Problem()).dependent("sm_103") == recipe.dependent("sm_90")


PREPARE = tilelang_by_chunk("prepare", Problem(), chunks=1)


@pytest.mark.parametrize(
    ("config", "problem", "words"),
    [
        (PREPARE.replace(chunks=4), Problem(), "chunks=1, not 4"),
        (default_config("prepare", Problem()), Problem(), "only prepare in TileLang"),
        (default_config("scan", Problem()), Problem(), "only prepare in TileLang"),
        (
            tilelang_by_chunk("prepare", Problem("gated_delta_rule"), chunks=1),
            Problem("gated_delta_rule"),
            "of decay=anchored or bounded",
        ),
    ],
)
def test_programs_that_take_what_is_left_are_of_prepare(
    config: Config, problem: Problem, words: str
) -> None:
    assert why_invalid(PREPARE.replace(programs="resident"), Problem()) is None
    reason = why_invalid(config.replace(programs="resident"), problem)
    assert reason is not None and words in reason
    with pytest.raises(ConfigError, match="programs=resident"):
        render(problem, config.stage, config.replace(programs="resident"))


@pytest.mark.parametrize(
    ("stage", "knobs", "problem", "words"),
    [
        ("scan", {"segments": "serial"}, Problem(), "only parallel scans"),
        ("prepare", {}, Problem(), "only parallel scans"),
        ("reverse_scan_blocks2_transitions", {}, Problem(), "that make their own transitions"),
        ("scan", {"segments": "parallel", "BV": 16}, Problem(dtype="fp32"), "products of fp32"),
        ("scan", {"segments": "parallel", "BV": 32}, Problem(K=96), "of one tile"),
        ("reverse_scan", {"segments": "parallel", "BV": 32}, Problem(K=256), "128 channels at"),
    ],
)
def test_merges_of_cut_halves_are_of_scans_in_segments(
    stage: str, knobs: dict[str, str | int], problem: Problem, words: str
) -> None:
    config = default_config(stage, problem).replace(**knobs)
    assert why_invalid(config, problem) is None
    assert words in str(why_invalid(config.replace(merge="cut"), problem))


GATED = Problem("gated_delta_rule")


@pytest.mark.parametrize(
    ("stage", "knobs", "problem", "words"),
    [
        ("scan", {"segments": "serial"}, GATED, "only parallel scans"),
        ("prepare", {}, GATED, "only parallel scans"),
        ("scan", {"segments": "parallel"}, Problem(), "whose steps a decay bounds"),
        ("scan", {"segments": "parallel"}, Problem("delta_rule"), "whose steps a decay bounds"),
        ("scan", {"segments": "parallel"}, Problem("kda"), "whose steps a decay bounds"),
        ("scan", {"segments": "parallel"}, replace(GATED, l2norm=False), "wants l2norm"),
        ("scan", {"segments": "parallel", "BV": 32}, replace(GATED, K=96), "not 96 and 128"),
        ("scan", {"segments": "parallel", "BV": 32}, replace(GATED, V=256), "not 128 and 256"),
    ],
)
def test_folds_of_what_counts_are_of_scans_whose_steps_a_decay_bounds(
    stage: str, knobs: dict[str, str | int], problem: Problem, words: str
) -> None:
    config = default_config(stage, problem).replace(**knobs)
    assert why_invalid(config, problem) is None
    reason = why_invalid(config.replace(reach=64), problem)
    assert reason is not None and "reach=64: " in reason and words in reason


def test_what_has_no_segments_folds_none() -> None:
    """A serial scan, a packed batch and calls that refuse it run the recipe without it."""
    recipe = Recipe.default(GATED, "direct_blocks2", arch="sm_90")
    scan = recipe["scan"].replace(segments="parallel", reach=64)
    assert why_invalid(scan, GATED) is None
    recipe = recipe.with_config(scan)
    assert recipe["scan"]["reach"] == 64
    raw, packed = (replace(GATED, **x) for x in ({"l2norm": False}, {"varlen": True}))
    few = recipe.for_few(Regime(tokens=64, sequences=1, heads=4))
    for other in (recipe.fitted(raw, "sm_90"), recipe.fitted(packed, "sm_90"), few):
        assert other["scan"]["segments"] == "serial" and "reach" not in other["scan"]
        assert why_invalid(other["scan"], other.problem, "sm_90") is None


@pytest.mark.parametrize("language", ["triton", "tilelang"])
@pytest.mark.parametrize("stage", ["scan", "scan_blocks2", "reverse_scan_blocks2", "reverse_scan"])
def test_a_merge_of_cut_halves_has_three_products(stage: str, language: str) -> None:
    """And nothing else of the text is another one; `near` loads as without the knob."""
    config = default_config(stage, Problem()).replace(segments="parallel", language=language)
    plain = render(Problem(), stage, config).source.splitlines()
    for value, ahead in (("cut", 2), ("near", 1)):
        found = render(Problem(), stage, config.replace(merge=value)).source.splitlines()
        assert sum("range(1, NS - 1, num_stages" in x for x in found) == 1
        assert f"    for i_m in tl.range(1, NS - 1, num_stages={ahead + 1}):" in found
        (at,) = (i for i, x in enumerate(plain) if "b_S = tl.dot(b_S, b_M" in x)
        end = at + len(found) - len(plain) + 1
        assert "".join(found[at:end]).count("tl.dot(") == 3
        loop, names = "num_stages=", ("Template digest", "merge=", "kernels", "--config")
        for x, y in zip(plain[:at] + plain[at + 1 :], found[:at] + found[end:], strict=True):
            assert x == y or loop in x or any(z in y for z in names), (x, y)


def in_tiles(stage: str, problem: Problem, tiles: int) -> Config:
    return fitted(tilelang_config(stage, problem).replace(tile_step=tiles), problem, "sm_90")


@pytest.mark.parametrize("stage", ["prepare", "grad_key", "grad_value", "scan", "reverse_scan"])
def test_tiles_in_other_steps_are_those_of_a_wider_head(stage: str) -> None:
    """160 in five tiles of 32, or as 192 in three of 64; nothing past it is read or written."""
    problem, wider = Problem(K=160, V=160), Problem(K=192, V=192)
    own, found = tilelang_config(stage, problem), in_tiles(stage, problem, 64)
    assert why_invalid(found, problem, "sm_90") is None and found["tile_step"] == 64
    assert found.form is in_tiles(stage, problem, 64).form is not own.form
    of_wider = tilelang_config(stage, wider)
    assert all(found[name] == x for name, x in of_wider.items())
    source = render(problem, stage, found).source
    dim = "V" if stage.startswith("grad") else "K"
    assert f"{dim}T = 192  # {dim} in tiles of 64 columns" in source
    assert f"{dim} = 160" in source or "K, V = 160, 160" in source
    assert f"{dim}T = " not in render(problem, stage, own).source
    # and a head that fills its tiles has the kernel that it has
    full = render(wider, stage, of_wider.replace(tile_step=64)).source.splitlines()
    plain = render(wider, stage, of_wider).source.splitlines()
    names = ("Template digest", "tile_step=", "kernels", "--config")
    assert all(x == y or any(z in y for z in names) for x, y in zip(plain, full, strict=True))


def test_scans_of_blocks_have_tiles_of_96_where_they_are_asked_for() -> None:
    problem = Problem(K=96, V=96)
    for stage in ("scan_blocks2", "rescan_blocks2", "reverse_scan_blocks1"):
        config = tilelang_config(stage, problem)
        assert "KT = 128" in render(problem, stage, config).source
        assert "KT = " not in render(problem, stage, config.replace(tile_step=32)).source
    config = tilelang_config("grad_blocks2", problem).replace(tile_step=32)
    assert "tiles of other widths" in str(why_invalid(config, problem, "sm_90"))


@pytest.mark.parametrize(
    ("problem", "arch", "language", "words"),
    [
        (Problem(K=160, V=160), "sm_90", "triton", "only what loads by TMA"),
        (Problem(), "sm_80", "tilelang", "only what loads by TMA"),
        (Problem("gated_delta_rule"), "sm_90", "tilelang", "decay is a channel's: gdn2, kda"),
    ],
)
def test_tiles_in_other_steps_are_tilelangs(
    problem: Problem, arch: str, language: str, words: str
) -> None:
    config = tilelang_config("scan", problem).replace(num_stages=1)
    config = config if language == "tilelang" else default_config("scan", problem)
    assert why_invalid(config, problem, arch) is None
    assert words in str(why_invalid(config.replace(tile_step=64), problem, arch))
