"""What the environment says about how kernels run."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from functools import cache
from pathlib import Path


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def verbose() -> bool:
    """Whether libraries may say on the terminal what they log for their developers."""
    return os.environ.get("GDN2GEN_VERBOSE", "0") not in ("", "0")


def hush() -> None:
    """Unless `verbose`, ignore warnings that tell a user nothing to do, in this process.

    Of torch, when the first product of a thread is a backward's, and of Triton 3.9 on a default
    that 3.10 changes.
    """
    if not verbose():
        for message in ("Attempting to run cuBLAS", "TRITON_DEFAULT_FP_FUSION"):
            warnings.filterwarnings("ignore", message)


def hush_tilelang() -> None:
    """Unless `verbose`, have TileLang log errors alone: it tells of every kernel, on stdout."""
    if not verbose():
        import tilelang  # sets the level of its own log

        log = logging.getLogger(tilelang.__name__)
        if log.level == logging.INFO:  # not what the user has set
            log.setLevel(logging.ERROR)


@cache
def cuda_compiler() -> str | None:
    """nvcc, which TileLang compiles with: in CUDA_HOME, CUDA_PATH, on PATH, in /usr/local/cuda."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(home) / "bin" / "nvcc") for home in (*homes, "/usr/local/cuda") if home]
    found = [shutil.which(place) for place in (*places[:-1], "nvcc", places[-1])]
    return next((place for place in found if place), None)
