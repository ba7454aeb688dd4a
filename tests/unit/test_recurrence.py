"""What is declared of a member of the family, and what follows from it."""

from __future__ import annotations

from dataclasses import fields

import pytest

from gdn2gen.base.errors import InputError
from gdn2gen.family.gdn2 import GDN2
from gdn2gen.family.problem import OPTIONAL_FLAGS, Problem
from gdn2gen.family.recurrence import GATES, Decay, Public, Recurrence
from gdn2gen.family.registry import OPS, RECURRENCES, recurrence_named
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.stages import STAGES
from gdn2gen.runtime.signature import signature_of

MEMBERS = [*RECURRENCES.values()]
OPERANDS = {x.name: x for stage in STAGES.values() for x in (*stage.inputs, *stage.outputs)}


def test_members_are_found_by_name() -> None:
    assert recurrence_named("gdn2") is GDN2 is RECURRENCES["gdn2"]
    with pytest.raises(InputError, match=r"op must be one of \('gdn2'.*but got 'gdn3'"):
        recurrence_named("gdn3")
    with pytest.raises(InputError, match=r"op must be one of \('gdn2'.*but got 'gdn3'"):
        Problem(op="gdn3")


@pytest.mark.parametrize("member", MEMBERS, ids=lambda x: x.name)
def test_a_declaration_holds_together(member: Recurrence) -> None:
    names = [x.name for x in member.inputs]
    assert len({*names}) == len(names)
    assert member.inputs == (*member.required, *member.optional)
    assert names[-1] == "cu_seqlens" and not member.inputs[-1].differentiable
    known = {x.name for x in fields(Problem)}
    assert {x.when for x in member.optional} <= known & {*OPTIONAL_FLAGS}
    assert {x.dtype for x in member.inputs} <= {"io", "gate", "parameter", "state", "index"}
    assert {x.dtype for x in member.required} <= {"io", "gate"}
    assert {*member.activations} <= {*GATES}
    assert {*member.plans} <= {*PLANS}
    assert (member.name in OPS) == bool(member.plans)


def test_inputs_are_what_kernels_read() -> None:
    """One after the other in the stages' contracts, of the same dims."""
    for x in GDN2.differentiable:
        operand = OPERANDS[x.name]
        assert operand.dims == x.dims
        assert operand.dtype in (x.dtype, "fp32")
        assert GDN2.gradients[x.name] in OPERANDS


def test_roles_are_of_inputs() -> None:
    with pytest.raises(ValueError, match=r"odd has no inputs \['beta'\]"):
        Recurrence(
            name="odd",
            title="",
            source="",
            inputs=GDN2.inputs,
            decay=Decay("g"),
            erase="beta",
            write=None,
            public=Public("chunk_odd", "fla.ops.odd"),
        )


def test_what_follows() -> None:
    assert [GDN2.inputs[place].name for place in GDN2.sized_by] == ["q", "v", "g"]
    assert [GDN2.per(x) for x in ("g", "b", "w", "A_log")] == ["channel"] * 3 + ["head"]


def test_schemas_follow_from_the_declaration() -> None:
    """As graphs that were exported before know them."""
    tensors = (
        "Tensor q, Tensor k, Tensor v, Tensor g, Tensor b, Tensor w, Tensor? initial_state, "
        "Tensor? A_log, Tensor? dt_bias, Tensor? cu_seqlens"
    )
    options = (
        "float? scale, float? lower_bound, bool l2norm, bool gate_in_kernel, "
        "bool output_final_state, bool state_v_first, str agreement"
    )
    signature = signature_of("gdn2")
    assert signature.forward_schema == f"({tensors}, {options}) -> (Tensor, Tensor, Tensor)"
    arrived = "Tensor do, Tensor? dht, Tensor saved, Tensor o"
    assert signature.backward_schema == (
        f"({arrived}, {tensors}, SymInt? sequences, {options}) -> Tensor[]"
    )
