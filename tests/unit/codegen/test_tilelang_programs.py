"""TileLang's programs of blocks and groups, carried out in Python, make what Triton's do."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from source_tree import SUPPORT, python_path
from tilelang_configs import tilelang_config
from tilelang_standin import BF16, COLUMNS, Kernel, Tile, gemm

from gdn2gen.codegen.build import beside_tilelang, load
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.validity import why_invalid

# A chunk that ends early among them, and one that is alone in its block. With a number after the
# chunks of a block the scans are in segments of so many chunks: a block may be in two of them, of
# three the one between has a transition, and the last may be shorter; - is in order.
# `wide` are programs of two warp groups, and 0 in place of a block the scans without. Two cases in
# one process, of which most is imports.
CASES = [
    ("gdn2 64 36 layer 1",),
    ("gdn2 64 36 layer 2", "gdn2 64 70 layer 2 1"),
    ("gdn2 160 36 layer 0 - wide lean",),
    ("gated_delta_rule 128 70 strong 2", "delta_rule 64 36 layer 2 - raw lean"),
    ("gated_delta_rule 64 134 strong 2 - maxnreg=128",),
    ("gdn2 64 134 layer 2 1 transitions",),
    ("gdn2 64 140 mixed 2 3 lean",),
    # head dims below their tiles, where some slices of channels, or all, lost too much
    ("gdn2 48 36 mixed 1", "gdn2 40x56 36 strong 2"),
    ("gdn2 24 36 mixed 1", "gdn2 72x96 36 strong 2"),
    *(
        pytest.param((x,), marks=pytest.mark.slow)
        for x in (
            "kda 128 70 layer 1",
            "gdn2 128 70 zero 1",
            "kda 64 70 layer 2",
            "gdn2 128 134 zero 2",
            "gdn2 64 230 layer 4",
            "kda 64 70 layer 2 1",
            "kda 128 134 zero 1 2",
            "gdn2 128 134 strong 2 1",
            "gdn2 64 230 zero 2 3 state_v_first",
            "gdn2 64 230 layer 4 3",
            "gdn2 64 100 sparse 2 1 twice stateless",
            "kda 64 40 layer 2 4 twice state_v_first",
            "gdn2 128 134 strong 2 1 wide",
            "gdn2 128 102 zero 0 1 wide",
            "kda 128 102 layer 0 1 wide twice stateless",
            "gdn2 112 70 layer 0 1 wide",
            "gdn2 152 70 mixed 0 - wide",
            "gdn2 256 70 strong 0 - wide lean twice",
            "kda 152 100 sparse 0 - wide twice stateless",
            "gdn2 192 40 layer 0 - wide lean state_v_first",
            "gated_delta_rule 128 134 strong 2 - lean twice",
            "gated_delta_rule 64 150 zero 1 - stateless",
            "gated_delta_rule 64 230 layer 2 3 state_v_first",
            "gated_delta_rule 64 134 layer 2 - maxnreg=128 lean",
            "gated_delta_rule 64 134 zero 2 - maxnreg=128",
            "gated_delta_rule 64 100 sparse 2 - maxnreg=128 twice stateless",
            "gated_delta_rule 64 134 mixed 2 - maxnreg=128 state_v_first",
            "gated_delta_rule 64 70 layer 2 - maxnreg=128 raw",
            "gated_delta_rule 64 100 layer 1 - maxnreg=128",
            "delta_rule 64 134 layer 2 - maxnreg=128",
            "delta_rule 128 70 layer 2 - stateless twice",
            "kda 128 230 strong 4 2 lean twice stateless",
            "kda 64 36 zero 2 8 lean state_v_first",
            "gdn2 128 134 sparse 2 1 lean",
            "gdn2 64 134 mixed 2 1 cut",
            "kda 64 134 zero 0 1 cut",
            "gdn2 128 134 strong 2 1 wide transitions",
            "kda 128 230 zero 2 2 wide transitions twice stateless",
            "kda 64 140 layer 2 2 transitions state_v_first",
            "gated_delta_rule 64 134 layer 2 1 transitions",
            "gated_delta_rule 64 230 sparse 2 2 transitions reach=100 lean",
            "gated_delta_rule 128 200 sparse 2 2 reach=64",
            "gated_delta_rule 128 134 strong 2 1 wide transitions",
            "delta_rule 128 134 zero 2 2 wide transitions stateless",
            "gdn2 112 70 layer 2",
            "gdn2 112 70 strong 2",
            "gdn2 104x128 70 mixed 2",
            "kda 112x104 70 mixed 1",
            "kda 48 70 strong 1",
            "gdn2 112 102 layer 2 1",
            "gdn2 48 100 sparse 2 1 twice stateless",
            "gdn2 160 36 layer 0 - wide lean tile_step=64",
            "gdn2 136x160 70 layer 0 - tile_step=64",
            "gdn2 96 70 layer 2 - tile_step=32",
            "gdn2 16x96 70 layer 2",
            "kda 88 70 strong 1",
            "kda 24x72 70 layer 2",
            "gdn2 96 70 layer 2 1",
            "gdn2 96 134 strong 2 1 wide",
            "gdn2 32 134 sparse 2 1 twice stateless",
        )
    ),
]
STAGES = "scan_group,rescan_group,reverse_scan_group,grad_group"
# two chunks, of which the second ends early; or three sequences, one without tokens
OF_GROUPS = [
    (STAGES.removeprefix("scan_group,"), "65", "", "layer", "1"),
    pytest.param(STAGES, "100", "varlen", "sparse", "2", marks=pytest.mark.slow),
    pytest.param(STAGES, "100", "-has_z", "zero", "2", marks=pytest.mark.slow),
    pytest.param(STAGES, "70", "wide", "layer", "2", marks=pytest.mark.slow),
    pytest.param(STAGES, "90", "varlen,-has_z,-has_D", "layer", "2", marks=pytest.mark.slow),
    pytest.param(STAGES, "150", "-has_D,state_v_first", "strong", "2", marks=pytest.mark.slow),
]


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": python_path()}
    command = [sys.executable, "-W", "ignore", str(SUPPORT / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# two chunks, of which the second ends early
OF_MAMBA3 = [
    ("68", "64", "2", "sparse", "skip,gate,carried"),
    pytest.param("132", "128", "1", "strong", "skip,gate", marks=pytest.mark.slow),
    pytest.param("136", "64", "0", "zero", "gate", marks=pytest.mark.slow),
    pytest.param("64", "128", "2", "layer", "carried", marks=pytest.mark.slow),
    pytest.param("4", "64", "1", "strong", "", marks=pytest.mark.slow),
    ("68", "64", "2", "sparse", "ahead,skip,gate"),
    pytest.param("200", "128", "1", "strong", "ahead,gate,carried", marks=pytest.mark.slow),
    pytest.param("132", "128", "0", "layer", "ahead,skip,gate", marks=pytest.mark.slow),
]


OF_TURNING = [
    ("68", "64", "16", "2", "sparse", "skip,gate,carried,apart,groups"),
    ("132", "128", "32", "2", "layer", "gate,nan"),
    *(
        pytest.param(*x, marks=pytest.mark.slow)
        for x in (
            ("132", "128", "32", "2", "layer", "skip,gate,carried"),
            ("132", "128", "32", "1", "strong", "gate,apart,groups"),
            ("196", "128", "64", "2", "zero", "carried,gate,apart"),
            ("128", "128", "0", "2", "strong", "skip,gate"),
            ("4", "128", "0", "0", "layer", "skip"),
            ("132", "64", "32", "0", "sparse", "carried"),
            ("132", "128", "20", "2", "layer", "gate,groups"),
            ("132", "64", "7", "2", "layer", "gate,nan,apart"),
        )
    ),
]


OF_ITS_BACKWARD = [
    ("68", "64", "sparse", "skip,carried,angles"),
    pytest.param("132", "128", "strong", "skip,carried,angles", marks=pytest.mark.slow),
    pytest.param("136", "128", "zero", "", marks=pytest.mark.slow),
    pytest.param("64", "128", "layer", "carried,angles", marks=pytest.mark.slow),
    pytest.param("4", "64", "strong", "angles", marks=pytest.mark.slow),
    ("68", "64", "sparse", "pairs=1,skip,carried,angles"),
    pytest.param("132", "128", "strong", "pairs=1,skip,carried,angles", marks=pytest.mark.slow),
    pytest.param("136", "128", "zero", "pairs=1", marks=pytest.mark.slow),
    pytest.param("64", "128", "layer", "pairs=1,carried,angles", marks=pytest.mark.slow),
    pytest.param("4", "64", "strong", "pairs=1,angles=7", marks=pytest.mark.slow),
    pytest.param("68", "128", "layer", "angles=45", marks=pytest.mark.slow),
    pytest.param("68", "64", "layer", "skip,angles=7", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("cases", CASES, ids=", ".join)
def test_programs_of_blocks_make_what_tritons_kernels_do(cases):
    printed = run("tilelang_checks.py", *cases).split("== ")[1:]
    for case, text in zip(cases, printed, strict=True):
        every, segment = [*case.split(), "-"][4:6]
        outside = "delta_rule" in case
        made = [f"scan_blocks{every} h", f"reverse_scan_blocks{every} dv"]
        if every == "0":
            made = ["scan_states h", "reverse_scan dX"]
        if "lean" in case:
            made = ["scan o", "rescan h", "reverse_scan dX"]
            if every != "0":
                made = [f"rescan_blocks{every} h", f"reverse_scan_blocks{every} dv"]
        if outside and every == "1":
            made = []
        if "transitions" in case:
            made = ["reverse_scan_blocks2_transitions dv"]
        of_chunks = every in ("1", "2") and not segment.isdigit()
        made += [f"grad_blocks{every} dk"] * of_chunks
        assert all(x in text for x in [*made, "reference o"])


def test_a_token_whose_decay_is_nan_comes_out_of_every_program_of_blocks():
    """Its chunk is neither weak nor strong: some kernel has to write its gradients."""
    cases = ["gdn2 64 40 layer 2 - nan", "kda 64 40 layer 1 - nan"]
    for case, text in zip(cases, run("tilelang_checks.py", *cases).split("== ")[1:], strict=True):
        assert f"grad_blocks{case.split()[4]} dk 2560 are NaN" in text


@pytest.mark.parametrize(("stages", "T", "flags", "pattern", "heads"), OF_GROUPS)
def test_programs_of_groups_make_what_tritons_kernels_do(stages, T, flags, pattern, heads):
    printed = run("tilelang_groups.py", stages, T, flags, pattern, heads)
    assert all(f"{x} d" in printed for x in ("reverse_scan_group", "grad_group"))
    assert "reference dq" in printed


@pytest.mark.parametrize(("T", "N", "keep", "pattern", "flags"), OF_MAMBA3)
def test_mamba3s_scan_is_its_recurrence(T, N, keep, pattern, flags):
    printed = run("mamba3_scans.py", T, N, keep, pattern, flags)
    made = {x.split()[0] for x in printed.splitlines()}
    kept = {"h"} if keep == "2" else set()
    kept |= {"ungated"} if keep != "0" and "gate" in flags else set()
    assert made == {"out", "final_ssm", *kept}


@pytest.mark.parametrize(("T", "N", "S", "keep", "pattern", "flags"), OF_TURNING)
def test_mamba3s_scan_that_turns_is_its_recurrence(T, N, S, keep, pattern, flags):
    printed = run("mamba3_turning_scans.py", T, N, S, keep, pattern, flags)
    made = {x.split()[0] for x in printed.splitlines()}
    wanted = {"q", "k"} if keep == "2" else set()
    if "nan" not in flags:
        wanted |= {"out", "final_ssm"} | ({"h"} if keep == "2" else set())
        wanted |= {"ungated"} if keep != "0" and "gate" in flags else set()
    if S != "0":
        wanted |= {"last_angle"} | ({"turns"} if keep != "0" else set())
        wanted |= {"theta"} if keep == "2" else set()
    assert made == wanted


@pytest.mark.parametrize(("T", "N", "pattern", "flags"), OF_ITS_BACKWARD)
def test_mamba3s_reverse_scan_makes_its_recurrences_gradients(T, N, pattern, flags):
    printed = run("mamba3_reverse_scans.py", T, N, pattern, flags)
    made = {x.split()[0] for x in printed.splitlines()}
    wanted = {"dv", "dQ_head", "dK_head", "kept_part", *(f"sums{i}" for i in range(5))}
    wanted |= {"dinitial_ssm"} if "carried" in flags else set()
    wanted |= {"dtheta", "dtheta_part"} if "angles" in flags else set()
    assert made == wanted


def test_no_second_warp_group_looks_for_its_columns_in_some_rows_of_a_tile():
    """It would read others: dq was off by 8.4e-1 on an H200."""
    k = Tile(np.ones((128, 128), np.float32), BF16)
    scores = Tile(np.ones((64, 64), np.float32), BF16)
    found = Tile(np.zeros((64, 128), np.float32), "float32")
    for threads in (256, 128):
        Kernel(1, threads=threads)
        with pytest.raises(AssertionError) if threads == 256 else nullcontext():
            gemm(scores, k[64:128, :], found, policy=COLUMNS)
    assert (found.array == 64).all()
    Kernel(1, threads=256)
    whole = Tile(k.array[:64].copy(), BF16)
    gemm(scores, whole, found, policy=COLUMNS, clear_accum=True)
    gemm(scores, k[64:128, 0:64], Tile(found.array[:, :64], "float32"), policy=COLUMNS)
    assert (found.array[:, :64] == 128).all() and (found.array[:, 64:] == 64).all()


def test_strong_decay_of_128_channels_takes_8_warps():
    """Four would spill 2,480 bytes a thread; what is compiled ahead is what is launched."""
    for BK, warps in ((64, 4), (128, 8)):
        config = tilelang_config("grad_blocks1", Problem()).replace(BK=BK)
        rendered = render(Problem(), "grad_blocks1", config)
        assert "num_warps=STRONG_WARPS, num_stages=1," in rendered.source
        assert beside_tilelang(load(rendered)) == {"num_warps": warps, "num_stages": 1}


@pytest.mark.parametrize("stage", ["scan", "reverse_scan", "scan_blocks2", "reverse_scan_blocks2"])
def test_segments_of_128_rows_are_two_warp_groups_in_one_program(stage):
    """Of 64 rows two programs share a multiprocessor; in no other size do two groups have work."""
    config = tilelang_config(stage, Problem()).replace(segments="parallel")
    for rows, threads, shared in ((64, 128, 2), (128, 256, 0)):
        source = render(Problem(), stage, config.replace(BV=rows)).source
        assert source.count(f", threads={threads}\n") == source.count("with tile.Kernel(") == 2
        assert source.count("tile.annotate_min_blocks_per_sm(2)") == shared
    wide = config.replace(BV=128)
    # those of blocks have 96 in tiles of 128
    narrow, words = (64, "exceeds the 64") if "blocks" in stage else (96, "128 of the transition")
    for problem in (Problem(K=narrow), Problem(V=narrow)):
        assert words in str(why_invalid(wide, problem))
    assert "BV of 64, not 128" in str(why_invalid(wide.replace(segments="serial"), Problem()))
