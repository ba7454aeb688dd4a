"""Projections of the same tokens: their gradients, and where they are not chained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gdn2gen.nn import GatedDeltaNet2, KimiDeltaAttention, projections
from gdn2gen.nn.projections import NARROW, Projected
from gdn2gen.runtime.room import Room


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


@pytest.mark.parametrize("make", [GatedDeltaNet2, KimiDeltaAttention])
def test_under_autocast_as_one_by_one(
    make: Callable[..., nn.Module], request: pytest.FixtureRequest
) -> None:
    """Weights and tokens in fp32: their gradients too, but for what bf16 rounds."""
    torch.manual_seed(0)
    layer = make(hidden_size=24, num_heads=2, head_dim=8)
    x = torch.randn(2, 9, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = _gradients(layer, x)
    chained = request.getfixturevalue("chained")
    with torch.autocast("cpu", torch.bfloat16):
        found = _gradients(layer, x)
    assert chained == [True]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 0.01 * b.norm()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(layer(x), found[0])
    assert chained == [True, True]


@pytest.mark.parametrize("together", [False, True])
def test_gradients_lie_where_the_product_wants_them(
    together: bool, interpreter: Callable[..., int]
) -> None:
    assert interpreter("projection_cases:convolved", "cpu", together) == 4


@pytest.mark.parametrize("kept", [0, 3])
def test_sigmoids_hand_back_beside_others(
    kept: int, chained: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is convolved, or what was lies elsewhere; of those that are used."""
    monkeypatch.setenv("GDN2GEN_SLOPES_TOGETHER", "1")
    torch.manual_seed(0)
    sizes = (8, 16, 8, NARROW + 8, 3, NARROW + 16)
    modules = [nn.Linear(5, n, bias=False).double() for n in sizes]
    gates = [modules[3], modules[5]]
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    for used in ((0, 1, 2, 3, 4, 5), (3, 4), (5,), (0, 5), (1, 4)):
        tokens = Projected(x, modules, kept, gates)
        made = [tokens.sigmoid(y) if y in gates else tokens.by(y) for y in modules]
        assert made[3].is_contiguous() and "_Together" in str(made[3].grad_fn)
        wanted = [y(x).sigmoid() if y in gates else y(x) for y in modules]
        into = [x, *(modules[i].weight for i in used)]
        sums = [sum(y[i].square().sum() for i in used) for y in (made, wanted)]
        found, right = (torch.autograd.grad(y, into) for y in sums)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b)
    assert all(chained)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_layer_whose_sigmoids_hand_back_together(
    dtype: torch.dtype, chained: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = GatedDeltaNet2(hidden_size=24, num_heads=33, head_dim=8, allow_neg_eigval=True)
    layer = layer.to(dtype)
    x = torch.randn(1, 9, 24, dtype=dtype, requires_grad=True)
    apart = _gradients(layer, x)
    monkeypatch.setenv("GDN2GEN_SLOPES_TOGETHER", "1")
    together = _gradients(layer, x)
    assert chained == [True, True]
    assert torch.equal(apart[0], together[0])
    for a, b in zip(together, apart, strict=True):
        assert (a - b).norm() <= (1e-12 if dtype == torch.float64 else 0.01) * b.norm()
    # who takes the sigmoid of the product has it once
    tokens = Projected(x, layer._projections(), 3, [layer.b_proj])
    torch.testing.assert_close(tokens.by(layer.b_proj), layer.b_proj(x))
    # written to by others, what is handed back would be wrong
    y = Projected(x, layer._projections(), 3, [layer.b_proj]).sigmoid(layer.b_proj)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_that_lie_elsewhere() -> None:
    room = Room.of([8, 16], 3)
    assert room.columns == 32
    like = torch.zeros(1, dtype=torch.float16)
    one, other = room.empty(2, 5, like), room.empty(2, 5, like)
    whole = room.holding(one)
    assert whole is not None and whole.shape == (10, 32)
    assert whole.data_ptr() == one[0].data_ptr()
    assert room.holding([one[0], other[1]]) is None
    assert room.holding([one[0], one[1].clone()]) is None
    assert room.holding([one[1], one[0]]) is None
    assert room.holding([None, one[1]]) is None
    assert Room.of([8, 16], 12).holding(one) is None
    assert Room.of([], 3).holding([]) is None


@pytest.mark.parametrize("many", [1, 10**6])
def test_narrow_ones_without_gradients(
    many: int, chained: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projections, "_gains", lambda x: x.numel() >= many)
    modules = [nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 5))]
    modules.append(nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False)))
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        tokens = Projected(x, modules)
        for module in modules:
            torch.testing.assert_close(tokens.by(module), module(x))
    assert chained == [many == 1]


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


def test_results_may_be_written_to(chained: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of linear layers, also where several are of one product."""
    monkeypatch.setattr(projections, "MANY", 1)
    modules = [nn.Linear(5, 3, bias=False), nn.Linear(5, 4, bias=False), nn.Linear(5, 300)]
    x = torch.randn(2, 4, 5, requires_grad=True)
    tokens = Projected(x, modules)
    made = [
        [tokens.by(module).mul_(2) for module in modules],
        [2 * module(x) for module in modules],
    ]
    found, right = (torch.autograd.grad(sum(z.square().sum() for z in y), x)[0] for y in made)
    torch.testing.assert_close(found, right)
    assert chained == [True]


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
