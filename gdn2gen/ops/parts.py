"""The ops of a layer beside its recurrence: short convolutions with SiLU, and the gated RMSNorm.

Tensors on a GPU run one generated kernel (a backward two). Tensors on the CPU, and what no kernel
is made for, run torch's own operations, with the same numbers but for rounding; under
TRITON_INTERPRET=1 tensors on the CPU run the kernels in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.base.environment import interpreted
from gdn2gen.base.errors import InputError
from gdn2gen.family import parts_reference as reference
from gdn2gen.family.parts import ACTIVATIONS, CHANNELS_STEP, MOST_TENSORS, NORM_SIZES, WIDTHS
from gdn2gen.kernels.rows import FARTHEST
from gdn2gen.runtime import part_calls, parts, parts_ops
from gdn2gen.runtime.arguments import by_kernels, is_traced, is_watched
from gdn2gen.runtime.dtypes import DTYPE_NAME

Tensors = Sequence[Tensor]


def short_convolution(
    x: Tensors,
    weight: Tensors,
    bias: Tensors | None = None,
    *,
    tail: Tensors | None = None,
    output_final_tail: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Causal depthwise convolutions over tokens, with SiLU, of one to three tensors in one launch,
    as a layer wants it of q, k and v:

        y_t = silu(sum_j weight_j * x_{t - W + 1 + j} + bias),   j = 0 .. W - 1

    Each sequence for itself: before its first token lies its tail, or zeros. Sums are in fp32, the
    oldest tap first in every layout, so that packed or split sequences give the same bits.

    Args:
        x: each [B, T, D] with channels D of its own, in one dtype. Views of a packed projection are
            read as they lie where rows begin 16 bytes apart.
        weight: each [D, W] with W of 2 to 4, in one dtype, which may be wider than that of x.
        bias: each [D].
        tail: each [N, W-1, D], the last inputs of each sequence before x, oldest first; N is B, or
            with cu_seqlens the number of sequences.
        output_final_tail: whether the last inputs of each sequence are wanted.
        cu_seqlens: [N+1] int32 or int64: N sequences packed in one row (B = 1). What it holds
            on a GPU is taken within the batch.

    Returns:
        y like x, and the last inputs like `tail`, or None.

    Raises:
        InputError: shapes, dtypes or devices that do not go together.

    Kernels are there for D that are multiples of 8 in bf16, fp16 and fp32; they are differentiable
    once, in x, weight and bias.
    """
    bias, given = (() if part is None else tuple(part) for part in (bias, tail))
    x, weight = tuple(x), tuple(weight)
    short = None
    if not (given or output_final_tail or cu_seqlens is not None):
        short = _short_key("convolution", len(x), len(weight), len(bias))
        call = None if short is None else part_calls.KNOWN.seen(short, (*x, *weight, *bias))
        if call is not None:
            return part_calls.convolve(call, (*x, *weight, *bias)), None
    _check_convolution(x, weight, bias, given, cu_seqlens)
    tensors = (*x, *weight, *bias, *given)
    gradient = part_calls.wants_gradient(tensors)
    # no kernel hands a gradient back to tails
    if not _convolved_by_kernels(x, weight, bias, given) or (
        gradient and part_calls.wants_gradient(given)
    ):
        return _by_torch(x, weight, bias, given, output_final_tail, cu_seqlens)
    given = tuple(part.to(x[0].dtype) for part in given)
    watched = is_watched(tensors)
    if short is not None and not watched and _are_usual(x, (*weight, *bias)):
        call = part_calls.KnownConvolution(x, weight, bias)
        part_calls.KNOWN.note(short, tensors, call)
        return part_calls.convolve(call, tensors), None
    if gradient:
        y = parts_ops.convolve(x, weight, bias, given, cu_seqlens, watched=watched)
        if not output_final_tail:
            return y, None
        return y, [
            reference.last_inputs(part, w.shape[1], given[i] if given else None, cu_seqlens)
            for i, (part, w) in enumerate(zip(x, weight, strict=True))
        ]
    run = parts_ops.CONVOLVE if watched else parts.convolve
    y, final, _ = run(x, weight, bias, given, cu_seqlens, output_final_tail)
    return y, final if output_final_tail else None


