"""The loss of a model: cross-entropy of logits that nobody else reads."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from gdn2gen.nn.projections import narrowed
from gdn2gen.runtime.arguments import is_watched

IGNORED: Final = -100
"""A target that does not count."""
_AT_ONCE: Final = 2**25
"""Logits that are in fp32 at a time, 134 MB."""


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean over targets [B, T] of -log softmax(x W^T), in fp32 (fp64 for fp64), with x
    [B, T, hidden] and W [vocabulary, hidden]."""
    if is_watched((x, weight, targets)) or torch.autograd.forward_ad._current_level >= 0:
        logits = functional.linear(x, weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return functional.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten())
    x, weight, targets = narrowed(x).flatten(0, 1), narrowed(weight), targets.flatten()
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss: Tensor = _CrossEntropy.apply(x, weight, targets, wanted)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Of its logits it keeps their gradients, in their dtype and where they lay: 14 bytes of
    traffic a logit in bf16, where autograd has 38, and 2 bytes kept for 10 at its worst."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, wanted: bool) -> Tensor:
        logits = functional.linear(x, weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        counts = targets != IGNORED
        losses = []
        rows = max(1, _AT_ONCE // weight.shape[0])
        parts = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
        for part, target in parts:
            log = functional.log_softmax(part, -1, dtype=wide)
            # others that are no token are refused, as torch refuses them
            place = target.masked_fill(target == IGNORED, 0)[:, None]
            own = log.gather(1, place)
            losses.append(own[:, 0])
            if wanted:
                torch.exp(log, out=part)
                # p - 1 before it is rounded, for p may be near 1
                part.scatter_(1, place, torch.expm1(own).to(part.dtype))
        number = counts.sum()
        if wanted:
            ctx.save_for_backward(x, weight, logits, counts, number)
        return -torch.where(counts, torch.cat(losses), 0).sum() / number

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, dlogits, counts, number = ctx.saved_tensors
        scale, counts = dloss / number, counts[:, None]
        dx = dweight = None
        # rows that do not count are left out of what is small
        if ctx.needs_input_grad[0]:
            dx = (dlogits @ weight).mul_(scale * counts)
        if ctx.needs_input_grad[1]:
            dweight = (dlogits.t() @ (x * counts)).mul_(scale)
        return dx, dweight, None, None
