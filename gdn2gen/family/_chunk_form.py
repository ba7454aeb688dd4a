"""The chunk form behind `family.reference.chunk`; symbols and equations stand there."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Tokens(NamedTuple):
    """Sequences of one length, ready for a form: compute dtype, one head per value head."""

    q: Tensor
    """[N, HV, T, K], times scale."""
    k: Tensor
    """[N, HV, T, K]."""
    z: Tensor
    """[N, HV, T, V], v times what is written of it."""
    decay: Tensor
    """[N, HV, T, K or 1], natural log."""
    erase: Tensor
    """[N, HV, T, K or 1]."""

    def split(self, sizes: int | list[int]) -> list[Tokens]:
        """Cut along T. `torch.split` and not slices: its backward writes every token once."""
        return [
            Tokens(*part) for part in zip(*(torch.split(x, sizes, 2) for x in self), strict=True)
        ]


def chunk_form(tokens: Tokens, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    if tokens.q.shape[2] == 0:
        return tokens.z, state
    outputs = []
    for chunk in tokens.split(chunk_size):
        size = chunk.q.shape[2]
        padding = (1 << (size - 1).bit_length()) - size
        if padding:  # Rows of zeros: no decay, nothing erased, nothing written.
            chunk = Tokens(*(F.pad(x, (0, 0, 0, padding)) for x in chunk))
        o, state = _one_chunk(chunk, state)
        outputs.append(o[:, :, :size])
    return torch.cat(outputs, 2), state


def _one_chunk(chunk: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """O [N, HV, C, V] and S_C [N, HV, K, V] of one chunk from S0; C is a power of two."""
    q, k, z, decay, erase = chunk
    gamma = decay.cumsum(-2).exp()
    # E and Qg pass through the same products: erase rows first, query rows second.
    rows = torch.stack((erase * k, q))
    from_entry_erase, from_entry_query = ((rows * gamma) @ state).unbind()
    T, Aqk = _decayed_scores(rows, k, decay).unbind()
    # unitriangular: the diagonal of I + T is implied, T itself is strictly lower.
    R = torch.linalg.solve_triangular(T, z - from_entry_erase, upper=False, unitriangular=True)
    k_tail = k * _sum_of_later(decay).exp()
    own = (q * k).sum(-1, keepdim=True) * R  # A token reads its own write undecayed.
    o = from_entry_query + own + _below_diagonal(Aqk, R)
    return o, gamma[..., -1, :, None] * state + k_tail.mT @ R


def _below_diagonal(scores: Tensor, x: Tensor) -> Tensor:
    """The product of strictly lower triangular [..., C, C], C a power of two, and [..., C, V].

    By the lower left quarters of blocks of 2, 4, ..., C rows: the upper triangle is left out, since
    a zero there times the NaN or infinity of a later row would be NaN.
    """
    total = torch.zeros_like(x)
    size = 1
    while size < x.shape[-2]:
        halves = torch.unflatten(torch.unflatten(scores, -1, (-1, 2, size)), -4, (-1, 2, size))
        quarters = halves[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        early = torch.unflatten(x, -2, (-1, 2, size))[..., 0, :, :]
        late = quarters @ early
        total = total + torch.stack((torch.zeros_like(late), late), -3).flatten(-4, -2)
        size *= 2
    return total


def _decayed_scores(rows: Tensor, columns: Tensor, decay: Tensor) -> Tensor:
    """sum_d rows_id columns_jd exp(g_{j+1} + ... + g_i)_d for i > j, and 0 elsewhere.

    Dyadic halving: blocks of C, C/2, ..., 2 tokens are cut at their middle. The lower left quarter
    of a block has its rows behind the cut and its columns before it, so its decay factors there
    into two exponentials of sums of one sign: exact for any decay, a matrix product, and no tensor
    of C x C x K pairs. Built from the smallest blocks up, which double until one is left.

    Args:
        rows: [..., C, K], C a power of two; leading dims may exceed those of the others.
        columns: [C, K] after its leading dims.
        decay: [C, K or 1] after its leading dims, natural log.

    Returns:
        [..., C, C], strictly lower triangular.
    """
    scores = rows.new_zeros(*rows.shape[:-1], 1, 1)  # [..., blocks, size, size]
    size = 1
    while scores.shape[-3] > 1:
        halves = (torch.unflatten(x, -2, (-1, 2, size)) for x in (rows, columns, decay))
        (_, late), (early, _), (early_decay, late_decay) = (x.unbind(-3) for x in halves)
        from_cut = late * late_decay.cumsum(-2).exp()
        to_cut = early * _sum_of_later(early_decay).exp()
        corner = from_cut @ to_cut.mT
        first, second = torch.unflatten(scores, -3, (-1, 2)).unbind(-3)
        upper = torch.cat((first, torch.zeros_like(first)), -1)
        scores = torch.cat((upper, torch.cat((corner, second), -1)), -2)
        size *= 2
    return scores.squeeze(-3)


def _sum_of_later(x: Tensor) -> Tensor:
    """Sum over the later rows of [..., C, K]; added up, since total - cumsum would cancel."""
    return F.pad(x[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
