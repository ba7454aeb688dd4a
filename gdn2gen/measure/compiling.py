"""Kernels of recipes, compiled side by side before a process of its own loads them: one after the
other, as a first call asks for them, six stages in TileLang take a minute of one core."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import wait
from typing import Final

from gdn2gen.base.device import Device
from gdn2gen.base.worker import CompilePool, compile_slots
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config

# As the tuner's: 5 to 20 s are usual.
COMPILE_SECONDS: Final = 120.0


def compile_side_by_side(
    asked: Iterable[tuple[Problem, Config]], device: Device, slots: int | None = None
) -> None:
    """Each once, into the caches. What fails there says so where it is called. `slots`: processes,
    by default all cores but two."""
    wanted = [*dict.fromkeys(asked)]
    pool = CompilePool(min(slots or compile_slots(), max(1, len(wanted))))
    target = "gdn2gen.codegen.build:compile_ahead"
    try:
        wait(
            pool.submit(target, problem, x.stage, x, device, timeout=COMPILE_SECONDS)
            for problem, x in wanted
        )
    finally:
        pool.close()
