"""TileLang's programs of blocks and groups, carried out in Python, make what Triton's do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from source_tree import SUPPORT, python_path

# a chunk that ends early among them
CASES = [
    ("gdn2", "64", "36", "layer"),
    pytest.param("kda", "128", "70", "layer", marks=pytest.mark.slow),
    pytest.param("gdn2", "128", "70", "zero", marks=pytest.mark.slow),
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


@pytest.mark.parametrize(("op", "K", "T", "pattern"), CASES)
def test_programs_of_blocks_make_what_tritons_kernels_do(op, K, T, pattern):
    printed = run("tilelang_checks.py", op, K, T, pattern)
    assert "grad_blocks1 dg" in printed and "reverse_scan_blocks1 dv" in printed


@pytest.mark.parametrize(("stages", "T", "flags", "pattern", "heads"), OF_GROUPS)
def test_programs_of_groups_make_what_tritons_kernels_do(stages, T, flags, pattern, heads):
    printed = run("tilelang_groups.py", stages, T, flags, pattern, heads)
    assert all(f"{x} d" in printed for x in ("reverse_scan_group", "grad_group"))
    assert "reference dq" in printed
