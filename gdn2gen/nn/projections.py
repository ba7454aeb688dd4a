"""Projections of the same tokens, whose gradients of the tokens add up in their matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.runtime.arguments import is_watched


class Projected:
    """The tokens x [.., hidden] of a layer, for one projection after the other.

    Autograd would make a gradient of x for each of them and add these up: of seven projections, six
    passes that read two tensors and write one, 0.29 ms of a layer's 6.4 (4 x 4096 tokens of 2048
    channels, bf16, at the 4.2 TB/s of a copy on an H200). Here a projection hands x on to the next
    one, so that its backward finds what later ones make of x's gradient, and adds to it in the
    product that it makes anyway.

    Only where that is all there is to them: `modules` are linear layers, or sequences of them, that
    nobody has put hooks on or others in place of. Everything else is called as it is.
    """

    def __init__(self, x: Tensor, modules: list[nn.Module]) -> None:
        self._x = x
        self._chained = _may_chain(x, modules)

    def by(self, module: nn.Module) -> Tensor:
        """`module(x)`; it is one of those that were named."""
        if not self._chained:
            y: Tensor = module(self._x)
            return y
        first, *others = module if isinstance(module, nn.Sequential) else (module,)
        y, self._x = _Linear.apply(self._x, first.weight, first.bias)  # type: ignore[no-untyped-call]
        for other in others:
            y = other(y)
        return y


class _Linear(torch.autograd.Function):
    """y = x W^T + bias, and x for the next one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias), x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dx: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """`dx` is what the later ones gave: a tensor that nothing else has, and which is added to
        where it lies."""
        if dy is None:
            return dx, None, None
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            if dx is None:
                dx = (rows @ weight).view(x.shape)
            else:
                dx.view(-1, x.shape[-1]).addmm_(rows, weight)
        of_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, of_weight, of_bias


def _may_chain(x: Tensor, modules: list[nn.Module]) -> bool:
    """Where there is a gradient to add up, once, and nothing watches or changes dtypes."""
    if torch.compiler.is_compiling() or not _gains(x):
        return False
    if torch.is_autocast_enabled(x.device.type) or torch.autograd.forward_ad._current_level >= 0:
        return False
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    if is_watched((x, *(weight for module in modules for weight in module.parameters()))):
        return False
    return all(_is_plain(module, x.dtype) for module in modules)


def _gains(x: Tensor) -> bool:
    return x.is_cuda and x.requires_grad and torch.is_grad_enabled()


def _is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether it is a linear layer, or a sequence of them, and nothing more."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    # libraries that move weights about put a forward of their own into the instance
    if any(getattr(module, name) for name in hooks) or "forward" in vars(module):
        return False
    if type(module) is nn.Sequential:
        return len(module) > 0 and all(_is_plain(x, dtype) for x in module)
    return type(module) is nn.Linear and module.weight.dtype == dtype
