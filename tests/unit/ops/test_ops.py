"""The public op: bad input is refused by name before any launch; torch finds what it expects."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any, Final

import op_checks
import pytest
import torch
from reference_op import ReferenceOp
from torch import Tensor

import gdn2gen
from gdn2gen.base.environment import verifying
from gdn2gen.base.errors import Gdn2genError, InputError, UnsupportedError
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.registry import OPS, RECURRENCES, recurrence_named
from gdn2gen.kernels.plans import PLANS
from gdn2gen.measure.accuracy import public_op
from gdn2gen.ops import _call
from gdn2gen.runtime import autograd
from gdn2gen.runtime.lookup import NOTHING

B, T, H, HV, K, V = 2, 20, 2, 4, 32, 64


def make(op: str = "gdn2", **changes: Any) -> dict[str, Any]:
    sizes = {"B": B, "T": T, "H": H, "HV": HV, "K": K, "V": V} | changes
    return make_inputs(op=op, **sizes)


def row(x: dict[str, Any]) -> dict[str, Any]:
    """The first sequence alone."""
    return {name: y[:1] for name, y in x.items()}


def flags_of(op: str) -> list[str]:
    parameters = inspect.signature(public_op(op)).parameters
    return [name for name, x in parameters.items() if x.annotation == "bool"]


def meta(x: Tensor) -> Tensor:
    return x.to("meta")


# Bad input

Change = Callable[[dict[str, Any]], dict[str, Any]]
GATED: Final[dict[str, Any]] = {"use_gate_in_kernel": True, "A_log": torch.zeros(HV)}
CU: Final = torch.tensor([0, 5, T])

REFUSED: Final[dict[str, tuple[Change, str]]] = {
    # rank
    "rank-q": (lambda x: {"q": x["q"][0]}, r"q must be \[B, T, heads, dim\].*\(20, 2, 32\)"),
    "type-q": (lambda x: {"q": x["q"].tolist()}, "q must be a tensor, but got list"),
    # shape
    "shape-k": (lambda x: {"k": x["k"][:, 1:]}, r"k must be \(2, 20, 2, 32\).*\(2, 19, 2, 32\)"),
    "shape-v": (lambda x: {"v": x["v"][:1]}, r"v must be \(2, 20, 4, 64\).*\(1, 20, 4, 64\)"),
    "heads-v": (lambda x: {"v": x["v"][:, :, :3]}, "HV=3, H=2"),
    "heads-none": (lambda x: {"q": x["q"][:, :, :0]}, "H=0"),
    # dtype
    "dtype-k": (lambda x: {"k": x["k"].half()}, r"k must have the dtype of q.*float16.*\.to\("),
    "dtype-q": (lambda x: {"q": x["q"].int()}, "q must be bfloat16.*torch.int32"),
    "dtype-fp8": (
        lambda x: {n: x[n].to(torch.float8_e4m3fn) for n in x},
        "q must be .*torch.float8_e4m3fn",
    ),
    "dtype-state": (
        lambda x: {"initial_state": torch.zeros(B, HV, K, V, dtype=torch.bfloat16)},
        "initial_state must be float32, but got torch.bfloat16",
    ),
    "dtype-complex": (lambda x: {"q": x["q"].cfloat()}, "q must be .*torch.complex64"),
    "dtype-quantised": (
        lambda x: {"v": torch.quantize_per_tensor(x["v"], 0.1, 0, torch.qint8)},
        "v must have .*torch.qint8",
    ),
    # layout
    "layout-sparse": (lambda x: {"k": x["k"].to_sparse()}, r"k must .*sparse_coo.*\.to_dense\("),
    "layout-mkldnn": (lambda x: {"v": x["v"].to_mkldnn()}, r"v must .*mkldnn.*\.to_dense\("),
    "layout-nested": (
        lambda x: {"q": torch.nested.nested_tensor([*x["q"]])},
        "q must be a dense tensor, but is nested.*cu_seqlens",
    ),
    "layout-cu_seqlens": (
        lambda x: row(x) | {"cu_seqlens": CU.to_sparse()},
        "cu_seqlens must be a dense tensor",
    ),
    # device
    "device-k": (lambda x: {"k": meta(x["k"])}, "k must be on cpu like q, but is on meta"),
    "device-q": (lambda x: {"q": meta(x["q"])}, "must be on meta like q, but is on cpu"),
    "device-state": (
        lambda x: {"initial_state": torch.zeros(B, HV, K, V, device="meta")},
        "initial_state must be on cpu like q, but is on meta",
    ),
    # states
    "state-N": (
        lambda x: {"initial_state": torch.zeros(3, HV, K, V)},
        r"initial_state must be \(2, 4, 32, 64\) \(N sequences.*\(3, 4, 32, 64\)",
    ),
    "state-packed": (
        lambda x: row(x) | {"cu_seqlens": CU, "initial_state": torch.zeros(1, HV, K, V)},
        r"initial_state must be \(2, 4, 32, 64\)",
    ),
    # packed sequences
    "packed-B": (lambda x: {"cu_seqlens": CU}, "cu_seqlens wants B=1, but q has B=2: flatten"),
    "packed-falls": (
        lambda x: row(x) | {"cu_seqlens": torch.tensor([0, 9, 5, T])},
        r"cu_seqlens must not fall, but cu_seqlens\[1\]=9 and cu_seqlens\[2\]=5",
    ),
    "packed-start": (
        lambda x: row(x) | {"cu_seqlens": torch.tensor([1, T])},
        "start at 0 and end at T=20, but starts at 1",
    ),
    "packed-end": (
        lambda x: row(x) | {"cu_seqlens": torch.tensor([0, T + 1])},
        "end at T=20, but .* ends at 21",
    ),
    "packed-rank": (lambda x: row(x) | {"cu_seqlens": CU[None]}, r"\[N\+1\].*\(1, 3\)"),
    "packed-none": (lambda x: row(x) | {"cu_seqlens": CU[:1]}, r"N >= 1.*\(1,\)"),
    "packed-dtype": (
        lambda x: row(x) | {"cu_seqlens": CU.float()},
        "cu_seqlens must be int32 or int64, but got torch.float32",
    ),
    "packed-copy": (
        lambda x: row(x) | {"cu_seqlens": CU, "cu_seqlens_cpu": CU[:2]},
        r"cu_seqlens_cpu must be a copy.*\(3,\).*\(2,\)",
    ),
    "packed-copy-values": (
        lambda x: row(x) | {"cu_seqlens": CU.clone(), "cu_seqlens_cpu": CU + 1},
        r"must be a copy of cu_seqlens, \[0, 5, 20\], but got \[1, 6, 21\]",
    ),
    "packed-copy-alone": (lambda x: {"cu_seqlens_cpu": CU}, "without cu_seqlens"),
    "scale": (lambda x: {"scale": "1"}, "scale must be a number, but got str"),
    "scale-wide": (lambda x: {"scale": 10**400}, "a float can hold, but got an int of 1329 bits"),
    "scale-bool": (lambda x: {"scale": True}, "scale must be a number, but got bool"),
}
# Of those that decay.
OF_ANY_DECAY: Final[dict[str, tuple[Change, str]]] = {
    "heads-g": (lambda x: {"g": x["g"][:, :, :3]}, "g must have H=2 or HV=4 heads, but got 3"),
    "dtype-g": (lambda x: {"g": x["g"].int()}, "g must be bfloat16.*torch.int32"),
    "layout-jagged": (
        lambda x: {"g": torch.nested.nested_tensor([*x["g"]], layout=torch.jagged)},
        "g must be a dense tensor, but is nested.*cu_seqlens",
    ),
}
# Of those that take it through a gate, and by what that has one bias for.
OF_GATE: Final[dict[str, tuple[Change, str]]] = {
    "dtype-A_log": (
        lambda x: GATED | {"A_log": GATED["A_log"].int()},
        "A_log must be bfloat16.*torch.int32",
    ),
    "dtype-dt_bias": (
        lambda x: GATED | {"dt_bias": torch.zeros(HV, K, dtype=torch.complex64)},
        "dt_bias must be bfloat16.*torch.complex64",
    ),
    "device-A_log": (
        lambda x: GATED | {"A_log": meta(GATED["A_log"])},
        "A_log must be on cpu like q, but is on meta",
    ),
    "gate-A_log": (lambda x: {"A_log": torch.zeros(HV)}, "A_log was given, but use_gate"),
    "gate-dt_bias": (lambda x: {"dt_bias": torch.zeros(HV * K)}, "dt_bias was given, but use_g"),
    "gate-A_log-shape": (
        lambda x: GATED | {"A_log": torch.zeros(3)},
        r"A_log must be \[4\], but got \(3,\)",
    ),
}
OF_BIAS: Final[dict[str, tuple[Change, str]]] = {
    "channel": (
        lambda x: GATED | {"dt_bias": torch.zeros(K)},
        r"dt_bias must be \[128\] or \[4, 32\], but got \(32,\)",
    ),
    "head": (
        lambda x: GATED | {"dt_bias": torch.zeros(HV, K)},
        r"dt_bias must be \[4\], but got \(4, 32\)",
    ),
}
# By what the decay has one number for.
OF_DECAY: Final[dict[str, dict[str, tuple[Change, str]]]] = {
    "channel": {
        "rank-g": (lambda x: {"g": x["g"][..., 0]}, r"g must be .* \(2, 20, 4\)"),
    },
    "head": {
        "rank-g": (
            lambda x: {"g": x["g"][..., None]},
            r"g must be \[B, T, heads\] with 3 dim.* \(2, 20, 4, 1\)",
        ),
    },
}
# By whether the gate has a form with a bound.
OF_BOUND: Final[dict[bool, dict[str, tuple[Change, str]]]] = {
    True: {
        "bound": (lambda x: {"lower_bound": -5.0}, "lower_bound was given, but use_gate"),
        "bound-neither": (lambda x: {"use_gate_in_kernel": True}, "needs A_log, or lower_bound"),
        "bound-safe": (lambda x: GATED | {"safe_gate": True}, "safe_gate=True .* needs lower_bou"),
        "bound-0": (lambda x: GATED | {"lower_bound": 0.0}, "-5 <= lower_bound < 0.*got 0.0"),
        "bound-low": (lambda x: GATED | {"lower_bound": -5.1}, "lower_bound < 0.*got -5.1"),
        "bound-nan": (lambda x: GATED | {"lower_bound": float("nan")}, "must hold.*nan"),
        "bound-bool": (lambda x: GATED | {"lower_bound": True}, "lower_bound must be a number"),
        "bound-type": (lambda x: GATED | {"lower_bound": "-5"}, "lower_bound must be a number"),
    },
    False: {"no-A_log": (lambda x: {"use_gate_in_kernel": True}, "needs A_log, but got None$")},
}
# By an argument that not every op has.
OF_ARGUMENT: Final[dict[str, dict[str, tuple[Change, str]]]] = {
    "state_v_first": {
        "state-order": (
            lambda x: {"initial_state": torch.zeros(B, HV, K, V), "state_v_first": True},
            r"initial_state must be \(2, 4, 64, 32\).*state_v_first=True",
        ),
        "flag-none": (lambda x: {"state_v_first": None}, "state_v_first must be .*got None"),
    },
    "g_gamma": {
        "gamma-both": (lambda x: {"g_gamma": torch.zeros(HV)}, "g and g_gamma were given"),
        "gamma-type": (lambda x: {"g": None, "g_gamma": 0.5}, "g_gamma must be .* got float"),
        "gamma-rank": (
            lambda x: {"g": None, "g_gamma": torch.zeros(HV, 1)},
            r"g_gamma must be \[heads\] .* shape \(4, 1\)",
        ),
        "gamma-dtype": (
            lambda x: {"g": None, "g_gamma": torch.zeros(HV).int()},
            "g_gamma must be .*torch.int32",
        ),
        "gamma-heads": (
            lambda x: {"g": None, "g_gamma": torch.zeros(3)},
            "g_gamma must have H=2 or HV=4 heads, but got 3",
        ),
    },
    "allow_neg_eigval": {
        "neg": (lambda x: {"allow_neg_eigval": True}, "needs use_beta_sigmoid_in_kernel=True"),
    },
    "return_intermediate_states": {
        "intermediate": (lambda x: {"return_intermediate_states": 1}, "must be True or False"),
    },
    "chunk_size": {
        "chunk-size": (lambda x: {"chunk_size": 48}, r"must be one of \(16, 32, 64\), .* got 48"),
        "chunk-size-bool": (lambda x: {"chunk_size": True}, "chunk_size must be one of .*True"),
        "chunk-size-tuned": (lambda x: {"chunk_size": 64}, "chunk_size=64 was given, but tokens"),
    },
}
OF_ONE: Final[dict[str, dict[str, tuple[Change, str]]]] = {
    "gdn2": {
        "rank-w": (lambda x: {"w": x["w"][None]}, r"w must be .* \(1, 2, 20, 4, 64\)"),
        "type-b": (lambda x: {"b": None}, "b must be a tensor, but got NoneType"),
        "shape-w": (lambda x: {"w": x["w"][..., :1]}, r"w must be .*\(2, 20, 4, 1\)"),
        "shape-b": (lambda x: {"b": x["b"][:, :, :1]}, r"b must be .*\(2, 20, 1, 32\)"),
        "dtype-w": (lambda x: {"w": x["w"].bfloat16()}, "w must have the dtype of q.*bfloat16"),
    },
    "kda": {
        "rank-beta": (
            lambda x: {"beta": x["beta"][..., None]},
            r"beta must be \[B, T, heads\] .* \(2, 20, 4, 1\)",
        ),
        "type-beta": (lambda x: {"beta": 1.0}, "beta must be a tensor, but got float"),
        "shape-beta": (
            lambda x: {"beta": x["beta"][:, :, :2]},
            r"beta must be \(2, 20, 4\), but got \(2, 20, 2\)",
        ),
        "dtype-beta": (lambda x: {"beta": x["beta"].half()}, "beta must have the dtype of q"),
        "dtype-beta-narrow": (
            lambda x: {n: y.bfloat16() for n, y in x.items()} | {"beta": x["beta"].half()},
            r"q, torch.bfloat16, or torch.float32, but got torch.float16; .*q.dtype\) or .float\(",
        ),
        "dtype-beta-double": (
            lambda x: {"beta": x["beta"].double()},
            "beta must have the dtype of q, torch.float32, but got torch.float64",
        ),
        "device-beta": (lambda x: {"beta": meta(x["beta"])}, "beta must be on cpu like q"),
    },
}
OF_ONE["mamba2"] = {
    "rank-dt": (lambda x: {"dt": x["dt"][..., None]}, r"dt must be \[B, T, heads\]"),
    "heads-dt": (lambda x: {"dt": x["dt"][..., :2]}, r"dt must be \(2, 20, 4\), .*\(2, 20, 2\)"),
    "dtype-dt": (lambda x: {"dt": x["dt"].int()}, "dt must be bfloat16.*torch.int32"),
    "shape-rate": (lambda x: {"rate": torch.zeros(3)}, r"rate must be \[4\], but got \(3,\)"),
    "dtype-rate": (lambda x: {"rate": torch.zeros(HV).int()}, "rate must be bfloat16.*int32"),
    "shape-D": (lambda x: {"D": torch.zeros(HV)}, r"D must be \[256\] or \[4, 64\], .*\(4,\)"),
    "shape-z": (
        lambda x: {"z": x["v"][..., :1]},
        r"z must be .*\(2, 20, 4, 1\)",
    ),
    "dtype-z": (lambda x: {"z": x["v"].half()}, "z must have the dtype of q.*torch.float16"),
    "device-z": (lambda x: {"z": meta(x["v"])}, "z must be on cpu like q, but is on meta"),
    "bias-alone": (lambda x: {"dt_bias": torch.zeros(HV)}, "dt_bias was given, but use_gate"),
}
OF_ONE |= dict.fromkeys(("gated_delta_rule", "delta_rule"), OF_ONE["kda"])


def refused(op: str) -> dict[str, tuple[Change, str]]:
    """What the op refuses, by its declaration."""
    recurrence = recurrence_named(op)
    found = REFUSED | OF_ONE.get(op, {})
    if not recurrence.takes("scale"):
        found = {name: x for name, x in found.items() if not name.startswith("scale")}
    if recurrence.decay is not None and not recurrence.stepped:
        found |= OF_ANY_DECAY | OF_DECAY[recurrence.decays_by]
    if op_checks.has_gate(op):
        found |= OF_GATE | OF_BOUND[recurrence.bounded]
        found |= {"gate-dt_bias-shape": OF_BIAS[recurrence.decays_by]}
    for name in recurrence.public.arguments:
        found |= OF_ARGUMENT.get(name, {})
    return found


# Refused by the kernels only: the reference takes any head dim, and float64.
KERNELS_REFUSE: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "K": ({"K": 48}, "K=48, V=.* in fp32 were not verified on a GPU: .*GDN2GEN_UNVERIFIED=1"),
    "V": ({"V": 256}, "V=256 in fp32 were not verified.*gdn2gen verify --op .* --head-dim .*,256"),
    "odd-K": ({"K": 44}, "no kernels.*multiples of 8 from 16 to 256; use 40 or 48: pad"),
    "odd-V": ({"V": 20}, "no kernels.*from 16 to 512; use 16 or 24: pad v"),
}
# The same, whatever was verified.
KERNELS_NEVER_TAKE: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "double": ({"dtype": torch.float64}, "q must be .*float64"),
    "double-g": ({"gate_dtype": torch.float64}, "(g|dt) must be .*float64"),
}
ODD: Final[dict[str, tuple[Change, str]]] = {
    "type-cu_seqlens": (lambda x: row(x) | {"cu_seqlens": [0, T]}, "cu_seqlens"),
    "type-state": (lambda x: {"initial_state": [0.0]}, "initial_state"),
    "type-A_log": (lambda x: {"use_gate_in_kernel": True, "A_log": 1.0}, "A_log"),
    "device-cu_seqlens": (lambda x: row(x) | {"cu_seqlens": meta(CU)}, "cu_seqlens must be on"),
    "dims-none": (lambda x: {n: x[n][..., :0] for n in x}, "K=0"),
}


@pytest.fixture(params=["reference", "kernels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What CPU tensors would run on; neither is reached."""

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("bad input went through")

    chosen: str = request.param
    monkeypatch.setattr(_call, "by_kernels", lambda _: chosen == "kernels")
    monkeypatch.setattr(autograd, "run", reached)
    return chosen


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op in OPS for name in refused(op)],
)
def test_bad_input_is_refused(op: str, name: str, path: str) -> None:
    change, said = refused(op)[name]
    inputs = make(op)
    with pytest.raises((InputError, UnsupportedError), match=said):
        public_op(op)(**inputs | change(inputs))


