"""Kernels compiled ahead, in a process that has nothing else, on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", ["gdn2", "gated_delta_rule"])
def test_a_first_call_compiles_nothing(op: str, tmp_path: Path) -> None:
    """In both languages for gdn2; the same bits twice; nothing is written to a home or cache."""
    command = [sys.executable, "scripts/cold_start.py", "--op", op, "--shape", "2x300x4"]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path / "kernels")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for line in done.stdout.splitlines()[1:]:
        found = json.loads(line)
        assert found["compilers"] == [] and found["same"]
        assert not [x for x in found["written"] if not x.isdigit()], found["written"]
        assert not found["tilelang"], "its compiler is not imported"
        assert found["first_forward_s"] < 20, "with a margin for hosts of many processes"
