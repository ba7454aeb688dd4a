"""mamba_chunk_scan_combined: its recurrence, its signature, what it refuses."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mamba_checks import CASES, LIMIT, draw, errors

from gdn2gen import mamba_chunk_scan_combined
from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.family.mamba2 import step_sizes

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
    }
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