@pytest.mark.parametrize(("op", "flag"), [(op, flag) for op in OPS for flag in flags_of(op)])
def test_a_flag_that_is_no_bool_is_refused(op: str, flag: str, path: str) -> None:
    with pytest.raises(InputError, match=f"{flag} must be True or False.*'no'"):
        public_op(op)(**make(op) | {flag: "no"})


@pytest.mark.parametrize("name", KERNELS_REFUSE)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_what_the_kernels_do_not_serve_is_refused(op: str, name: str, path: str) -> None:
    changes, said = KERNELS_REFUSE[name]
    with pytest.raises(Gdn2genError, match=said):
        public_op(op)(**make(op, **changes))


@pytest.mark.parametrize("name", KERNELS_NEVER_TAKE)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("path", ["kernels"], indirect=True)
@verifying()
def test_what_the_kernels_never_take_is_refused(op: str, name: str, path: str) -> None:
    changes, said = KERNELS_NEVER_TAKE[name]
    if "gate_dtype" in changes and recurrence_named(op).decay is None:
        pytest.skip("nothing decays")
    with pytest.raises(Gdn2genError, match=said):
        public_op(op)(**make(op, **changes))


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("op", OPS)
def test_odd_input_is_refused(op: str, name: str, path: str) -> None:
    change, said = ODD[name]
    if name == "type-A_log" and not op_checks.has_gate(op):
        pytest.skip("there is no gate")
    inputs = make(op)
    with pytest.raises(InputError, match=said):
        public_op(op)(**inputs | change(inputs))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("path", ["kernels"], indirect=True)
