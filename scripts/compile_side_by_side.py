"""Compile kernels by as many processes as there are cores, so that a GPU that times them waits for
none of it. Used by scripts that sweep configs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from gdn2gen.base.device import Device, present_device
from gdn2gen.base.errors import Gdn2genError
from gdn2gen.base.terminal import console
from gdn2gen.family.compiled import Compiled
from gdn2gen.kernels.config import Config


def compile_all(given: Iterable[tuple[Compiled, Config]]) -> set[Config]:
    """For the present GPU; each is compiled once. Those that no compiler takes are said, and
    returned."""
    wanted = [*dict.fromkeys(given)]
    if not wanted:
        return set()
    device = present_device()
    spawned = multiprocessing.get_context("spawn")
    failed = set()
    with ProcessPoolExecutor(min(len(wanted), os.cpu_count() or 1), spawned) as pool:
        said = pool.map(_compile_one, *zip(*wanted, strict=True), [device] * len(wanted))
        for (_, config), reason in zip(wanted, said, strict=True):
            if reason:
                console(stderr=True).print(reason)
                failed.add(config)
    return failed


def _compile_one(problem: Compiled, config: Config, device: Device) -> str:
    from gdn2gen.codegen.build import compile_ahead

    try:
        compile_ahead(problem, config.stage, config, device)
    except Gdn2genError as error:
        return str(error)
    return ""
