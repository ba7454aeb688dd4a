"""Projections of the same tokens: their gradients, and where they are not chained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gdn2gen.nn import GatedDeltaNet2, KimiDeltaAttention, projections
from gdn2gen.nn.projections import Projected


@pytest.fixture
def chained(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Chains on the CPU, too; whether there was one, each time."""
    found: list[bool] = []

    def may_chain(x: Tensor, modules: list[nn.Module]) -> bool:
        found.append(may(x, modules))
        return found[-1]

    may = projections._may_chain
    monkeypatch.setattr(projections, "_gains", lambda x: x.requires_grad)
    monkeypatch.setattr(projections, "_may_chain", may_chain)
    return found


def _gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    y = layer(x)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))]


@pytest.mark.parametrize("make", [GatedDeltaNet2, KimiDeltaAttention])
def test_a_layers_gradients_are_autograds(
    make: Callable[..., nn.Module], request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    layer = make(hidden_size=24, num_heads=2, head_dim=8).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    wanted = _gradients(layer, x)
    chained = request.getfixturevalue("chained")
    found = _gradients(layer, x)
    assert chained == [True]
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_what_gives_no_gradient_adds_none(chained: list[bool]) -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 4)), nn.Linear(5, 2)]
    x = torch.randn(4, 5, requires_grad=True)
    for used in ((0, 1, 2), (1,), (0, 2), (2,)):
        tokens = Projected(x, modules)
        made = [tokens.by(module) for module in modules]
        wanted = [module(x) for module in modules]
        into = [x, *modules[used[0]].parameters()]
        sums = [sum(y[n].square().sum() for n in used) for y in (made, wanted)]
        found, right = (torch.autograd.grad(y, into) for y in sums)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, right, strict=True))
    assert all(chained)


def test_what_is_more_than_a_linear_layer_is_called_as_it_is(chained: list[bool]) -> None:
    class Widened(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(4, 5, requires_grad=True)
    seen: list[Tensor] = []
    hooked = nn.Linear(5, 3)
    hooked.register_forward_hook(lambda _module, _given, y: seen.append(y))
    within = nn.Sequential(nn.Linear(5, 2), Widened(2, 4))
    replaced = nn.Linear(5, 3)
    replaced.forward = lambda x: 3 * x  # type: ignore[method-assign]
    for module in (Widened(5, 3), hooked, within, replaced):
        assert torch.equal(Projected(x, [module]).by(module), module(x))
    assert len(seen) == 2
    with pytest.raises(RuntimeError, match="dtype"):
        Projected(x, [wide := nn.Linear(5, 3).double()]).by(wide)
    handle = nn.modules.module.register_module_forward_hook(lambda _m, _x, y: seen.append(y))
    Projected(x, [plain := nn.Linear(5, 3)]).by(plain)
    handle.remove()
    assert len(seen) == 3
    assert not any(chained)
