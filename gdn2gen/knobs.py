"""What the environment says about how kernels run."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def cuda_compiler() -> str | None:
    """nvcc, which TileLang compiles with: in CUDA_HOME, CUDA_PATH, on PATH, in /usr/local/cuda."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(home) / "bin" / "nvcc") for home in (*homes, "/usr/local/cuda") if home]
    found = [shutil.which(place) for place in (*places[:-1], "nvcc", places[-1])]
    return next((place for place in found if place), None)
