"""Mamba-2's step, one import line away from state-spaces/mamba's, with states in slots of a pool.

It runs `fused_recurrent_mamba2`: q = C, k = B, v = x, rate = A. What Mamba-2 gives repeated over a
head's channels, dt, A, dt_bias and most often D, is read once for the head: nothing is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.family.mamba2 import step_sizes
from gdn2gen.ops._decode import around, decode, lasting_plan, launch_plan
from gdn2gen.ops._known import short_key
from gdn2gen.ops.recurrent import MAMBA2_STEP
from gdn2gen.runtime import passes
from gdn2gen.runtime.arguments import check_dense, is_traced
from gdn2gen.runtime.decoding import Plan, Read, surroundings
from gdn2gen.runtime.kinds import Kinds
from gdn2gen.runtime.signature import Options, renamed

_NAME: Final = "selective_state_update"
# Errors name what callers of Mamba's op give: tensors of the recurrence, and those of its states.
_SHARED: Final = {"q": "C", "k": "B", "v": "x", "rate": "A"}
_STEP: Final = replace(MAMBA2_STEP, signature=renamed(MAMBA2_STEP.signature, _NAME, **_SHARED))
_STATES: Final = {"ssm_state_indices": "state_batch_indices", "state_pool": "state"}
_UNLIMITED: Final = (-math.inf, math.inf)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int | None = None,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Mamba-2 over one token of each sequence, or a few (arXiv 2405.21060); the state in place.

    Per head, with the state h [P, N], and dt = softplus(dt + dt_bias) with `dt_softplus`:

        h_t = exp(A dt_t) h_{t-1} + dt_t x_t B_t^T
        y_t = h_t C_t + D x_t                            out_t = y_t silu(z_t)

    b sequences; h heads of P channels; g groups of B and C, each of which serves h / g heads that
    follow each other. N and P are K and V of `fused_recurrent_mamba2`: its limits hold here. dt and
    A must be one number a head, repeated over its channels by a stride of 0 (`.expand`), as all of
    Mamba-2's are; Mamba-1's, one a channel, are refused. There is no backward.

    States are carried in float32, whatever they are in memory. Rows of x, dt, B, C and z may lie
    apart, as in slices of a projection: they are read as they lie if they begin at multiples of 8
    elements, and D as it lies.

    Args:
        state: [slots, h, P, N] float32 or bfloat16, read and written in place. A slot's dims follow
            each other in memory; slots may lie any distance apart.
        x: [b, h, P] bfloat16, float16 or float32; [b, T, h, P] for T tokens of each sequence; or
            with `cu_seqlens` [tokens, h, P].
        dt: like x but for its dtype, bfloat16, float16 or float32: repeated over P.
        A: [h, P, N], <= 0: repeated over P and N.
        B: [b, g, N] like x, with T or tokens as x has them.
        C: the same.
        D: [h, P]: factor of x in y; None for none.
        z: like x: the gate; None for none.
        dt_bias: [h, P], added to dt: repeated over P; None for none. Without `dt_softplus` torch
            adds it.
        dt_softplus: dt = softplus(dt + dt_bias), in the kernel.
        state_batch_indices: [b] or [b, 1+S] int32 or int64: the slot of each sequence, which no
            other has; or one for each of its tokens: the state after token t goes to slot [n, t].
            An index below 0, equal to `null_slot` or past the last slot names none: it is never
            written, and a sequence that would read it is padding, whose rows of out are zeros.
            Without it sequence n has slot n.
        num_accepted_tokens: [b] int32 or int64, with indices [b, 1+S]: the state is read from slot
            [n, accepted - 1], taken within 1 .. 1+S; from [n, 0] if None.
        null_slot: an index that is padding, too, such as 0.
        cu_seqlens: [b + 1] int32 or int64, rising within 0 .. tokens: packed sequences, of any
            length, 0 too. Rows of out that it does not cover are zeros.
        out: like x: y is written there, and returned. It may be x or z, but shares no memory with
            what else is read.

    Returns:
        out, in the shape and dtype of x.

    Raises:
        InputError: a wrong rank, shape, dtype, device or value, before any launch.
        UnsupportedError: dt, A or dt_bias that differ within a head; head dims that were not
            verified; an input that wants a gradient.
    """
    tensors = (C, B, x, dt, None, A, dt_bias, D, z, cu_seqlens)
    own = (*tensors, state_batch_indices, num_accepted_tokens, state, out)
    short, read = None, None
    if type(dt_softplus) is bool and not is_traced():
        read = surroundings()
        short = short_key(_STEP.signature, own, (dt_softplus,), (null_slot,), around(read))
    if short is not None:
        found = _known.seen(short, [y for y in own if y is not None])
        if found is not None:
            y = found.make() if out is None else out
            launch_plan(_STEP.signature, found.plan, (*own[:-1], y), known=True)
            return y
    axis = _check(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens, out)
    step, bias = dt.select(-1, 0), None if dt_bias is None else dt_bias.select(1, 0)
    if bias is not None and not dt_softplus:
        step, bias = step_sizes(step, bias, False, _UNLIMITED), None
    gate_is_own = z is None or z.dtype == x.dtype
    gate = z if gate_is_own or z is None else z.to(x.dtype)
    into = out
    if axis is not None:
        C, B, x, step = (y.unsqueeze(axis) for y in (C, B, x, step))
        gate = None if gate is None else gate.unsqueeze(axis)
        into = None if out is None else out.unsqueeze(axis)
    views = (C, B, x, step, None, A.select(2, 0).select(1, 0), bias, D, gate, cu_seqlens)
    serving = (state_batch_indices, num_accepted_tokens, state, into)
    try:
        y, _ = decode(
            _STEP,
            views,
            serving,
            scale=1.0,
            output_final_state=False,
            use_gate_in_kernel=dt_softplus,
            state_v_first=True,
            null_slot=null_slot,
        )
    except (InputError, UnsupportedError) as error:
        raise type(error)(_in_their_words(str(error))) from None
    # none of what the kernel read was made by torch
    untouched = (bias is None) is (dt_bias is None) and gate_is_own
    if short is not None and read is not None and untouched:
        _note(short, own, (*views, *serving), dt_softplus, null_slot, read)
    if out is not None:
        return out
    return y if axis is None else y.squeeze(axis)


