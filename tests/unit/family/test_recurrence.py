"""What is declared of a member of the family, and what follows from it."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from gdn2gen.base.errors import InputError
from gdn2gen.family.gdn2 import GDN2
from gdn2gen.family.kda import KDA
from gdn2gen.family.problem import OPTIONAL_FLAGS, Problem
from gdn2gen.family.recurrence import GATES, Decay, Public, Recurrence
from gdn2gen.family.registry import OPS, RECURRENCES, recurrence_named
from gdn2gen.kernels.plans import PLANS, stages_of
from gdn2gen.kernels.stage import Operand, is_of
from gdn2gen.kernels.stages import STAGES
from gdn2gen.runtime._kernels import _folds
from gdn2gen.runtime.signature import signature_of

MEMBERS = [*RECURRENCES.values()]


def operands_of(op: str) -> dict[str, Operand]:
    """Of all stages that a member has, by name."""
    stages = [STAGES[name] for name in stages_of(op)]
    found = [x for stage in stages for x in (*stage.inputs, *stage.outputs)]
    return {x.name: x for x in found if is_of(x, op)}


def test_members_are_found_by_name() -> None:
    assert recurrence_named("gdn2") is GDN2 is RECURRENCES["gdn2"]
    with pytest.raises(InputError, match=r"op must be one of gdn2, .*but got 'gdn3'"):
        recurrence_named("gdn3")
    with pytest.raises(InputError, match=r"op must be one of gdn2, .*but got 'gdn3'"):
        Problem(op="gdn3")


@pytest.mark.parametrize("member", MEMBERS, ids=lambda x: x.name)
def test_a_declaration_holds_together(member: Recurrence) -> None:
    names = [x.name for x in member.inputs]
    assert len({*names}) == len(names)
    assert member.inputs == (*member.required, *member.optional)
    assert names[-1] == "cu_seqlens" and not member.inputs[-1].differentiable
    known = {x.name for x in fields(Problem)}
    assert {x.when for x in member.optional} <= known & {*OPTIONAL_FLAGS}
    of_tokens = {"io", "factor", "gate"}
    assert {x.dtype for x in member.inputs} <= of_tokens | {"parameter", "state", "index"}
    assert {x.dtype for x in member.required} <= of_tokens
    assert {*member.activations} <= {*GATES}
    assert {*member.plans} <= {*PLANS}
    assert (member.name in OPS) == bool(member.plans)


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_what_kernels_read(op: str) -> None:
    """One after the other in the stages' contracts, of the same dims."""
    member, operands = recurrence_named(op), operands_of(op)
    for x in member.differentiable:
        operand = operands[x.name]
        assert operand.dims == x.dims
        assert operand.dtype in (x.dtype, "fp32")
        assert member.gradients[x.name] in operands


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
    assert GDN2.update == ("(I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T")
    assert [GDN2.per(x) for x in ("g", "b", "w", "A_log")] == ["channel"] * 3 + ["head"]


def test_what_follows_of_a_tied_one() -> None:
    assert KDA.erase == KDA.write == "beta" and KDA.per("beta") == "head"
    assert KDA.tied and not GDN2.tied
    assert KDA.update == "(I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T"
    with pytest.raises(InputError, match="gdn2 has no beta whose sigmoid"):
        Problem(beta_sigmoid=True)
    with pytest.raises(InputError, match=r"neg_eigval .* needs beta_sigmoid"):
        Problem(op="kda", neg_eigval=True)


def test_a_wide_beta_is_of_a_narrower_q() -> None:
    assert Problem("kda", beta_fp32=True).dtype_of("factor") == "fp32"
    assert Problem("kda", dtype="fp16").dtype_of("factor") == "fp16"
    assert "beta_fp32" not in Problem("kda").document
    with pytest.raises(InputError, match="gdn2 has no beta that could be fp32"):
        Problem(beta_fp32=True)
    with pytest.raises(InputError, match="beside a bf16 or fp16 q, but got dtype='fp32'"):
        Problem("kda", dtype="fp32", beta_fp32=True)


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
    kda = signature_of("kda").forward_schema
    assert "Tensor g, Tensor beta, Tensor? initial_state" in kda
    assert "bool state_v_first, bool beta_sigmoid, bool neg_eigval, str agreement" in kda


SIZES = {"B": 2, "T": 5, "H": 2, "HV": 6, "HG": 3, "K": 4, "V": 8, "N": 2, "NT": 4, "NK": 3}
SIZES["HP"] = 4  # two of each group
HEADS = ("H", "HV", "HG")
PLAIN = {"B": "b", "T": "t", "K": "k", "V": "v", "N": "n", "NT": "c", "NK": "s"}
LETTERS = {**PLAIN, **dict.fromkeys((*HEADS, "HP"), "h")}


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS for name in recurrence_named(op).gradients]
)
@pytest.mark.parametrize("tokens", [5, 0])
def test_a_gradient_is_summed_to_the_shape_of_its_input(op: str, name: str, tokens: int) -> None:
    """Over the value heads that read one of the input, and over what the input has none of."""
    sizes = SIZES | {"T": tokens}
    member = recurrence_named(op)
    of_input = member.named[name].symbols
    of_kernel = operands_of(op)[member.gradients[name]].dims.split()
    grad = torch.randn([sizes[x] for x in of_kernel])
    x = torch.empty([sizes[x] for x in of_input], dtype=torch.bfloat16)
    heads = next(sizes[x] for x in of_input if x in HEADS)
    many = "HP" if "HP" in of_kernel else "HV"
    grouped = grad.double().unflatten(of_kernel.index(many), (heads, sizes[many] // heads))
    before = "".join(LETTERS[x] + "r" * (x == many) for x in of_kernel)
    after = "".join(LETTERS[x] for x in of_input)
    found = _folds(op)[name](grad, x)
    assert found.shape == x.shape
    expected = torch.einsum(f"{before}->{after}", grouped)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
