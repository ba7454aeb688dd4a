"""Random inputs as a layer makes them, with gentle or hostile gates; for tuner, bench, tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2gen.base.errors import InputError
from gdn2gen.family.decays import LEVELS, DecayPattern
from gdn2gen.family.registry import OPS, recurrence_named

PATTERNS: Final = (
    "layer",
    "zero",
    "constant",
    "strong",
    "uniform",
    "sparse",
    "mixed",
    "correlated",
)
"""Patterns: how the inputs decay, g in natural log.

layer       -A softplus(0.5 normal + bias): A uniform in [1, 16] per head, bias per channel, the
            inverse softplus of a step that is log-uniform in [0.001, 0.1]
zero        0: nothing is ever forgotten
constant    -5.95: about 15 tokens sum past the range of fp32's exponent (88 nats)
strong      -20: 5 tokens do
uniform     U(-20, 0)
sparse      layer, and -300 (the channel is reset) in one element of 64; what both erases and writes
            is 0 in one element of 8
mixed       each channel of each head follows one of the above, at random
correlated  layer's decay / 16; keys with a mutual correlation of 0.9; erase gates in (1.9, 2)
"""

_CORRELATION: Final = 0.9
_RESET: Final = -300.0
_RESET_RATE: Final = 1 / 64
_SKIPPED_RATE: Final = 1 / 8


def make_inputs(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    *,
    op: str = OPS[0],
    HV: int | None = None,
    HG: int | None = None,
    dtype: torch.dtype = torch.float32,
    gate_dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    pattern: str | DecayPattern = "layer",
    seed: int = 0,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    initial_state: bool = False,
    rate: bool = False,
) -> dict[str, Tensor]:
    """Draw the tensors of one call, on `device`; the same arguments there give the same bits.

    What a recurrence declares of each input (`Input.draw`), the decay as one of `PATTERNS`, or as
    that of heads of a `DecayPattern`, chosen at random. Neither
    q nor k is normalised: call with `use_qk_l2norm_in_kernel=True`, or the recurrence explodes.

    Args:
        op: the recurrence.
        B, T, H, K, V: sequences, tokens in each, heads of q and k, head dims.
        HV: heads of v, w and the state; H if None.
        HG: heads of the decay; HV if None.
        dtype: of all but the decay.
        gate_dtype: of the decay, which is made in float32, or in float64 if that is its dtype.
        factor_dtype: of what has the role `factor` (`Input.dtype`); dtype if None.
        cu_seqlens: boundaries of N sequences packed in one (B = 1); N is B otherwise.
        initial_state: also draw a state.
        rate: also draw that of a step, [HV] float32 in [-16, -1], and steps that decay with it as
            the pattern says; 0 where nothing is forgotten, which then has the steps of `layer`.

    Returns:
        The inputs that every call takes, in the dims that the recurrence declares; initial_state
        [N, HV, K, V] (normal, float32) if asked for; cu_seqlens [N + 1] (int64) if given.
    """
    if not isinstance(pattern, DecayPattern) and pattern not in PATTERNS:
        raise InputError(f"pattern must be one of {PATTERNS}, but got {pattern!r}")
    if cu_seqlens is not None and B != 1:
        raise InputError(f"cu_seqlens needs a packed batch of B=1, but got B={B}")
    HV = H if HV is None else HV
    HG = HV if HG is None else HG
    recurrence = recurrence_named(op)
    sizes = {"B": B, "T": T, "H": H, "HV": HV, "HG": HG, "K": K, "V": V}
    shapes = {x.name: tuple(sizes[y] for y in x.symbols) for x in recurrence.required}
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=of, device=device, generator=rng)

    plain = {x.name: x.draw for x in recurrence.required if x.draw != "decay"}
    dtypes = {"factor": dtype if factor_dtype is None else factor_dtype}
    tensors = {
        x.name: normal(*shapes[x.name], of=dtypes.get(x.dtype, dtype))
        for x in recurrence.required
        if x.name in plain
    }
    for name, draw in plain.items():
        if draw == "unit":
            tensors[name].sigmoid_()
    if pattern == "correlated":
        _correlate(tensors["k"], normal(B, 1, H, K))
        if recurrence.erase is not None:
            tensors[recurrence.erase].mul_(0.1).add_(1.9)
    if recurrence.decay is not None:
        name = recurrence.decay.input
        *rows, dim = shapes[name] if recurrence.per(name) == "channel" else (*shapes[name], 1)
        wide = torch.promote_types(gate_dtype, torch.float32)
        # a step of 0 would write nothing: what never decays has a rate of 0
        drawn = "layer" if rate and pattern == "zero" else pattern
        decay = _decay(drawn, (*rows, dim), rng, wide)  # type: ignore[arg-type]
        if recurrence.stepped:
            decay = -decay
        if rate:
            tensors["rate"] = torch.empty(HV, device=device).uniform_(-16.0, -1.0, generator=rng)
            decay /= tensors["rate"].abs()[:, None]
            tensors["rate"] *= pattern != "zero"
        tensors[name] = decay.to(gate_dtype).view(shapes[name])
    if pattern == "sparse" and recurrence.erase is not None and recurrence.tied:
        factor = tensors[recurrence.erase]
        skipped = torch.rand(factor.shape, device=device, generator=rng) < _SKIPPED_RATE
        factor.masked_fill_(skipped, 0.0)
    ends = None if cu_seqlens is None else torch.as_tensor(cu_seqlens, device=device).long()
    if initial_state:
        N = B if ends is None else len(ends) - 1
        tensors["initial_state"] = normal(N, HV, K, V, of=torch.float32)
    if ends is not None:
        tensors["cu_seqlens"] = ends
    return tensors


def _correlate(keys: Tensor, shared: Tensor) -> None:
    """Give all keys of a head a part in common."""
    shared.mul_(math.sqrt(_CORRELATION))
    keys.mul_(math.sqrt(1 - _CORRELATION)).add_(shared)


def _decay(
    pattern: str | DecayPattern,
    shape: tuple[int, int, int, int],
    rng: torch.Generator,
    dtype: torch.dtype,
) -> Tensor:
    """Decay g of `shape` [B, T, HG, K] in natural log, <= 0."""
    if isinstance(pattern, DecayPattern):
        return _observed_decay(pattern, shape, rng, dtype)
    if pattern == "mixed":
        return _mixed_decay(shape, rng, dtype)
    g = torch.empty(shape, dtype=dtype, device=rng.device)
    constants = {"zero": 0.0, "constant": -5.95, "strong": -20.0}
    if pattern in constants:
        return g.fill_(constants[pattern])
    if pattern == "uniform":
        return g.uniform_(-20.0, 0.0, generator=rng)
    *_, heads, dim = shape
    A = g.new_empty(heads, 1).uniform_(1.0, 16.0, generator=rng)
    step = g.new_empty(heads, dim).uniform_(math.log(1e-3), math.log(0.1), generator=rng).exp_()
    bias = step + torch.log(-torch.expm1(-step))
    g = F.softplus(g.normal_(generator=rng).mul_(0.5).add_(bias)).mul_(-A)
    if pattern == "sparse":
        resets = torch.rand(shape, device=rng.device, generator=rng) < _RESET_RATE
        g.masked_fill_(resets, _RESET)
    if pattern == "correlated":
        g.div_(16.0)  # The inverse is at its worst where little is forgotten within a chunk.
    return g


def _mixed_decay(
    shape: tuple[int, int, int, int], rng: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Each channel of each head draws one of the plain patterns, and keeps it for all tokens."""
    plain = ("layer", "zero", "constant", "strong", "uniform", "sparse")
    choice = torch.randint(len(plain), shape[2:], device=rng.device, generator=rng)
    g = torch.empty(shape, dtype=dtype, device=rng.device)
    for i, pattern in enumerate(plain):
        torch.where(choice == i, _decay(pattern, shape, rng, dtype), g, out=g)
    return g


