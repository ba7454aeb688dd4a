"""Projections of the same tokens, whose gradients of the tokens add up in their matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.base.environment import is_batch_invariant
from gdn2gen.runtime.arguments import is_watched
from gdn2gen.runtime.room import Room

NARROW: Final = 256
"""Columns up to which products are made as one: by itself such a one has too few tiles for a GPU,
and reads and writes as many bytes of tokens as any other."""
MANY: Final = 1024
"""Tokens from which on that is worth laying their weights beside each other."""
_unsafe_view: Final[Any] = torch.ops.aten._unsafe_view.default


class Projected:
    """The tokens x [.., hidden] of a layer, for one projection after the other.

    Autograd would make a gradient of x for each of them and add these up: of seven projections, six
    passes that read two tensors and write one. Here all of them are one function, whose backward
    makes one product of what arrives beside each other in memory: the first `convolved` ones, which
    a convolution's backward writes so, and narrow ones, which are copied there. The others add to
    it in their own products. Forwards narrow ones are one product, too.

    Under autocast the tokens are narrowed once, and not for each of the projections.

    Only where that is all there is to them: `modules` are linear layers, or sequences of them, that
    nobody has put hooks on or others in place of. Everything else is called as it is.
    """

    def __init__(self, x: Tensor, modules: Sequence[nn.Module], convolved: int = 0) -> None:
        self._x = x
        self._made: dict[nn.Module, Tensor] = {}
        if not _may_chain(x, modules):
            return
        firsts = [_first(module) for module in modules]
        if torch.is_grad_enabled():
            inner = tuple(map(_is_inner, modules))
            x = narrowed(x)
            weights = [narrowed(first.weight) for first in firsts]
            biases = [None if first.bias is None else narrowed(first.bias) for first in firsts]
            made = _Together.apply(inner, convolved, x, *weights, *biases)  # type: ignore[no-untyped-call]
            self._made = dict(zip(modules, made, strict=True))
            return
        narrow = [module for module in modules if _is_inner(module) and _is_narrow(_first(module))]
        if len(narrow) > 1:
            made = _beside(_rows(x), [_first(module).weight for module in narrow])
            self._made = dict(zip(narrow, made, strict=True))

    def by(self, module: nn.Module) -> Tensor:
        """`module(x)`; it is one of those that were named."""
        y = self._made.pop(module, None)
        if y is None:
            made: Tensor = module(self._x)
            return made
        if not _is_inner(module):
            return y
        for other in module[1:]:  # type: ignore[index]
            y = other(y)
        return y.view(*self._x.shape[:-1], y.shape[-1])


class _Together(torch.autograd.Function):
    """x W^T + bias by every weight; those of `inner` and narrow ones as rows of a matrix."""

    @staticmethod
    def forward(
        ctx: Any, inner: tuple[bool, ...], convolved: int, x: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(inner)
        weights: list[Any] = [*parameters[:count]]
        biases = parameters[count:]
        narrow = [
            i
            for i in range(convolved, count)
            if weights[i].shape[0] <= NARROW and biases[i] is None
        ]
        ctx.narrow, ctx.convolved = narrow, convolved
        convolutions = [x.shape[0] for x in weights[:convolved]]
        ctx.room = Room.of(convolutions, sum(weights[i].shape[0] for i in narrow))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)
        made: dict[int, Tensor] = {}
        rows = _rows(x)
        if len(narrow) > 1 and rows.shape[0] >= MANY and not is_batch_invariant():
            beside = _beside(rows, [weights[i] for i in narrow])
            # kernels want theirs without gaps; products do not care
            made = {
                i: y if inner[i] else y.contiguous() for i, y in zip(narrow, beside, strict=True)
            }
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            y = made[i] if i in made else functional.linear(rows, weight, bias)
            # no view of another tensor, which nobody could write to
            made[i] = y if inner[i] else _unsafe_view(y, (*x.shape[:-1], y.shape[1]))
        return tuple([made[i] for i in range(count)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        count = len(weights)
        wants_x, *wants = ctx.needs_input_grad[2:]
        dy = [None if part is None else _rows(part) for part in given]
        whole = ctx.room.holding(given[: ctx.convolved])
        narrow = [i for i in ctx.narrow if dy[i] is not None]
        convolved = [] if whole is None else [*range(ctx.convolved)]
        shared = [*convolved, *narrow]
        of_weights: list[Tensor | None] = [None] * count
        of_biases = [
            y.sum(0) if want and y is not None else None
            for y, want in zip(dy, wants[count:], strict=True)
        ]
        dx: Tensor | None = None
        rows = _rows(x)
        if shared:
            together = _laid_out(whole, [dy[i] for i in shared], ctx.convolved)
            begin = 0
            for group in (convolved, narrow):
                # not one product: 6400 rows of a weight's gradient are 400 tiles for 132
                # multiprocessors, 6144 are 384
                sizes = [weights[i].shape[0] for i in group]
                columns = together[:, begin : begin + sum(sizes)]
                begin += sum(sizes)
                if any(wants[i] for i in group):
                    found = torch.split(columns.t() @ rows, sizes)
                    for i, part in zip(group, found, strict=True):
                        of_weights[i] = part if wants[i] else None
            if wants_x:
                dx = together @ torch.cat([weights[i] for i in shared])
        for i, y in enumerate(dy):
            if i in shared or y is None:
                continue
            if wants[i]:
                of_weights[i] = y.t() @ rows
            if wants_x:
                dx = y @ weights[i] if dx is None else dx.addmm_(y, weights[i])
        return (None, None, None if dx is None else dx.view(x.shape), *of_weights, *of_biases)


def _laid_out(whole: Tensor | None, dy: Sequence[Any], convolved: int) -> Tensor:
    """All of `dy` beside each other. `whole` has the convolved ones, and room for the others."""
    if whole is None:
        return torch.cat([*dy], 1) if len(dy) > 1 else dy[0]
    end = sum(y.shape[1] for y in dy[:convolved])
    for y in dy[convolved:]:
        whole[:, end : end + y.shape[1]] = y
        end += y.shape[1]
    return whole[:, :end]


def _beside(rows: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """rows W^T by each weight, in one product; views of it."""
    made = functional.linear(rows, torch.cat([*weights]))
    return [*torch.split(made, [x.shape[0] for x in weights], 1)]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _first(module: nn.Module) -> nn.Linear:
    first = module[0] if isinstance(module, nn.Sequential) else module
    assert isinstance(first, nn.Linear)
    return first


def _is_inner(module: nn.Module) -> bool:
    """Whether its first product is no result, but what its others take."""
    return isinstance(module, nn.Sequential) and len(module) > 1


def _is_narrow(first: nn.Linear) -> bool:
    return first.weight.shape[0] <= NARROW and first.bias is None


def _may_chain(x: Tensor, modules: Sequence[nn.Module]) -> bool:
    """Where there is something to gain, once, and nothing watches or changes dtypes."""
    if torch.compiler.is_compiling() or not _gains(x):
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    if is_watched((x, *(weight for module in modules for weight in module.parameters()))):
        return False
    # what autocast narrows may be of several dtypes
    dtype = None if torch.is_autocast_enabled(x.device.type) else x.dtype
    return all(_is_plain(module, dtype) for module in modules)


def narrowed(x: Tensor) -> Tensor:
    """x as autocast hands it to a product."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _gains(x: Tensor) -> bool:
    """With a gradient, or many tokens without any."""
    if torch.is_grad_enabled():
        return x.is_cuda and x.requires_grad
    return x.is_cuda and x.numel() >= MANY * x.shape[-1] and not is_batch_invariant()


def _is_plain(module: nn.Module, dtype: torch.dtype | None) -> bool:
    """Whether it is a linear layer of this dtype, or a sequence of them, and nothing more."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    # libraries that move weights about put a forward of their own into the instance
    if any(getattr(module, name) for name in hooks) or "forward" in vars(module):
        return False
    if type(module) is nn.Sequential:
        return len(module) > 0 and all(_is_plain(x, dtype) for x in module)
    return type(module) is nn.Linear and dtype in (None, module.weight.dtype)
