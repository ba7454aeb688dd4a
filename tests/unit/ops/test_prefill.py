"""Prefill for serving: slots, padding, checkpoints, states on the way; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import prefill_cases
import pytest
import torch
from prefill_cases import BF16, Case, draw

import gdn2gen
from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.family.registry import OPS
from gdn2gen.measure.accuracy import public_op

Check = Callable[..., Any]
CHECKS: Final = prefill_cases

SERVING: Final = OPS
CASES: Final = {
    **{op: [Case(op=op, every=64)] for op in SERVING},
    "mamba2 with all": [
        Case(op="mamba2", every=64, v_first=True, beside=("rate", "dt_bias", "D", "z")),
        Case(op="mamba2", lengths=None, HV=3, every=128, beside=("D",), padding=(1,), gap=3),
    ],
    "a batch": [Case(lengths=None, every=64, padding=(1,), v_first=True)],
    "other dims": [Case(op="kda", K=40, V=24, HV=2, every=64, v_first=True)],
    "slots at odd places": [Case(gap=3, every=64, index_dtype=torch.int64)],
    "bf16 states": [Case(state_dtype=BF16, every=64, begins=None)],
    "padding at slot 0": [Case(null_slot=0, every=128, padding=(0, 3))],
    "without indices": [Case(indexed=False, begins=None, padding=())],
    "room for more sequences": [Case(lengths=(64, 9, 0, 0), every=64, padding=())],
}


@pytest.mark.parametrize("name", CASES)
def test_beside_fp64(name: str, run: Check) -> None:
    run("check_all", CASES[name])


@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(64, 0, 129)),
        Case(op="simple_gla", lengths=None, v_first=True),
        Case(op="mamba2", lengths=(64, 0, 129), v_first=True, beside=("rate", "D", "z")),
        Case(op="kda", lengths=None, T=64, K=40),
        Case(op="gated_delta_rule", lengths=(64, 0, 66)),
        Case(op="delta_rule", lengths=(3, 65)),
        Case(op="gla", lengths=(65, 1)),
    ],
    ids=["packed", "batch", "mamba2", "whole", "gated_delta_rule", "delta_rule", "gla"],
)
def test_states_on_the_way(case: Case, run: Check) -> None:
    run("intermediate", case)


@pytest.mark.parametrize("op", ["gdn2", "gated_delta_rule", "mamba2"])
def test_pieces_have_the_bits_of_one_call(op: str, interpreter: Check) -> None:
    interpreter("prefill_cases:in_pieces", op)


@pytest.mark.parametrize("op", ["gdn2", "gla", "mamba2"])
def test_opcheck(op: str) -> None:
    prefill_cases.opcheck(op, 64 if op == "gdn2" else 0)


def test_one_graph_serves_all_lengths() -> None:
    assert prefill_cases.compiled("kda") == 1


@pytest.mark.parametrize("op", ["kda", "simple_gla"])
def test_a_server_in_small(op: str, run: Check) -> None:
    run("prefill_then_steps", op)


def _changed(op: str = "gdn2", **changes: Any) -> dict[str, Any]:
    drawn = draw(Case(op=op, every=64))
    return {**drawn.inputs, **drawn.serving, **changes}


REFUSED: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "pool-shape": ({"state_pool": torch.zeros(4, 2, 32)}, r"\[slots, 2, 32, 32\]"),
    "pool-dtype": ({"state_pool": torch.zeros(4, 2, 32, 32).half()}, "float32 or bfloat16"),
    "pool-overlaps": ({"state_pool": torch.zeros(1, 2, 32, 32).expand(9, -1, -1, -1)}, "overlap"),
    "pool-type": ({"state_pool": [1]}, "state_pool must be a tensor or None, but got list"),
    "no-pool": ({"state_pool": None}, "ssm_state_indices name slots of state_pool"),
    "initial": ({"initial_state": torch.zeros(4, 2, 32, 32)}, "a state comes from one"),
    "indices-shape": ({"ssm_state_indices": torch.zeros(4, 1).int()}, r"must be \[N\] with N=4"),
    "indices-dtype": ({"ssm_state_indices": torch.zeros(4)}, "int32 or int64"),
    "flags-dtype": ({"has_initial_state": torch.zeros(4)}, "has_initial_state must be bool"),
    "null-bool": ({"null_slot": True}, "null_slot must be an int"),
    "null-wide": ({"null_slot": 2**70}, "64 bits"),
    "every-alone": ({"checkpoint_state_indices": None}, "give both"),
    "every-odd": ({"checkpoint_every_n_tokens": 48}, "multiple of 64"),
    "every-bool": ({"checkpoint_every_n_tokens": True}, "multiple of 64"),
    "table-shape": ({"checkpoint_state_indices": torch.zeros(3, 2).int()}, r"\[N, C\] with N=4"),
    "both": ({"return_intermediate_states": True}, "leave one out"),
    "indices-list": ({"ssm_state_indices": [0, 1, 2, 3]}, "must be a tensor or None, but got list"),
    "flags-list": ({"has_initial_state": [True] * 4}, "must be a tensor or None, but got list"),
    "null-float": ({"null_slot": 1.0}, "null_slot must be an int or None"),
    "every-none": ({"checkpoint_every_n_tokens": 0}, "multiple of 64"),
    "every-below": ({"checkpoint_every_n_tokens": -64}, "multiple of 64"),
    "table-row": ({"checkpoint_state_indices": torch.zeros(4).int()}, r"\[N, C\] with N=4"),
    "table-dtype": ({"checkpoint_state_indices": torch.zeros(4, 2)}, "int32 or int64"),
    "pool-few": (
        {"ssm_state_indices": None, "state_pool": torch.zeros(2, 2, 32, 32)},
        "a slot for each of",
    ),
    "pool-apart": ({"state_pool": torch.zeros(9, 2, 32, 64)[..., ::2]}, "written in place"),
    "pool-sparse": ({"state_pool": torch.zeros(9, 2, 32, 32).to_sparse()}, "to_dense"),
    "falling": ({"cu_seqlens": torch.tensor([0, 100, 50, 150, 203])}, "must not fall"),
    "device": ({"state_pool": torch.zeros(9, 2, 32, 32, device="meta")}, "must be on cpu like q"),
}


@pytest.mark.parametrize("op", SERVING)
def test_refused(op: str) -> None:
    """Of every member by the same words, and nothing was written before."""
    for changes, words in REFUSED.values():
        given = _changed(op, **changes)
        pools = [given["state_pool"]] if "state_pool" not in changes else []
        before = [x.clone() for x in pools]
        with pytest.raises(InputError, match=words):
            public_op(op)(**given)
        assert all(map(torch.equal, pools, before)), words


@pytest.mark.parametrize("every", [0, 64])
def test_a_pool_in_float64_is_the_references_alone(every: int, interpreter: Check) -> None:
    """Kernels crashed on it where states were kept on the way, and were silent where not."""
    said = interpreter("prefill_cases:with_wide_pool", every)
    assert "state_pool must be float32 or narrower, but got torch.float64" in said
    case = Case(every=every)
    drawn = draw(case)
    drawn.serving["state_pool"] = drawn.serving["state_pool"].double()
    o, _ = gdn2gen.chunk_gdn2(**drawn.inputs, **drawn.serving, **case.flags)
    assert o.isfinite().all()


def test_there_is_no_backward() -> None:
    given = _changed()
    given["v"].requires_grad_()
    with pytest.raises(UnsupportedError, match="no_grad"):
        gdn2gen.chunk_gdn2(**given)


@pytest.mark.parametrize("op", SERVING)
def test_tensors_without_data_have_shapes(op: str) -> None:
    drawn = draw(Case(op=op))
    given = {x: y.to("meta") for x, y in drawn.inputs.items()}
    o, state, states = public_op(op)(  # type: ignore[misc]
        **given, output_final_state=True, return_intermediate_states=True
    )
    assert o.shape == given["v"].shape and state.shape == (4, 2, 32, 32)
    assert states.shape == (1, 203 // 64 + 4, 2, 32, 32)
