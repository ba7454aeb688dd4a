"""Compile kernels by as many processes as there are cores, so that a GPU that times them waits for
none of it. Used by scripts that sweep configs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from gdn2gen.base.device import Device, present_device
from gdn2gen.family.compiled import Compiled
from gdn2gen.kernels.config import Config


def compile_all(given: Iterable[tuple[Compiled, Config]]) -> None:
    """For the present GPU; each is compiled once."""
    wanted = [*dict.fromkeys(given)]
    if not wanted:
        return
    device = present_device()
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(wanted), os.cpu_count() or 1), spawned) as pool:
        for _ in pool.map(_compile_one, *zip(*wanted, strict=True), [device] * len(wanted)):
            pass


def _compile_one(problem: Compiled, config: Config, device: Device) -> None:
    from gdn2gen.codegen.build import compile_ahead

    compile_ahead(problem, config.stage, config, device)
