"""Kernels that are in no plan, those of Mamba-3, timed and checked in a worker: one that
crashes or hangs costs its knobs, not the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from gdn2gen.base.environment import VERIFYING
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.worker import Worker
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.limits import Knob
from gdn2gen.measure.mamba3_times import Configs, check_knobs, time_knobs

# A kernel compiles in a second or two, and a check has a reference that goes token by token.
_TIMEOUT_S: Final = 180.0
_INTERPRETER_TIMEOUT_S: Final = 300.0
Call = Callable[..., Outcome[Any]]
"""`module:function`, its arguments, and `timeout`, as `Worker.call` has it."""


def parts_worker() -> Worker:
    return Worker({"GDN2GEN_UNVERIFIED": VERIFYING, "TRITON_INTERPRET": "0"})


def interpreting_worker() -> Worker:
    """Where there is no GPU, or for another one."""
    return Worker(
        {
            "GDN2GEN_UNVERIFIED": VERIFYING,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
    )


def time_part(
    call: Call, problem: Mamba3Problem, shape: Shape, stage: str, knobs: Mapping[str, Knob]
) -> Outcome[float]:
    """Milliseconds of one stage with these knobs."""
    forced = {x: y for x, y in knobs.items() if x != "BT"}
    target = f"{time_knobs.__module__}:{time_knobs.__name__}"
    return call(target, problem, shape, stage, knobs["BT"], forced, timeout=_TIMEOUT_S)


def check_parts(
    call: Call, problem: Mamba3Problem, shape: Shape, BT: int | None, knobs: Configs
) -> Outcome[tuple[dict[str, float], str]]:
    """Errors by output, and what is wrong, if anything is; `BT` None: of a step."""
    target = f"{check_knobs.__module__}:{check_knobs.__name__}"
    return call(target, problem, shape, BT, knobs, timeout=_TIMEOUT_S)


def interpret_parts(
    call: Call, problem: Mamba3Problem, shape: Shape, BT: int, knobs: Configs
) -> Outcome[tuple[dict[str, float], str]]:
    """The same in Triton's interpreter."""
    target = f"{check_knobs.__module__}:{check_knobs.__name__}"
    return call(target, problem, shape, BT, knobs, "cpu", timeout=_INTERPRETER_TIMEOUT_S)
