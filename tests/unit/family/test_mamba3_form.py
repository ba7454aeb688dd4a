"""Mamba-3's recurrence: its paper's two terms, what it is of other members, its one-pass form."""

from __future__ import annotations

import math

import pytest
import torch
from mamba3_checks import CASES, STATES, arguments, draw, results

from gdn2gen.family import mamba2
from gdn2gen.family.mamba3 import recurrent, rotate
from gdn2gen.family.mamba3_form import Ends, accumulated
from gdn2gen.measure.accuracy import relative_errors


def test_it_is_the_papers_equation() -> None:
    """h_t = alpha h_{t-1} + beta k_{t-1} v_{t-1}^T + gamma k_t v_t^T, by complex numbers."""
    x = {
        name: y.double()
        for name, y in draw({"angles": 12, "sizes": (4, 16, 24), "groups": 4}).items()
    }
    head, b = 2, 1
    lam, dt = x["Trap"][b, head].sigmoid(), x["DT"][b, head]
    theta = (dt[:, None] * math.pi * x["Angles"][b, :, head].tanh()).cumsum(0)
    turn = torch.polar(torch.ones_like(theta), theta)
    q, k = (
        turn * torch.view_as_complex((x[name][b, :, head] + x[bias][head]).unflatten(-1, (-1, 2)))
        for name, bias in (("Q", "Q_bias"), ("K", "K_bias"))
    )
    h, before = torch.zeros(12, 16, dtype=torch.complex128), torch.zeros(12, 16)
    outputs = []
    for t in range(40):
        alpha = x["ADT"][b, head, t].exp()
        now = k[t][:, None] * x["V"][b, t, head]
        h = alpha * h + (1 - lam[t]) * dt[t] * alpha * before + lam[t] * dt[t] * now
        before = now
        outputs.append((q[t].conj() @ h).real)
    out, _ = recurrent(**x)
    torch.testing.assert_close(out[b, :, head], torch.stack(outputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_one_pass_is_the_recurrence(name: str) -> None:
    """Every output and gradient in fp64."""
    found = relative_errors(*results(draw(CASES[name]), wide=True))
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("angles", [0, 6])
def test_with_a_lambda_of_one_it_is_mamba2(angles: int) -> None:
    """With rotated B and C; without angles, with those that are given."""
    x = {
        name: y.double()
        for name, y in draw(
            {"sizes": (4, 16, 24), "groups": 2, "angles": angles, "Z": True, "D": True}
        ).items()
    }
    A = -torch.rand(4).double()
    x |= {"ADT": A[:, None] * x["DT"], "Trap": torch.full_like(x["Trap"], math.inf)}
    out, states = recurrent(**x)
    theta = (x["DT"].mT[..., None] * math.pi * x["Angles"].tanh()).cumsum(1)
    C, B = (
        rotate(x[name].repeat_interleave(2, 2) + x[f"{name}_bias"], theta) for name in ("Q", "K")
    )
    wanted, state = mamba2.recurrent(x["V"], x["DT"].mT, A, B, C, D=x["D"], z=x["Z"])
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(states.ssm, state, rtol=1e-11, atol=1e-12)


def test_two_halves_are_the_whole() -> None:
    x = {name: y.double() for name, y in draw(CASES["layer"]).items()}
    whole, last = recurrent(**arguments(x))
    halves = [dict(x), dict(x)]
    for half, part in zip(halves, (slice(0, 17), slice(17, None)), strict=True):
        half |= {name: x[name][:, part] for name in ("Q", "K", "V", "Angles", "Z")}
        half |= {name: x[name][..., part] for name in ("ADT", "DT", "Trap")}
    first, states = recurrent(**arguments(halves[0]))
    second, end = recurrent(**arguments(halves[1] | states._asdict()))
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-12, atol=1e-12)
    for name in STATES:
        torch.testing.assert_close(getattr(end, name), getattr(last, name), rtol=1e-12, atol=1e-12)


def test_angles_add_up_without_loss() -> None:
    """At 32,768 tokens, where sums in float32 would be off by 2e-4."""
    T, rng = 32768, torch.Generator().manual_seed(0)
    DT = 0.1 * torch.rand(1, 2, T, generator=rng)
    Angles = 1.0 + torch.randn(1, T, 2, 3, generator=rng)
    found = accumulated(Angles, DT, None, Ends(1, T, None, DT.device)).float()
    steps = DT.double().mT[..., None] * math.pi * Angles.double().tanh()
    error = (found - steps.cumsum(1) + math.pi).remainder(2 * math.pi) - math.pi
    assert error.abs().max() < 3e-6
