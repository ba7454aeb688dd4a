"""Triton's interpreter, hastened, gives the bits that it gives as it is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from source_tree import SUPPORT, python_path


@pytest.mark.resolved
def test_the_hastened_interpreter_gives_the_same_bits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": python_path()}
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "interpreter_checks.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
