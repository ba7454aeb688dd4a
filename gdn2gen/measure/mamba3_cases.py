"""Mamba-3's cases of the accuracy suite: the op over whole sequences, and that of one token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

from gdn2gen.family.inputs import PATTERNS
from gdn2gen.family.mamba3_problem import STEP, Mamba3Problem
from gdn2gen.family.problem import USUAL_DIMS
from gdn2gen.family.shapes import Shape

CHECKS: Final = ("accuracy", "causality", "empty", "repeat", "steps")


@dataclass(frozen=True)
class Mamba3Case:
    """One call, and what is asked of it, as `cases.Case` is of other members."""

    name: str
    problem: Mamba3Problem
    shape: Shape
    """Sizes; its groups are those of Q and K."""
    pattern: str = "layer"
    """How ADT decays, see `inputs.PATTERNS`."""
    check: str = "accuracy"
    """One of CHECKS."""
    interpreter: bool = False
    level: str = "lean"
    """Of the scan: `fast` keeps more of its forward."""

    @property
    def op(self) -> str:
        """What is verified by it: the op over whole sequences, or that of one token."""
        return STEP if self.check == "steps" else self.problem.op


def _shape(B: int, T: int, H: int, groups: int, cu_seqlens: tuple[int, ...] | None = None) -> Shape:
    return Shape(f"{B}x{T}x{H}/{groups}", B, T, H, cu_seqlens, groups)


def _problem(K: int, V: int, dtype: str = "bf16") -> Mamba3Problem:
    """As a layer has it, going on from states: half of the channels are rotated."""
    return Mamba3Problem(
        dtype=dtype, state_size=K, head_dim=V, angles=K // 4, skip=True, gate=True, carried=True
    )


def _patterns(base: Mamba3Case) -> Iterator[Mamba3Case]:
    for pattern in PATTERNS:
        yield replace(base, name=f"{base.name}-{pattern}", pattern=pattern)


def _features(base: Mamba3Case) -> Iterator[Mamba3Case]:
    """`base` once for every option of the ops that changes what the kernels compute."""
    problem, shape = base.problem, base.shape
    T, H, half = shape.T, shape.H, problem.state_size // 2
    bare = replace(problem, skip=False, gate=False, carried=False)
    packed = _shape(1, T, H, 1, (0, 0, T // 3, T // 3 + 1, T // 3 + 1, T))
    narrow = "bf16" if problem.dtype == "fp32" else problem.dtype
    changes = {
        "plain": replace(base, problem=bare),
        "packed": replace(base, problem=replace(problem, packed=True), shape=packed),
        "packed-plain": replace(base, problem=replace(bare, packed=True), shape=packed),
        "groups": replace(base, shape=_shape(1, T, 6, 3)),
        "no-angles": replace(base, problem=replace(problem, angles=0)),
        "all-angles": replace(base, problem=replace(problem, angles=half)),
        "odd-angles": replace(base, problem=replace(problem, angles=half // 2 - 1)),
        "narrow-logits": replace(
            base, problem=replace(problem, trap_dtype=narrow, angle_dtype=narrow)
        ),
        "fast": replace(base, level="fast"),
        "packed-fast": replace(
            base, problem=replace(problem, packed=True), shape=packed, level="fast"
        ),
        "one-token": replace(base, shape=_shape(2, 1, H, 1)),
        "empty": replace(base, shape=_shape(2, 0, H, 1), check="empty"),
        "causality": replace(base, check="causality"),
        "repeat": replace(base, check="repeat"),
    }
    for name, case in changes.items():
        yield replace(case, name=f"{base.name}-{name}")


def _steps(base: Mamba3Case) -> Iterator[Mamba3Case]:
    """`base` for the op of one token: five of them, one after the other."""
    bare = replace(base.problem, skip=False, gate=False, angles=0)
    step = replace(base, shape=_shape(3, 5, base.shape.H, 1), check="steps")
    yield replace(step, name=f"{base.name}-steps")
    yield replace(step, name=f"{base.name}-steps-plain", problem=bare, shape=_shape(3, 5, 6, 3))


def _sized(K: int, V: int, *, interpreter: bool) -> Iterator[Mamba3Case]:
    """The suite of one pair of head dims."""
    # the reference keeps a state of every token for its backward, in fp64
    large = _shape(1, 301, 4, 1) if K * V > 128 * 128 else _shape(2, 301, 8, 1)
    shape = _shape(1, 41, 4, 1) if interpreter else large
    for dtype in ("bf16", "fp16", "fp32"):
        name = f"mamba3-{'small-' if interpreter else ''}K{K}-V{V}-{dtype}"
        base = Mamba3Case(name, _problem(K, V, dtype), shape, interpreter=interpreter)
        yield from (*_patterns(base), *_steps(base))
        # in the other 16 bits kernels differ in nothing but the dtype
        yield from (x for x in _features(base) if dtype != "fp16" or x.check == "repeat")
        if not interpreter:
            # two segments of a sequence, in chunks of 32
            yield replace(base, name=f"{name}-segments", shape=_shape(1, 1100, 2, 1))
        if not interpreter and dtype == "bf16":
            yield from _at_once(base)


def _at_once(base: Mamba3Case) -> Iterator[Mamba3Case]:
    """`base` with as many heads as it takes for states and outputs to be one stage, where there is
    one (`kernels.mamba3_scan`); and tokens of which a chunk is not full."""
    many = replace(base, shape=_shape(2, 132, 40, 1))
    bare = replace(base.problem, skip=False, gate=False, carried=False)
    changes = {
        "": many,
        "-plain": replace(many, problem=bare),
        "-fast": replace(many, level="fast", pattern="sparse"),
        "-strong": replace(many, pattern="strong"),
        "-causality": replace(many, check="causality"),
        "-repeat": replace(many, check="repeat"),
    }
    for name, case in changes.items():
        yield replace(case, name=f"{base.name}-at-once{name}")


def _all() -> Iterator[Mamba3Case]:
    yield from _sized(32, 16, interpreter=True)
    yield from _sized(128, 64, interpreter=False)
    large = Mamba3Case("mamba3-bf16-repeat-large", _problem(128, 64), _shape(2, 4096, 16, 1))
    yield replace(large, check="repeat")
    for dtype, (K, V) in product(("bf16", "fp16", "fp32"), product(USUAL_DIMS, repeat=2)):
        if (K, V) != (128, 64):
            name = f"mamba3-{dtype}-K{K}-V{V}"
            base = Mamba3Case(name, _problem(K, V, dtype), _shape(1, 300, 4, 2), "mixed")
            yield from (base, *_steps(base))


MAMBA3_CASES: Final = tuple(_all())


def mamba3_cases_of(K: int, V: int) -> tuple[Mamba3Case, ...]:
    """The suite of one pair of head dims: every pattern in every dtype, options, steps."""
    return (*_sized(K, V, interpreter=True), *_sized(K, V, interpreter=False))
