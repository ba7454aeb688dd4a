"""A stage in TileLang on a machine that pip alone set up: NVRTC compiles it, and it is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gdn2gen.base.device import present_device
from gdn2gen.codegen.nvrtc import find_nvrtc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_nvrtc() is None, reason="NVRTC or its headers are not installed"),
]

PROGRAM = """
import os, sys, warnings
def watch(event, arguments):
    assert event != "subprocess.Popen" or "nvcc" not in os.path.basename(str(arguments[0]))
sys.addaudithook(watch)
warnings.filterwarnings("error", message=".*written in TileLang")
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.tuning.gpu.jobs import check_quick
recipe = Recipe.default(Problem(K=64, V=64), "lean")
scan = recipe["scan"].replace(language="tilelang")
result = check_quick(recipe.with_config(scan))
print(result.ok, result.reason)
"""


def test_a_stage_without_nvcc_is_right(tmp_path: Path) -> None:
    if present_device().arch != "sm_90":
        pytest.skip("TileLang's stages are for sm_90")
    caches = {x: str(tmp_path) for x in ("GDN2GEN_CACHE_DIR", "TILELANG_CACHE_DIR")}
    environment = {**os.environ, **caches, "CUDA_HOME": "/nonexistent"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["True"], done.stdout + done.stderr
    assert list((tmp_path / "programs").glob("*.so"))
