"""Heads of a layer, and whether they go together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gdn2gen.base.errors import InputError


@dataclass(frozen=True)
class Heads:
    """H heads of q and k, HV of v, of the dims K and V."""

    H: int
    HV: int
    K: int
    V: int

    @classmethod
    def of(cls, num_heads: int, num_v_heads: int | None, head_dim: int, expand_v: float) -> Heads:
        """Raises InputError for sizes below 1, heads that do not divide, or half a channel."""
        HV = num_heads if num_v_heads is None else num_v_heads
        sizes = {"num_heads": num_heads, "num_v_heads": HV, "head_dim": head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, but got {size}")
        if HV % num_heads != 0:
            raise InputError(
                f"num_v_heads must be a multiple of num_heads, "
                f"but got num_v_heads={HV}, num_heads={num_heads}"
            )
        V = round(head_dim * expand_v)
        if V < 1 or abs(V - head_dim * expand_v) > 1e-5 * V:
            raise InputError(
                f"head_dim * expand_v must be a whole number of channels, "
                f"but got {head_dim} * {expand_v} = {head_dim * expand_v}"
            )
        return cls(num_heads, HV, head_dim, V)


def inner_heads(
    hidden_size: int,
    expand: float,
    head_dim: int,
    num_heads: int | None,
    n_groups: int,
    state_size: int,
) -> int:
    """Heads of expand * hidden_size channels. Raises InputError where sizes do not go together."""
    sizes = {"head_dim": head_dim, "n_groups": n_groups, "state_size": state_size}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1, but got {size}")
    inner = round(expand * hidden_size)
    if inner < 1 or abs(inner - expand * hidden_size) > 1e-5 * inner or inner % head_dim != 0:
        raise InputError(
            f"expand * hidden_size must be a multiple of head_dim, but got {expand} * "
            f"{hidden_size} and head_dim={head_dim}"
        )
    heads = inner // head_dim
    if num_heads is not None and num_heads != heads:
        raise InputError(
            f"num_heads must be expand * hidden_size / head_dim = {heads}, but got {num_heads}"
        )
    if heads % n_groups != 0:
        raise InputError(
            f"n_groups must divide the heads, but got n_groups={n_groups} and {heads} heads"
        )
    return heads


def split(x: Tensor, heads: int, dim: int) -> Tensor:
    """[.., heads * dim] as [.., heads, dim]."""
    return x.view(*x.shape[:-1], heads, dim)
