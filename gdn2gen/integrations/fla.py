"""flash-linear-attention's ops on ours: its layers, its models, and others' models that call it.

    from gdn2gen.integrations import fla

    print(fla.register())
    ...                     # models run as before, on these kernels where they apply
    print(fla.refused())    # and where they did not, why
    fla.unregister()

A function of flash-linear-attention is replaced by one with the same arguments wherever a loaded
module has it by name; modules that are imported later find it at home. A call that ours does not
take goes to the original, and says so once.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

import gdn2gen
from gdn2gen.family.registry import OPS, RECURRENCES
from gdn2gen.integrations._library import (
    SILU,
    Given,
    Library,
    Refused,
    Replacement,
    Report,
    refuse_others,
    runs,
)
from gdn2gen.ops.parts import gated_rms_norm, short_convolution


def register(*models: nn.Module) -> Report:
    """Let flash-linear-attention's ops run on ours; call it again after further imports.

    Args:
        models: models that exist already and keep functions as attributes of their modules, as
            those of transformers do.

    Returns:
        What was replaced, where, and what was not.

    Raises:
        UnsupportedError: flash-linear-attention cannot be imported.
    """
    return _FLA.register(models)


def unregister(*models: nn.Module) -> None:
    """Put the originals back, in all modules and in `models`; `refused` forgets what it counted."""
    _FLA.unregister(models)


def refused() -> dict[str, dict[str, int]]:
    """How many calls went to the originals since `register`, by function and reason."""
    return _FLA.refused()


def _replacements() -> Iterator[Replacement]:
    for op in OPS:
        public = RECURRENCES[op].public
        for name in (public.chunk, public.recurrent):
            if name and public.fla and hasattr(gdn2gen, name):
                yield Replacement(public.fla, name, runs(getattr(gdn2gen, name)))
    yield Replacement("fla.modules.convolution", "causal_conv1d", _convolve)
    yield Replacement("fla.modules.fused_norm_gate", "rms_norm_gated", _norm)


def _convolve(given: Given) -> tuple[Tensor, None]:
    x, weight, bias = (given.get(name) for name in ("x", "weight", "bias"))
    others = {name: y for name, y in given.items() if name not in ("x", "weight", "bias")}
    if others.pop("activation", None) not in SILU:
        raise Refused("there is no SiLU after the convolution")
    refuse_others(others, frozenset({"cu_seqlens", "cu_seqlens_cpu"}))
    if x is None or weight is None:
        raise Refused("there is no weight")
    biases = None if bias is None else [bias]
    (y,), _ = short_convolution([x], [weight], biases, cu_seqlens=given.get("cu_seqlens"))
    return y, None


def _norm(given: Given) -> Tensor:
    known = ("x", "g", "weight", "bias", "activation", "eps")
    refuse_others({name: y for name, y in given.items() if name not in known}, frozenset())
    if given.get("weight") is None or given.get("bias") is not None:
        raise Refused("it has no weight, or a bias")
    activation = given.get("activation", "swish")
    activation = "silu" if activation in SILU else activation
    eps = given.get("eps", 1e-6)
    return gated_rms_norm(given["x"], given["g"], given["weight"], eps=eps, activation=activation)


_FLA = Library("fla", "flash-linear-attention", _replacements)
