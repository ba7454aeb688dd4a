"""What look-ups depend on besides their arguments, read once.

An answer is remembered under what was read before it was looked up, so a look-up may read nothing
of it again: another thread that enters and leaves `batch_invariant()` in between would have the
other mode's answer remembered under this one's key, for good.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gdn2gen.base import environment, paths
from gdn2gen.base.decay import VARIABLE
from gdn2gen.base.environment import values_of
from gdn2gen.store import pins, tuned_files

if TYPE_CHECKING:
    from gdn2gen.store.dispatch import Found

FORCED: ContextVar[Found | None] = ContextVar("forced_recipe", default=None)
"""What `dispatch.forced_recipe` says."""

VARIABLES: Final = (
    "GDN2GEN_TUNED_DIR",
    "GDN2GEN_CACHE_DIR",
    "GDN2GEN_STRICT",
    "GDN2GEN_COMPILED_DIR",
    "GDN2GEN_BATCH_INVARIANT",
    "GDN2GEN_GATE_APART",
    # what a call's checks depend on, and what it expects
    VARIABLE,
    "GDN2GEN_UNVERIFIED",
    "TRITON_INTERPRET",
)


def surroundings() -> tuple[Any, ...]:
    """What `find_recipe` depends on besides its arguments: while it is equal, so is the answer.

    A plain tuple, since every call asks; `Surroundings` says what is in it.
    """
    return (
        FORCED.get(),
        values_of(VARIABLES),
        paths.user_tuned_dir,
        paths.packaged_tuned_dir,
        tuned_files.current_look(),
        pins.current(),
    )


class Surroundings(NamedTuple):
    """`surroundings`, as they were read: what a look-up asks of them."""

    forced: Found | None
    """What the innermost `forced_recipe` forces."""
    values: tuple[Any, ...]
    """The environment's, of `VARIABLES`, and as `values_of` gives them."""
    user: Callable[..., Path]
    packaged: Callable[[], Path]
    look: int
    """`tuned_files.current_look`."""
    pins: pins.Taken

    @classmethod
    def of(cls, read: tuple[Any, ...] | None = None) -> Surroundings:
        """As `surroundings` were `read`, or as they are now."""
        return cls(*(surroundings() if read is None else read))

    @property
    def said(self) -> paths.Said:
        """What the environment said of `VARIABLES`."""
        return said_of(VARIABLES, self.values)

    @property
    def batch_invariant(self) -> bool:
        return not environment.is_off(self.said["GDN2GEN_BATCH_INVARIANT"])

    @property
    def strict(self) -> bool:
        return not environment.is_off(self.said["GDN2GEN_STRICT"])

    @property
    def gate_apart(self) -> bool | None:
        """Whether every gate that can be is apart (1), or none (0); None where nothing is said."""
        value = self.said["GDN2GEN_GATE_APART"]
        return not environment.is_off(value) if value else None

    @property
    def unverified(self) -> str | None:
        return environment.unverified_by(self.said["GDN2GEN_UNVERIFIED"])

    @property
    def decay(self) -> tuple[Any, ...]:
        """What `base.decay` reads of the environment, as `values_of` gives it."""
        return (self.values[VARIABLES.index(VARIABLE)],)

    @property
    def compiled_dir(self) -> Path | None:
        return paths.compiled_dir(self.said)

    @property
    def folders(self) -> tuple[Path, Path]:
        """The user's of tuned files, and the packaged one."""
        return self.user(self.said), self.packaged()


def said_of(names: tuple[str, ...], values: tuple[Any, ...]) -> paths.Said:
    """What `values_of` gave of `names`, as texts."""
    decoded = (None if x is None else os.fsdecode(x) for x in values)
    return dict(zip(names, decoded, strict=True))