@verifying()
def test_a_state_in_double_is_refused_by_the_kernels(op: str, path: str) -> None:
    with pytest.raises(InputError, match="initial_state"):
        public_op(op)(**make(op), initial_state=torch.zeros(B, HV, K, V).double())


SAID: Final = {
    "gdn2": "    b: [B, T, HG, K] like q: erase gate in [0, 1], or [0, 2].\n",
    "gated_delta_rule": "    g: [B, T, HG] bfloat16, float16 or float32: decay in natural log",
    "kda": "    beta: [B, T, HV] like q, or float32: what is erased and written, in [0, 1], or",
    "delta_rule": "    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T\n",
    "gla": "    S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T\n",
    "simple_gla": "    g_gamma: [HG] bfloat16, float16 or float32: in place of g, what every",
    "mamba2": "    o_t = (S_t^T q_t + D v_t) * silu(z_t)\n",
}


@pytest.mark.parametrize("op", OPS)
def test_the_docstring_says_what_every_argument_is(op: str) -> None:
    function = public_op(op)
    assert function is getattr(gdn2gen, recurrence_named(op).public.chunk)
    text = inspect.getdoc(function) or ""
    assert text.startswith(f"{recurrence_named(op).title} over whole sequences")
    _, arguments = text.split("Args:\n")
    found = re.findall(r"^    (\w+): \S", arguments.split("\nReturns:")[0], flags=re.M)
    assert found == [*inspect.signature(function).parameters]
    assert SAID[op] in text
    assert max(map(len, text.splitlines())) <= 96


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_keyword_is_a_type_error(op: str) -> None:
    with pytest.raises(TypeError, match="use_l2norm"):
        public_op(op)(**make(op) | {"use_l2norm": True})