class _Known(NamedTuple):
    """A kind of call, told by its own tensors: the kernel takes their addresses, and those of what
    is made of them, a head's one number or an axis more, are the same."""

    plan: Plan
    make: Callable[[], Tensor]
    """What is returned where there is no `out`."""


_known: Kinds[_Known] = Kinds(2048)


def _note(
    short: tuple[Any, ...],
    own: tuple[Tensor | None, ...],
    given: tuple[Tensor | None, ...],
    dt_softplus: bool,
    null_slot: int | None,
    read: Read,
) -> None:
    """Know a call like this one again, if a kernel read all of its tensors as they lie; `given`
    are the views of them that it was called with."""
    x = own[2]
    options = Options(1.0, None, False, dt_softplus, output_final_state=False, state_v_first=True)
    plan = lasting_plan(_STEP, given, options, null_slot, read)
    if plan is not None and x is not None:
        made = passes.maker(tuple(x.shape), x.dtype, x.device)
        _known.note(short, [y for y in own if y is not None], _Known(plan, made))


def _in_their_words(text: str) -> str:
    for ours, theirs in _STATES.items():
        text = text.replace(ours, theirs)
    return text


def _check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: object,
    cu_seqlens: Tensor | None,
    out: Tensor | None,
) -> int | None:
    """Ranks and shapes by the names of Mamba's op, before anything is computed, and that what is
    read once for a head is one number; the kernels' op checks the rest. Returns the axis of tokens
    or sequences that x lacks."""
    given: dict[str, Any] = {
        "state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z,
        "dt_bias": dt_bias, "cu_seqlens": cu_seqlens, "out": out,
    }  # fmt: skip
    for name, y in given.items():
        if not (isinstance(y, Tensor) or (y is None and name in _OPTIONAL)):
            wanted = "a tensor or None" if name in _OPTIONAL else "a tensor"
            raise InputError(f"{name} must be {wanted}, but got {type(y).__name__}")
        if y is not None and y.is_nested:  # it has no shape
            check_dense(name, torch.jagged)
    if type(dt_softplus) is not bool:
        raise InputError(f"dt_softplus must be True or False, but got {dt_softplus!r}")
    if x.dim() not in (3, 4) or state.dim() != 4 or B.dim() != x.dim():
        raise _no_heads(state, x, B)
    *rows, h, P = x.shape
    g, N = B.shape[-2:]
    if g == 0 or h % g:
        raise InputError(f"heads of x must be a multiple of the groups of B, but got {h} and {g}")
    shapes: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("state", state, (state.shape[0], h, P, N)), ("dt", dt, x.shape), ("A", A, (h, P, N)),
        ("B", B, (*rows, g, N)), ("C", C, (*rows, g, N)), ("D", D, (h, P)), ("z", z, x.shape),
        ("dt_bias", dt_bias, (h, P)), ("out", out, x.shape),
    )  # fmt: skip
    for name, tensor, shape in shapes:
        if tensor is not None and tensor.shape != shape:
            raise InputError(f"{name} must be {tuple(shape)}, but got {tuple(tensor.shape)}")
    if out is not None and out.dtype != x.dtype:
        raise InputError(f"out must have the dtype of x, {x.dtype}, but got {out.dtype}")
    if P == 0 or N == 0:
        raise InputError(f"head dims must be at least 1, but got P={P}, N={N}")
    _check_tied("dt", dt, dt.stride()[-1:])
    _check_tied("A", A, A.stride()[1:])
    if dt_bias is not None:
        _check_tied("dt_bias", dt_bias, dt_bias.stride()[1:])
    if len(rows) == 2:
        return None
    return 1 if cu_seqlens is None else 0


