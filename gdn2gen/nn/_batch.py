"""How the sequences of a call lie: in rows, packed in one row, or in rows with padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdn2gen.base.errors import InputError


@dataclass(frozen=True)
class Batch:
    """The tokens of N sequences, without padding."""

    x: Tensor
    """[B, T, hidden], or [1, tokens, hidden] where sequences are packed."""
    sequences: int
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    single: bool = False
    """Whether no sequence has more than one token."""
    padded: tuple[int, int] | None = None
    """B and T of what had padding, and in `tokens` the rows of it that are none."""
    tokens: Tensor | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        hidden: int,
        cu_seqlens: Tensor | None,
        cu_seqlens_cpu: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Batch:
        """Check what was given and take padding out. Raises InputError."""
        if x.dim() != 3 or x.shape[2] != hidden:
            raise InputError(f"x must be [B, T, hidden] with hidden={hidden}, "
                             f"but got {tuple(x.shape)}")  # fmt: skip
        single = x.shape[1] == 1
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise InputError(
                    "cu_seqlens and attention_mask were given, but packed tokens have no padding; "
                    "give one of them"
                )
            return cls._without_padding(x, attention_mask, single)
        if cu_seqlens is None:
            if cu_seqlens_cpu is not None:
                raise InputError("cu_seqlens_cpu was given without cu_seqlens")
            return cls(x, x.shape[0], single=single)
        _check_packed(x, cu_seqlens)
        return cls(x, cu_seqlens.shape[0] - 1, cu_seqlens, cu_seqlens_cpu)

    @classmethod
    def _without_padding(cls, x: Tensor, mask: Tensor, single: bool) -> Batch:
        B, T, _ = x.shape
        if tuple(mask.shape) != (B, T):
            raise InputError(
                f"attention_mask must be [B, T] = {(B, T)}, 0 where x is padding, "
                f"but got {tuple(mask.shape)}; of a longer one give the columns of these tokens"
            )
        if mask.device != x.device:
            raise InputError(f"attention_mask is on {mask.device}, but x on {x.device}")
        given = mask != 0
        tokens = given.flatten().nonzero().flatten()
        ends = given.sum(1).cumsum(0)
        cu_seqlens = torch.cat((ends.new_zeros(1), ends))
        x = x.flatten(0, 1).index_select(0, tokens)[None]
        return cls(x, B, cu_seqlens, None, single, (B, T), tokens)

    def restored(self, y: Tensor) -> Tensor:
        """Rows for the tokens as rows of the call, zeros where it had padding."""
        if self.padded is None or self.tokens is None:
            return y
        B, T = self.padded
        rows = y.new_zeros(B * T, y.shape[-1]).index_copy(0, self.tokens, y[0])
        return rows.view(B, T, -1)


def _check_packed(x: Tensor, cu_seqlens: Tensor) -> None:
    if x.shape[0] != 1:
        raise InputError(
            f"cu_seqlens wants B=1, but x has B={x.shape[0]}: flatten the batch into one row"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise InputError(
            f"cu_seqlens must be [N+1] with N >= 1, but got shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InputError(f"cu_seqlens must be int32 or int64, but got {cu_seqlens.dtype}")
    if cu_seqlens.device != x.device:
        raise InputError(f"cu_seqlens is on {cu_seqlens.device}, but x on {x.device}")