def test_errors_of_ours_are_value_errors() -> None:
    assert issubclass(InputError, ValueError) and issubclass(UnsupportedError, ValueError)


def test_a_checked_cu_seqlens_is_checked_again_after_a_write() -> None:
    inputs = make(B=1) | {"cu_seqlens": CU.clone()}
    gdn2gen.chunk_gdn2(**inputs)
    inputs["cu_seqlens"][1] = 21
    with pytest.raises(InputError, match=r"cu_seqlens\[1\]=21 and cu_seqlens\[2\]=20"):
        gdn2gen.chunk_gdn2(**inputs)


# CPU tensors run the reference


WITH_GATE: Final = tuple(op for op in OPS if op_checks.has_gate(op))
FLAGS: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "l2norm": {"use_qk_l2norm_in_kernel": True},
    "softplus": GATED,
    "v-first": {"state_v_first": True, "initial_state": torch.ones(B, HV, V, K)},
    "fast": {"disable_recompute": True},
    "scaled": {"scale": 2},
}


OF_THE_BOUND: Final[dict[str, dict[str, Any]]] = {
    "sigmoid": {"use_gate_in_kernel": True, "lower_bound": -4.0, "safe_gate": True},
}
WITH_BETA: Final = tuple(op for op in OPS if recurrence_named(op).activates_beta)
OF_BETA: Final[dict[str, dict[str, Any]]] = {
    "beta-sigmoid": {"use_beta_sigmoid_in_kernel": True},
    "neg-eigval": {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True},
}


