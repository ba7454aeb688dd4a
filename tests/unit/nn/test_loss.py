"""The loss of a model beside torch's own cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gdn2gen.nn import _loss

WORDS, HIDDEN = 11, 6


def _given(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 7, HIDDEN), scale * torch.randn(WORDS, HIDDEN)
    targets = torch.randint(WORDS, (2, 7))
    targets[0, 3] = targets[1, :2] = -100
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def _both(x: Tensor, weight: Tensor, targets: Tensor) -> list[list[Tensor]]:
    """Loss and gradients, ours and in fp64."""
    found = _loss.cross_entropy(x, weight, targets)
    exact = [part.detach().double().requires_grad_() for part in (x, weight)]
    logits = functional.linear(*exact).flatten(0, 1)
    wanted = functional.cross_entropy(logits, targets.flatten())
    pairs = (found, [x, weight]), (wanted, exact)
    return [[loss, *torch.autograd.grad(3 * loss, into)] for loss, into in pairs]


@pytest.mark.parametrize("at_once", [1, 3 * WORDS, 10**6])
def test_loss_and_gradients(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of rows is in fp32 at a time; some targets do not count."""
    monkeypatch.setattr(_loss, "_AT_ONCE", at_once)
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for one, other in zip(*_both(*_given(dtype)), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=near, atol=near)


def test_logits_in_bf16() -> None:
    """Logits are rounded, and their gradients; not the chance of what was nearly certain before 1
    is taken from it."""
    x, weight, targets = _given(torch.bfloat16, scale=2.0)
    (loss, *found), (exact, *right) = _both(x, weight, targets)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), exact, rtol=0.02)
    for one, other in zip(found, right, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 0.02 * other.norm()


def test_what_is_nearly_certain() -> None:
    """p = 1 - 1/1000, which bf16 has no number for."""
    gap = torch.tensor([[6.9062]])
    x = torch.cat((gap, torch.zeros(1, 1)), 1)[None].bfloat16().requires_grad_()
    weight = torch.eye(2).bfloat16()
    loss = _loss.cross_entropy(x, weight, torch.tensor([[0]]))
    (dx,) = torch.autograd.grad(loss, x)
    chance = 1 / (1 + float(gap.exp()))
    assert loss.item() == pytest.approx(chance, rel=0.01)
    torch.testing.assert_close(dx[0, 0].float(), torch.tensor([-chance, chance]), rtol=0.01, atol=0)


def test_large_logits_stay_finite() -> None:
    x, weight, targets = _given(torch.float32, scale=1e4)
    found, right = _both(x, weight, targets)
    torch.testing.assert_close(found[0].double(), right[0], rtol=1e-5, atol=0)
    assert all(y.isfinite().all() for y in found)


def test_under_autocast_gradients_are_as_wide_as_the_weights() -> None:
    x, weight, targets = _given(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss.cross_entropy(x, weight, targets)
    wanted = functional.cross_entropy(functional.linear(x, weight).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, wanted, rtol=0.02, atol=0)
    for one, other in zip(
        torch.autograd.grad(loss, [x, weight]),
        torch.autograd.grad(wanted, [x, weight]),
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = _given(torch.float32)
    with_gradients = _loss.cross_entropy(x, weight, targets)
    monkeypatch.setattr(torch, "expm1", None)
    with torch.no_grad():
        assert torch.equal(_loss.cross_entropy(x, weight, targets), with_gradients)
    frozen = _loss.cross_entropy(x.detach(), weight.detach(), targets)
    assert torch.equal(frozen, with_gradients)


@pytest.mark.parametrize("target", [-1, -101, WORDS])
def test_targets_that_are_no_token_are_refused(target: int) -> None:
    x, weight, targets = _given(torch.float32)
    targets[0, 0] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        _loss.cross_entropy(x, weight, targets)


def test_of_nothing_as_torch_has_it() -> None:
    x, weight, targets = _given(torch.float32)
    assert _loss.cross_entropy(x, weight, torch.full_like(targets, -100)).isnan()
