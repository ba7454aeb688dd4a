"""A decay's gate by itself beside fp64, and calls with and without one apart, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import gate_cases
import pytest
import torch
from gate_cases import Gate
from part_cases import BOUNDS

from gdn2gen.ops.decay_gate import decay_gate

Check = Callable[..., Any]
BF16, FP16 = torch.bfloat16, torch.float16
OPS: Final = ("gdn2", "kda", "gated_delta_rule")
"""Those whose channels decay by a gate."""
GATES: Final = {
    "softplus": Gate(),
    "bounded": Gate(lower_bound=-5.0),
    "bf16": Gate(dtype=BF16, size=128, heads=2, rows=(45,)),
    "fp16, bounded": Gate(dtype=FP16, size=40, lower_bound=-2.5),
    "no bias": Gate(parameters=("A_log",)),
    "bounded, no rate": Gate(parameters=("dt_bias",), lower_bound=-5.0),
    "bounded, nothing": Gate(parameters=(), lower_bound=-5.0),
    "far out": Gate(hostile=True),
    "far out, bounded": Gate(hostile=True, lower_bound=-5.0),
    # several turns of a program, none of which is whole
    "one token a tile": Gate(knobs=(("BR", 1), ("ahead", 1), ("BD", 64)), rows=(301,)),
    "many tokens": Gate(rows=(3, 211), knobs=(("ahead", 4), ("BR", 2), ("BD", 512))),
    "no tokens": Gate(rows=(2, 1), heads=1, size=8),
}


REFUSED: Final = (
    "needs A_log, got None",
    "A_log must be [2], one per head of",
    "dt_bias must be [16] or [2, 8]",
    "lower_bound < 0` must hold, but got 1.0",
    "x must be [..., HG, K], but got (8,)",
)


@pytest.mark.parametrize("name", GATES)
def test_kernels(name: str, interpreter: Check) -> None:
    case = GATES[name]
    # sums over tokens of fp32 terms, some of them 100 times what is left of them
    bound = max(BOUNDS[case.dtype], 4e-6)
    assert interpreter("gate_cases:gate", case) < bound


def test_on_the_host_it_is_the_reference() -> None:
    assert gate_cases.gate(Gate(lower_bound=-5.0)) < 2e-6
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    assert decay_gate(x, torch.zeros(2)).dtype == torch.float64


def test_what_is_not_finite(interpreter: Check) -> None:
    assert gate_cases.not_finite() and interpreter("gate_cases:not_finite")


def test_no_token_has_no_gradient(interpreter: Check) -> None:
    assert interpreter("gate_cases:no_tokens")


def test_refused(run: Check) -> None:
    found = run("refusals")
    for said, wanted in zip(found, REFUSED, strict=True):
        assert wanted in said


def test_opcheck(interpreter: Check) -> None:
    interpreter("gate_cases:opcheck")


CALLS: Final = {
    "softplus": {},
    "bounded": {"lower_bound": -5.0},
    "packed": {"B": 1, "cu_seqlens": (0, 7, 7, 20)},
    "states the other way": {"V": 32, "initial_state": False},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("op", OPS)
def test_calls_agree(op: str, name: str, interpreter: Check) -> None:
    """With those whose gate is in their kernels, in every output and gradient; on the host, too."""
    if op == "gated_delta_rule" and name == "bounded":
        pytest.skip("it has no such gate")
    assert gate_cases.agree(op, **CALLS[name])
    assert interpreter("gate_cases:agree_by_kernels", op, CALLS[name])


@pytest.mark.parametrize("level", ["lean", "fast"])
@pytest.mark.parametrize("op", OPS)
def test_calls_beside_fp64(op: str, level: str, interpreter: Check) -> None:
    errors = interpreter("gate_cases:beside_fp64", op, level)
    assert {"A_log", "dt_bias", "g"} <= {x.removeprefix("d") for x in errors}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("parameters", [torch.float32, BF16])
@pytest.mark.parametrize("op", OPS)
def test_calls_like_one_before(op: str, parameters: torch.dtype, interpreter: Check) -> None:
    interpreter("gate_cases:repeated", op, "cpu", parameters)


def test_on_the_host_a_rate_in_16_bits_is_exact() -> None:
    x, A_log = torch.randn(5, 2, 8), torch.tensor([-1.37, 1.71]).bfloat16()
    assert torch.equal(decay_gate(x, A_log), decay_gate(x, A_log.float()))


@pytest.mark.parametrize("op", OPS)
def test_compiled(op: str, run: Check) -> None:
    assert run("compiled", op) == 1


CHECKS: Final = gate_cases


@pytest.mark.parametrize("op", OPS)
def test_served(op: str, run: Check) -> None:
    run("served", op)


@pytest.mark.parametrize("op", [*OPS, None])
def test_a_second_derivative_is_refused(op: str | None, interpreter: Check) -> None:
    interpreter("gate_cases:refuses_twice", op)


def test_checkpointed(run: Check) -> None:
    run("checkpointed", "gdn2")
