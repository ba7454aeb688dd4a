"""Docstrings of the public ops, made of what their recurrences declare."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from typing import Final, TypeVar

from gdn2gen.family.recurrence import Input, Recurrence

_F = TypeVar("_F", bound=Callable[..., object])
_ANY_OF: Final = "bfloat16, float16 or float32"
_DTYPES: Final = {
    "factor": "like q, or float32",
    "gate": _ANY_OF,
    "parameter": _ANY_OF,
    "state": "float32",
    "index": "int32 or int64",
}
_WIDTH: Final = 96
_OPTIONS: Final = {
    "scale": "of the output; K**-0.5 if None.",
    "output_final_state": "return the state after the last token.",
    "use_qk_l2norm_in_kernel": "normalise q and k by x / sqrt(sum(x^2) + 1e-6).",
    "use_gate_in_kernel": "decay = -exp(A_log) * softplus({g.input} + dt_bias), or with "
    "`lower_bound` decay = lower_bound * sigmoid(exp(A_log) * ({g.input} + dt_bias)).",
    "use_beta_sigmoid_in_kernel": "what erases and writes is sigmoid({beta}).",
    "allow_neg_eigval": "it is twice that; needs `use_beta_sigmoid_in_kernel`.",
    "cu_seqlens_cpu": "cu_seqlens' copy on the host, which is checked if it is given.",
    "safe_gate": "the decay is bounded; needs `lower_bound` where the gate is in the kernel.",
    "lower_bound": "least decay, in [-5, 0).",
    "disable_recompute": 'keep more of the forward for a faster backward (the level "fast").',
    "return_intermediate_states": "not built yet; UnsupportedError.",
    "state_v_first": "states are [N, HV, V, K].",
}
_FLOAT16: Final = (
    "With float16, states and what is written to them above 65504 make o and the final state inf "
    "or NaN, and gradients of the state lose digits below 2^-10 and vanish below 2^-24: scale v "
    "and the initial state down (o and states are linear in them), or the loss up, or use bfloat16."
)


def documented(recurrence: Recurrence) -> Callable[[_F], _F]:
    """Complete the docstring of a recurrence's op over whole sequences."""

    def complete(function: _F) -> _F:
        if function.__doc__:  # None under python -OO
            lines = _lines(recurrence, signature(function).parameters)
            function.__doc__ = "\n".join([function.__doc__, *lines])
        return function

    return complete


def _lines(recurrence: Recurrence, names: Iterable[str]) -> Iterator[str]:
    yield from ("", "Per head, with the state S in R^{K x V} and elementwise `*`:", "")
    yield f"    S_t = {recurrence.update}"
    yield from ("    o_t = scale * S_t^T q_t", "")
    yield from textwrap.wrap(
        "B sequences of T tokens. H heads of q and k; HV of v, a multiple of H: value head i reads "
        f"q, k of head i // (HV / H). HG is H or HV. K and V are multiples of 8 "
        "from 16, K to 256 and V to 512: on a GPU those that were verified on its architecture in "
        f"this dtype, with GDN2GEN_UNVERIFIED=1 all. {_FLOAT16}",
        _WIDTH,
    )
    yield from ("", "Args:")
    for name in names:
        x = recurrence.named.get(name)
        known = {"g": recurrence.decay, "beta": recurrence.erase}
        text = f"{name}: {_OPTIONS[name].format(**known) if x is None else _tensor(x)}"
        yield from textwrap.wrap(text, _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)
    yield from ("", "Returns:")
    yield "    o [B, T, HV, V] in the dtype of v, and the final state (float32) or None."
    yield from ("", "Raises:")
    yield "    InputError: a wrong rank, shape, dtype, device or value, before any launch."
    yield "    UnsupportedError: head dims or options that were not verified."


def _tensor(x: Input) -> str:
    dtype = _DTYPES.get(x.dtype, _ANY_OF if x.name == "q" else "like q")
    return f"[{', '.join(x.symbols)}] {dtype}: {x.what}."
