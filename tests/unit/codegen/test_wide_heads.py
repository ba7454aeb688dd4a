"""TileLang's forms of more than 128 channels: prepare with g in registers, scans of 128 rows."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from source_tree import SUPPORT, python_path
from tilelang_configs import tilelang_by_chunk, tilelang_config

from gdn2gen.base.device import named_device
from gdn2gen.codegen.build import compile_ahead
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, default_of
from gdn2gen.kernels.limits import Place
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.tuning.offline.predict import blocks_per_sm
from gdn2gen.tuning.space import starts, why_hopeless

H200 = named_device("NVIDIA H200")
GATED = {"gate": "softplus", "has_A_log": True, "has_dt_bias": True}
SLOW = pytest.mark.slow


def prepare(problem: Problem, maxnreg: int = 128) -> Config:
    return tilelang_by_chunk("prepare", problem).replace(maxnreg=maxnreg)


def wide_scan(stage: str, problem: Problem, num_stages: int = 2) -> Config:
    return tilelang_config(stage, problem).replace(BV=128, num_stages=num_stages)


def test_two_programs_of_prepare_share_a_multiprocessor_without_g_in_shared_memory() -> None:
    problem = Problem(K=256, V=256)
    alone, two = (render(problem, "prepare", prepare(problem, x)).source for x in (0, 128))
    assert "s_g = tile.alloc_shared" in alone and "min_blocks_per_sm" not in alone
    assert "s_g" not in two and "tile.annotate_min_blocks_per_sm(2)" in two
    fetched = two.index("x_G[i, c] = tile.cast(g[i_b, i_row + i_token + i, i_hg, i_channel + c]")
    assert two.index("in tile.Pipelined(") < fetched < two.index("tile.gemm(s_kq, s_kq, b_norms")
    # up to 192 channels two fit as they are
    narrower = Problem(K=192, V=192)
    assert "s_g = tile.alloc_shared" in render(narrower, "prepare", prepare(narrower)).source


def test_past_the_last_channel_and_token_no_g_is_read() -> None:
    problem = Problem(K=232, V=232)
    source = render(problem, "prepare", prepare(problem)).source
    assert "if i_token + i < n_rows and i_channel < K:" in source


def test_rows_of_a_scan_by_head_dim_member_and_chunk() -> None:
    """128 in order where one program of 64 has a multiprocessor, and nothing spills much."""
    wide = Problem(K=160, V=160)
    for stage in ("scan", "scan_states", "rescan", "reverse_scan"):
        config = wide_scan(stage, wide)
        assert why_invalid(config, wide, "sm_90") is None
        source = render(wide, stage, config).source
        assert ", threads=256\n" in source and "min_blocks_per_sm" not in source
        assert "half as many programs" in str(why_invalid(config, Problem()))
        other = replace(wide, op="gated_delta_rule")
        assert "would spill 528 bytes" in str(why_invalid(config, other))
        assert "loads ahead of both" in str(why_invalid(config.replace(BT=16), wide))
    assert "sm_90 alone" in str(why_invalid(wide_scan("scan", wide), wide, "sm_80"))
    parallel = wide_scan("scan", wide).replace(segments="parallel")
    assert "128 of the transition" in str(why_invalid(parallel, wide))


def test_the_state_of_256_channels_is_rounded_by_halves() -> None:
    """In registers of half a tile, which the first half's products have read by then."""
    for stage, reads in (("scan", 2), ("scan_states", 2), ("rescan", 1)):
        for K, rows, halves in ((256, 128, reads == 2), (224, 128, False), (256, 64, False)):
            problem = Problem(K=K, V=K)
            source = render(problem, stage, wide_scan(stage, problem).replace(BV=rows)).source
            assert ("b_Sd = tile.alloc_fragment([BV, K // 2], IO)" in source) == halves
            first, second = (source.find(f"b_Sd, s_Y[:, {x}], b_R") for x in ("0:128", "128:256"))
            assert (0 < first < source.find("tile.wait_wgmma(0)") < second) == halves


