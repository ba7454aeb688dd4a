"""mamba_ssm's ops on ours: its layers, flash-linear-attention's of Mamba, and others' that call it.

    from gdn2gen.integrations import mamba

    print(mamba.register())
    ...                       # models run as before, on these kernels where they apply
    print(mamba.refused())    # and where they did not, why
    mamba.unregister()

What is replaced: `mamba_chunk_scan_combined` and `mamba_split_conv1d_scan_combined` of Mamba-2 (the
latter is what its layers train on: convolution, scan, norm and projection), and
`selective_state_update`, by which they decode; and `mamba3_siso_combined` of Mamba-3. A call that
ours does not take goes to the original, and says so once: so do all of Mamba-1's steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

import gdn2gen
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
from gdn2gen.nn.norm import grouped_rms_norm
from gdn2gen.ops.mamba import mamba_chunk_scan_combined
from gdn2gen.ops.parts import short_convolution

_MAMBA2: Final = "mamba_ssm.ops.triton.ssd_combined"
_STEP: Final = "mamba_ssm.ops.triton.selective_state_update"
_MAMBA3: Final = "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined"


def register(*models: nn.Module) -> Report:
    """Let mamba_ssm's ops run on ours; call it again after further imports.

    Args:
        models: models that exist already and keep functions as attributes of their modules, as
            those of transformers may.

    Returns:
        What was replaced, where, and what was not.

    Raises:
        UnsupportedError: mamba_ssm cannot be imported.
    """
    return _MAMBA.register(models)


def unregister(*models: nn.Module) -> None:
    """Put the originals back, in all modules and in `models`; `refused` forgets what it counted."""
    _MAMBA.unregister(models)


def refused() -> dict[str, dict[str, int]]:
    """How many calls went to the originals since `register`, by function and reason."""
    return _MAMBA.refused()


def _replacements() -> Iterator[Replacement]:
    yield Replacement(_MAMBA2, "mamba_chunk_scan_combined", runs(gdn2gen.mamba_chunk_scan_combined))
    yield Replacement(_MAMBA2, "mamba_split_conv1d_scan_combined", _split)
    yield Replacement(_STEP, "selective_state_update", runs(gdn2gen.selective_state_update))
    yield Replacement(_MAMBA3, "mamba3_siso_combined", runs(gdn2gen.mamba3_siso_combined))


# Arguments of theirs that `_split` reads; others must say nothing.
_WANTED: Final = ("zxbcdt", "conv1d_weight", "dt_bias", "A", "D", "chunk_size")
_TAKEN: Final = frozenset(
    {
        *_WANTED, "conv1d_bias", "initial_states", "dt_limit", "return_final_states", "activation",
        "rmsnorm_weight", "rmsnorm_eps", "outproj_weight", "outproj_bias", "headdim", "ngroups",
        "norm_before_gate",
    }
)  # fmt: skip


def _split(given: Given) -> Any:
    """Convolution, scan, norm and projection of [z, x, B, C, dt] below each other."""
    refuse_others(given, _TAKEN)
    if missing := [name for name in _WANTED if given.get(name) is None]:
        raise Refused(f"{', '.join(missing)} is not given, which ours needs")
    if given.get("activation", "silu") not in SILU:
        raise Refused("there is no SiLU after the convolution")
    weight, D, groups = given["conv1d_weight"], given["D"], given.get("ngroups", 1)
    P = D.shape[1] if D.dim() == 2 else given.get("headdim")
    if P is None:
        raise Refused("headdim is not given, nor is D [heads, headdim]")
    heads, inner, channels = D.shape[0], D.shape[0] * P, weight.shape[0]
    if given["zxbcdt"].shape[-1] != inner + channels + heads:
        raise Refused("there are channels beside those of z, x, B, C and dt: a gated MLP's")
    sizes = [inner, (channels - inner) // 2, (channels - inner) // 2]
    z, x, B, C, dt = torch.split(given["zxbcdt"], [inner, *sizes, heads], -1)
    bias = given.get("conv1d_bias")
    biases = None if bias is None else torch.split(bias, sizes)
    # Three of one launch, so that each is a tensor of its own, which the op need not copy.
    (x, B, C), _ = short_convolution([x, B, C], torch.split(weight, sizes), biases)
    norm = given.get("rmsnorm_weight")
    # The gate is the op's, unless there is a norm between.
    gates = norm is None or not given.get("norm_before_gate", True)
    final = given.get("return_final_states", False)
    found = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, P)),  # type: ignore[no-untyped-call]
        dt,
        given["A"],
        B.unflatten(-1, (groups, -1)),  # type: ignore[no-untyped-call]
        C.unflatten(-1, (groups, -1)),  # type: ignore[no-untyped-call]
        given["chunk_size"],
        D=D,
        z=z.unflatten(-1, (heads, P)) if gates else None,  # type: ignore[no-untyped-call]
        dt_bias=given["dt_bias"],
        initial_states=given.get("initial_states"),
        dt_softplus=True,
        dt_limit=given.get("dt_limit", (0.0, float("inf"))),
        return_final_states=final,
    )
    y, *states = found if isinstance(found, tuple) else (found,)
    y = y.flatten(2)
    if norm is not None:
        eps = given.get("rmsnorm_eps", 1e-6)
        y = grouped_rms_norm(y, norm, None if gates else z, groups=groups, eps=eps)
    out: Tensor = y
    if given.get("outproj_weight") is not None:
        out = functional.linear(y, given["outproj_weight"], given.get("outproj_bias"))
    return (out, *states) if final else out


_MAMBA = Library("mamba_ssm", "mamba-ssm", _replacements)