def _observed_decay(
    pattern: DecayPattern,
    shape: tuple[int, int, int, int],
    rng: torch.Generator,
    dtype: torch.dtype,
) -> Tensor:
    """Each head draws one of the pattern's; channels go through its groups in order, and where
    there is one number a head, it draws a group."""
    *_, heads, dim = shape
    known = pattern.heads
    rows = []
    for _ in range(heads):
        head = known[int(torch.randint(len(known), (), device=rng.device, generator=rng))]
        first = int(torch.randint(len(head), (), device=rng.device, generator=rng))
        places = [first] if dim == 1 else [c * len(head) // dim for c in range(dim)]
        rows.append([head[place] for place in places])
    quantiles = torch.tensor(rows, dtype=dtype, device=rng.device)  # [heads, dim, levels]
    levels = torch.tensor(LEVELS, dtype=dtype, device=rng.device)
    u = torch.empty(shape, dtype=dtype, device=rng.device).uniform_(generator=rng)
    above = torch.searchsorted(levels, u).clamp_(1, len(LEVELS) - 1)
    part = (u - levels[above - 1]) / (levels[above] - levels[above - 1])
    wide = quantiles.expand(*shape, -1)
    low, high = (wide.gather(-1, x[..., None]).squeeze(-1) for x in (above - 1, above))
    return torch.lerp(low, high, part)
