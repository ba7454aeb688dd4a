"""Every op beside every option of serving: it takes it, or says by name that it does not; and what
no op can mean by one is refused by name before anything is written."""

from __future__ import annotations

import inspect
from typing import Any, Final

import pytest
import torch
from test_conventions import small

import gdn2gen
from gdn2gen.base.errors import Gdn2genError, InputError
from gdn2gen.family.prefill import PREFILL_KEYWORDS
from gdn2gen.family.registry import DECODING_OPS, OPS, recurrence_named

# Beside them the flag of batch-invariant mode, which is no argument.
OPTIONS: Final = ("cu_seqlens", "state_v_first", "return_intermediate_states", *PREFILL_KEYWORDS)
_POOLS: Final = {*PREFILL_KEYWORDS}
# One token or a few have no states on the way; they are written by indices [N, 1 + S].
_ON_THE_WAY: Final = {
    "return_intermediate_states",
    "checkpoint_every_n_tokens",
    "checkpoint_state_indices",
    "has_initial_state",
}
_STEPS: Final = [str(recurrence_named(op).public.recurrent) for op in DECODING_OPS]
LACKING: Final[dict[str, set[str]]] = {
    **{recurrence_named(op).public.chunk: set() for op in OPS},
    **{name: _ON_THE_WAY for name in _STEPS},
    # flash-linear-attention's has K first alone
    "chunk_delta_rule": {"state_v_first"},
    "fused_recurrent_delta_rule": {"state_v_first", *_ON_THE_WAY},
    # mamba_ssm's states are [P, N], V first
    "mamba_chunk_scan_combined": {"state_v_first"},
    # four states a sequence, by `Input_States`
    "mamba3_siso_combined": {"state_v_first", "return_intermediate_states", *_POOLS},
    "mamba3_siso_step": {*OPTIONS},
    # mamba_ssm's words: `state` is the pool, `state_batch_indices` say whose slots
    "selective_state_update": {*OPTIONS} - {"cu_seqlens", "null_slot"},
}


def _given(name: str) -> dict[str, Any]:
    """Arguments of a call on the CPU."""
    if name == "mamba3_siso_step":
        given = small("mamba3_siso_combined")
        shapes = {x: y[:, 0] for x, y in given.items() if x in ("Q", "K", "V", "Angles")}
        shapes |= {x: y[..., 0] for x, y in given.items() if x in ("ADT", "DT", "Trap")}
        b, h, p, n = (*shapes["V"].shape, shapes["Q"].shape[2])
        states = [torch.zeros(b, h, x) for x in (shapes["Angles"].shape[2], n, p)]
        angle, k, v = states
        return {**given, **shapes, "Input_States": (angle, torch.zeros(b, h, p, n), k, v)}
    if name in ("chunk_mamba2", "fused_recurrent_mamba2"):
        given = small("mamba_chunk_scan_combined")
        return {"q": given["C"], "k": given["B"], "v": given["x"], "dt": given["dt"]}
    return small(name)


def test_the_table_names_every_op() -> None:
    public = {
        name
        for name in gdn2gen.__all__
        if name.startswith(("chunk_", "fused_recurrent_", "mamba", "selective_"))
    }
    assert {*LACKING} == public


@pytest.mark.parametrize("name", LACKING)
def test_an_option_is_taken_or_refused_by_its_name(name: str) -> None:
    function, given = getattr(gdn2gen, name), _given(name)
    function(**given)
    taken = inspect.signature(function).parameters
    for option in OPTIONS:
        assert (option not in taken) == (option in LACKING[name]), option
        # a TypeError of Python's own where it is lacking
        wanted = TypeError if option in LACKING[name] else InputError
        with pytest.raises(wanted, match=option):
            function(**given | {option: "no such value"})


@pytest.mark.parametrize("name", LACKING)
def test_batch_invariant_mode_takes_every_op(name: str) -> None:
    function, given = getattr(gdn2gen, name), _given(name)
    state = {"state": given["state"].clone()} if "state" in given else {}  # written in place
    found = function(**given | state)
    with gdn2gen.batch_invariant():
        again = function(**given)
    found, again = (x if isinstance(x, tuple) else (x,) for x in (found, again))
    for x, y in zip(found, again, strict=True):
        assert x is y is None or not isinstance(x, torch.Tensor) or torch.equal(x, y)


# What goes with what, of the ops that have pools.
_WRONG: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "indices without a pool": ({"ssm_state_indices": torch.zeros(1).int()}, "ssm_state_indices"),
    "null_slot without indices": ({"null_slot": 0}, "null_slot"),
    "flags without a pool": ({"has_initial_state": torch.ones(1).bool()}, "has_initial_state"),
    "n without slots": ({"checkpoint_every_n_tokens": 64}, "checkpoint_every_n_tokens"),
    "slots without n": (
        {"checkpoint_state_indices": torch.zeros(1, 1).int()}, "checkpoint_every_n_tokens"
    ),
    "slots without a pool": (
        {"checkpoint_state_indices": torch.zeros(1, 1).int(), "checkpoint_every_n_tokens": 64},
        "checkpoint_state_indices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [x for x, y in LACKING.items() if not y & _POOLS])
def test_what_goes_with_nothing_is_refused(name: str) -> None:
    function, given = getattr(gdn2gen, name), _given(name)
    for what, (changes, words) in _WRONG.items():
        with pytest.raises(Gdn2genError, match=words):
            function(**given | changes)
            pytest.fail(what)
