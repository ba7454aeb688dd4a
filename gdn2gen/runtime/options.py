"""Checks of the public ops' options: what is no tensor, or none of a recurrence's.

What tensors are checked for is `runtime.arguments`.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from gdn2gen.base.decay import WEAK, check_decay, expected_by
from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.family.problem import check_lower_bound
from gdn2gen.kernels.limits import CHUNKS
from gdn2gen.runtime.signature import Signature


def check_scale(scale: object) -> float | None:
    """Raises InputError unless it is a number or None."""
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, float | int):
        raise InputError(f"scale must be a number, but got {type(scale).__name__}")
    try:
        return float(scale)
    except OverflowError:
        raise InputError(
            "scale must be a number that a float can hold, but got an int of "
            f"{scale.bit_length()} bits"  # type: ignore[union-attr]
        ) from None


def check_gate(
    signature: Signature,
    use_gate_in_kernel: bool,
    safe_gate: bool,
    lower_bound: float | None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> None:
    """Check that the gate's options fit together. Raises InputError."""
    number = isinstance(lower_bound, int | float) and not isinstance(lower_bound, bool)
    if lower_bound is not None and not number:
        raise InputError(f"lower_bound must be a number, but got {type(lower_bound).__name__}")
    if not use_gate_in_kernel:
        for name, value in (("A_log", A_log), ("dt_bias", dt_bias), ("lower_bound", lower_bound)):
            if value is not None and not (name == "lower_bound" and safe_gate):
                raise InputError(f"{name} was given, but use_gate_in_kernel is False")
    elif A_log is None and lower_bound is None and "A_log" in signature.gate_parameters:
        wanted = "A_log, but got None"
        if signature.bounded:
            wanted = "A_log, or lower_bound for the bounded gate; got neither"
        raise InputError(f"use_gate_in_kernel=True needs {wanted}")
    if lower_bound is not None:
        check_lower_bound(lower_bound)
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise InputError("safe_gate=True with use_gate_in_kernel=True needs lower_bound")


def check_chunk_size(chunk_size: object) -> None:
    """Refuses a size by name: which one is fastest, a recipe says. Of all, results are the same."""
    if chunk_size is None:
        return
    if type(chunk_size) is not int or chunk_size not in CHUNKS:
        raise InputError(f"chunk_size must be one of {CHUNKS}, or None, but got {chunk_size!r}")
    raise UnsupportedError(
        f"chunk_size={chunk_size} was given, but tokens of a chunk are tuned: leave it out, or "
        "force a recipe with gdn2gen.store.dispatch.forced_recipe"
    )


def decay_of_call(
    signature: Signature, given: object, told: str | None, values: tuple[object, ...] | None = None
) -> str:
    """What a call expects of its decay: what it says, or what the process does, by what it was
    `told`, and by the environment's `values` (`expected_by`). Weak where no kernel's time depends
    on it. Raises InputError for another word."""
    word = expected_by(told, values) if given is None else check_decay(given)
    return word if signature.by_channel else WEAK


def check_beta(sigmoid: bool, neg_eigval: bool) -> None:
    """Raises InputError where eigenvalues may be negative by a sigmoid that is not taken here."""
    if neg_eigval and not sigmoid:
        raise InputError("allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True")


def check_capacity(use_graph: object, max_num_seqs: object, cu_seqlens: object) -> None:
    """What flash-linear-attention is told of a CUDA graph, where any call may be captured here: its
    shapes are the capacity. Raises InputError."""
    if type(use_graph) is not bool:
        raise InputError(f"use_graph must be True or False, but got {use_graph!r}")
    if max_num_seqs is None:
        return
    if type(max_num_seqs) is not int:
        raise InputError(
            f"max_num_seqs must be an int or None, but got {type(max_num_seqs).__name__}"
        )
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.numel() != max_num_seqs + 1:
        found = f"{cu_seqlens.numel()} numbers" if isinstance(cu_seqlens, Tensor) else "None"
        raise InputError(
            f"max_num_seqs={max_num_seqs} wants cu_seqlens of {max_num_seqs + 1} numbers, but got "
            f"{found}: repeat its last one for sequences without tokens"
        )


def check_order(cu_seqlens: object, cu_seqlens_cpu: object, safe_gate: object) -> None:
    """Of `chunk_gdn2`, where A_log and dt_bias once had the places of cu_seqlens and its copy, and
    these those after: what was given so cannot be what these are. Raises InputError."""
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_cpu", cu_seqlens_cpu)):
        if isinstance(x, Tensor) and x.is_floating_point():
            raise InputError(f"{name} must be int32 or int64, but got {x.dtype}; {_ORDER}")
    if safe_gate is None or isinstance(safe_gate, Tensor):
        found = "None" if safe_gate is None else f"a tensor of shape {tuple(safe_gate.shape)}"
        raise InputError(f"safe_gate must be True or False, but got {found}; {_ORDER}")


_ORDER: Final = (
    "arguments by place come in flash-linear-attention 0.6.0's order (..., use_gate_in_kernel, "
    "cu_seqlens, cu_seqlens_cpu, safe_gate, lower_bound, disable_recompute, "
    "return_intermediate_states, state_v_first, A_log, dt_bias), and A_log and dt_bias no longer "
    "before cu_seqlens: give them by name"
)


FLAGS = (
    "use_qk_l2norm_in_kernel",
    "use_gate_in_kernel",
    "output_final_state",
    "state_v_first",
    "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "safe_gate",
    "disable_recompute",
    "return_intermediate_states",
)
"""Flags of the public ops: those of `Options`, in their order, then the others."""


def check_flags(*given: object) -> None:
    """Raises InputError unless each of `FLAGS` is True or False: `"no"` would pass for True."""
    if not _BOOL.issuperset(map(type, given)):
        for name, value in zip(FLAGS, given, strict=True):
            if type(value) is not bool:
                raise InputError(f"{name} must be True or False, but got {value!r}")


_BOOL = frozenset({bool})
