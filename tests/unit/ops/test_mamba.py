"""mamba_chunk_scan_combined: its recurrence, its signature, what it refuses."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mamba_checks import CASES, LIMIT, draw, errors

from gdn2gen import chunk_mamba2, mamba_chunk_scan_combined
from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.family.mamba2 import step_sizes
from gdn2gen.family.prefill import PREFILL_KEYWORDS

Check = Callable[..., Any]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    assert max(errors(name).values()) < LIMIT


@pytest.mark.parametrize("name", ["layer", "seq_idx", "packed"])
def test_values_and_gradients_by_kernels(name: str, interpreter: Check) -> None:
    found = interpreter("mamba_checks:errors", name)
    assert max(found.values()) < LIMIT, found


def test_dt_is_biased_activated_and_limited_in_this_order() -> None:
    dt = torch.tensor([[[-1.0], [2.0], [30.0]]], dtype=torch.float64)
    found = step_sizes(dt, torch.tensor([0.5]).double(), True, (0.5, 4.0)).flatten().tolist()
    assert found == [0.5, pytest.approx(math.log1p(math.exp(2.5))), 4.0]
    assert step_sizes(dt, None, False, (0.0, math.inf)).flatten().tolist() == [0.0, 2.0, 30.0]


def test_the_signature_is_that_of_mamba_ssm() -> None:
    found = inspect.signature(mamba_chunk_scan_combined).parameters
    empty = inspect.Parameter.empty
    assert {name: x.default for name, x in found.items()} == {
        **dict.fromkeys(("x", "dt", "A", "B", "C", "chunk_size"), empty),
        **dict.fromkeys(("D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens")),
        "dt_softplus": False,
        "dt_limit": (0.0, math.inf),
        "return_final_states": False,
        "return_varlen_states": False,
        "state_dtype": None,
        # ours, by name alone
        "return_intermediate_states": False,
        **dict.fromkeys(PREFILL_KEYWORDS),
    }
    by_name = [x for x, y in found.items() if y.kind is inspect.Parameter.KEYWORD_ONLY]
    assert by_name == ["return_intermediate_states", *PREFILL_KEYWORDS]
    assert [*found][:9] == ["x", "dt", "A", "B", "C", "chunk_size", "D", "z", "dt_bias"]


def test_what_is_returned_is_what_is_asked_for() -> None:
    made, options = draw(CASES["packed"])
    call: dict[str, Any] = {**made, **options, "chunk_size": 64}
    out = mamba_chunk_scan_combined(**call)
    assert isinstance(out, torch.Tensor)
    found = mamba_chunk_scan_combined(**call, return_final_states=True, return_varlen_states=True)
    assert [tuple(x.shape) for x in found] == [(1, 40, 4, 16), (1, 4, 16, 24), (3, 4, 16, 24)]
    assert torch.equal(found[0], out) and torch.equal(found[1], found[2][-1:])


def test_no_tokens() -> None:
    made, options = draw(CASES["seq_idx"], T=0)
    out, states = mamba_chunk_scan_combined(
        **made, **options, chunk_size=64, return_final_states=True
    )
    assert out.shape == (2, 0, 4, 16) and torch.equal(states, made["initial_states"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chunk_size": 48}, "chunk_size must be a power of two, but got 48"),
        ({"chunk_size": True}, "chunk_size must be a power of two, but got True"),
        ({"dt_limit": (-1.0, 1.0)}, "must hold, but got"),
        ({"dt_limit": 0.1}, "dt_limit must be two numbers"),
        ({"dt_softplus": 1}, "dt_softplus must be True or False, but got 1"),
        ({"A": torch.zeros(3)}, r"A must be \(4,\), but got \(3,\)"),
        ({"D": torch.zeros(4, 3)}, r"D must be \(4,\) or \(4, 16\), but got \(4, 3\)"),
        ({"B": torch.zeros(2, 40, 3, 24)}, "multiple of the groups of B, but got 4 and 3"),
        ({"C": torch.zeros(2, 40, 2, 24).half()}, "C must have the dtype of x, torch.float32"),
        ({"z": torch.zeros(2, 40, 4, 16, device="meta")}, "z must be on cpu like x"),
        ({"seq_idx": torch.zeros(2, 40)}, "seq_idx must be int32 or int64, but got torch.float32"),
        ({"return_varlen_states": True}, "needs cu_seqlens, but got None"),
        ({"initial_states": torch.zeros(2, 4, 24, 16)}, r"initial_states must be \(2, 4, 16, 24\)"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], said: str) -> None:
    made, _ = draw(CASES["plain"])
    with pytest.raises(InputError, match=said):
        mamba_chunk_scan_combined(**{**made, "chunk_size": 64, **change})


def test_states_are_float32() -> None:
    made, _ = draw(CASES["plain"])
    with pytest.raises(UnsupportedError, match=r"states are float32, but got .*bfloat16"):
        mamba_chunk_scan_combined(**made, chunk_size=64, state_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="chunk"):
        mamba_chunk_scan_combined(**made)  # type: ignore[call-arg]


def _served(**changes: Any) -> dict[str, Any]:
    """Packed sequences in slots 4, -1 and 1 of seven; slot 2 is of the state after 64 tokens."""
    made, options = draw({"cu_seqlens": (0, 2, 3, 75), "D": (4,)}, T=75)
    made.pop("initial_states")
    return {
        **made,
        **options,
        "chunk_size": 64,
        "state_pool": torch.randn(7, 4, 16, 24, generator=torch.Generator().manual_seed(2)),
        "ssm_state_indices": torch.tensor([4, -1, 1]),
        "has_initial_state": torch.tensor([True, True, False]),
        "checkpoint_every_n_tokens": 64,
        "checkpoint_state_indices": torch.tensor([[-1], [5], [2]]),
        **changes,
    }


def test_states_in_a_pool_are_those_of_the_family() -> None:
    """By its names; kernels are the same, and slots that nothing names stay as they were."""
    given = _served()
    before = given["state_pool"].clone()
    out, pool = mamba_chunk_scan_combined(**given, return_final_states=True)
    assert pool is given["state_pool"]
    again = _served()
    names = {"x": "v", "A": "rate", "B": "k", "C": "q"}
    passed = {names.get(x, x): y for x, y in again.items() if x not in ("chunk_size", "D")}
    o, _ = chunk_mamba2(**passed, state_v_first=True, D=again["D"][:, None].expand(4, 16))
    assert torch.equal(out, o) and torch.equal(pool, again["state_pool"])
    assert [n for n in range(7) if not torch.equal(pool[n], before[n])] == [1, 2, 4]


def test_states_on_the_way_come_last() -> None:
    given = {x: y for x, y in _served().items() if x not in ("state_pool", *PREFILL_KEYWORDS)}
    found = mamba_chunk_scan_combined(
        **given,
        return_final_states=True,
        return_varlen_states=True,
        return_intermediate_states=True,
    )
    assert [tuple(x.shape) for x in found] == [
        (1, 75, 4, 16), (1, 4, 16, 24), (3, 4, 16, 24), (1, 4, 4, 16, 24)
    ]  # fmt: skip
    piece = {x: y[:, 3:67] if x in ("x", "dt", "B", "C") else y for x, y in given.items()}
    piece.pop("cu_seqlens")
    _, after = mamba_chunk_scan_combined(**piece, return_final_states=True)
    torch.testing.assert_close(found[3][0, 3], after[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"initial_states": torch.zeros(3, 4, 16, 24)}, "initial_states and state_pool"),
        ({"return_varlen_states": True}, "return_varlen_states and state_pool"),
        ({"state_pool": torch.zeros(7, 4, 24, 16)}, r"state_pool must be \[slots, 4, 16, 24\]"),
        ({"state_pool": torch.zeros(7, 4, 16, 24, device="meta")}, "on cpu like C"),
        ({"state_pool": None}, "ssm_state_indices name slots of state_pool"),
        ({"checkpoint_every_n_tokens": 96}, "checkpoint_every_n_tokens must be a multiple of 64"),
        ({"return_intermediate_states": True}, "leave one out"),
        ({"return_intermediate_states": 1}, "return_intermediate_states must be True or False"),
        ({"cu_seqlens": None, "seq_idx": torch.zeros(1, 75).int()}, "seq_idx was given without"),
        ({"x": torch.zeros(1, 75, 4, 16, requires_grad=True)}, "x requires a gradient.*no_grad"),
    ],
)  # fmt: skip
def test_what_serving_does_not_take_is_refused(change: dict[str, Any], said: str) -> None:
    given = _served(**change)
    before = None if given["state_pool"] is None else given["state_pool"].clone()
    with pytest.raises((InputError, UnsupportedError), match=said):
        mamba_chunk_scan_combined(**given)
    if before is not None and before.device.type == "cpu":
        assert torch.equal(given["state_pool"], before)