def short_convolution_step(
    x: Tensors, weight: Tensors, bias: Tensors | None = None, *, tail: Tensors
) -> list[Tensor]:
    """The same for one token of each sequence, x each [N, 1, D]; `tail`, each [N, W-1, D] without
    gaps and in the dtype of x, is moved on in place. Forward only.

    Raises:
        InputError: as `short_convolution`; more than one token; a gradient that would be wanted.
    """
    bias, given = () if bias is None else tuple(bias), tuple(tail)
    x, weight = tuple(x), tuple(weight)
    _check_convolution(x, weight, bias, given, None)
    tensors = (*x, *weight, *bias, *given)
    if x[0].shape[1] != 1:
        raise InputError(f"a step is of one token, but x is {tuple(x[0].shape)}")
    if part_calls.wants_gradient(tensors):
        raise InputError("a step writes tails in place and has no gradient: use torch.no_grad()")
    for part, kept in zip(x, given, strict=True):
        if kept.dtype != part.dtype or not kept.is_contiguous():
            raise InputError(
                f"tail is written in place: it must be {part.dtype} without gaps, but got "
                f"{kept.dtype} with strides {kept.stride()} for {tuple(kept.shape)}"
            )
    if not _convolved_by_kernels(x, weight, bias, given):
        y, final = _by_torch(x, weight, bias, given, True, None)
        for kept, made in zip(given, final or (), strict=True):
            kept.copy_(made)
        return y
    run = parts_ops.STEP if is_watched(tensors) else parts.convolve_step
    y = [part.new_empty(part.shape) for part in x]
    run(x, weight, bias, given, y)
    return y


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-5, activation: str = "sigmoid"
) -> Tensor:
    """RMSNorm over the last dim, times an activated gate:

        y = x / sqrt(mean(x^2) + eps) * weight * activation(gate)

    Args:
        x, gate: [..., D], of one dtype.
        weight: [D].
        eps: added to the mean of squares.
        activation: "sigmoid" or "silu".

    Returns:
        y like x; computed in fp32 (fp64 for fp64).

    Raises:
        InputError: shapes that differ, an unknown activation.

    Kernels are there for D that are multiples of 8 up to 1024, in bf16, fp16 and fp32; they are
    differentiable once.
    """
    short = _short_key(type(eps), eps, activation)
    call = None if short is None else part_calls.KNOWN.seen(short, (x, gate, weight))
    if call is not None:
        return part_calls.norm(call, x, gate, weight)
    if x.shape != gate.shape or weight.shape != x.shape[-1:]:
        raise InputError(
            f"x and gate must both be [..., D] and weight [D], but got {tuple(x.shape)}, "
            f"{tuple(gate.shape)} and {tuple(weight.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {ACTIVATIONS}, but got {activation!r}")
    tensors = (x, gate, weight)
    _check_devices({"x": x, "gate": gate, "weight": weight})
    if not (_is_norm_size(weight.shape[0]) and _has_kernels(tensors, (x, gate), (weight,))):
        return reference.gated_rms_norm(x, gate, weight, eps, activation)
    watched = is_watched(tensors)
    if short is not None and not watched and _are_usual((), tensors):
        call = part_calls.KnownNorm(*tensors, eps, activation)
        part_calls.KNOWN.note(short, tensors, call)
        return part_calls.norm(call, *tensors)
    if watched or part_calls.wants_gradient(tensors):
        return parts_ops.norm(x, gate, weight, eps, activation, watched=watched)
    return parts.norm(x, gate, weight, eps, activation)


def _short_key(*options: Any) -> tuple[Any, ...] | None:
    """Of all that a call and its kernels depend on beside its tensors; None where there is no
    telling, or nothing to gain."""
    if is_traced() or torch.autograd.forward_ad._current_level >= 0 or interpreted():
        return None
    return (by_kernels, *options)


def _are_usual(rows: Tensors, dense: Tensors) -> bool:
    """Whether they are as in most calls: as kernels take them, and not empty."""
    if any([x.numel() == 0 or x.is_neg() for x in (*rows, *dense)]):
        return False
    return all([parts.in_rows(x) is x for x in rows]) and all([x.is_contiguous() for x in dense])


# torch.compile knows no order between a set and what a mapping has (2.11).
_DTYPES: Final = tuple(DTYPE_NAME)


