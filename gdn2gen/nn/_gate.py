"""A decay that is activated before the op over chunks, and not in its kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn2gen.family.activations import activate_gate
from gdn2gen.family.parts import HEAD_SIZES
from gdn2gen.runtime.arguments import by_kernels, is_watched
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.stream_parts import Gate


def apart(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an op with g activated, where its kernels were to do that."""
    if not arguments.get("use_gate_in_kernel"):
        return arguments
    names = ("g", "A_log", "dt_bias", "lower_bound")
    g: Tensor = arguments["g"]
    A_log, dt_bias, lower_bound = (arguments.get(name) for name in names[1:])
    rest = {x: y for x, y in arguments.items() if x not in (*names, "use_gate_in_kernel")}
    if _has_kernel(g, A_log, dt_bias, lower_bound):
        return {**rest, "g": Gate.apply(g, A_log, dt_bias)}  # type: ignore[no-untyped-call]
    wide = torch.promote_types(g.dtype, torch.float32)
    return {**rest, "g": activate_gate(g.to(wide), A_log, dt_bias, lower_bound)}


def _has_kernel(g: Any, A_log: Any, dt_bias: Any, lower_bound: float | None) -> bool:
    given = (g, A_log, dt_bias)
    if lower_bound is not None or not all(isinstance(x, Tensor) for x in given):
        return False
    if not by_kernels(g.device) or is_watched(given) or g.dim() != 4 or g.numel() == 0:
        return False
    if torch.autograd.forward_ad._current_level >= 0 or g.dtype not in DTYPE_NAME:
        return False
    return g.shape[-1] in HEAD_SIZES and A_log.dtype == dt_bias.dtype == torch.float32
