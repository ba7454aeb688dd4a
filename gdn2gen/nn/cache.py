"""What layers keep of the tokens they have seen, so that the next ones can follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gdn2gen.base.errors import InputError
from gdn2gen.nn._users import Users


class Cache:
    """States of `batch_size` sequences, for each layer by its `layer_idx`.

    A layer keeps what it needs under names of its own; every tensor has a row for each sequence,
    and a row of zeros is a sequence that has not begun. Values alone are kept: no gradient flows
    through a cache. Without gradients a layer writes where the tensors lie, so that a CUDA graph of
    one token may be replayed.

    Args:
        batch_size: sequences: B, or with `cu_seqlens` [N+1] the N of it.

    Raises:
        InputError: fewer than one sequence.
    """

    def __init__(self, batch_size: int) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, but got {batch_size}")
        self.batch_size = batch_size
        self.layers: dict[int, dict[str, Tensor]] = {}
        self._users: dict[int, Users] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the layers that it was used by: a copy is for any."""
        return {name: x for name, x in self.__dict__.items() if name != "_users"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._users = {}

    def __repr__(self) -> str:
        return f"Cache(batch_size={self.batch_size}, layers={sorted(self.layers)})"

    def layer(self, index: int) -> dict[str, Tensor]:
        """What a layer keeps, by name; nothing before its first call."""
        return self.layers.setdefault(index, {})

    def part(self, index: int) -> LayerCache:
        """What layers take as `cache` in place of the whole: the same tensors, found already."""
        return LayerCache(self, index)

    def of_layer(
        self, index: int | None, sequences: int, layer: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """`layer` for a call with so many sequences, of `layer` if it is said.

        Raises InputError where the layer has no number, the cache is of another batch size, or
        several layers take turns under one number; a first change of layers is a warning. Of layers
        that are compiled it is not told.
        """
        if index is None:
            raise InputError(
                "a cache keeps layers apart by layer_idx, but this layer has None: give it a number"
            )
        if self.batch_size != sequences:
            raise InputError(_of_other_sequences(self.batch_size, sequences))
        if layer is not None and not torch.compiler.is_compiling():
            self._users.setdefault(index, Users()).note(index, layer)
        return _usable(self.layer(index))

    def copy(self) -> Cache:
        """A cache with the same values in tensors of its own."""
        other = Cache(self.batch_size)
        for index, kept in self.layers.items():
            other.layers[index] = {name: x.clone() for name, x in kept.items()}
        return other

    @torch.no_grad()
    def reset(self, rows: Tensor | None = None) -> None:
        """Let the sequences `rows`, int64 [R], begin anew; all of them if None. In place.

        Raises InputError for other dtypes or ranks.
        """
        if rows is not None:
            _check_rows(rows)
        else:
            self._users.clear()
        for kept in self.layers.values():
            for x in _usable(kept).values():
                if rows is None:
                    x.zero_()
                else:
                    x[rows.to(x.device)] = 0

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Let sequence i go on where sequence rows[i] is, as beam search does; rows int64 [R].

        In place where R is the batch size; otherwise the cache has R sequences from now on.
        Raises InputError for other dtypes or ranks, or no rows.
        """
        _check_rows(rows)
        if rows.shape[0] == 0:
            raise InputError("rows must name a sequence at least, but got none; use a new Cache")
        for kept in self.layers.values():
            for name, x in _usable(kept).items():
                chosen = x.index_select(0, rows.to(x.device))
                if chosen.shape == x.shape:
                    x.copy_(chosen)
                else:
                    kept[name] = chosen
        self.batch_size = rows.shape[0]


class LayerCache:
    """What a `Cache` keeps of one layer (`Cache.part`).

    A layer that is compiled by itself looks up its number in a `Cache` in its graph, so that every
    layer of a model has a graph of its own; of this one it needs no number, and layers that are
    alike share one graph. It is of the tensors that the whole has when it is made.
    """

    def __init__(self, whole: Cache, index: int) -> None:
        self.whole = whole
        self.index = index
        self.kept = whole.layer(index)

    def __repr__(self) -> str:
        return f"{self.whole!r}.part({self.index})"

    def of_layer(
        self, index: int | None, sequences: int, layer: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """As the whole's.

        Raises InputError for another layer's number, too; not where the layer is compiled, which
        would make it a part of the graph.
        """
        if torch.compiler.is_compiling():
            if self.whole.batch_size != sequences:
                raise InputError(_of_other_sequences(self.whole.batch_size, sequences))
            return self.kept
        if index != self.index:
            raise InputError(
                f"this part of a cache is of layer_idx={self.index}, but this layer has "
                f"layer_idx={index}: give it cache.part({index})"
            )
        return self.whole.of_layer(index, sequences, layer)


def _of_other_sequences(known: int, given: int) -> str:
    return f"the cache is of {known} sequences, but these tokens are of {given}"


def _usable(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was made in inference mode is for that mode alone, in which nothing may write it or keep
    it for a backward from outside: there copies take its place."""
    if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
        kept.update({name: x.clone() for name, x in kept.items() if x.is_inference()})
    return kept


def write(kept: dict[str, Tensor], name: str, value: Tensor, *, trains: bool) -> None:
    """Keep the values of a tensor, where those before them lie if they may be overwritten."""
    if may_overwrite(kept, name, trains=trains):
        kept[name].copy_(value)
    else:
        kept[name] = value.detach().clone()  # not a view of what is far larger


def may_overwrite(kept: dict[str, Tensor], name: str, *, trains: bool) -> bool:
    """Whether there is something that may change where it lies: a backward may still read it
    (`trains`), and what was made in inference mode is for that mode alone."""
    x = kept.get(name)
    if x is None or trains:
        return False
    if torch.compiler.is_compiling():  # which knows no inference mode
        return True
    return torch.is_inference_mode_enabled() or not x.is_inference()


def in_place(kept: dict[str, Tensor], name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor in fp32 or wider, zeros at first, that a call without gradients may write to."""
    if not may_overwrite(kept, name, trains=False):
        wide = torch.promote_types(like.dtype, torch.float32)
        new = torch.zeros(shape, dtype=wide, device=like.device)
        kept[name] = kept[name].clone() if name in kept else new
    return kept[name]


def _check_rows(rows: Tensor) -> None:
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise InputError(f"rows must be int64 [R], but got {rows.dtype} {tuple(rows.shape)}")
