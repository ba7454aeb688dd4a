"""Members of the family that have no public op over a few tokens, through the one of all members.

One number a head to erase and another to write: templates and checks take them by their
declaration. Each check returns errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Final

import torch
from decoding_cases import BOUNDS, error, same_bits
from torch import Tensor

from gdn2gen.base.environment import verifying
from gdn2gen.family import problem, registry
from gdn2gen.family.decoding_reference import decode
from gdn2gen.family.recurrence import (
    BETA,
    CHANNEL_DECAY,
    KEY,
    QUERY,
    SEQUENCES,
    STATE,
    VALUE,
    Decay,
    Input,
    Public,
    Recurrence,
)
from gdn2gen.ops import _decode
from gdn2gen.runtime.decoding_op import DecodingOp, decoding_op

HEAD_DECAY: Final = replace(CHANNEL_DECAY, dims="B T HV")
MEMBERS: Final = (
    Recurrence(
        name="of_heads",
        title="of_heads",
        source="a test",
        inputs=(
            QUERY, KEY, VALUE, HEAD_DECAY, BETA, Input("w", "B T H", "written", draw="unit"), STATE,
            SEQUENCES,
        ),
        decay=Decay("g"),
        erase="beta",
        write="w",
        public=Public(
            "of_heads", "of_heads", ("use_qk_l2norm_in_kernel", "state_v_first"), "of_heads"
        ),
    ),
)  # fmt: skip


@contextmanager
def declared() -> Iterator[None]:
    """Inside, they are members like any other."""
    before, known = problem.OPS, dict(registry.RECURRENCES)
    registry.RECURRENCES.update({x.name: x for x in MEMBERS})
    problem.OPS = tuple(dict.fromkeys((*before, *(x.name for x in MEMBERS))))  # type: ignore[misc]
    try:
        yield
    finally:
        problem.OPS = before  # type: ignore[misc]
        registry.RECURRENCES.clear()
        registry.RECURRENCES.update(known)


@cache
def _op(member: Recurrence) -> DecodingOp:
    return decoding_op(member)


def check(name: str) -> dict[str, float]:
    """A member with a pool and speculation, beside the reference: every activation that it has."""
    (member,) = (x for x in MEMBERS if x.name == name)
    gates = member.decay.activations if member.decay else ("none",)
    with declared(), torch.no_grad(), verifying():
        return {
            f"{gate} {beta}": _error(member, gate, beta)
            for gate in gates
            for beta in ((False, True) if member.tied else (False,))
        }


def _error(member: Recurrence, gate: str, beta: bool) -> float:
    # of what has one number for a head of q, there are as many of v: FLA has no groups there
    grouped = not any(x.dims == "B T H" for x in member.inputs)
    HV = 4 if grouped else 2
    sizes = {"B": 2, "T": 3, "H": 2, "HV": HV, "HG": HV, "K": 48, "V": 32, "N": 2}
    torch.manual_seed(0)
    given: dict[str, Tensor] = {}
    for x in member.inputs:
        drawn = torch.randn([sizes.get(y, 1) for y in x.symbols])
        if not x.when or (x.when in ("has_A_log", "has_dt_bias") and gate != "none"):
            decays = x.dtype == "gate" and gate == "none"
            given[x.name] = -drawn.abs() if decays else drawn
            if x.draw == "unit" and not beta:
                given[x.name] = drawn.sigmoid()
    options: dict[str, Any] = {
        "scale": 0.5,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": gate != "none",
        "lower_bound": None,
        "state_v_first": True,
    }
    if member.tied:
        options |= {"use_beta_sigmoid_in_kernel": beta, "allow_neg_eigval": beta}
    pool = torch.randn(9, HV, 32, 48)
    indices = torch.tensor([[1, 3, 5], [6, 0, 2]])
    accepted = torch.tensor([3, 1])
    before, exact = pool.clone(), pool.double()
    o = torch.full((2, 3, HV, 32), float("nan"))
    tensors = tuple(given.get(x.name) for x in member.inputs)
    _decode.decode(
        _op(member), tensors, (indices, accepted, pool, o),
        output_final_state=False, null_slot=None, **options,
    )  # fmt: skip
    o_exact = torch.zeros_like(o, dtype=torch.float64)
    decode(
        member, {n: x.double() for n, x in given.items()}, o_exact, state_pool=exact,
        ssm_state_indices=indices, num_accepted_tokens=accepted, **options,
    )  # fmt: skip
    assert same_bits(pool[[4, 7, 8]], before[[4, 7, 8]])
    worst = max(error(o, o_exact), error(pool, exact))
    assert worst < BOUNDS[torch.float32], (member.name, gate, beta, worst)
    return worst
