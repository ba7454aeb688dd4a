"""The cases of the accuracy suite: one list for `gdn2gen verify` and for the tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

from gdn2gen.base.errors import InputError
from gdn2gen.family.decays import DecayPattern
from gdn2gen.family.inputs import PATTERNS
from gdn2gen.family.problem import DTYPES, USUAL_DIMS, Problem
from gdn2gen.family.registry import DECODING_OPS, OPS, recurrence_named
from gdn2gen.family.shapes import Shape

# Patterns that differ where nothing decays.
_WITHOUT_DECAY: Final = ("layer", "sparse", "correlated")
CHECKS: Final = ("accuracy", "causality", "decoding", "empty", "repeat")


@dataclass(frozen=True)
class Case:
    """One call, and what is asked of it."""

    name: str
    problem: Problem
    shape: Shape
    """Sizes; its H is the number of value heads HV."""
    pattern: str | DecayPattern = "mixed"
    """How the inputs decay, see `inputs.PATTERNS`."""
    H: int | None = None
    """Heads of q and k, where they are fewer than the value heads."""
    HG: int | None = None
    """Heads of the decay, where they are fewer than the value heads."""
    check: str = "accuracy"
    """One of CHECKS."""
    interpreter: bool = False
    """Small enough for Triton's interpreter."""

    @property
    def op(self) -> str:
        """What is verified by it: the recurrence's op over chunks, or that over single tokens."""
        if self.check != "decoding":
            return self.problem.op
        return str(recurrence_named(self.problem.op).public.recurrent)


def _shape(B: int, T: int, H: int, cu_seqlens: tuple[int, ...] | None = None) -> Shape:
    return Shape(f"{B}x{T}x{H}", B, T, H, cu_seqlens)


def _gates(base: Case) -> dict[str, Case]:
    """`base` with every activation of the decay that its recurrence has kernels for."""
    member = recurrence_named(base.problem.op)
    activations, rated = member.activations, "A_log" in member.named
    found: dict[str, dict[str, Any]] = {
        "softplus": {"gate": "softplus", "has_A_log": rated, "has_dt_bias": True},
        "softplus-no-bias": {"gate": "softplus", "has_A_log": rated},
        "sigmoid": {"gate": "sigmoid", "has_A_log": True, "has_dt_bias": True},
        "sigmoid-no-A_log": {"gate": "sigmoid"},
    }
    return {
        name: replace(base, problem=replace(base.problem, **fields), pattern="layer")
        for name, fields in found.items()
        if fields["gate"] in activations
    }


def _betas(base: Case) -> dict[str, Case]:
    """`base` with what its recurrence takes of beta inside its kernels."""
    if not recurrence_named(base.problem.op).activates_beta:
        return {}
    once = replace(base.problem, beta_sigmoid=True)
    return {
        "beta-sigmoid": replace(base, problem=once),
        "neg-eigval": replace(base, problem=replace(once, neg_eigval=True)),
    }


def _wide_beta(base: Case) -> Iterator[Case]:
    """`base` with beta in fp32, where its recurrence has one."""
    if recurrence_named(base.problem.op).has_factor:
        problem = replace(base.problem, beta_fp32=True)
        yield replace(base, name=f"{base.name}-beta-fp32", problem=problem)


def _layouts(base: Case) -> dict[str, Case]:
    """`base` without the norm and with transposed states, where its op has a keyword for them."""
    member = recurrence_named(base.problem.op)
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "no-l2norm": ("use_qk_l2norm_in_kernel", {"l2norm": False}),
        "v-first": ("state_v_first", {"state_v_first": True}),
    }
    return {
        name: replace(base, problem=replace(base.problem, **fields))
        for name, (keyword, fields) in found.items()
        if member.takes(keyword)
    }


