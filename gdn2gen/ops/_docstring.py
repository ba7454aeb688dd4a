"""Docstrings of the public ops, made of what their recurrences declare."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    "g_gamma": f"[HG] {_ANY_OF}: in place of g, what every token of a head decays by. Without "
    "either nothing decays.",
    "scale": "of the output; K**-0.5 if None.",
    "output_final_state": "return the state after the last token.",
    "use_qk_l2norm_in_kernel": "normalise q and k by x / sqrt(sum(x^2) + 1e-6).",
    "use_gate_in_kernel": "decay = -exp(A_log) * softplus({g.input} + dt_bias){bounded}.",
    "step_in_kernel": "the step is softplus({g.input} + dt_bias).",
    "use_beta_sigmoid_in_kernel": "what erases and writes is sigmoid({beta}).",
    "allow_neg_eigval": "it is twice that; needs `use_beta_sigmoid_in_kernel`.",
    "cu_seqlens_cpu": "cu_seqlens' copy on the host, which is checked if it is given.",
    "chunk_size": "tokens of a chunk, which are tuned: one of 16, 32 and 64 is refused by name "
    "(UnsupportedError).",
    "safe_gate": "the decay is bounded; needs `lower_bound` where the gate is in the kernel.",
    "lower_bound": "least decay, in [-5, 0).",
    "disable_recompute": 'keep more of the forward for a faster backward (the level "fast").',
    "expected_decay": '"weak" or "strong": which kernels run, of those tuned under either; results '
    "are right under any decay. What the process expects if None (`gdn2gen.expected_decay`).",
    "return_intermediate_states": "return a third: the states before tokens 0, 64, 128, ... of "
    "each sequence, [B, NT, HV, K, V] in the dtype of q, as flash-linear-attention does (packed: "
    "B = 1, one sequence after the other; NT is T // 64 + N, with zeros past the last state, "
    "unless the host knows the lengths by `cu_seqlens_cpu`). There is no backward then.",
    "state_v_first": "states are [N, HV, V, K].",
}
# Of the ops over whole sequences, in other words than of those over a few tokens.
_PREFILL: Final = {
    "use_graph": "as in flash-linear-attention: says nothing here, where any call may be "
    "captured in a CUDA graph and replayed with other contents.",
    "max_num_seqs": "how many sequences `cu_seqlens` has room for: those that are not there have "
    "no tokens, and are its last number once more.",
    "state_pool": "[slots, HV, K, V] float32 or bfloat16: states, read and written in place, in "
    "place of `initial_state`; there is no backward then. A slot's dims follow each other in "
    "memory; slots may lie any distance apart. Without `ssm_state_indices` sequence n has slot n.",
    "ssm_state_indices": "[N], int32 or int64: slots of the sequences, which no other has. A state "
    "is read from a slot, and written back after the last token. An index below 0, equal to "
    "`null_slot` or past the pool's end names no slot: it is never written, and its sequence is "
    "padding, whose rows of o are zeros. A sequence without tokens leaves its slot alone.",
    "has_initial_state": "[N] bool: where it is False, a sequence begins with zeros, whatever lies "
    "in its slot. All begin with what lies there if None.",
    "checkpoint_every_n_tokens": "n, a multiple of 64: states after n, 2 n, ... tokens of each "
    "sequence of this call are kept, too, as a cache of prefixes wants them; with "
    "`checkpoint_state_indices`.",
    "checkpoint_state_indices": "[N, C], int32 or int64: slots of `state_pool` for these states, "
    "none of which is a sequence's own or named twice. Column c is of the state after (c + 1) n "
    "tokens; what a sequence is too short for, is not written. What names no slot is as in "
    "`ssm_state_indices`.",
}
_BOUNDED: Final = (
    ", or with `lower_bound` decay = lower_bound * sigmoid(exp(A_log) * ({name} + dt_bias))"
)
# Of the ops over a few tokens, beside those or in other words.
_DECODING: Final = {
    "output_final_state": "return the state after the last token, in the dtype of `initial_state`; "
    "with a `state_pool`, the pool.",
    "state_v_first": "states are [N, HV, V, K], and slots of the pool [HV, V, K].",
    "state_pool": "[slots, HV, K, V] float32 or bfloat16: states, read and written in place. A "
    "slot's dims follow each other in memory; slots may lie any distance apart. Without "
    "`ssm_state_indices` sequence n has slot n.",
    "ssm_state_indices": "[N] or [N, 1+S], int32 or int64: slots of each sequence, which no other "
    "has. [N]: the state is read from a slot, and written back after the last token. [N, 1+S]: "
    "the state after token t is written to slot [n, t]. An index below 0, equal to `null_slot` "
    "or past the pool's end names no slot: it is never written, and a sequence that would read "
    "it is padding, whose rows of o are zeros.",
    "num_accepted_tokens": "[N], int32 or int64, with indices [N, 1+S]: the state is read from "
    "slot [n, accepted - 1], taken within 1 .. 1+S; from [n, 0] if None.",
    "null_slot": "an index that is padding, too, such as 0.",
    "gk": "decays of channels, too: no kernels yet; UnsupportedError.",
    "gv": "decays of values: no kernels yet; UnsupportedError.",
    "reverse": "from the last token to the first: no kernels yet; UnsupportedError.",
    "out": "[B, T, HV, V] in the dtype of v: o is written there, and returned. Rows may lie apart. "
    "It may be v, but shares no memory with what else is read.",
}
# The same of what recurrences declare.
_DECODING_INPUTS: Final = {
    "initial_state": "[N, HV, K, V] float32 or bfloat16: one for each sequence; zero if None.",
    "cu_seqlens": "[N+1] int32 or int64: rising within 0 .. T: packed sequences, of any length, 0 "
    "too; wants B = 1. On a GPU only the kernel reads it, and takes what it holds within 0 .. T: "
    "contents may change between replays of a CUDA graph, as may those of every other tensor. "
    "Rows of o that it does not cover are zeros.",
}
_AS_DECLARED: Final[Mapping[str, str]] = {}
_FLOAT16: Final = (
    "With float16, states and what is written to them above 65504 make o and the final state inf "
    "or NaN, and gradients of the state lose digits below 2^-10 and vanish below 2^-24: scale v "
    "and the initial state down (o and states are linear in them), or the loss up, or use bfloat16."
)

_APART: Final = (
    "Rows of {} may lie apart, as in slices of a projection: they are read as they lie if they "
    "begin at multiples of 8 elements (the first at one of 16 bytes), but under a tracer."
)


def documented(recurrence: Recurrence) -> Callable[[_F], _F]:
    """Complete the docstring of a recurrence's op over whole sequences."""

    def complete(function: _F) -> _F:
        if function.__doc__:  # None under python -OO
            lines = _lines(recurrence, signature(function).parameters)
            function.__doc__ = "\n".join([function.__doc__, *lines])
        return function

    return complete