def flags_known(op: str) -> dict[str, dict[str, Any]]:
    """Those whose keywords the op has."""
    member = recurrence_named(op)
    known = {*member.named, *member.public.arguments}
    return {name: x for name, x in (FLAGS | OF_THE_BOUND | OF_BETA).items() if {*x} <= known}


@pytest.mark.parametrize(("op", "name"), [(op, x) for op in OPS for x in flags_known(op)])
@pytest.mark.resolved
def test_the_cpu_path_is_the_reference(op: str, name: str) -> None:
    flags, inputs = flags_known(op)[name], make(op)
    if name == "softplus":
        inputs |= op_checks.gate_parameters(op, HV)
    o, state = public_op(op)(**inputs | flags, output_final_state=True)
    known = {x: flags[x] for x in flags if x not in ("safe_gate", "disable_recompute")}
    expected, last = ReferenceOp(op)(**inputs | known)
    assert state is not None and state.dtype == torch.float32
    assert torch.equal(o, expected)
    assert torch.equal(state, last)
    assert public_op(op)(**inputs | flags)[1] is None


@pytest.mark.parametrize("op", OPS)
def test_gradients_on_the_cpu(op: str) -> None:
    sizes = {"T": 3, "K": 2, "V": 3, "H": 1, "HV": 2, "B": 1}
    inputs = make(op, dtype=torch.float64, gate_dtype=torch.float64, **sizes)
    names = [*inputs]

    def call(*tensors: Tensor) -> Tensor:
        arguments: dict[str, Any] = dict(zip(names, tensors, strict=True))
        o, state = public_op(op)(**arguments, output_final_state=True)
        assert state is not None
        return torch.cat((o.flatten(), state.flatten()))

    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("op", OPS)