def _outputs(base: Case) -> dict[str, Case]:
    """`base` with what its recurrence takes after its state: a skip, a gate, and both."""
    member = recurrence_named(base.problem.op)
    found: dict[str, dict[str, Any]] = {
        "no-rate": {"has_rate": False},
        "skip": {"has_D": True},
        "output-gate": {"has_z": True},
        "skip-and-gate": {"has_D": True, "has_z": True},
    }
    grouped = replace(base, shape=_shape(1, base.shape.T, 4), H=2)
    return {
        name: replace(grouped, problem=replace(base.problem, **fields))
        for name, fields in found.items()
        if all(x.removeprefix("has_") in member.named for x in fields)
    }


def _features(base: Case) -> Iterator[Case]:
    """`base` once for every option of the op that changes what the kernels compute."""
    problem, shape = base.problem, base.shape
    T = shape.T
    packed = (0, 0, T // 3, T // 3 + 1, T // 3 + 1, T)
    has_gate_heads = any("HG" in x.symbols for x in recurrence_named(problem.op).inputs)
    grouped_gates = replace(base, shape=_shape(1, T, 4), H=2, HG=2)
    changes: dict[str, Case] = {
        "stateless": replace(
            base, problem=replace(problem, initial_state=False, final_state=False)
        ),
        **_layouts(base),
        **_gates(base),
        **_betas(base),
        **_outputs(base),
        "varlen": replace(
            base, problem=replace(problem, varlen=True), shape=_shape(1, T, shape.H, packed)
        ),
        "grouped": replace(base, shape=_shape(1, T, 4), H=2),
        **({"grouped-gates": grouped_gates} if has_gate_heads else {}),
        "empty": replace(base, shape=_shape(1, 0, 1), check="empty"),
        # of one head, dg of a scalar decay would be one number, and small by chance
        "one-token": replace(base, shape=_shape(2, 1, 8)),
        "whole-chunks": replace(base, shape=_shape(1, 128, _heads(problem.op))),
        "causality": replace(base, shape=_shape(1, 22, 1), check="causality"),
        "causality-chunks": replace(base, check="causality"),
        "repeat": replace(base, check="repeat"),
    }
    for name, case in changes.items():
        yield replace(case, name=f"{base.name}-{name}")


def _patterns(base: Case) -> Iterator[Case]:
    decays = recurrence_named(base.problem.op).decay is not None
    for pattern in PATTERNS if decays else _WITHOUT_DECAY:
        yield replace(base, name=f"{base.name}-{pattern}", pattern=pattern)


def _head_dims(base: Case) -> Iterator[Case]:
    """Every pair of head dims; K != V shows a swapped transpose that square states hide."""
    for K, V in product(USUAL_DIMS, repeat=2):
        if (K, V) != (base.problem.K, base.problem.V):
            problem = replace(base.problem, K=K, V=V)
            yield replace(base, name=f"{base.name}-K{K}-V{V}", problem=problem)


def _decoding(base: Case) -> Iterator[Case]:
    """`base` for the op over single tokens, where the recurrence has one."""
    if base.problem.op in DECODING_OPS:
        yield replace(base, name=f"{base.name}-decoding", check="decoding")


def _usual(op: str) -> dict[str, Any]:
    """Fields of the problems of cases that are not asked for: a step decays by a rate."""
    return {"has_rate": True} if recurrence_named(op).stepped else {}


def _heads(op: str) -> int:
    """Of the smallest cases: more than one where the gradient of an input is one number a head, a
    sum that may be small by chance."""
    return 4 if recurrence_named(op).stepped else 1


def _interpreter_cases(op: str) -> Iterator[Case]:
    states: dict[str, Any] = {"initial_state": True, "final_state": True}
    problem = Problem(op=op, K=32, V=32, dtype="fp32", **states, **_usual(op))
    small = Case("small-fp32", problem, _shape(1, 75, _heads(op)), interpreter=True)
    yield from _patterns(small)
    yield from _features(small)
    yield from _head_dims(small)
    half = replace(small, name="small-fp16", problem=replace(problem, dtype="fp16"))
    yield from _patterns(half)
    mixed = replace(half, name="small-fp16-K64-V32", problem=replace(half.problem, K=64))
    yield from (mixed, replace(mixed, name=f"{mixed.name}-repeat", check="repeat"))
    narrow = replace(small, name="small-bf16", problem=replace(problem, dtype="bf16"))
    yield from (*_patterns(narrow), *_wide_beta(narrow))
    yield from (*_decoding(small), *_decoding(narrow))


def _gpu_cases(op: str) -> Iterator[Case]:
    problem = Problem(op=op, initial_state=True, final_state=True, **_usual(op))
    base = Case("bf16", problem, _shape(2, 1000, 4))
    yield from _patterns(base)
    yield from _features(base)
    yield from _head_dims(replace(base, shape=_shape(2, 300, 3)))
    if recurrence_named(op).decay is not None:
        yield replace(base, name="bf16-gates-bf16", problem=replace(problem, gate_dtype="bf16"))
    yield from _wide_beta(base)
    # 30 calls of at least 256 blocks each: fewer have hidden races.
    yield replace(base, name="bf16-repeat-large", shape=_shape(2, 4096, 16), check="repeat")
    for dtype in ("fp16", "fp32"):
        other = replace(base, name=dtype, problem=replace(problem, dtype=dtype))
        yield from _patterns(other)
        yield from _head_dims(replace(other, shape=_shape(1, 300, 2)))
    for dtype in DTYPES:
        other = replace(base, name=dtype, problem=replace(problem, dtype=dtype))
        for case in (other, *_head_dims(other)):
            yield from _decoding(case)


def _named(op: str, cases: Iterable[Case]) -> Iterator[Case]:
    """Cases of a recurrence; after the first, names begin with it."""
    for case in cases:
        yield case if op == OPS[0] else replace(case, name=f"{op}-{case.name}")


CASES: Final = tuple(
    case for op in OPS for case in _named(op, (*_interpreter_cases(op), *_gpu_cases(op)))
)


def cases_of(K: int, V: int) -> tuple[Case, ...]:
    """The suite of one pair of head dims: every pattern in bf16, options, the other dtypes."""
    return tuple(case for op in OPS for case in _named(op, _sized_cases(op, K, V)))


def _sized_cases(op: str, K: int, V: int) -> Iterator[Case]:
    problem = Problem(op=op, K=K, V=V, initial_state=True, final_state=True, **_usual(op))
    for base in (
        Case(f"K{K}-V{V}-bf16", problem, _shape(1, 301, 3)),
        Case(f"small-K{K}-V{V}-bf16", problem, _shape(1, 41, _heads(op)), interpreter=True),
    ):
        yield from (*_patterns(base), *_features(base), *_decoding(base))
        for dtype in ("fp16", "fp32"):
            name = base.name.replace("bf16", dtype)
            other = replace(base, name=name, problem=replace(problem, dtype=dtype))
            yield from (*_patterns(other), *_decoding(other))
            yield from (x for x in _features(other) if dtype == "fp32" or x.check == "repeat")
        # two segments of a sequence, in chunks of 32
        if not base.interpreter:
            yield replace(base, name=f"{base.name}-segments", shape=_shape(1, 1100, 2))


def cases_drawn(pattern: DecayPattern, op: str | None = None) -> tuple[Case, ...]:
    """Of decays that trained gates had, at their head dims, in every dtype; of the recurrence that
    had them, or of another. Raises InputError where that has no cases of such decays."""
    op = pattern.op if op is None else op
    if op not in OPS:
        raise InputError(
            f"decays of {pattern.op} are not drawn for {op}, but for {', '.join(OPS)}"
            " (Mamba-3's one pass is simple_gla's)"
        )
    problem = Problem(
        op=op, K=pattern.K, V=pattern.V, initial_state=True, final_state=True, **_usual(op)
    )
    found = []
    for prefix, shape in (("", _shape(1, 1100, 8)), ("small-", _shape(1, 75, 4))):
        for dtype in DTYPES:
            name = f"{prefix}{pattern.name}-{dtype}"
            case = Case(name, replace(problem, dtype=dtype), shape, pattern)
            case = replace(case, interpreter=bool(prefix))
            found += [case, replace(case, name=f"{name}-repeat", check="repeat")]
    return tuple(_named(op, found))