def _is_norm_size(D: int) -> bool:
    """`D in NORM_SIZES`, for a tracer's symbol, too."""
    sizes = NORM_SIZES
    return sizes.start <= D < sizes.stop and D % sizes.step == 0


def _has_kernels(tensors: Tensors, x: Tensors, parameters: Tensors) -> bool:
    """Whether kernels serve these tensors, and nothing is about that wants more of them than one
    derivative backwards."""
    if not by_kernels(x[0].device):
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if any([part.layout != torch.strided for part in tensors]):
        return False
    dtypes = {part.dtype for part in x}, {part.dtype for part in parameters}
    return all(len(found) == 1 and all(y in _DTYPES for y in found) for found in dtypes)


def _convolved_by_kernels(x: Tensors, weight: Tensors, bias: Tensors, tail: Tensors) -> bool:
    widths = {w.shape[1] for w in weight}
    channels = [part.shape[2] for part in x]
    if len(widths) > 1 or any([D % CHANNELS_STEP or D > FARTHEST for D in channels]):
        return False
    return _has_kernels((*x, *weight, *bias, *tail), x, (*weight, *bias))


def _check_convolution(
    x: Tensors, weight: Tensors, bias: Tensors, tail: Tensors, cu_seqlens: Tensor | None
) -> None:
    """Raises InputError."""
    if not 1 <= len(x) <= MOST_TENSORS or len(weight) != len(x):
        raise InputError(
            f"x and weight must be 1 to {MOST_TENSORS} tensors each, as many of one as of the "
            f"other, but got {len(x)} and {len(weight)}"
        )
    for name, given in (("bias", bias), ("tail", tail)):
        if given and len(given) != len(x):
            raise InputError(f"{name} must be {len(x)} tensors, as x, but got {len(given)}")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            shape = tuple(cu_seqlens.shape)
            raise InputError(f"cu_seqlens must be [N+1] with N >= 1, but got shape {shape}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise InputError(f"cu_seqlens must be int32 or int64, but got {cu_seqlens.dtype}")
        if x[0].dim() == 3 and x[0].shape[0] != 1:
            raise InputError(f"cu_seqlens wants B=1, but x has B={x[0].shape[0]}")
    for i, part in enumerate(x):
        _check_tensor(i, part, x[0], weight[i], bias[i] if bias else None)
        if tail:
            N = x[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            shape = (N, weight[i].shape[1] - 1, part.shape[2])
            if tail[i].shape != shape:
                raise InputError(f"tail must be {shape}, but got {tuple(tail[i].shape)}")
    named = {
        f"{name}[{i}]": part
        for name, group in (("x", x), ("weight", weight), ("bias", bias), ("tail", tail))
        for i, part in enumerate(group)
    }
    _check_devices(named if cu_seqlens is None else {**named, "cu_seqlens": cu_seqlens})


def _check_tensor(i: int, x: Tensor, first: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[:2] != first.shape[:2]:
        raise InputError(
            f"x must be tensors [B, T, D] of the same B and T, but x[{i}] is {tuple(x.shape)} "
            f"beside {tuple(first.shape)}"
        )
    D = x.shape[2]
    if D < 1 or weight.dim() != 2 or weight.shape[0] != D or weight.shape[1] not in WIDTHS:
        raise InputError(
            f"weight[{i}] must be [D, W] with D={D} as in x and W one of {WIDTHS}, "
            f"but got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (D,):
        raise InputError(f"bias[{i}] must be [{D}], but got {tuple(bias.shape)}")


def _check_devices(named: Mapping[str, Tensor]) -> None:
    devices = {name: x.device for name, x in named.items()}
    if len({*devices.values()}) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise InputError(f"all tensors must be on one device, but got {where}")


def _by_torch(
    x: Tensors,
    weight: Tensors,
    bias: Tensors,
    tail: Tensors,
    output_final_tail: bool,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    y, final = [], []
    for i, part in enumerate(x):
        made = reference.short_convolution(
            part,
            weight[i],
            bias[i] if bias else None,
            tail[i] if tail else None,
            cu_seqlens,
        )
        y.append(made[0])
        final.append(made[1])
    return y, final if output_final_tail else None
