"""A user's terminal on a GPU host: what libraries log of their own is not on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT

pytestmark = pytest.mark.gpu

NOISE = ("TileLang", "INFO", "WARNING", "cuBLAS", "FP_FUSION")
CALL = """
import torch
from gdn2gen import chunk_gdn2
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store.dispatch import forced_recipe
from gdn2gen.family.problem import Problem
recipe = Recipe.default(Problem(K=64, V=64))
scan = recipe["scan"].replace(language="tilelang")
recipe = recipe.with_config(scan)
inputs = [torch.randn(1, 200, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
inputs[3] = -inputs[3].float().abs()
for x in inputs:
    x.requires_grad_()
with forced_recipe(recipe):
    o, _ = chunk_gdn2(*inputs, use_qk_l2norm_in_kernel=True)
(o.float() @ torch.randn(64, 64, device="cuda")).sum().backward()
"""


def said_by(*command: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_first_call_is_silent(tmp_path: Path) -> None:
    from gdn2gen.base.device import present_device

    if present_device().arch != "sm_90":
        pytest.skip("TileLang's kernels are served on sm_90")
    fresh = {"GDN2GEN_CACHE_DIR": str(tmp_path / "own"), "TILELANG_CACHE_DIR": str(tmp_path)}
    assert said_by("-c", CALL, **fresh) == ""


@pytest.mark.gpu_alone
def test_bench_says_what_it_measured_alone() -> None:
    said = said_by("-m", "gdn2gen", "bench", "--shapes", "1x256x2", "--head-dim", "64")
    assert "1x256x2" in said
    assert [line for line in said.splitlines() if any(word in line for word in NOISE)] == []
