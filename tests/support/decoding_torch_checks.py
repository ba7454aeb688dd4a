"""The ops over a few tokens as torch sees them: by the reference, and in the interpreter.

Each check raises AssertionError, or returns something: another process is asked for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from decoding_cases import Case, compare, draw, expected, public_op, same_bits
from torch import Tensor

from gdn2gen.base.environment import verifying
from gdn2gen.base.errors import InputError
from gdn2gen.family.registry import recurrence_named
from gdn2gen.ops import recurrent
from gdn2gen.runtime.decoding import Plan
from gdn2gen.runtime.decoding_checks import SERVING
from gdn2gen.runtime.decoding_op import plan_of
from gdn2gen.runtime.signature import decoding_signature


@verifying()
def opcheck(op: str, states: str) -> bool:
    """torch's own checks of the schema, the fake and what tracers make of the op."""
    gated = recurrence_named(op).takes("use_gate_in_kernel")
    case = Case(op=op, states=states, T=2, gate="softplus" if gated else "none")
    drawn = draw(case, "cpu")
    member = recurrence_named(op)
    o = torch.empty_like(drawn.inputs["v"])
    final = None if states == "speculative" else torch.empty(3, 2, 32, 32)
    tensors = [drawn.inputs.get(x.name) for x in member.inputs]
    serving = [
        drawn.serving.get(x) for x in ("ssm_state_indices", "num_accepted_tokens", "state_pool")
    ]
    flags = [None, None, case.normalised, gated, final is not None, False]
    flags += [False, False] if member.activates_beta else []
    torch.library.opcheck(
        getattr(torch.ops.gdn2gen, f"{op}_recurrent").default,
        (*tensors, *serving, o, final, *flags, None),
    )
    return True


@verifying()
def compiled(op: str, states: str, lengths: tuple[int, ...] | None = None) -> int:
    """Whole graphs of calls of several sizes, beside the reference; returns how many were made."""
    torch._dynamo.reset()
    made: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def call(given: dict[str, Any], flags: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        return public_op(op)(**given, **flags, output_final_state=True)

    for N in (3, 5, 4):
        case = Case(op=op, states=states, N=N, T=2, gap=8, gate="sigmoid")
        if lengths is not None:
            case = replace(case, lengths=lengths[:N], states="pool")
        drawn = draw(case, "cpu")
        exact = expected(case, drawn)
        before = None if drawn.storage is None else drawn.storage.clone()
        with torch.no_grad():
            o, state = call({**drawn.inputs, **drawn.serving}, case.flags)
        compare(case, drawn, before, o, state, exact)
    return len(made)


@verifying()
def without_data() -> None:
    """Tensors on `meta` have shapes."""
    drawn = draw(Case(T=2, states="none"), "cpu")
    given = {name: x.to("meta") for name, x in drawn.inputs.items()}
    o, state = recurrent.fused_recurrent_gdn2(**given, output_final_state=True)
    assert o.device.type == "meta" and o.shape == given["v"].shape
    assert state is not None and state.shape == (3, 2, 32, 32)


@verifying()
def views_that_torch_negates() -> bool:
    """Their values are not those in memory."""
    drawn = draw(Case(T=2, states="none"), "cpu")
    with torch.no_grad():
        wanted, _ = recurrent.fused_recurrent_gdn2(**drawn.inputs)
        v = torch.complex(torch.zeros_like(drawn.inputs["v"]), -drawn.inputs["v"]).conj().imag
        assert v.is_neg()
        found, _ = recurrent.fused_recurrent_gdn2(**drawn.inputs | {"v": v})
    assert torch.equal(found, wanted)
    return True


@verifying()
def nothing_to_do() -> bool:
    """No tokens, no sequences, and both."""
    for changes in ({"N": 0}, {"T": 0}, {"N": 0, "T": 0}):
        for states in ("none", "slots"):
            case = Case(**{"N": 2, "T": 2, "states": states, **changes})
            drawn = draw(case, "cpu")
            pool = None if drawn.storage is None else drawn.storage.clone()
            with torch.no_grad():
                o, state = public_op(case.op)(**drawn.inputs, **drawn.serving)
            assert o.shape == drawn.inputs["v"].shape and o.numel() == 0 and state is None
            if pool is not None:
                assert same_bits(drawn.storage, pool)
    case = Case(N=1, T=3, states="none")
    given = draw(case, "cpu").inputs | {"cu_seqlens": torch.zeros(1, dtype=torch.int32)}
    with torch.no_grad():
        o, state = public_op(case.op)(**given, output_final_state=True, out=torch.ones(1, 3, 2, 32))
    assert not o.any() and state is not None and state.shape == (0, 2, 32, 32)
    return True


@verifying()
def plan(case: Case, **changes: Any) -> Plan:
    """What a call is planned as."""
    drawn = draw(case, "cpu")
    signature = decoding_signature(case.op)
    given = {**drawn.inputs, **drawn.serving, **changes}
    options = (None, None, case.normalised, case.gate != "none", False, case.values_first)
    options += (False, False) if recurrence_named(case.op).activates_beta else ()
    tensors = [given.get(x) for x in (*signature.names, *SERVING)]
    return plan_of(signature, tensors, options, None)


@verifying()
def strided_plans() -> bool:
    """Copied is only what no kernel could read."""
    assert not plan(Case(T=2)).problem.strided
    for case in (Case(T=2, wide_rows=True), Case(wide_rows=True, op="kda")):
        found = plan(case)
        assert found.problem.strided and not found.copied
    apart = draw(Case(T=2), "cpu").inputs
    turned = apart["q"].transpose(1, 3).contiguous().transpose(1, 3)
    found = plan(Case(T=2), q=turned)
    assert not found.problem.strided and found.copied == (0,)
    # a table of pages has columns beside those of a call
    table = torch.arange(60, dtype=torch.int32).view(3, 20)
    pool = torch.zeros(60, 2, 32, 32)
    for indices, copied in ((table[:, 3], False), (table[:, 3:6], False), (table[:, ::2], True)):
        found = plan(Case(T=2), ssm_state_indices=indices, state_pool=pool)
        assert bool(found.copied) == copied
    return True


@verifying()
def over_what_is_read(op: str) -> list[str]:
    """`out` in the memory of each input of its size, in calls that are new and that are known: as
    in memory of its own, or refused. Returns those that are refused, as callers call them."""
    member = recurrence_named(op)
    there = dict(member.public.recurrent_names)
    case = Case(op=op, H=2, T=2, rate=op == "mamba2", output_gate=op == "mamba2")
    refused = []
    for name in [x for x, y in draw(case, "cpu").inputs.items() if y.shape == (3, 2, 2, 32)]:
        found = {_runs_over(case, name, there.get(name, name)) for _ in range(3)}
        assert len(found) == 1, name
        refused += [] if found.pop() else [there.get(name, name)]
    return refused


def _runs_over(case: Case, name: str, shown: str) -> bool:
    drawn = draw(case, "cpu")
    exact = expected(case, drawn)
    assert drawn.storage is not None
    before = drawn.storage.clone()
    given = {**drawn.inputs, **drawn.serving, **case.flags, "output_final_state": True}
    out = torch.empty_like(given["v"])
    with torch.no_grad():
        public_op(case.op)(**given, out=out)  # such calls are known from here on
        drawn.storage.copy_(before)
        try:
            o, state = public_op(case.op)(**given, out=given[name])
        except InputError as error:
            assert f"out begins where {shown} does" in str(error)
            assert same_bits(drawn.storage, before)
            return False
    compare(case, drawn, before, o, state, exact)
    return True
