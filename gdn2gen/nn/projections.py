"""Projections of the same tokens, whose gradients of the tokens add up in their matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.base.environment import is_batch_invariant, slopes_together
from gdn2gen.kernels.rows import UNIT
from gdn2gen.runtime.arguments import by_kernels, is_watched
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.passes import empty
from gdn2gen.runtime.room import Room
from gdn2gen.runtime.stream_parts import sigmoid_backward

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

    Of `gates` the sigmoid is wanted, by `sigmoid`. With GDN2GEN_SLOPES_TOGETHER=1 wide ones have it
    in the same function, which then writes what it hands back beside the others' gradients: one
    product less for each that reads and writes the gradient of x once more.

    Under autocast the tokens are narrowed once, and not for each of the projections.

    Only where that is all there is to them: `modules` are linear layers, or sequences of them, that
    nobody has put hooks on or others in place of. Everything else is called as it is.
    """

    def __init__(
        self,
        x: Tensor,
        modules: Sequence[nn.Module],
        convolved: int = 0,
        gates: Sequence[nn.Module] = (),
    ) -> None:
        self._x = x
        self._made: dict[nn.Module, Tensor] = {}
        self._activated: Sequence[nn.Module] = ()
        if not _may_chain(x, modules):
            return
        firsts = [_first(module) for module in modules]
        if torch.is_grad_enabled():
            inner = tuple(map(_is_inner, modules))
            x = narrowed(x)
            weights = [narrowed(first.weight) for first in firsts]
            biases = [None if first.bias is None else narrowed(first.bias) for first in firsts]
            if gates and slopes_together():
                self._activated = [module for module in gates if _is_wide(module)]
            gated = tuple([module in self._activated for module in modules])
            made = _Together.apply(inner, convolved, gated, x, *weights, *biases)  # type: ignore[no-untyped-call]
            self._made = dict(zip(modules, made, strict=True))
            return
        narrow = [module for module in modules if _is_inner(module) and _is_narrow(_first(module))]
        if len(narrow) > 1:
            made = _beside(_rows(x), [_first(module).weight for module in narrow])
            self._made = dict(zip(narrow, made, strict=True))

    def by(self, module: nn.Module) -> Tensor:
        """`module(x)`; it is one of those that were named."""
        # of a gate there is the sigmoid, which who asks for the product has yet to take
        y = None if module in self._activated else self._made.pop(module, None)
        if y is None:
            made: Tensor = module(self._x)
            return made
        if not _is_inner(module):
            return y
        for other in module[1:]:  # type: ignore[index]
            y = other(y)
        return y.view(*self._x.shape[:-1], y.shape[-1])

    def inner(self, module: nn.Module) -> Tensor | None:
        """What the second of two linear layers takes, as rows [M, R], where it was made without
        gradients."""
        if torch.is_grad_enabled() or not isinstance(module, nn.Sequential) or len(module) != 2:
            return None
        return self._made.get(module)

    def sigmoid(self, module: nn.Module) -> Tensor:
        """The sigmoid of `module(x)`; it is one of the gates."""
        y = self._made.pop(module, None) if module in self._activated else None
        return self.by(module).sigmoid() if y is None else y


