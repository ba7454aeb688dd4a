"""The ways in which chunk_simple_gla takes its decay."""

from __future__ import annotations

import torch

from gdn2gen import chunk_simple_gla
from gdn2gen.family.inputs import make_inputs


def test_a_constant_decay_is_that_of_every_token() -> None:
    x = make_inputs(2, 20, 2, 16, 16, HV=4, op="simple_gla")
    g_gamma = torch.tensor([-0.1, -0.2, 0.0, -3.0], requires_grad=True)
    g = g_gamma.detach().expand(2, 20, 4).clone().requires_grad_()
    o, state = chunk_simple_gla(*(x[n] for n in "qkv"), g_gamma=g_gamma, output_final_state=True)
    expected, last = chunk_simple_gla(**x | {"g": g}, output_final_state=True)
    assert state is not None and last is not None
    assert torch.equal(o, expected) and torch.equal(state, last)
    o.square().sum().backward()  # type: ignore[no-untyped-call]
    expected.square().sum().backward()  # type: ignore[no-untyped-call]
    assert g.grad is not None and g_gamma.grad is not None
    torch.testing.assert_close(g_gamma.grad, g.grad.sum((0, 1)))


def test_nothing_decays_without_one() -> None:
    x = make_inputs(1, 20, 2, 16, 16, op="simple_gla", pattern="zero")
    o, _ = chunk_simple_gla(*(x[n] for n in "qkv"))
    assert torch.equal(o, chunk_simple_gla(**x)[0])
