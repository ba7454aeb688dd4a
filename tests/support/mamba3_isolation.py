"""Mamba-3's packed sequences beside one of which nothing is a number: all others have the same
bits."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, Final

import torch
from mamba3_checks import STATES, arguments, draw
from torch import Tensor

from gdn2gen import mamba3_siso_combined
from gdn2gen.base.environment import verifying
from gdn2gen.runtime.mamba3_chunk_ops import chunks_forced

# In the middle one without tokens, whose neighbours' are near.
ENDS: Final = (0, 9, 17, 17, 40)
# With tokens last, and shared by all.
_TOKENS_LAST: Final = ("ADT", "DT", "Trap")
_SHARED: Final = ("Q_bias", "K_bias", "D", "cu_seqlens")
Drawn = dict[str, Tensor]


@verifying()
def changed_by(odd: int, value: float, chunked: bool | None = None) -> list[str]:
    """Outputs, states and gradients of the other sequences that change where inputs, states and
    gradients of results are `value` in sequence `odd`."""
    drawn = draw({"cu_seqlens": ENDS, "D": True, "Z": True, "states": True})
    rng = torch.Generator().manual_seed(1)
    # of out, and of the four states
    wanted = [drawn["V"], *(drawn[x] for x in STATES)]
    wanted = [torch.randn(x.shape, generator=rng) for x in wanted]
    with nullcontext() if chunked is None else chunks_forced(chunked):
        right = _results(drawn, wanted)
        poisoned = {x: _with(y, x, odd, value) for x, y in drawn.items()}
        names = ("out", *STATES)
        found = _results(
            poisoned, [_with(y, x, odd, value) for x, y in zip(names, wanted, strict=True)]
        )
    others = [x for x in range(len(ENDS) - 1) if x != odd]
    return [
        name
        for name, x in right.items()
        if not all(torch.equal(_of(x, name, n), _of(found[name], name, n)) for n in others)
    ]


def _results(drawn: Drawn, wanted: list[Tensor]) -> Drawn:
    leaves = {
        x: y.clone().requires_grad_() if y.is_floating_point() else y for x, y in drawn.items()
    }
    made: tuple[Any, ...] = mamba3_siso_combined(**arguments(leaves), return_final_states=True)
    loss = sum((x * y).sum() for x, y in zip(made, wanted, strict=True))
    names = [x for x, y in leaves.items() if y.requires_grad]
    gradients = torch.autograd.grad(loss, [leaves[x] for x in names])
    found = dict(zip(("out", *(f"last {x}" for x in STATES)), made, strict=True))
    found |= {f"d{x}": y for x, y in zip(names, gradients, strict=True) if x not in _SHARED}
    return {x: y.detach() for x, y in found.items()}


def _of(x: Tensor, name: str, n: int) -> Tensor:
    """What of a tensor is sequence n's."""
    name = name.removeprefix("last ")
    plain = name[1:] if name.startswith("d") else name
    if plain in STATES:
        return x[n]
    part = slice(ENDS[n], ENDS[n + 1])
    return x[..., part] if plain in _TOKENS_LAST else x[:, part]


def _with(x: Tensor, name: str, n: int, value: float) -> Tensor:
    if name in _SHARED:
        return x
    x = x.clone()
    _of(x, name, n).fill_(-math.inf if name == "ADT" and value == math.inf else value)
    return x