_OPTIONAL: Final = ("D", "z", "dt_bias", "cu_seqlens", "out")


def _no_heads(state: Tensor, x: Tensor, B: Tensor) -> InputError | UnsupportedError:
    if x.dim() == 2 and state.dim() == 3:  # no sizes: who counts refusals counts one
        return UnsupportedError(
            f"{_NAME} has kernels for heads of Mamba-2, x [b, h, P] and state [slots, h, P, N], "
            "but got x of 2 and state of 3 dims, which have none, as Mamba-1's: call mamba_ssm's"
        )
    shapes = f"x {tuple(x.shape)}, state {tuple(state.shape)} and B {tuple(B.shape)}"
    return InputError(
        "x must be [b, h, P], [b, T, h, P], or with cu_seqlens [tokens, h, P]; state [slots, h, P, "
        f"N]; and B as x with [g, N] last; but got {shapes}"
    )


def _check_tied(name: str, x: Tensor, strides: tuple[int, ...]) -> None:
    """That there is one number for a head, by strides: no value is looked at."""
    if any(strides) and any(
        stride != 0 and size != 1
        for stride, size in zip(strides, x.shape[-len(strides) :], strict=True)
    ):
        raise UnsupportedError(
            f"{name} must be one number a head, repeated over its channels by strides of 0, but "
            f"its last strides are {strides}: Mamba-2's is, by {_EXPANDED[name]}; one for each "
            "channel, as Mamba-1 has, has no kernels here: call mamba_ssm's"
        )


_EXPANDED: Final = {
    "dt": "dt[..., None].expand(*dt.shape, P)",
    "A": "A[:, None, None].expand(-1, P, N)",
    "dt_bias": "dt_bias[:, None].expand(-1, P)",
}
