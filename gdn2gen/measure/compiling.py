"""Kernels of recipes, compiled side by side before a process of its own loads them: one after the
other, as a first call asks for them, six stages in TileLang take a minute of one core."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, wait
from typing import Final

from gdn2gen.base.device import Device
from gdn2gen.base.environment import check_compiles
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.worker import CompilePool, compile_slots
from gdn2gen.codegen.build import Resources
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config

# A compile takes 5 to 20 s; the rare one that takes minutes would stall its slot for no gain.
COMPILE_SECONDS: Final = 120.0


def compile_in(
    pool: CompilePool, problem: Problem, config: Config, device: Device
) -> Future[Outcome[Resources]]:
    """Queue the compile of one stage. Raises UnsupportedError where nothing compiles."""
    check_compiles()
    target = "gdn2gen.codegen.build:compile_ahead"
    return pool.submit(target, problem, config.stage, config, device, timeout=COMPILE_SECONDS)


def compile_side_by_side(
    asked: Iterable[tuple[Problem, Config]], device: Device, slots: int | None = None
) -> None:
    """Each once, into the caches. What fails there says so where it is called. `slots`: processes,
    by default all cores but two."""
    wanted = [*dict.fromkeys(asked)]
    pool = CompilePool(min(slots or compile_slots(), max(1, len(wanted))))
    try:
        wait(compile_in(pool, problem, config, device) for problem, config in wanted)
    finally:
        pool.close()
