"""The gate of a decay by itself, for what reads a decay and not its pre-activation.

Tensors on a GPU run one generated kernel (the backward two), as the other parts of a layer do (see
`ops.parts`); others run the reference.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from gdn2gen.base.errors import InputError
from gdn2gen.family.activations import activate_gate
from gdn2gen.family.parts import CHANNELS_STEP, NORM_SIZES
from gdn2gen.family.problem import check_lower_bound
from gdn2gen.kernels.rows import FARTHEST
from gdn2gen.runtime.arguments import by_kernels, is_watched
from gdn2gen.runtime.decay_gate import GATE, KnownGate
from gdn2gen.runtime.dtypes import DTYPE_NAME

# torch.compile knows no order between a set and what a mapping has (2.11).
_DTYPES: Final = tuple(DTYPE_NAME)


def decay_gate(
    x: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    lower_bound: float | None = None,
) -> Tensor:
    """The log decay of each channel, of its pre-activation, as `use_gate_in_kernel` makes it:

        g = -exp(A_log) * softplus(x + dt_bias)

    or with `lower_bound` lower_bound * sigmoid(exp(A_log) * (x + dt_bias)).

    Args:
        x: [..., HG, K].
        A_log: [HG], which only the bounded gate may lack.
        dt_bias: [HG * K] or [HG, K].
        lower_bound: limit of the decay per token, negative.

    Returns:
        g like x, in fp32 (fp64 for fp64).

    Raises:
        InputError: shapes that do not fit, no A_log without a bound, a bound that is not negative.

    Kernels are there for K that are multiples of 8 up to 1024, in bf16, fp16 and fp32; they are
    differentiable once, in x, A_log and dt_bias.
    """
    if x.dim() < 2:
        raise InputError(f"x must be [..., HG, K], but got {tuple(x.shape)}")
    if lower_bound is not None:
        check_lower_bound(lower_bound)
    known = known_gate_of(x, A_log, dt_bias, lower_bound)
    if known is not None:
        return known(*prepared(x, A_log, dt_bias, lower_bound))
    if not _has_kernel(x, A_log, dt_bias):
        wide = torch.promote_types(x.dtype, torch.float32)
        # of a rate in 16 bits, so that its exponential is not rounded to them
        rate = None if A_log is None else A_log.to(torch.promote_types(A_log.dtype, wide))
        return activate_gate(x.to(wide), rate, dt_bias, lower_bound).to(wide)
    g: Tensor = GATE(*prepared(x, A_log, dt_bias, lower_bound), lower_bound)
    return g


def known_gate_of(
    x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> KnownGate | None:
    """The kernels for tensors like these, `prepared`; None where none serves them, or something
    wants to see the op itself."""
    given = [part for part in (x, A_log, dt_bias) if part is not None]
    if is_watched(given) or not _has_kernel(x, A_log, dt_bias) or not x.numel():
        return None
    return KnownGate(*prepared(x, A_log, dt_bias, lower_bound), lower_bound)


def prepared(
    x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x, and both parameters as the kernels take them: of those that are not given zeros, a rate
    of 1 and no bias. Raises InputError."""
    heads, dim = x.shape[-2:]
    if A_log is None and lower_bound is None:
        raise InputError("the softplus gate needs A_log, got None; or give lower_bound")
    if A_log is None:
        A_log = x.new_zeros(heads, dtype=torch.float32)
    elif A_log.dim() != 1 or A_log.shape[0] != heads:
        raise InputError(f"A_log must be [{heads}], one per head of x, but got {[*A_log.shape]}")
    if dt_bias is None:
        dt_bias = x.new_zeros(heads * dim, dtype=torch.float32)
    elif not _has_a_number_for_each(dt_bias, heads, dim):
        raise InputError(
            f"dt_bias must be [{heads * dim}] or [{heads}, {dim}], but got {[*dt_bias.shape]}"
        )
    return x.contiguous(), A_log.float(), dt_bias.float().reshape(heads * dim)


def _has_a_number_for_each(dt_bias: Tensor, heads: int, dim: int) -> bool:
    """[HG * K] or [HG, K]. Compared one by one: Dynamo (torch 2.13) says of sizes that it knows as
    symbols that they are in no tuple of such."""
    if dt_bias.dim() == 2:
        return dt_bias.shape[0] == heads and dt_bias.shape[1] == dim
    return dt_bias.dim() == 1 and dt_bias.shape[0] == heads * dim


def _has_kernel(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a kernel serves x, and nothing is about that wants more of it than one derivative
    backwards."""
    heads, dim = x.shape[-2:]
    given = [x, *(y for y in parameters if y is not None)]
    sizes = NORM_SIZES
    if not (by_kernels(x.device) and sizes.start <= dim < sizes.stop and dim % CHANNELS_STEP == 0):
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if heads * dim > FARTHEST or any([y.device != x.device for y in given]):
        return False
    strided = all([y.layout == torch.strided for y in given])
    return strided and x.dtype in _DTYPES