def test_a_search_begins_with_what_was_made_for_these_head_dims() -> None:
    """And a call without tuning does not: it runs Triton's."""
    for K in (160, 192, 224, 256):
        problem = Problem(K=K, V=K)
        (found,) = (
            x
            for x in starts("prepare", problem, H200, 32)
            if (x["language"], x["decay"]) == ("tilelang", "anchored")
        )
        assert (found["maxnreg"], found["num_stages"], found["num_warps"]) == (128, 1, 4)
        for stage in ("scan", "scan_states", "rescan", "reverse_scan"):
            rows = {
                x.get("segments"): x["BV"]
                for x in starts(stage, problem, H200, 32)
                if x["language"] == "tilelang"
            }
            assert rows == ({None: 128} if stage == "rescan" else {"serial": 128, "parallel": 64})
    usual = Place(Problem(), 32, "sm_90")
    form = next(x for x in STAGES["scan"].forms if (x.name, x.language) == ("serial", "tilelang"))
    assert default_of("scan", form, usual)["BV"] == 64


@pytest.mark.parametrize(
    "case",
    [
        "gdn2 232 40 layer",
        pytest.param("gdn2 256 70 sparse softplus", marks=SLOW),
        pytest.param("gdn2 232 100 strong", marks=SLOW),
        pytest.param("gdn2 224 70 zero packed", marks=SLOW),
        pytest.param("kda 224 70 mixed packed softplus", marks=SLOW),
        pytest.param("gla 256 40 uniform", marks=SLOW),
    ],
)
def test_prepare_with_g_in_registers_within_the_op(case: str) -> None:
    """Beside the reference in fp64, every gradient, by the program's text carried out."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": python_path()}
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "centred_checks.py"), "prepare"]
    command += [*case.split(), "anchored", "maxnreg=128"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.tilelang
@pytest.mark.parametrize(
    "problem",
    [
        Problem(K=256, V=256),
        Problem(K=224, V=224, varlen=True),
        Problem(K=256, V=256, varlen=True, **GATED),  # type: ignore[arg-type]
        Problem("kda", K=256, V=256),
        Problem("gla", K=256, V=256),
    ],
    ids=lambda x: f"{x.op}-{x.K}-{x.gate}-{x.varlen}",
)
def test_two_programs_of_prepare_fit(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepare(problem)
    assert why_hopeless(config, problem, H200) is None
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    used = compile_ahead(problem, "prepare", config, named_device("sm_90"))
    assert (used.threads, used.spill_bytes) == (256, 0), f"{config}: {used}"
    assert used.registers <= 128 and blocks_per_sm(used, named_device("sm_90")) == 2


@pytest.mark.slow
@pytest.mark.tilelang
@pytest.mark.parametrize(
    ("stage", "problem", "num_stages", "most"),
    [
        # 96 and 104 where all channels of the state were in 16 bits at once
        ("scan", Problem(K=256, V=256), 3, 0),
        ("scan_states", Problem(K=256, V=256, varlen=True), 2, 0),
        ("scan", Problem("kda", K=256, V=256), 3, 0),
        ("rescan", Problem(K=192, V=192), 2, 0),
        ("reverse_scan", Problem(K=256, V=256), 2, 0),
        ("scan", Problem(K=160, V=160), 3, 0),
        ("scan", Problem("gla", K=256, V=512), 3, 0),
    ],
    ids=lambda x: f"{x.op}-{x.K}" if isinstance(x, Problem) else str(x),
)
def test_scans_of_two_warp_groups_fit(
    stage: str,
    problem: Problem,
    num_stages: int,
    most: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = wide_scan(stage, problem, num_stages)
    assert why_hopeless(config, problem, H200) is None
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    used = compile_ahead(problem, stage, config, named_device("sm_90"))
    assert (used.threads, used.registers) == (384, 168), f"{stage} [{config}]: {used}"
    assert used.spill_bytes <= most, f"{stage} [{config}]: {used}"
    assert used.shared_bytes <= H200.shared_bytes
