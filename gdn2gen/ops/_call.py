"""What every public op does with its arguments: checks, then one call of the recurrence's ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from types import NoneType
from typing import Any, Final

from torch import Tensor

from gdn2gen.base.decay import told
from gdn2gen.ops._gates import Gate
from gdn2gen.ops._known import short_key, whole_key
from gdn2gen.ops._prefill import NOT_SERVING, Serving, prefill
from gdn2gen.runtime import autograd
from gdn2gen.runtime.arguments import (
    Dims,
    by_kernels,
    check_arguments,
    check_narrow,
    is_traced,
    is_watched,
)
from gdn2gen.runtime.call import rows_of
from gdn2gen.runtime.gates import has_gate_apart
from gdn2gen.runtime.head_dims import check_head_dims
from gdn2gen.runtime.kinds import Kinds
from gdn2gen.runtime.lookup import find_runner, request_at
from gdn2gen.runtime.options import (
    check_beta,
    check_chunk_size,
    check_flags,
    check_gate,
    check_scale,
    decay_of_call,
)
from gdn2gen.runtime.runner import SizedRunner
from gdn2gen.runtime.sequences import check_cu_seqlens
from gdn2gen.runtime.signature import Signature
from gdn2gen.store.surroundings import Surroundings, surroundings


def call(
    op: autograd.Op,
    tensors: tuple[Tensor | None, ...],
    *,
    scale: Any,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: Any = None,
    disable_recompute: bool,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens_cpu: Tensor | None,
    chunk_size: Any = None,
    expected_decay: Any = None,
    serving: Serving = NOT_SERVING,
) -> Any:
    """o, and the final state or None; and with `return_intermediate_states` those on the way.

    `tensors` are those of the signature; the others are called as by callers, and those with a
    default not every op has."""
    known = (
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        output_final_state,
        state_v_first,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
    )
    flags = (*known, safe_gate, disable_recompute, return_intermediate_states)
    check_flags(*flags)
    signature = op.signature
    serves = return_intermediate_states or serving is not NOT_SERVING
    # once: what the call is known by is what it runs, whatever another thread says meanwhile
    said, read = told(), None
    traced, key = is_traced(), None
    if not (traced or autograd.has_tangents() or cu_seqlens_cpu is not None or serves):
        # a word that is not known is refused further down: it never comes to be known
        read = surroundings()
        around = by_kernels, expected_decay, said, *read
        short = short_key(signature, tensors, flags, (scale, lower_bound), around)
        if short is not None and chunk_size is None and type(expected_decay) in _WORDS:
            given = [x for x in tensors if x is not None]
            ready = _ready.seen(short, given)
            if ready is not None:
                o, state = ready.run(tensors)
                return o, state if output_final_state else None
            key = None if is_watched(tensors) else _key(short, given, signature, tensors)
            ready = None if key is None else _ready.get(key)
            if ready is not None:
                if _is_as_kernels_take(signature, tensors, given, ready.dims):
                    _ready.note(short, given, ready)
                o, state = ready.run_any(signature, tensors)
                return o, state if output_final_state else None
    values = None if read is None else Surroundings.of(read).decay
    decay = decay_of_call(signature, expected_decay, said, values)
    watched = traced or is_watched((*tensors, *serving.pools) if serves else tensors)
    gates = {x: tensors[place] for x, place in signature.gate_parameters.items()}
    check_gate(signature, use_gate_in_kernel, safe_gate, lower_bound, **gates)
    check_beta(use_beta_sigmoid_in_kernel, allow_neg_eigval)
    check_chunk_size(chunk_size)
    dims = check_arguments(signature, tensors, cu_seqlens_cpu, state_v_first, known=not watched)
    factor = check_scale(scale)
    assert tensors[0] is not None
    computed = by_kernels(tensors[0].device)
    head_dims = dims.K, dims.V
    if computed:
        head_dims = check_head_dims(
            signature.op, tensors[0].dtype, tensors[0].device, dims.K, dims.V, read
        )
        tensors = _as_kernels_take(signature, tensors, dims, apart=not watched)
    options = (
        factor,
        float(lower_bound) if use_gate_in_kernel and lower_bound is not None else None,
        *known,
    )[: signature.options]
    level = "fast" if disable_recompute else "lean"
    if (
        use_gate_in_kernel
        and "A_log" in signature.gate_parameters
        and has_gate_apart(
            signature,
            *(tensors, dims, head_dims, options, level, decay),
            computed=computed,
            scan_apart=return_intermediate_states,
            watched=watched,
            read=read,
        )
    ):
        ungated = partial(
            call,
            op,
            scale=scale,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
            allow_neg_eigval=allow_neg_eigval,
            disable_recompute=disable_recompute,
            return_intermediate_states=return_intermediate_states,
            state_v_first=state_v_first,
            cu_seqlens_cpu=cu_seqlens_cpu,
            expected_decay=expected_decay,
            serving=serving,
        )
        apart = _Apart(dims, Gate(signature, options[1]), ungated)
        if computed and key is not None:
            _ready.keep(key, apart)
        return apart.run(tensors)
    if serves:
        return prefill(
            op,
            *(tensors, serving, dims, options, decay, cu_seqlens_cpu),
            intermediate=return_intermediate_states,
            watched=watched,
        )
    if computed and key is not None and read is not None:
        _ready.keep(key, _Ready(dims, options, level, decay, rows_of(signature, tensors), read))
    o, state = autograd.run(
        op,
        *(tensors, options, level, decay, dims, head_dims),
        by_kernels=computed,
        watched=watched,
        read=read,
    )
    return o, state if output_final_state else None


class _Ready:
    """A kind of call that has passed every check on what is not a value, and its kernels."""

    def __init__(
        self,
        dims: Dims,
        options: tuple[Any, ...],
        level: str,
        decay: str,
        rows: tuple[tuple[str, int], ...],
        read: tuple[Any, ...],
    ) -> None:
        """`read`: the `surroundings` that it is known by."""
        self.dims, self._options, self._rows = dims, options, rows
        self._level, self._decay, self._read = level, decay, read
        self._runners: dict[bool, SizedRunner] = {}

    def run(self, tensors: Sequence[Tensor | None], known: bool = True) -> Outputs:
        """`known`: the tensors are as kernels take them, but for where they lie."""
        cu_seqlens = tensors[-1]
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, self.dims.T)
        return autograd.run_known(tensors, self._runner, known=known)

    def run_any(self, signature: Signature, tensors: tuple[Tensor | None, ...]) -> Outputs:
        if any([tensors[place] is not None for place in signature.parameters]):
            tensors = _as_kernels_take(signature, tensors, self.dims)
        return self.run(tensors, known=False)

    def _runner(self, gradient: bool) -> SizedRunner:
        found = self._runners.get(gradient)
        if found is None:
            request = request_at(self.dims, *self._options, rows=self._rows)
            found = find_runner(request, self._level, gradient, self._decay, self._read)
            self._runners[gradient] = found
        return found


class _Apart:
    """A kind of call whose gate is a kernel of its own, and that goes on as one without a gate."""

    def __init__(self, dims: Dims, gate: Gate, ungated: Callable[..., Any]) -> None:
        self.dims, self._gate, self._ungated = dims, gate, ungated

    def run(self, tensors: Sequence[Tensor | None]) -> Any:
        return self._ungated(self._gate(tensors))

    def run_any(self, _: Signature, tensors: tuple[Tensor | None, ...]) -> Any:
        return self.run(tensors)


Outputs = tuple[Tensor, Tensor | None]
_ready: Kinds[_Ready | _Apart] = Kinds(1024)


def _key(
    short: tuple[Any, ...],
    given: Sequence[Tensor],
    signature: Signature,
    tensors: tuple[Tensor | None, ...],
) -> tuple[Any, ...] | None:
    """With whose rows lie apart, as kernels read them, and how far; all others may be copied.

    Not by strides: with the same ones, what begins at an odd address is copied.
    """
    return whole_key(short, given, _LOOK, lambda _: rows_of(signature, tensors))


def _is_as_kernels_take(
    signature: Signature,
    tensors: tuple[Tensor | None, ...],
    given: Sequence[Tensor],
    dims: Dims,
) -> bool:
    if any(map(Tensor.is_neg, given)):
        return False
    taken = _as_kernels_take(signature, tensors, dims)
    return all(x is y for x, y in zip(tensors, taken, strict=True))


_WORDS: Final = frozenset({str, NoneType})
_LOOK: Final = attrgetter("shape", "dtype", "layout")


def _as_kernels_take(
    signature: Signature, tensors: tuple[Tensor | None, ...], dims: Dims, *, apart: bool = True
) -> tuple[Tensor | None, ...]:
    """Row after row, and parameters in fp32 with all their dims; float64 only the reference takes.
    With `apart`, rows of those that kernels read so may lie apart.

    Raises InputError for that.
    """
    left = {x for x, _ in rows_of(signature, tensors)} if apart and signature.apart else ()
    for place in (0, signature.gate, *signature.states):
        x = tensors[place]
        if x is not None:
            check_narrow(signature.shown[place], x.dtype)
    found = [
        x if x is None or name in left else x.contiguous()
        for name, x in zip(signature.names, tensors, strict=True)
    ]
    for place in signature.parameters:
        x = found[place]
        if x is not None:
            x, symbols = x.float(), signature.dims[place]
            if len(x.shape) < len(symbols):
                x = x.view([getattr(dims, symbol) for symbol in symbols])
            found[place] = x
    return tuple(found)
