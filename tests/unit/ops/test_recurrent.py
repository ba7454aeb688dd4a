"""The ops over a few tokens: values, slots, padding, speculation beside fp64; what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import declared_members
import decoding_cases
import decoding_refusals
import decoding_torch_checks
import pytest
import torch
from decoding_cases import Case, draw
from serving_simulation import simulate

import gdn2gen
from gdn2gen import fused_recurrent_gdn2, fused_recurrent_kda
from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.family.decoding import KEYWORDS
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.registry import DECODING_OPS, recurrence_named
from gdn2gen.ops import recurrent

Check = Callable[..., Any]
CHECKS: Final = decoding_torch_checks
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES: Final = {
    "gdn2": [Case(), Case(T=5, HV=4, H=2, HG=2)],
    "kda": [Case(op="kda"), Case(op="kda", T=5, HV=4, H=2, HG=2)],
    "gated_delta_rule": [
        Case(op="gated_delta_rule", states="speculative", T=3, HV=4, H=2, gate="softplus",
             beta="neg", v_first=True),
        Case(op="gated_delta_rule", K=40, V=24, T=5, HG=1, states="initial"),
    ],
    "delta_rule": [
        Case(op="delta_rule", states="speculative", T=3, HV=4, H=2),
        Case(op="delta_rule", K=40, V=24, lengths=(2, 0, 3), states="initial"),
    ],
    "gla": [
        Case(op="gla", states="speculative", T=3, HV=4, H=2, v_first=True),
        Case(op="gla", K=40, V=24, T=5, HG=1, states="initial", pattern="sparse"),
    ],
    "simple_gla": [
        Case(op="simple_gla", states="speculative", T=3, HV=4, H=2, v_first=True),
        Case(op="simple_gla", K=40, V=24, lengths=(2, 0, 3), states="slots", wide_rows=True),
    ],
    "mamba2": [
        Case(op="mamba2", K=40, V=24, HV=4, H=2, rate=True, skip="tied", output_gate=True,
             gate="softplus", dtype=FP16, state_dtype=BF16, v_first=True, gap=3, N=4, padding=(1,)),
        Case(op="mamba2", HV=4, states="speculative", T=3, rate=True, skip="full", holes=True,
             v_first=True),
        Case(op="mamba2", lengths=(2, 0, 3), uncovered=1, states="initial", output_gate=True,
             wide_rows=True, rate=True, gate="softplus", parameters=False),
        Case(op="mamba2", states="none", T=2),
    ],
    "given and final states": [
        Case(states=x, T=t, v_first=v, state_dtype=d)
        for x, t, v, d in (("none", 3, True, FP32), ("initial", 3, False, BF16),
                           ("initial", 1, True, FP32), ("initial", 0, False, FP32))
    ],
    "a pool without indices": [Case(states="slots", T=2), Case(states="slots", v_first=True)],
    "slots far apart": [
        Case(gap=8, v_first=True), Case(gap=3), Case(gap=5, state_dtype=BF16, v_first=True, T=2)
    ],
    "padding": [
        Case(N=4, padding=(0, 2, 3)),
        Case(N=4, T=3, padding=(0, 2, 3), v_first=True, index_dtype=torch.int64),
        Case(N=4, padding=(1, 2), null_slot=0),
        Case(N=3, padding=(0, 1, 2), null_slot=2),
    ],
    "speculation": [
        Case(states="speculative", T=4, N=5, padding=(1,), seed=x, v_first=x % 2 == 0)
        for x in range(3)
    ] + [
        Case(states="speculative", T=1, N=4, padding=(1,), gap=8),
        Case(states="speculative", T=3, accepted=False, null_slot=0, padding=(2,)),
        Case(states="speculative", T=5, N=4, holes=True, null_slot=1, v_first=True),
        Case(states="speculative", T=4, N=3, holes=True, accepted=False),
        Case(states="speculative", T=3, state_dtype=BF16, index_dtype=torch.int64),
    ],
    "packed": [
        Case(lengths=(1, 0, 3), uncovered=2),
        Case(lengths=(2, 0, 3), uncovered=3, states="initial", index_dtype=torch.int64),
        Case(lengths=(3, 1, 0, 2), states="speculative", padding=(0,), uncovered=1),
        Case(lengths=(3, 1, 4, 2), states="speculative", narrow=2),
        Case(op="kda", lengths=(2, 4), states="slots", wide_rows=True),
    ],
    "gates": [
        Case(gate="softplus", T=2, parameter_dtype=BF16),
        Case(gate="sigmoid", T=2, HG=1),
        Case(gate="sigmoid", parameters=False),
        Case(op="kda", gate="softplus", beta="sigmoid", gate_dtype=BF16, dtype=BF16),
        Case(op="kda", beta="neg", dtype=FP16, factor_dtype=FP32, l2norm=False, scale=0.3, K=16),
    ],
    "decay": [Case(pattern=x, T=4) for x in ("zero", "strong", "sparse")],
    "dtypes": [Case(dtype=x, state_dtype=y, T=2) for x in (BF16, FP16) for y in (FP32, BF16)],
    "head dims": [
        Case(K=16, V=16), Case(K=40, V=24, HG=1, v_first=True), Case(K=96, V=48, dtype=BF16, T=2),
        Case(K=256, V=64, HV=1, v_first=True), Case(K=24, V=512, HV=1, op="kda"),
    ],
    "rows that lie apart": [
        Case(wide_rows=True), Case(wide_rows=True, T=3, dtype=BF16, gate_dtype=BF16),
        Case(op="kda", wide_rows=True, T=2, HV=4, H=2),
    ],
    "64 tokens": [Case(T=64, N=1, HV=1)],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["reference", "kernels"])
def test_values(how: str, name: str, request: pytest.FixtureRequest) -> None:
    """Nothing is written but what an index names: see `decoding_cases.compare`."""
    if how == "reference":
        decoding_cases.check_all(CASES[name])
    else:
        request.getfixturevalue("interpreter")("decoding_cases:check_all", CASES[name])


# Each op with indices once, padding of every kind, tokens that are guessed, states that are masked.
AHEAD: Final = [
    *(Case(op=op, N=4, padding=(0, 2), v_first=True, K=40, V=24) for op in DECODING_OPS),
    *(Case(op=op, states="speculative", T=3, holes=True, N=3) for op in ("gdn2", "mamba2")),
    Case(N=3, padding=(0, 1, 2), null_slot=2),
    Case(lengths=(3, 1, 0, 2), states="speculative", padding=(0,), uncovered=1, narrow=1),
    Case(op="kda", dtype=BF16, state_dtype=BF16, gap=3, wide_rows=True, padding=(1,)),
]


def test_loads_ahead_of_the_branch(interpreter: Check) -> None:
    knobs = {"loads": "ahead", "evict": "first"}
    assert interpreter("decoding_cases:check_with", knobs, AHEAD) == len(AHEAD)
    assert interpreter("decoding_cases:check_with", knobs, [Case(states="slots", T=2)]) == 0


# Of one token: in place, in slots of guesses, in states that are given, and where only some of the
# last tile are values; D and z of Mamba-2.
TILED: Final = [
    *(Case(op=op, N=4, padding=(0, 2), v_first=True, K=40, V=24) for op in DECODING_OPS),
    *(Case(op=op, states="speculative", N=3, holes=True, V=48) for op in ("gdn2", "kda")),
    Case(states="initial", V=64, state_dtype=BF16),
    Case(op="gla", states="slots", V=40, v_first=True),
    *(Case(op="mamba2", HV=4, H=2, rate=True, skip=x, output_gate=True, gate="softplus", V=40,
           dtype=FP16, v_first=True, gap=3) for x in ("tied", "full")),
]  # fmt: skip


@pytest.mark.parametrize("tiles", [2, 4])
def test_several_tiles_share_a_token(tiles: int, interpreter: Check) -> None:
    knobs = {"BV": 8, "tiles": tiles}
    assert interpreter("decoding_cases:check_with", knobs, TILED) == len(TILED)
    none = [Case(T=2), Case(states="none"), Case(lengths=(1, 2))]
    assert interpreter("decoding_cases:check_with", knobs, none) == 0


@pytest.mark.parametrize("how", ["reference", "kernels"])
def test_a_server(how: str, request: pytest.FixtureRequest) -> None:
    runs = (
        (Case(gap=8), True, True),
        (Case(op="kda", null_slot=0, v_first=True, index_dtype=torch.int64), True, False),
        (Case(state_dtype=BF16), False, True),
    )
    for case, speculative, packed in runs:
        kwargs = {"speculative": speculative, "packed": packed}
        if how == "reference":
            _, served = simulate(case, 24, "cpu", **kwargs)
        else:
            interpreter = request.getfixturevalue("interpreter")
            _, served = interpreter("decoding_cases:simulated", case, 24, kwargs)
        assert served >= 8


@pytest.mark.parametrize("name", [x.name for x in declared_members.MEMBERS])
def test_further_members_need_a_declaration_alone(name: str, interpreter: Check) -> None:
    declared_members.check(name)
    interpreter("declared_members:check", name)


def test_sequences_without_tokens_and_batches_without_sequences(run: Check) -> None:
    run("nothing_to_do")


@pytest.mark.parametrize("op", DECODING_OPS)
def test_out_may_lie_over_what_has_its_elements_alone(op: str, run: Check) -> None:
    over = {"gdn2": {"q", "k", "g", "b"}, "kda": {"q", "k", "g"}, "gla": {"q", "k", "gk"}}
    assert {*run("over_what_is_read", op)} == over.get(op, {"q", "k"})


def test_rows_that_lie_apart_are_read_as_they_lie(interpreter: Check) -> None:
    interpreter("decoding_torch_checks:strided_plans")


@pytest.mark.parametrize("op", DECODING_OPS)
@pytest.mark.parametrize("states", ["initial", "speculative"])
def test_opcheck(op: str, states: str, run: Check) -> None:
    run("opcheck", op, states)


@pytest.mark.parametrize(
    ("op", "states", "lengths"),
    [("gdn2", "pool", None), ("kda", "speculative", None), ("gdn2", "initial", None),
     ("gdn2", "pool", (3, 2, 0, 3, 1))],
)  # fmt: skip
def test_one_whole_graph_serves_all_sizes(op: str, states: str, lengths: Any, run: Check) -> None:
    assert run("compiled", op, states, lengths) == 1


def test_views_and_tensors_without_data(run: Check) -> None:
    run("views_that_torch_negates")
    decoding_torch_checks.without_data()


@pytest.mark.parametrize("op", DECODING_OPS)
def test_arguments_are_declared_in_their_order(op: str) -> None:
    member = recurrence_named(op)
    public, function = member.public, getattr(recurrent, member.public.recurrent)
    assert function is getattr(gdn2gen, public.recurrent)
    there = dict(public.recurrent_names)
    given = [there.get(x.name, x.name) for x in member.required]
    first = [x for x in given if x not in public.recurrent_arguments]
    names = (*first, *public.recurrent_arguments, *KEYWORDS)
    parameters = inspect.signature(function).parameters
    assert tuple(parameters) == names
    assert all(parameters[x].kind is inspect.Parameter.KEYWORD_ONLY for x in KEYWORDS)
    assert all(f"\n    {x}: " in (function.__doc__ or "") for x in names)


def test_what_is_left_out_decays_nothing_and_writes_all() -> None:
    drawn = draw(Case(op="gla", states="none", T=3, pattern="zero"), "cpu")
    q, k, v, g = (drawn.inputs[x] for x in "qkvg")
    o, _ = gdn2gen.fused_recurrent_gla(q, k, v, g)
    assert torch.equal(gdn2gen.fused_recurrent_gla(q, k, v)[0], o)
    simple = gdn2gen.fused_recurrent_simple_gla(q, k, v, g_gamma=torch.zeros(2))[0]
    torch.testing.assert_close(simple, o)
    plain = gdn2gen.fused_recurrent_delta_rule(q, k, v, torch.ones(3, 3, 2))[0]
    assert torch.equal(gdn2gen.fused_recurrent_delta_rule(q, k, v)[0], plain)
    torch.testing.assert_close(gdn2gen.fused_recurrent_gated_delta_rule(q, k, v)[0], plain)


# What is refused


def test_decays_and_orders_without_kernels_are_refused() -> None:
    x = draw(Case(states="none"), "cpu").inputs
    q, k, v, g = (x[name] for name in "qkvg")
    with pytest.raises(UnsupportedError, match=r"no kernels for gk: .* fused_recurrent_kda"):
        gdn2gen.fused_recurrent_gated_delta_rule(q, k, v, gk=g)
    with pytest.raises(UnsupportedError, match="fused_recurrent_gla has no kernels for gv"):
        gdn2gen.fused_recurrent_gla(q, k, v, gv=g)
    with pytest.raises(UnsupportedError, match="no kernels for reverse=True"):
        gdn2gen.fused_recurrent_simple_gla(q, k, v, reverse=True)
    with pytest.raises(InputError, match="reverse must be True or False, but got 1"):
        gdn2gen.fused_recurrent_gla(q, k, v, reverse=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", decoding_refusals.BAD)
def test_bad_input_is_refused(name: str) -> None:
    decoding_refusals.refused(name)


def test_bad_input_is_refused_before_kernels(interpreter: Check) -> None:
    """In the same words."""
    interpreter("decoding_refusals:refused", *decoding_refusals.BAD)
    interpreter("decoding_refusals:refused_by_plans")
    interpreter("decoding_refusals:refused_where_not_verified")


def test_unknown_keywords_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="use_gate"):
        fused_recurrent_gdn2(use_gate=True)
    with pytest.raises(TypeError, match="positional"):
        fused_recurrent_kda(*range(18))


def test_an_input_that_wants_a_gradient_is_refused() -> None:
    drawn = draw(Case(states="none"), "cpu")
    drawn.inputs["v"].requires_grad_()
    words = "fused_recurrent_gdn2 has no backward, but v .*inference_mode.*, or chunk_gdn2, which"
    with pytest.raises(UnsupportedError, match=words):
        fused_recurrent_gdn2(**drawn.inputs)
    with torch.inference_mode():
        fused_recurrent_gdn2(**drawn.inputs)


def test_what_is_refused_is_refused_after_a_good_call_too() -> None:
    """True is equal to 1, by which a call's plan might be found."""
    given = make_inputs(2, 1, 1, 16, 16)
    serving = {
        "state_pool": torch.zeros(4, 1, 16, 16),
        "ssm_state_indices": torch.tensor([1, 2]),
    }
    fused_recurrent_gdn2(**given, **serving, null_slot=1)
    for wrong in (True, 1.0):
        with pytest.raises(InputError, match="null_slot"):
            fused_recurrent_gdn2(**given, **serving, null_slot=wrong)


@pytest.mark.parametrize(
    ("name", "flag"), [("g", "use_gate_in_kernel"), ("beta", "use_beta_sigmoid_in_kernel")]
)
def test_what_is_not_given_is_not_activated(name: str, flag: str) -> None:
    given = make_inputs(1, 2, 1, 16, 16, op="gated_delta_rule")
    del given[name]
    with pytest.raises(InputError, match=f"{flag}=True activates {name}"):
        gdn2gen.fused_recurrent_gated_delta_rule(**given, **{flag: True})
