"""Kernels compiled side by side before a process of its own loads them: one after the other, as a
first call asks for them, six stages in TileLang take a minute of one core."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Final

from gdn2gen.base.device import Device, present_device
from gdn2gen.base.environment import check_compiles
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.terminal import console
from gdn2gen.base.worker import CompilePool, compile_slots
from gdn2gen.codegen.build import Resources
from gdn2gen.family.compiled import Compiled
from gdn2gen.kernels.config import Config

# A compile takes 5 to 20 s; the rare one that takes minutes would stall its slot for no gain.
COMPILE_SECONDS: Final = 120.0


def compile_in(
    pool: CompilePool, problem: Compiled, config: Config, device: Device
) -> Future[Outcome[Resources]]:
    """Queue the compile of one stage. Raises UnsupportedError where nothing compiles."""
    check_compiles()
    target = "gdn2gen.codegen.build:compile_ahead"
    return pool.submit(target, problem, config.stage, config, device, timeout=COMPILE_SECONDS)


def compile_side_by_side(
    asked: Iterable[tuple[Compiled, Config]], device: Device, slots: int | None = None
) -> dict[Config, str]:
    """Each once, into the caches; returns those that no compiler takes, and why. By so many
    processes, all cores but two where `slots` is not given."""
    wanted = [*dict.fromkeys(asked)]
    pool = CompilePool(min(slots or compile_slots(), max(1, len(wanted))))
    try:
        made = [compile_in(pool, problem, config, device) for problem, config in wanted]
        found = [x.result() for x in made]
    finally:
        pool.close()
    return {x: y.reason for (_, x), y in zip(wanted, found, strict=True) if not y.ok}


def compile_all(asked: Iterable[tuple[Compiled, Config]]) -> set[Config]:
    """The same for the present GPU and by all cores, for what sweeps configs and does nothing
    meanwhile. Those that no compiler takes are said, and returned."""
    failed = compile_side_by_side(asked, present_device(), os.cpu_count())
    for reason in failed.values():
        console(stderr=True).print(reason)
    return {*failed}
