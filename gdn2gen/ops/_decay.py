"""What an op may be given in several ways, as the one that its kernels read; what they lack."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2gen.base.errors import InputError, UnsupportedError


def decay_of(v: Tensor, g: Tensor | None, g_gamma: Tensor | None = None) -> Tensor | None:
    """g; or g_gamma, one number a head, for every token of v [B, T, HV, V]; or, without either, 0.

    Its gradient is then a sum over tokens. What is no tensor is left for the op to refuse.

    Raises:
        InputError: both are given, or g_gamma is no [heads] of floating point.
    """
    if g is not None and g_gamma is not None:
        raise InputError("g and g_gamma were given, but a decay is one of them: leave one out")
    if g is not None or not isinstance(v, Tensor) or v.dim() != 4:
        return g
    if g_gamma is None:
        return torch.zeros(v.shape[:3], dtype=torch.float32, device=v.device)
    if not isinstance(g_gamma, Tensor):
        raise InputError(f"g_gamma must be a tensor or None, but got {type(g_gamma).__name__}")
    if g_gamma.dim() != 1 or not g_gamma.is_floating_point():
        raise InputError(
            f"g_gamma must be [heads] and of floating point, but got shape "
            f"{tuple(g_gamma.shape)} and {g_gamma.dtype}"
        )
    return g_gamma.expand(*v.shape[:2], -1)


def channels_of(q: Tensor, v: Tensor, gk: Tensor | None) -> Tensor | None:
    """gk, or a decay of 0 in every channel of a value head. What is no tensor is left to the op."""
    tensors = isinstance(q, Tensor) and isinstance(v, Tensor)
    if gk is not None or not tensors or q.dim() != 4 or v.dim() != 4:
        return gk
    return torch.zeros(*v.shape[:3], q.shape[3], dtype=torch.float32, device=v.device)


def factor_of(v: Tensor, beta: Tensor | None) -> Tensor | None:
    """beta, or 1 for every token and value head."""
    if beta is not None or not isinstance(v, Tensor) or v.dim() != 4:
        return beta
    return v.new_ones(v.shape[:3])


def refuse_decays(op: str, instead: str, **given: object) -> None:
    """Raises UnsupportedError for decays that no kernel of the op reads."""
    for name, value in given.items():
        if value is not None:
            raise UnsupportedError(f"{op} has no kernels for {name}: leave it None{instead}")


def refuse_reverse(op: str, reverse: object) -> None:
    """Raises InputError unless it is True or False, and UnsupportedError if it is True."""
    if type(reverse) is not bool:
        raise InputError(f"reverse must be True or False, but got {reverse!r}")
    if reverse:
        raise UnsupportedError(f"{op} has no kernels for reverse=True: flip the tokens' dim around")
