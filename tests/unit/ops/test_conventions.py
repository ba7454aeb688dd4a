"""Every op beside its peer's: names, order, defaults; what means nothing here is refused by name.

The peers' signatures are those of flash-linear-attention 0.6.0 and mamba_ssm of 2026-07.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import mamba3_checks
import pytest
import torch

import gdn2gen
from gdn2gen.base.errors import Gdn2genError, InputError
from gdn2gen.family.registry import RECURRENCES

REQUIRED: Final = inspect.Parameter.empty
_STATES: Final = {"scale": None, "initial_state": None, "output_final_state": False}
_SEQUENCES: Final = {"cu_seqlens": None, "cu_seqlens_cpu": None}


def _required(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), REQUIRED)


@dataclass(frozen=True)
class Peer:
    """The op of the same name there."""

    signature: dict[str, Any]
    """Names in order, and defaults."""
    swallowed: tuple[str, ...] = ()
    """What it takes beside, in **kwargs, and makes something of."""
    unserved: tuple[str, ...] = ()
    """Of both, what calls here have to be without."""


_KDA_GATES: Final = {
    "use_gate_in_kernel": False, "use_beta_sigmoid_in_kernel": False, "allow_neg_eigval": False,
}  # fmt: skip
PEERS: Final = {
    "chunk_kda": Peer(
        _required("q k v g beta") | _STATES | {"use_qk_l2norm_in_kernel": False} | _KDA_GATES
        | {"safe_gate": False, "lower_bound": None, "disable_recompute": False}
        | {"return_intermediate_states": False, "state_v_first": False} | _SEQUENCES
        | {"cp_context": None, "use_graph": False, "max_num_seqs": None},
        swallowed=("A_log", "dt_bias", "chunk_size", "transpose_state_layout"),
        unserved=("cp_context", "transpose_state_layout"),
    ),
    "chunk_gated_delta_rule": Peer(
        _required("q k v g beta") | _STATES | {"use_qk_l2norm_in_kernel": False}
        | {"use_beta_sigmoid_in_kernel": False, "allow_neg_eigval": False}
        | {"state_v_first": False} | _SEQUENCES | {"chunk_indices": None, "cp_context": None},
        swallowed=("use_gate_in_kernel", "A_log", "dt_bias", "chunk_size"),
        unserved=("chunk_indices", "cp_context"),
    ),
    "chunk_delta_rule": Peer(
        _required("q k v beta") | _STATES | {"use_qk_l2norm_in_kernel": False} | _SEQUENCES,
        swallowed=("chunk_size",),
    ),
    "chunk_gla": Peer(
        _required("q k v g") | _STATES | {"state_v_first": False} | _SEQUENCES
    ),
    "chunk_simple_gla": Peer(
        _required("q k v") | {"g": None, "g_gamma": None} | _STATES | {"state_v_first": False}
        | _SEQUENCES,
        swallowed=("chunk_size",),
    ),
    "chunk_gdn2": Peer(
        _required("q k v g b w") | _STATES | {"use_qk_l2norm_in_kernel": False}
        | {"use_gate_in_kernel": False} | _SEQUENCES | {"safe_gate": False, "lower_bound": None}
        | {"disable_recompute": False, "return_intermediate_states": False}
        | {"state_v_first": False, "cp_context": None},
        swallowed=("A_log", "dt_bias", "chunk_size"),
        unserved=("cp_context",),
    ),
    "fused_recurrent_kda": Peer(
        _required("q k v g beta") | {"A_log": None, "dt_bias": None} | _STATES
        | {"use_qk_l2norm_in_kernel": False} | _KDA_GATES
        | {"lower_bound": None, "state_v_first": False, "cu_seqlens": None},
    ),
    "fused_recurrent_gated_delta_rule": Peer(
        _required("q k v") | dict.fromkeys(("g", "gk", "gv", "beta")) | _STATES
        | {"use_qk_l2norm_in_kernel": False, "use_gate_in_kernel": False, "A_log": None}
        | {"dt_bias": None, "use_beta_sigmoid_in_kernel": False, "allow_neg_eigval": False}
        | {"state_v_first": False, "cu_seqlens": None},
    ),
    "fused_recurrent_delta_rule": Peer(
        _required("q k v") | {"beta": None} | _STATES
        | {"use_qk_l2norm_in_kernel": False, "cu_seqlens": None},
    ),
    "fused_recurrent_gla": Peer(
        _required("q k v") | {"gk": None, "gv": None} | _STATES
        | {"reverse": False, "state_v_first": False, "cu_seqlens": None},
    ),
    "fused_recurrent_simple_gla": Peer(
        _required("q k v") | {"g": None, "g_gamma": None} | _STATES
        | {"reverse": False, "state_v_first": False, "cu_seqlens": None},
    ),
    "fused_recurrent_gdn2": Peer(
        _required("q k v g b w") | {"A_log": None, "dt_bias": None} | _STATES
        | {"use_qk_l2norm_in_kernel": False, "use_gate_in_kernel": False, "lower_bound": None}
        | {"state_v_first": False, "cu_seqlens": None},
    ),
    "mamba_chunk_scan_combined": Peer(
        _required("x dt A B C chunk_size")
        | dict.fromkeys(("D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens"))
        | {"dt_softplus": False, "dt_limit": (0.0, math.inf), "return_final_states": False}
        | {"return_varlen_states": False, "state_dtype": None},
    ),
    "selective_state_update": Peer(
        _required("state x dt A B C")
        | {"D": None, "z": None, "dt_bias": None, "dt_softplus": False}
        | {"state_batch_indices": None},
    ),
    "mamba3_siso_combined": Peer(
        _required("Q K V ADT DT Trap Q_bias K_bias Angles")
        | {"D": None, "Z": None, "Input_States": None, "chunk_size": 64}
        | {"return_final_states": False, "cu_seqlens": None},
    ),
}  # fmt: skip
CHUNKED: Final = [name for name in PEERS if name.startswith("chunk_")]
SIZED: Final = [name for name in CHUNKED if "chunk_size" in PEERS[name].swallowed]


def small(name: str) -> dict[str, Any]:
    """Arguments of a call on the CPU, where torch computes."""

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size)

    if name == "mamba3_siso_combined":
        return mamba3_checks.arguments(mamba3_checks.draw(mamba3_checks.CASES["plain"]))
    if name == "mamba_chunk_scan_combined":
        return {"x": normal(1, 4, 2, 16), "dt": normal(1, 4, 2).abs(), "A": -torch.ones(2),
                "B": normal(1, 4, 1, 16), "C": normal(1, 4, 1, 16), "chunk_size": 64}  # fmt: skip
    if name == "selective_state_update":
        one = normal(1, 2, 16)
        given = {"state": normal(1, 2, 16, 16), "x": one, "dt": normal(1, 2, 1).abs()}
        given |= {"A": torch.zeros(2, 1, 1).expand(2, 16, 16), "B": one[:, :1], "C": one[:, :1]}
        return given | {"dt": given["dt"].expand(1, 2, 16)}
    shapes = {"beta": (1, 4, 2), "g": (1, 4, 2, 16)}
    shapes |= {"g": (1, 4, 2)} if "gated_delta" in name or "simple" in name else {}
    drawn = [x for x, y in PEERS[name].signature.items() if y is REQUIRED]
    drawn += ["g"] if "simple" in name or name == "fused_recurrent_gated_delta_rule" else []
    made = {x: normal(*shapes.get(x, (1, 4, 2, 16))).sigmoid() for x in drawn}
    return made | ({"g": -made["g"]} if "g" in made else {})


@pytest.mark.parametrize("name", PEERS)
def test_names_order_and_defaults_are_the_peers(name: str) -> None:
    peer, ours = PEERS[name], inspect.signature(getattr(gdn2gen, name)).parameters
    kinds = {x.kind for x in ours.values()}
    # **kwargs would swallow what a caller means
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    served = {x: y for x, y in peer.signature.items() if x not in peer.unserved}
    assert {x: ours[x].default for x in served} == served
    assert {*peer.swallowed} - {*peer.unserved} <= {*ours}
    # a caller who gives them by place, as far as all that is before them serves
    places = [x for x, y in ours.items() if y.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    by_place = [x for x in served if x in places]
    assert places[: len(by_place)] == by_place


@pytest.mark.parametrize("name", PEERS)
def test_what_does_not_serve_is_refused_by_its_name(name: str) -> None:
    function: Callable[..., Any] = getattr(gdn2gen, name)
    given = small(name)
    function(**given)
    for keyword in (*PEERS[name].unserved, "no_such_keyword"):
        with pytest.raises((TypeError, InputError), match=keyword):
            function(**given, **{keyword: None})


@pytest.mark.parametrize("name", CHUNKED)
def test_what_an_op_declares_it_takes_is_in_the_order_that_it_takes_it(name: str) -> None:
    """Which packages of `gdn2gen generate` go by."""
    (recurrence,) = [x for x in RECURRENCES.values() if x.public.chunk == name]
    ours = list(inspect.signature(getattr(gdn2gen, name)).parameters)
    declared = recurrence.public.arguments
    assert [x for x in ours if x in declared] == [x for x in declared if x in ours]


_FORMER: Final = {
    "A_log": (torch.zeros(2),),
    "A_log, dt_bias": (torch.zeros(2), torch.zeros(32)),
    "dt_bias": (None, torch.zeros(32)),
    "cu_seqlens": (None, None, torch.tensor([0, 4])),
    "all before safe_gate": (torch.zeros(2), None, torch.tensor([0, 4]), torch.tensor([0, 4])),
    "a flag": (None, None, None, None, False),
}


@pytest.mark.parametrize("given", _FORMER.values(), ids=_FORMER)
def test_gdn2s_former_order_is_refused_and_named(given: tuple[Any, ...]) -> None:
    tensors = [small("chunk_gdn2")[x] for x in "qkvgbw"]
    with pytest.raises(InputError, match=r"0\.6\.0's order .*cu_seqlens, .*A_log, dt_bias\)"):
        gdn2gen.chunk_gdn2(*tensors, None, None, False, True, True, *given)


def test_gdn2s_arguments_by_place_are_those_by_name() -> None:
    given, cu = small("chunk_gdn2"), torch.tensor([0, 3, 4])
    options = {"scale": None, "initial_state": None, "output_final_state": True}
    options |= {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True}
    options |= {"cu_seqlens": cu, "cu_seqlens_cpu": cu, "safe_gate": True, "lower_bound": -2.0}
    by_place = gdn2gen.chunk_gdn2(*given.values(), *options.values())
    by_name = gdn2gen.chunk_gdn2(**given, **options)
    for x, y in zip(by_place, by_name, strict=True):
        assert x is not None and y is not None and torch.equal(x, y)


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("size", [64, 48, "64", True])
def test_a_chunk_size_is_refused_with_a_reason(name: str, size: object) -> None:
    """By the ops of flash-linear-attention, where leaving it out is always right."""
    with pytest.raises(Gdn2genError, match="chunk_size"):
        getattr(gdn2gen, name)(**small(name), chunk_size=size)


@pytest.mark.parametrize("name", ["mamba_chunk_scan_combined", "mamba3_siso_combined"])
def test_a_chunk_size_of_mambas_is_checked_and_changes_nothing(name: str) -> None:
    """It has no default of `None` there, so that every caller gives one."""
    function, given = getattr(gdn2gen, name), small(name)
    first, other = (function(**given | {"chunk_size": size}) for size in (64, 256))
    assert torch.equal(first, other)
    for size in (48, 0, "64", True, None):
        with pytest.raises(Gdn2genError, match="chunk_size"):
            function(**given | {"chunk_size": size})


@pytest.mark.parametrize("name", PEERS)
def test_flags_are_true_or_false(name: str) -> None:
    function, given = getattr(gdn2gen, name), small(name)
    flags = [x for x, y in inspect.signature(function).parameters.items() if y.default is False]
    assert flags
    for flag in flags:
        with pytest.raises(InputError, match=flag):
            function(**given | {flag: "no"})


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("chunk_kda", {"max_num_seqs": 4}, "max_num_seqs"),
        ("chunk_kda", {"lower_bound": -5.0}, "lower_bound"),
        ("chunk_kda", {"A_log": torch.zeros(2)}, "A_log"),
        ("chunk_kda", {"allow_neg_eigval": True}, "allow_neg_eigval"),
        ("chunk_gated_delta_rule", {"dt_bias": torch.zeros(2)}, "dt_bias"),
        ("chunk_gated_delta_rule", {"allow_neg_eigval": True}, "allow_neg_eigval"),
        ("chunk_simple_gla", {"g_gamma": torch.zeros(2)}, "g_gamma"),
        ("fused_recurrent_gated_delta_rule", {"gk": torch.zeros(1, 4, 2, 16)}, "gk"),
        ("fused_recurrent_gated_delta_rule", {"gv": torch.zeros(1, 4, 2, 16)}, "gv"),
        ("fused_recurrent_gla", {"gv": torch.zeros(1, 4, 2, 16)}, "gv"),
        ("fused_recurrent_gla", {"reverse": True}, "reverse"),
        ("fused_recurrent_simple_gla", {"reverse": True}, "reverse"),
        ("mamba_chunk_scan_combined", {"return_varlen_states": True}, "return_varlen_states"),
        ("mamba_chunk_scan_combined", {"state_dtype": torch.bfloat16}, "state_dtype"),
        ("mamba_chunk_scan_combined", {"dt_limit": (-1.0, 1.0)}, "dt_limit"),
    ],
)  # fmt: skip
def test_what_means_nothing_in_this_call_is_refused(
    name: str, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(Gdn2genError, match=words):
        getattr(gdn2gen, name)(**small(name) | given)
