"""Compile kernels by as many processes as there are cores, so that a GPU that times them waits for
none of it. Used by scripts that sweep configs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from gdn2gen.base.device import Device, present_device
from gdn2gen.base.errors import BuildError
from gdn2gen.family.compiled import Compiled
from gdn2gen.kernels.config import Config


def compile_all(
    given: Iterable[tuple[Compiled, Config]],
) -> dict[tuple[Compiled, Config], str]:
    """For the present GPU, each once; those that do not compile, and why."""
    wanted = [*dict.fromkeys(given)]
    if not wanted:
        return {}
    device = present_device()
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(wanted), os.cpu_count() or 1), spawned) as pool:
        found = pool.map(_compile_one, *zip(*wanted, strict=True), [device] * len(wanted))
        return {each: why for each, why in zip(wanted, found, strict=True) if why}


def _compile_one(problem: Compiled, config: Config, device: Device) -> str:
    from gdn2gen.codegen.build import compile_ahead

    try:
        compile_ahead(problem, config.stage, config, device)
    except BuildError as error:
        return str(error)
    return ""
