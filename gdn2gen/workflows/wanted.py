"""Problems, shapes and devices, as callers of the workflows name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gdn2gen.base import device as devices
from gdn2gen.base.decay import DECAYS, STRONG, check_decay, expected
from gdn2gen.base.device import Device
from gdn2gen.base.errors import InputError
from gdn2gen.family.decays import DecayPattern
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.family.mamba3_problem import MAMBA3
from gdn2gen.family.problem import Problem, check_fields
from gdn2gen.family.registry import DECODING_OPS, STEP_OPS, recurrence_named
from gdn2gen.family.shapes import Shape, parse_shapes
from gdn2gen.store.sharing import device_called

Shapes = str | Shape | Sequence[str | Shape]
"""Names (`train4k`), sizes (`4x4096x16`: B, T and heads), or shapes; one text may list several."""

DEFAULT_TARGET: Final = "sm_90"


def problem_from(
    op: str, head_dim: int, value_dim: int | None, dtype: str, fields: dict[str, Any]
) -> Problem:
    """`fields` are those of `Problem` (gate, gate_dtype, l2norm, initial_state, ...). Raises
    InputError for others."""
    check_fields(Problem, fields)
    V = head_dim if value_dim is None else value_dim
    return Problem(op=op, K=head_dim, V=V, dtype=dtype, **fields)


_OF_EITHER: Final = (
    *("op", "K", "V", "dtype", "gate_dtype", "l2norm", "gate", "has_A_log", "has_dt_bias"),
    *("beta_sigmoid", "neg_eigval", "beta_fp32", "has_rate", "has_D", "has_z"),
)


def decoding_problem_from(
    problem: Problem, fields: Mapping[str, bool], shape: Shape
) -> DecodingProblem:
    """The decoding problem of the same recurrence, dims, dtypes and gate; `fields` are its own.
    States of Mamba-2 are V first unless these say otherwise, and its D is one number a head, as
    `selective_state_update` has them.

    Raises InputError for a recurrence that has no op over a few tokens.
    """
    if problem.op not in DECODING_OPS:
        raise InputError(
            f"{problem.op} has no op over a few tokens, but decode={shape.name} was given; there "
            f"are those of {', '.join(DECODING_OPS)}"
        )
    given: dict[str, Any] = {name: getattr(problem, name) for name in _OF_EITHER}
    given["state_v_first"] = recurrence_named(problem.op).stepped
    given["tied_D"] = fields.get("has_D", problem.has_D)
    return DecodingProblem(**{**given, "one_token": shape.T == 1, **fields})


def at(problem: Problem, shape: Shape) -> Problem:
    """`problem` for the calls at `shape`: packed if the shape is."""
    return replace(problem, varlen=problem.varlen or shape.cu_seqlens is not None)


def usual_shapes(shapes: Shapes | None, op: str) -> Shapes:
    """What is given; or what the commands take without a word, Mamba's own or train4k."""
    if shapes is not None:
        return shapes
    return "mamba4k" if op in (*STEP_OPS, MAMBA3) else "train4k"


def shapes_from(shapes: Shapes) -> list[Shape]:
    """Raises InputError for a word that names none, and where there is none."""
    if isinstance(shapes, str):
        return parse_shapes(shapes)
    if isinstance(shapes, Shape):
        return [shapes]
    if not isinstance(shapes, Sequence):
        raise InputError(
            "shapes are names such as 'train4k' or sizes BxTxH such as '4x4096x16', or several of "
            f"them, but got {shapes!r}"
        )
    return [x for given in shapes for x in shapes_from(given)]


def levels_from(levels: str | Iterable[str]) -> tuple[str, ...]:
    return (levels,) if isinstance(levels, str) else tuple(levels)


def expected_from(decay: str | None) -> str:
    """What calls expect of their decay; what this process does if None."""
    return expected() if decay is None else check_decay(decay, "decay")


def tuned_under(decay: str | Path) -> tuple[str, DecayPattern | None]:
    """What a search is for, `weak` or `strong`, and what it draws: a file of decays that a model
    had is for `strong`. Raises InputError for what is neither."""
    if isinstance(decay, str) and decay in DECAYS:
        return decay, None
    try:
        return STRONG, DecayPattern.load(decay)
    except (OSError, TypeError) as error:
        raise InputError(
            f"decay must be one of {DECAYS}, or a file of decays that a model had "
            f"(gdn2gen.nn.Observatory.pattern().save), but got {decay!r}: {error}"
        ) from error


def present_or(target: str | None) -> tuple[Device, bool]:
    """The device to work for, and whether it is the GPU in this machine.

    A named target wins; without a name the present GPU, or `DEFAULT_TARGET` where there is none.
    """
    if target is not None:
        return device_called(target), False
    if devices.has_gpu():
        return devices.present_device(), True
    return devices.named_device(DEFAULT_TARGET), False
