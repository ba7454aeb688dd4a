"""Which layers a cache serves under one number: two layers of one model must not share it."""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import nn

from gdn2gen.base.errors import InputError


class Users:
    """The layers that used one number of a cache, the last one last, for as long as they live.

    One layer after another is no mistake where the second is what became of the first (loaded anew,
    copied, converted), so that is a warning. Two that take turns, and are no copies of each other,
    go on from each other's states: that is an error.
    """

    def __init__(self) -> None:
        self._layers: list[weakref.ref[nn.Module]] = []
        self._copies = False

    def note(self, index: int, layer: nn.Module) -> None:
        """A call of `layer` under this number.

        Raises InputError where it takes turns with another layer.
        """
        if self._layers and self._layers[-1]() is layer:
            return
        living = [found for x in self._layers if (found := x()) is not None]
        others = [x for x in living if x is not layer]
        # not what the last call was of, or that layer is gone
        if others and living[-1] is not layer:
            self._tell_apart(index, layer, others[-1], comes_back=len(others) < len(living))
        self._layers = [weakref.ref(x) for x in (*others, layer)]

    def _tell_apart(self, index: int, layer: nn.Module, other: nn.Module, comes_back: bool) -> None:
        words = f"{_called(layer)} and {_called(other)}"
        if not comes_back:
            warnings.warn(
                f"{words} have the same layer_idx={index}, under which this cache keeps the states "
                "of one layer: if both are of one model, give each a layer_idx of its own, or one "
                "goes on from the other's states; if the first took the other's place, delete that "
                "before, or call cache.reset() for new sequences",
                stacklevel=7,
            )
        elif not self._copies:
            self._copies = not _differ(layer, other)
            if not self._copies:
                raise InputError(
                    f"{words} take turns under layer_idx={index} of one cache, and so go on from "
                    "each other's states: give each layer of a model a layer_idx of its own, and "
                    "each model a Cache of its own (or cache.reset() between them)"
                )


def _called(layer: nn.Module) -> str:
    """A layer knows no name of its own."""
    return f"{type(layer).__name__} at {id(layer):#x}"


@torch.no_grad()
def _differ(one: nn.Module, other: nn.Module) -> bool:
    """Whether they are not of one kind with the same weights. A CUDA graph that is being captured
    can hear no answer: then no."""
    if any(x.is_cuda for x in one.parameters()) and torch.cuda.is_current_stream_capturing():
        return False
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    if type(one) is not type(other) or ours.keys() != theirs.keys():
        return True
    return not all(x is theirs[name] or _same(x, theirs[name]) for name, x in ours.items())


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    like = (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
    return like and torch.equal(x, y)
