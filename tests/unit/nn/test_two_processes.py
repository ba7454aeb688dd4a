"""Two processes, each with half of the batch, give the loss and the gradients of one."""

from __future__ import annotations

from pathlib import Path

from two_processes import compare


def test_as_one(tmp_path: Path) -> None:
    """By DDP and by FSDP2."""
    compare("cpu", "gloo", tmp_path, near=1e-5)