def decoding_documented(recurrence: Recurrence) -> Callable[[_F], _F]:
    """The same of its op over a few tokens."""

    def complete(function: _F) -> _F:
        if function.__doc__:
            lines = _decoding_lines(recurrence, signature(function).parameters)
            function.__doc__ = "\n".join([function.__doc__, *lines])
        return function

    return complete


def _decoding_lines(recurrence: Recurrence, names: Iterable[str]) -> Iterator[str]:
    """Of an op over a few tokens."""
    yield from _equations(recurrence)
    yield from textwrap.wrap(
        f"{_sizes()} States are carried in float32, whatever they are in memory. There is no "
        "backward. Rows of q and of all that has one for each token may lie apart, as in views of "
        "a packed projection: they are read as they lie if they begin at multiples of 8 elements.",
        _WIDTH,
    )
    yield from ("", "Args:")
    declared = {there: name for name, there in recurrence.public.recurrent_names}
    for name in names:
        yield from _argument(
            recurrence, name, _OPTIONS | _DECODING, _DECODING_INPUTS, declared.get(name)
        )
    yield from ("", "Returns:")
    yield "    o [B, T, HV, V] in the dtype of v; and the final state, the pool, or None."
    yield from ("", "Raises:")
    yield "    InputError: a wrong rank, shape, dtype, device or value, before any launch."
    yield "    UnsupportedError: head dims that were not verified; an input that wants a gradient."


def _equations(recurrence: Recurrence) -> Iterator[str]:
    yield from ("", "Per head, with the state S in R^{K x V} and elementwise `*`:", "")
    yield f"    S_t = {recurrence.update}"
    output = "(S_t^T q_t + D v_t) * silu(z_t)" if recurrence.stepped else "scale * S_t^T q_t"
    yield from (f"    o_t = {output}", "")


def _sizes() -> str:
    return (
        "B sequences of T tokens. H heads of q and k; HV of v, a multiple of H: value head i reads "
        "q, k of head i // (HV / H). HG is H or HV. K and V are multiples of 8 from 16, K to 256 "
        "and V to 512: on a GPU those that were verified on its architecture in this dtype, with "
        "GDN2GEN_UNVERIFIED=1 all."
    )


def _argument(
    recurrence: Recurrence,
    name: str,
    options: Mapping[str, str],
    inputs: Mapping[str, str] = _AS_DECLARED,
    declared: str | None = None,
) -> list[str]:
    """Lines on one argument; `inputs` in place of what is declared of them. `declared`: what the
    recurrence calls it, if not so."""
    x = recurrence.named.get(declared or name)
    g = recurrence.decay and recurrence.decay.input
    bounded = _BOUNDED.format(name=g) if recurrence.bounded else ""
    known = {"g": recurrence.decay, "beta": recurrence.erase, "bounded": bounded}
    option = "step_in_kernel" if recurrence.stepped and name == "use_gate_in_kernel" else name
    text = options[option].format(**known) if x is None else inputs.get(name, _tensor(x))
    return textwrap.wrap(
        f"{name}: {text}", _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8
    )


def _lines(recurrence: Recurrence, names: Iterable[str]) -> Iterator[str]:
    yield from _equations(recurrence)
    apart = [x.name for x in recurrence.inputs if x.apart]
    rows = f" {_APART.format(' and '.join([', '.join(apart[:-1]), apart[-1]]))}" if apart else ""
    yield from textwrap.wrap(f"{_sizes()} {_FLOAT16}{rows}", _WIDTH)
    yield from ("", "Args:")
    for name in names:
        yield from _argument(recurrence, name, _DECODING | _OPTIONS | _PREFILL)
    yield from ("", "Returns:")
    yield from textwrap.wrap(
        "o [B, T, HV, V] in the dtype of v, and the final state (float32), the pool, or None. With "
        "`return_intermediate_states` a third, which the annotation does not say.",
        _WIDTH,
        initial_indent=" " * 4,
        subsequent_indent=" " * 4,
    )
    yield from ("", "Raises:")
    yield "    InputError: a wrong rank, shape, dtype, device or value, before any launch."
    yield "    UnsupportedError: head dims or options that were not verified."


def _tensor(x: Input) -> str:
    dtype = _DTYPES.get(x.dtype, _ANY_OF if x.name == "q" else "like q")
    return f"[{', '.join(x.symbols)}] {dtype}: {x.what}."
