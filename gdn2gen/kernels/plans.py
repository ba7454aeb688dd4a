"""Plan: the chain of stages, forward and back. Level: how much the forward may keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, get_args

from gdn2gen.base.errors import DispatchError, UnsupportedError
from gdn2gen.family.registry import recurrence_named

EVERY: Final = (1, 2, 4)
"""Chunks of a block, of plans that keep a state of each block."""

Level = Literal["lean", "fast"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)


@dataclass(frozen=True)
class Plan:
    """A chain of stages, forward and backward.

    The forward keeps what the backward reads and does not make (`schedule.saved_by`).
    """

    name: str
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    every: int = 0
    """Chunks from one state that is kept between stages to the next; 0 where stages keep all."""
    instead: str = ""
    """Of a plan whose stages serve some problems alone, the one that keeps the same in stages that
    serve all; "" where its own do."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Every stage once, in order of first use."""
        return tuple(dict.fromkeys((*self.forward, *self.backward)))


_FORWARD = ("prepare", "scan")
_BACKWARD = ("rescan", "reverse_scan", "grad_value", "grad_key")
_LINEAR = ("rescan", "reverse_scan", "grad_key")
# Where scans read q and k themselves there are no factors to keep or to make again: 160 bytes, and
# 64 of S_seg.
_DIRECT = Plan("direct", _FORWARD, _BACKWARD)


def _blocks(every: int) -> tuple[Plan, Plan]:
    """Of both levels, with the state of every so many chunks between their stages."""
    backward = (f"reverse_scan_blocks{every}", f"grad_blocks{every}")
    again = ("reprepare_factors", f"rescan_blocks{every}")
    return (
        # keeps what `lean` does
        Plan(f"blocks{every}", _FORWARD, (*again, *backward), every),
        # R and the factors, and h of every block, less S_seg
        Plan(f"blocks{every}_states", ("prepare", f"scan_blocks{every}"), backward, every),
    )


def _direct_blocks(every: int) -> tuple[Plan, Plan]:
    """The same where scans read q and k themselves: there are no factors to make again."""
    backward = (f"reverse_scan_blocks{every}", f"grad_blocks{every}")
    return (
        # keeps what `direct` does
        Plan(f"direct_blocks{every}", _FORWARD, (f"rescan_blocks{every}", *backward), every),
        # R, and h of every block, less S_seg
        Plan(f"direct_blocks{every}_states", ("prepare", f"scan_blocks{every}"), backward, every),
    )


_WHOLE = ("forward",)
_WHOLE_OUTSIDE = ("forward_outside",)


def _whole_blocks(every: int) -> Plan:
    """What `blocks` of so many chunks does, whose prepare and scan are one kernel."""
    apart = _blocks(every)[0]
    return Plan(f"whole_{apart.name}", _WHOLE, apart.backward, every, instead=apart.name)


def _whole_direct(every: int) -> Plan:
    """The same where scans read q and k themselves; of no block, what `direct` does."""
    apart = _direct_blocks(every)[0] if every else _DIRECT
    return Plan(f"whole_{apart.name}", _WHOLE_OUTSIDE, apart.backward, every, instead=apart.name)


def _whole_direct_states(every: int) -> Plan:
    """The same of what level fast keeps."""
    apart = _direct_blocks(every)[1]
    forward = (f"forward_outside_blocks{every}",)
    return Plan(f"whole_{apart.name}", forward, apart.backward, every, instead=apart.name)


def _whole_states(every: int) -> Plan:
    """The same of what level fast keeps."""
    apart = _blocks(every)[1]
    forward = (f"forward_blocks{every}",)
    return Plan(f"whole_{apart.name}", forward, apart.backward, every, instead=apart.name)


def _with_transitions(apart: Plan) -> Plan:
    """What `apart` does in segments, whose transitions the forward keeps for the backward."""
    forward, backward = (
        tuple(f"{x}_transitions" if "scan" in x and "rescan" not in x else x for x in stages)
        for stages in (apart.forward, apart.backward)
    )
    name = f"{apart.name}_transitions"
    return Plan(name, forward, backward, apart.every, instead=apart.name)


