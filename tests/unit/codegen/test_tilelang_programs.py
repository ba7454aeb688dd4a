"""TileLang's programs of blocks, carried out in Python, make what Triton's kernels do."""

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


@pytest.mark.parametrize(("op", "K", "T", "pattern"), CASES)
def test_programs_of_blocks_make_what_tritons_kernels_do(op, K, T, pattern):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": python_path()}
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "tilelang_checks.py")]
    command += [op, K, T, pattern]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "grad_blocks1 dg" in done.stdout and "reverse_scan_blocks1 dv" in done.stdout
