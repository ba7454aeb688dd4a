"""Projections of the same tokens before a convolution by kernels, beside the same one by one."""

from __future__ import annotations

import os
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gdn2gen.nn import projections
from gdn2gen.nn.projections import NARROW, Projected
from gdn2gen.ops.parts import short_convolution
from gdn2gen.runtime.passes import poisoned
from gdn2gen.runtime.room import Room, room_of


def convolved(device: str = "cpu", together: bool = False) -> int:
    """How often the convolution's gradients lay where the product wants them, of four backwards.
    `together`: beside what a sigmoid handed back."""
    with patch.dict(os.environ, {"GDN2GEN_SLOPES_TOGETHER": str(int(together))}):
        return _convolved(device, together)


def _convolved(device: str, together: bool) -> int:
    torch.manual_seed(0)
    gate = nn.Sequential(nn.Linear(24, 5, bias=False), nn.Linear(5, 7))
    modules: list[nn.Module] = [nn.Linear(24, n, bias=False) for n in (16, 16, 8, 3)]
    modules += [gate, nn.Linear(24, NARROW + 8), nn.Linear(24, 4)]
    # wide ones through sigmoids: one that kernels can write, one of odd width, one with a bias
    gates = [nn.Linear(24, NARROW + n, bias=n == 8) for n in (24, 3, 8)]
    modules[3:3] = gates
    modules = [module.to(device) for module in modules]
    weights = [torch.randn(n, 4, device=device).requires_grad_() for n in (16, 16, 8)]
    parameters = [p for module in modules for p in module.parameters()]
    x = torch.randn(2, 9, 24, device=device).requires_grad_()
    towards: list[Tensor] = []

    def run(tokens: Projected, used: int) -> list[Tensor]:
        y, _ = short_convolution([tokens.by(module) for module in modules[:3]], weights)
        assert room_of(y) is None
        y += [tokens.sigmoid(module) for module in gates]
        y += [tokens.by(module) for module in modules[6:used]]
        towards.extend(torch.randn_like(part) for part in y[len(towards) :])
        into = [x, *weights, *parameters]
        graph = {"retain_graph": True, "allow_unused": True}
        found = torch.autograd.grad(y, into, towards[: len(y)], **graph)
        again = torch.autograd.grad(y, into, towards[: len(y)], **graph)
        for one, other in zip(found, again, strict=True):
            assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
        return [part.new_zeros(()) if g is None else g for part, g in zip(into, found, strict=True)]

    seen: list[Tensor | None] = []
    holding = Room.holding

    def watched(self: Room, gradients: list[Tensor | None]) -> Tensor | None:
        seen.append(holding(self, gradients))
        return seen[-1]

    slopes: list[torch.Size] = []
    hand_back = projections._hand_back

    def counted(dy: Tensor, y: Tensor, dx: Tensor) -> None:
        slopes.append(dx.shape)
        hand_back(dy, y, dx)

    for used in (len(modules), 7):
        wanted = run(Projected(x, []), used)
        with (
            poisoned(),
            patch.object(projections, "_gains", lambda x: x.requires_grad),
            patch.object(projections, "MANY", 1),
            patch.object(Room, "holding", watched),
            patch.object(projections, "_hand_back", counted),
        ):
            found = run(Projected(x, modules, 3, gates), used)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert slopes == [(18, NARROW + 24)] * (4 if together else 0)
    return sum(x is not None for x in seen)
