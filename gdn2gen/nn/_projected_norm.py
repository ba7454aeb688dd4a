"""The norm at a layer's end, which projects its gate itself."""

from __future__ import annotations

from torch import Tensor, nn

from gdn2gen.base.environment import norm_projects
from gdn2gen.nn.norm import GatedRMSNorm
from gdn2gen.nn.projections import Projected, is_changed
from gdn2gen.runtime.arguments import by_kernels, is_watched
from gdn2gen.runtime.stream_parts import projected_norm, projects


def norm_of_projected(
    norm: nn.Module, o: Tensor, tokens: Projected, projection: nn.Module
) -> Tensor | None:
    """`norm(o, projection(tokens))` of o [B, T, H, D] by one kernel, which keeps its gates: with
    GDN2GEN_NORM_PROJECTS=1, without gradients, where there is such a kernel; else None."""
    low = tokens.inner(projection) if norm_projects() else None
    if low is None or type(norm) is not GatedRMSNorm or is_changed(norm):
        return None
    second = projection[1]  # type: ignore[index]
    assert isinstance(second, nn.Linear)
    if is_watched((o, norm.weight)) or not by_kernels(o.device):
        return None
    if not projects(o, low, second.weight, norm.weight):
        return None
    options = norm.eps, norm.activation
    return projected_norm(o, low, second.weight, second.bias, norm.weight, *options)