class _Together(torch.autograd.Function):
    """x W^T + bias by every weight, those that are `gated` through a sigmoid; those of `inner` and
    narrow ones as rows of a matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        inner: tuple[bool, ...],
        convolved: int,
        gated: tuple[bool, ...],
        x: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(inner)
        weights: list[Any] = [*parameters[:count]]
        biases = parameters[count:]
        ctx.gated = [i for i in range(count) if gated[i]]
        narrow = [
            i
            for i in range(convolved, count)
            if weights[i].shape[0] <= NARROW and biases[i] is None
        ]
        ctx.narrow, ctx.convolved = narrow, convolved
        convolutions = [x.shape[0] for x in weights[:convolved]]
        ctx.room = Room.of(convolutions, sum(weights[i].shape[0] for i in (*ctx.gated, *narrow)))
        ctx.set_materialize_grads(False)
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
            y = y.sigmoid_() if gated[i] else y
            # no view of another tensor, which nobody could write to
            made[i] = y if inner[i] else _unsafe_view(y, (*x.shape[:-1], y.shape[1]))
        ctx.save_for_backward(x, *weights, *[made[i] for i in ctx.gated])
        return tuple([made[i] for i in range(count)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(given)
        x, *weights = ctx.saved_tensors[: count + 1]
        results = dict(zip(ctx.gated, ctx.saved_tensors[count + 1 :], strict=True))
        wants_x, *wants = ctx.needs_input_grad[3:]
        dy = [None if part is None else _rows(part) for part in given]
        whole = ctx.room.holding(given[: ctx.convolved])
        copied = [i for i in (*ctx.gated, *ctx.narrow) if dy[i] is not None]
        narrow = [i for i in copied if i not in results]
        convolved = [] if whole is None else [*range(ctx.convolved)]
        shared = [*convolved, *copied]
        of_weights: list[Tensor | None] = [None] * count
        of_biases = [
            y.sum(0) if want and y is not None else None
            for y, want in zip(dy, wants[count:], strict=True)
        ]
        dx: Tensor | None = None
        rows = _rows(x)
        if shared:
            begin = sum(weights[i].shape[0] for i in convolved)
            together = _laid_out(whole, begin, [(dy[i], results.get(i)) for i in copied])
            begin = 0
            for group in ([i for i in shared if i not in narrow], narrow):
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
        return (None,) * 3 + (None if dx is None else dx.view(x.shape), *of_weights, *of_biases)


def _laid_out(
    whole: Tensor | None, begin: int, parts: Sequence[tuple[Any, Tensor | None]]
) -> Tensor:
    """All of `parts` beside each other: of each its gradient, and the sigmoid that this is yet to
    go through, if there is one. `whole` has others in its first columns, and room for these."""
    if whole is None and all([y is None for _, y in parts]):
        return torch.cat([dy for dy, _ in parts], 1) if len(parts) > 1 else parts[0][0]
    if whole is None:
        columns = sum(dy.shape[1] for dy, _ in parts)
        like = parts[0][0]
        whole = empty((like.shape[0], -(-columns // UNIT) * UNIT), like.dtype, like.device)
    for dy, y in parts:
        end = begin + dy.shape[1]
        if y is None:
            whole[:, begin:end] = dy
        else:
            _hand_back(dy, _rows(y), whole[:, begin:end])
        begin = end
    return whole[:, :begin]


def _hand_back(dy: Tensor, y: Tensor, dx: Tensor) -> None:
    """dy through the sigmoid y, into columns of a matrix."""
    if by_kernels(dy.device) and dy.dtype in DTYPE_NAME and dy.numel():
        # torch's own kernel writes to rows that lie apart element by element
        sigmoid_backward(dy, y, dx)
    else:
        dx.copy_(torch.ops.aten.sigmoid_backward(dy, y))


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


def _is_wide(module: nn.Module) -> bool:
    """Whether it is worth more than to be copied, and kernels can write where its gradient lies."""
    first = _first(module)
    width = first.weight.shape[0]
    return not _is_inner(module) and first.bias is None and width > NARROW and width % UNIT == 0


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


def is_changed(module: nn.Module) -> bool:
    """Whether a call of it does more than its class says."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    # libraries that move weights about put a forward of their own into the instance
    return any(getattr(module, name) for name in hooks) or "forward" in vars(module)


def _is_plain(module: nn.Module, dtype: torch.dtype | None) -> bool:
    """Whether it is a linear layer of this dtype, or a sequence of them, and nothing more."""
    if is_changed(module):
        return False
    if type(module) is nn.Sequential:
        return len(module) > 0 and all(_is_plain(x, dtype) for x in module)
    return type(module) is nn.Linear and dtype in (None, module.weight.dtype)