def test_gradients_by_torch_func(op: str) -> None:
    flags: dict[str, Any] = {**op_checks.activated(op)}
    if op_checks.has_gate(op):
        bounded = recurrence_named(op).bounded
        flags |= {"lower_bound": -3.0} if bounded else {"A_log": torch.zeros(HV)}
    leaves = {name: x.requires_grad_() for name, x in make(op).items()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return public_op(op)(**given, **flags)[0].square().sum()

    expected = torch.autograd.grad(loss(leaves), [*leaves.values()])
    found = torch.func.grad(loss)({name: x.detach() for name, x in leaves.items()})
    assert all(torch.equal(x, y) for x, y in zip(found.values(), expected, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_cpu(op: str, dtype: torch.dtype) -> None:
    o, state = public_op(op)(
        **make(op, dtype=dtype), **op_checks.normalised(op), output_final_state=True
    )
    assert o.dtype == dtype and o.isfinite().all()
    assert state is not None and state.dtype == torch.float32


@pytest.mark.parametrize("op", WITH_BETA)
@pytest.mark.parametrize("name", OF_BETA)
def test_a_wide_beta_on_the_cpu(op: str, name: str) -> None:
    errors = op_checks.wide_beta(op, OF_BETA[name])
    assert errors.pop("dbeta") < 1e-4
    assert max(errors.values()) < 4e-3


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", [0, 1, 15, 64])
def test_lengths_on_the_cpu(op: str, tokens: int) -> None:
    inputs = {name: x.requires_grad_() for name, x in make(op, T=tokens).items()}
    o, state = public_op(op)(**inputs, **op_checks.normalised(op), output_final_state=True)
    assert o.shape == (B, tokens, HV, V)
    assert state is not None and state.shape == (B, HV, K, V)
    if tokens:
        grads = torch.autograd.grad(o.sum() + state.sum(), [*inputs.values()])
        assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.resolved
def test_torch_compile_on_the_cpu(op: str) -> None:
    step = torch.compile(public_op(op), backend="eager", fullgraph=True)
    for tokens in (20, 33):
        inputs = {name: x.requires_grad_() for name, x in make(op, T=tokens).items()}
        expected, _ = public_op(op)(**inputs, **op_checks.normalised(op))
        o, _ = step(**inputs, **op_checks.normalised(op))
        torch.testing.assert_close(o, expected)
        grads = torch.autograd.grad(o.sum(), [*inputs.values()])
        assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("how", op_checks.LAYOUTS)
def test_strided_inputs_on_the_cpu(op: str, how: str) -> None:
    assert max(op_checks.strided_inputs(op, how).values()) < op_checks.LIMIT


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.resolved
def test_opcheck_on_the_cpu(op: str, gated: bool) -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    found = op_checks.opcheck(op, (*tests, "test_aot_dispatch_dynamic"), gated, NOTHING)
    assert {*found.values()} == {"SUCCESS"}


@pytest.mark.parametrize("op", WITH_BETA)
@pytest.mark.resolved
def test_opcheck_of_a_wide_beta_on_the_cpu(op: str) -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    found = op_checks.opcheck(op, (*tests, "test_aot_dispatch_dynamic"), True, NOTHING, True)
    assert {*found.values()} == {"SUCCESS"}


@pytest.mark.parametrize(
    ("op", "gated"), [*((op, False) for op in OPS), *((op, True) for op in WITH_GATE)]
)
@pytest.mark.resolved
def test_fakes_agree_with_the_reference(op: str, gated: bool) -> None:
    op_checks.fakes_agree(op, "lean", gated)


# The op over the kernels, in the interpreter


BY_KERNELS: Final = pytest.mark.parametrize("op", WITH_GATE)


def _pairs(*values: tuple[Any, ...]) -> list[Any]:
    """Members and what they are combined with, all pairs of two; the rest of the product is slow.

    Of members and one thing more: every member, and every value, and the other half is slow.
    """
    found = []
    for places in itertools.product(*(range(len(x)) for x in (WITH_GATE, *values))):
        given = [x[i] for x, i in zip((WITH_GATE, *values), places, strict=True)]
        marks = [pytest.mark.slow] * (sum(places) % 2)
        names = [{True: "gated", False: "plain"}.get(x, x) for x in reversed(given)]
        found.append(pytest.param(*given, id="-".join(names), marks=marks))
    return found


# Of the others, what lacks arguments may go wrong by.
_OPCHECKS: Final = ("test_schema", "test_faketensor", "test_autograd_registration")
OF_OTHERS: Final[dict[str, tuple[Any, ...]]] = {
    "strided_inputs": ("padded",),
    "no_tokens": (True,),
    "changed_cu_seqlens": (),
    "opcheck": (_OPCHECKS, True, "fast"),
    "compiled": (False,),
}


@pytest.mark.parametrize("op", [op for op in OPS if op not in WITH_GATE])
@pytest.mark.parametrize("check", OF_OTHERS)
def test_those_without_a_gate(op: str, check: str, interpreter: Callable[..., Any]) -> None:
    found = interpreter(f"op_checks:{check}", op, *OF_OTHERS[check])
    if check == "opcheck":
        assert {*found.values()} == {"SUCCESS"}
    elif check != "compiled":
        _accurate(found)


def _accurate(errors: dict[str, float]) -> None:
    over = {name: error for name, error in errors.items() if not error < op_checks.LIMIT}
    assert not over


@BY_KERNELS
@pytest.mark.parametrize("how", op_checks.LAYOUTS)
def test_strided_inputs(op: str, how: str, interpreter: Callable[..., Any]) -> None:
    _accurate(interpreter("op_checks:strided_inputs", op, how))


@BY_KERNELS
@pytest.mark.parametrize("output", ["o", "final_state"])
def test_a_loss_of_one_output(op: str, output: str, interpreter: Callable[..., Any]) -> None:
    _accurate(interpreter("op_checks:one_output", op, output))


@BY_KERNELS
@pytest.mark.parametrize("name", ["q", "v", "g", "initial_state"])
def test_a_gradient_of_one_input(op: str, name: str, interpreter: Callable[..., Any]) -> None:
    _accurate(interpreter("op_checks:some_gradients", op, name))


# Less those in blocks, and those that have no form in Triton.
_OF_ALL_CHUNKS = [x for x in RECURRENCES["gdn2"].plans if not (PLANS[x].every or PLANS[x].instead)]


@pytest.mark.parametrize(
    ("op", "plan"),
    [
        # every plan, every member; the others of their product are slow
        pytest.param(op, plan, marks=[pytest.mark.slow] * (i > 0 and i != j))
        for i, op in enumerate(WITH_GATE)
        for j, plan in enumerate(_OF_ALL_CHUNKS)
    ],
)
def test_a_call_that_wants_no_gradient_gives_the_same_bits(
    op: str, plan: str, interpreter: Callable[..., Any]
) -> None:
    assert interpreter("op_checks:without_gradient", op, plan) == []


@BY_KERNELS
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_no_tokens(op: str, packed: bool, interpreter: Callable[..., Any]) -> None:
    _accurate(interpreter("op_checks:no_tokens", op, packed))


@BY_KERNELS
def test_cu_seqlens_that_is_written_to(op: str, interpreter: Callable[..., Any]) -> None:
    _accurate(interpreter("op_checks:changed_cu_seqlens", op))


@BY_KERNELS
@pytest.mark.parametrize("check", ["low_precision_parameters", "inputs_are_untouched"])
def test_autograd(op: str, check: str, interpreter: Callable[..., Any]) -> None:
    interpreter(f"op_checks:{check}", op)


@pytest.mark.parametrize(("op", "gated", "level"), _pairs((False, True), ("lean", "fast")))
@pytest.mark.resolved
def test_opcheck(op: str, gated: bool, level: str, interpreter: Callable[..., Any]) -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    found = interpreter("op_checks:opcheck", op, tests, gated, level)
    assert found == dict.fromkeys(tests, "SUCCESS")


@pytest.mark.parametrize(("op", "level", "gated"), _pairs(("lean", "fast"), (False, True)))
def test_fakes_agree_with_kernels(
    op: str, level: str, gated: bool, interpreter: Callable[..., Any]
) -> None:
    interpreter("op_checks:fakes_agree", op, level, gated)


@pytest.mark.parametrize(("op", "gated"), _pairs((False, True)))
@pytest.mark.resolved
def test_torch_compile(op: str, gated: bool, interpreter: Callable[..., Any]) -> None:
    interpreter("op_checks:compiled", op, gated)


# of all members also test_compiled_lengths.py
@pytest.mark.parametrize(
    "op", [pytest.param(x, marks=[pytest.mark.slow] * (x != "gdn2")) for x in WITH_GATE]
)
def test_torch_compile_at_other_lengths(op: str, interpreter: Callable[..., Any]) -> None:
    interpreter("op_checks:compiled_at_other_lengths", op)


@pytest.mark.parametrize(("op", "gated"), _pairs((True, False)))
def test_opcheck_with_dynamic_sizes(op: str, gated: bool, interpreter: Callable[..., Any]) -> None:
    interpreter("op_checks:opcheck", op, ("test_aot_dispatch_dynamic",), gated, "lean")


# beta in fp32 beside a narrower q


@pytest.mark.parametrize("op", WITH_BETA)
@pytest.mark.parametrize("name", OF_BETA)
def test_a_wide_beta(op: str, name: str, interpreter: Callable[..., Any]) -> None:
    errors = interpreter("op_checks:wide_beta", op, OF_BETA[name])
    assert max(errors.values()) < 8e-3


@pytest.mark.parametrize("op", WITH_BETA)
@pytest.mark.resolved
def test_opcheck_of_a_wide_beta(op: str, interpreter: Callable[..., Any]) -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    found = interpreter("op_checks:opcheck", op, tests, True, "lean", True)
    assert found == dict.fromkeys(tests, "SUCCESS")


@pytest.mark.parametrize("op", WITH_BETA)
@pytest.mark.resolved
def test_torch_compile_of_a_wide_beta(op: str, interpreter: Callable[..., Any]) -> None:
    interpreter("op_checks:compiled", op, True, True)
