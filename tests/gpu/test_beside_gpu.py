"""Passes on several streams at once, in a process that may not end."""

from __future__ import annotations

import subprocess
import sys

import pytest
from source_tree import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.gpu_alone]


@pytest.mark.parametrize(
    ("member", "level"),
    [("gdn2:64", "lean"), ("gdn2:128", "fast"), ("gated_delta_rule:64", "lean")],
)
def test_passes_beside_each_other_end(member: str, level: str) -> None:
    """Of many short sequences, as small models train on; to the same bits as alone."""
    command = [sys.executable, "scripts/beside.py", member, "64x256x2", "--level", level]
    done = subprocess.run(
        [*command, "--seconds", "15"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