PLANS: Final = {
    plan.name: plan
    for plan in (
        # 128 bytes per token and head kept (16 bits, BT = 32), and 64 of S_seg: triangular work is
        # not redone.
        Plan("lean", _FORWARD, ("reprepare", *_BACKWARD)),
        # 784 bytes more: the factors stay, and only the scan is redone.
        Plan("fast", _FORWARD, ("sum_decay", *_BACKWARD)),
        # 1280 bytes more, less S_seg: nothing is redone, but for the sum of the decay.
        Plan("states", ("prepare", "scan_states"), ("sum_decay", *_BACKWARD[1:])),
        _DIRECT,
        # 1280 bytes more, less S_seg.
        Plan("direct_states", ("prepare", "scan_states"), _BACKWARD[1:]),
        # The same of members that erase nothing: values are added to the state as they are, the
        # reverse scan makes their gradient, and grad_key has all that those of scores are made of.
        Plan("linear", _FORWARD, ("reprepare", *_LINEAR)),
        Plan("linear_fast", _FORWARD, ("sum_decay", *_LINEAR)),
        Plan("linear_states", ("prepare", "scan_states"), ("sum_decay", *_LINEAR[1:])),
        Plan("linear_direct", _FORWARD, _LINEAR),
        Plan("linear_direct_states", ("prepare", "scan_states"), _LINEAR[1:]),
        # Where heads share the scores of their group: these and two numbers a token and head are
        # kept, and S_seg.
        Plan(
            "grouped",
            ("prepare_group", "scan_group"),
            ("rescan_group", "reverse_scan_group", "grad_group"),
        ),
        # Fewer bytes: states between chunks are made again, no stage is the value side's own, and
        # no sum of the decay is kept.
        *(plan for every in EVERY for plan in _blocks(every)),
        *(plan for every in (1, 2) for plan in _direct_blocks(every)),
        # What `lean`, `blocks1` and `blocks2` do, whose prepare and scan are one kernel: 896 bytes
        # a token and head at K = 128 are not written and read again.
        Plan("whole", _WHOLE, ("reprepare", *_BACKWARD), instead="lean"),
        *map(_whole_blocks, (1, 2)),
        *map(_whole_states, (1, 2)),
        *map(_whole_direct, (0, 1, 2)),
        _whole_direct_states(2),
        # In segments, 64 KB of each kept at K = 128: the reverse scan has no transitions to make.
        *map(_with_transitions, (*_blocks(2), *_direct_blocks(2))),
    )
}
# What a caller chooses: how much the forward may keep. Of those that serve its recurrence the tuner
# ranks the plans of a level; the first is the one without tuning.
PLANS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "lean": (
        *("lean", "direct", "linear", "linear_direct", "grouped"),
        *(f"blocks{every}" for every in EVERY),
        *("whole", "whole_blocks1", "whole_blocks2"),
        "blocks2_transitions",
        *("direct_blocks1", "direct_blocks2"),
        *("whole_direct", "whole_direct_blocks1", "whole_direct_blocks2"),
        "direct_blocks2_transitions",
    ),
    "fast": (
        *("fast", "states", "direct_states"),
        *("linear_fast", "linear_states", "linear_direct_states"),
        "grouped",
        *(f"blocks{every}_states" for every in EVERY),
        *("whole_blocks1_states", "whole_blocks2_states", "blocks2_states_transitions"),
        *("direct_blocks1_states", "direct_blocks2_states"),
        *("whole_direct_blocks2_states", "direct_blocks2_states_transitions"),
    ),
}


def plans_of(level: str, op: str) -> tuple[str, ...]:
    """The plans of a level that serve a recurrence, the one without tuning first."""
    served = recurrence_named(op).plans
    return tuple(name for name in PLANS_OF[level] if name in served)


def filed_level(level: str, op: str) -> str:
    """Under which entries of a recurrence serve calls at `level`: the first of the same plans. What
    keeps no more at level fast than at level lean is tuned once."""
    served = plans_of(level, op)
    return next(x for x in LEVELS if plans_of(x, op) == served)


def filed_levels(levels: Iterable[str], op: str) -> tuple[str, ...]:
    """The same of several, each once."""
    return tuple(dict.fromkeys(filed_level(x, op) for x in levels))


def stages_of(op: str) -> tuple[str, ...]:
    """The stages of the plans that serve a recurrence, each once."""
    return _stages(recurrence_named(op).plans)


@cache
def _stages(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(stage for plan in names for stage in PLANS[plan].stages))


def level_of(plan_name: str) -> Level:
    """The level that a plan serves."""
    return next(level for level in LEVELS if plan_name in PLANS_OF[level])


def is_optional(plan_name: str, op: str) -> bool:
    """Whether another plan serves the same level without tuning."""
    return plans_of(level_of(plan_name), op)[0] != plan_name


def keeps_least(plan: Plan) -> bool:
    """Whether its forward writes nothing more than that of the least level; transitions of segments
    are written in any case."""
    return plan.forward[-1] in ("scan", "scan_transitions", "scan_group", *_WHOLE, *_WHOLE_OUTSIDE)


def plan_named(name: str) -> Plan:
    if name not in PLANS:
        raise DispatchError(f"unknown plan {name!r}; known: {', '.join(PLANS)}")
    return PLANS[name]


def plan_for(name: str, op: str) -> Plan:
    """The plan of that name. Raises UnsupportedError if it does not serve the recurrence."""
    plan, served = plan_named(name), recurrence_named(op).plans
    if name not in served:
        raise UnsupportedError(
            f"plan {name!r} does not serve {op}; use one that does: {', '.join(served)}"
        )
    return plan
