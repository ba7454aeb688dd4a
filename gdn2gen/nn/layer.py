"""What all layers share, whatever they project: how sequences lie, caches, what stays in fp32."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from gdn2gen.base.errors import InputError
from gdn2gen.nn._batch import Batch
from gdn2gen.nn.cache import Cache, LayerCache

STATE: Final = "state"
RATES: Final = ("A_log", "dt_bias")
"""Parameters of a decay, which are not for weight decay."""
_NARROW: Final = (torch.float16, torch.bfloat16)


class Layer(nn.Module):
    """A layer that mixes tokens, sequence by sequence: `_mix` of a subclass does.

    Parameters of the layer itself, not those of its modules, are never narrower than fp32. A
    subclass that has any draws them in `_reset_rates`, and calls `_own_parameters` after making
    them.
    """

    _undecayed: ClassVar[tuple[str, ...]] = RATES
    """Parameters of its own that are not for weight decay."""

    def __init__(self, hidden_size: int, layer_idx: int | None) -> None:
        super().__init__()
        if hidden_size < 1:
            raise InputError(f"hidden_size must be at least 1, but got {hidden_size}")
        self.hidden_size = hidden_size
        self.layer_idx = layer_idx

    @abstractmethod
    def _mix(self, batch: Batch, kept: dict[str, Tensor] | None) -> Tensor:
        """y [B, T, hidden] of tokens without padding; reads and writes what a cache keeps."""

    @property
    @abstractmethod
    def recurrence(self) -> tuple[str, int, int]:
        """That whose kernels run the layer, as commands call it, and their K and V."""

    @abstractmethod
    def decay_of(self, x: Tensor) -> Tensor:
        """By how much each token x [B, T, hidden] lets the state decay, in natural log, <= 0:
        [B, T, heads, K], or [.., 1] where it is one number a head; in fp32 at least, and without a
        gradient."""

    def _reset_rates(self) -> None:
        """Draw the layer's own parameters."""

    def _own_parameters(self) -> None:
        """Draw and mark them; mark them again after a load that put others in their place."""
        self._mark_rates()
        self._reset_rates()
        self.register_load_state_dict_post_hook(_mark_again)  # type: ignore[no-untyped-call]

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as after `to_empty` of a layer made on the device "meta"."""
        for module in self.modules():
            draw = getattr(module, "reset_parameters", None)
            if module is not self and draw is not None:
                draw()
        self._reset_rates()

    def _mark_rates(self) -> None:
        """The mark that optimizers of the field look for."""
        for name in self._undecayed:
            setattr(getattr(self, name), "_no_weight_decay", True)  # noqa: B010

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        """`.to()` and its like, which leave the layer's own parameters in fp32 at least."""

        def wide(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if y.dtype in _NARROW else y

        if recurse:
            for module in self.children():
                module._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(wide, recurse=False)  # type: ignore[no-untyped-call]
        self._mark_rates()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark_rates()

    def forward(
        self,
        x: Tensor,
        *,
        cache: Cache | LayerCache | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of each sequence.

        Without gradients one token a sequence (T = 1) goes to the op over few tokens, such as
        `fused_recurrent_kda`, as all calls do with `mode="fused_recurrent"` where a layer has
        modes; everything else goes to the op over chunks.

        Args:
            x: [B, T, hidden]: the tokens.
            cache: what earlier tokens of the same sequences left; written with what these leave.
                `cache.part(layer_idx)` in its place lets compiled layers share one graph.
            cu_seqlens: [N+1] int32 or int64: N sequences packed in one row (B = 1).
            cu_seqlens_cpu: its copy on the host, which the ops then check.
            attention_mask: [B, T] of any dtype: 0 where a token is padding, on either side or
                between. Padding is taken out before the layer and is zeros in y; how much there is
                the host waits to hear.

        Returns:
            y [B, T, hidden].

        Raises:
            InputError: wrong shapes, a cache of another batch size, or one in which another layer
                has the same `layer_idx`.
            UnsupportedError: head dims that were not verified, on a GPU.
        """
        batch = Batch.of(x, self.hidden_size, cu_seqlens, cu_seqlens_cpu, attention_mask)
        kept = None if cache is None else cache.of_layer(self.layer_idx, batch.sequences, self)
        return batch.restored(self._mix(batch, kept))


@torch.no_grad()
def draw_rates(A_log: Tensor, dt_bias: Tensor, least: float = 1.0, most: float = 16.0) -> None:
    """exp(A_log) of U(least, most); softplus(dt_bias) log-uniform in 1e-3 .. 0.1. In place."""
    A_log.uniform_(least, most).log_()
    draw_steps(dt_bias)


@torch.no_grad()
def draw_steps(dt_bias: Tensor) -> None:
    """softplus(dt_bias) log-uniform in 1e-3 .. 0.1, in place."""
    step = dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp_().clamp_(min=1e-4)
    # The y of softplus(y) = step.
    step.add_(torch.log(-torch.expm1(-step)))


def requires_gradient(tensors: dict[str, Any]) -> bool:
    """Whether a call with these arguments will have a backward."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tensors.values()
    )


def _mark_again(layer: nn.Module, _: Any) -> None:
    """A load that assigns may have brought narrow ones."""
    assert isinstance(layer, Layer)
    for name, x in layer.named_parameters(recurse=False):
        if x.dtype in _NARROW:
            setattr(layer, name, nn.Parameter(x.detach().float(), x.requires_grad))
    layer._mark_rates()
