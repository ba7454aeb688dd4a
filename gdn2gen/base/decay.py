"""How strong a call's decay is expected to be, which it cannot know: the words, and who says so.

`weak`: as gates are drawn, or less: hardly a channel loses more than 2^-96 over 32 tokens.
`strong`: as gates become that have learnt to recall: many a chunk has a channel that does.

Kernels that are fastest under one are not under the other. Which ones run is all that depends on
the word: results are right under any decay, whatever is said.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, Literal, get_args

from gdn2gen.base.environment import values_of
from gdn2gen.base.errors import InputError

Decay = Literal["weak", "strong"]
DECAYS: Final[tuple[str, ...]] = get_args(Decay)
WEAK: Final = "weak"
STRONG: Final = "strong"
VARIABLE: Final = "GDN2GEN_EXPECTED_DECAY"

_told: str | None = None
"""What `expected_decay` says; where it says nothing the environment does. A graph of torch.compile
is guarded by it, as by no variable of the environment: calls after a change are traced anew."""


def check_decay(given: object, name: str = "expected_decay") -> str:
    """Raises InputError unless it is one of `DECAYS`."""
    if type(given) is not str or given not in DECAYS:
        raise InputError(f"{name} must be one of {DECAYS}, but got {given!r}")
    return given


def expected() -> str:
    """What calls of this process expect that are not told themselves."""
    return expected_by(_told)


def told() -> str | None:
    """What calls are told by `expected_decay`, if anything. While this is the same, `VARIABLE` too,
    so is what they expect."""
    return _told


def expected_by(said: str | None, values: tuple[Any, ...] | None = None) -> str:
    """What a call expects that `told` said this to; another thread may say something else since.
    `values`: what the environment said of `VARIABLE`, as `values_of` gives it, where it was read
    before."""
    if said is not None:
        return said
    return _from_environment() if values is None else _read(values)


def _from_environment() -> str:
    return _read(values_of(_VARIABLES))


_VARIABLES: Final = (VARIABLE,)


@cache
def _read(values: tuple[Any, ...]) -> str:
    (raw,) = values
    given = "" if raw is None else os.fsdecode(raw).strip().lower()
    return check_decay(given, VARIABLE) if given else WEAK


# What torch.compiler.assume_constant_result marks a function with, but that imports torch._dynamo.
_from_environment._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def expected_decay(decay: str) -> Iterator[None]:
    """Inside, calls expect a decay that is `weak` or `strong`, unless they are told themselves.

    Of the kernels on file those run that are fastest under such a decay; results are right under
    any. It matters where each channel decays by itself: of `chunk_gdn2`, `chunk_kda` and
    `chunk_gla`, whose argument `expected_decay` says the same of one call, as that of their layers
    does. `gdn2gen.nn.Observatory.decay` says which it is.

    A backward runs what its forward ran, wherever it is called. A forward that is computed once
    more for it (checkpointing) is a call like any other: enter this around both, a whole step of
    training, or have the layers told. It holds for this process, on all threads, as does
    GDN2GEN_EXPECTED_DECAY=strong, which it comes before. Enter it outside of what torch.compile
    traces: a compiled function is compiled once for each of the words, and has read the variable
    when it was. What a CUDA graph captured stays as it is.

    Raises InputError for another word.
    """
    global _told
    before, _told = _told, check_decay(decay, "decay")
    try:
        yield
    finally:
        _told = before
