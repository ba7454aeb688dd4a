"""What the environment says about how kernels run."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from gdn2gen.base.errors import UnsupportedError


def values_of(names: tuple[str, ...]) -> tuple[Any, ...]:
    """What the environment says of each name, to be compared and no more: every call asks.

    `os.environ` encodes a name and decodes what it finds, 0.65 us each; the dict behind it is at
    hand in CPython.
    """
    if _BEHIND is None:
        return tuple(map(os.environ.get, names))
    return tuple(map(_BEHIND.get, _encoded(names)))


_BEHIND: Final[dict[Any, Any] | None] = getattr(os.environ, "_data", None)


@cache
def _encoded(names: tuple[str, ...]) -> tuple[Any, ...]:
    environ: Any = os.environ
    return tuple(map(environ.encodekey, names))


def is_off(value: Any) -> bool:
    """Whether what a switch of the environment says, as `values_of` or `os.environ` gives it, is
    no: it is not set, or empty, or 0, false, no or off."""
    return value in _OFF


# Each as it may be written, and in bytes: torch.compile follows a look into a tuple.
_SPELLED: Final = [f(x) for x in ("0", "false", "no", "off") for f in (str, str.title, str.upper)]
_OFF: Final = (None, "", b"", *_SPELLED, *(x.encode() for x in _SPELLED))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1): where
    Triton takes it for yes, which else would launch on them."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def check_compiles() -> None:
    """Raises UnsupportedError where kernels are for Triton's interpreter, as they are rendered and
    as Triton takes them: none can be compiled for a GPU, or written for one."""
    if interpreted():
        raise UnsupportedError(
            f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} has kernels made for Triton's "
            "interpreter, and none is compiled for a GPU: unset it"
        )


_WITHOUT_ASSEMBLY: Final = ContextVar("without_assembly", default=False)


def knows_assembly() -> bool:
    """Whether kernels that are rendered now may have a GPU's own instructions."""
    return not (interpreted() or _WITHOUT_ASSEMBLY.get())


@contextmanager
def without_assembly() -> Iterator[None]:
    """Inside, kernels are rendered as for Triton's interpreter, which runs them without a GPU."""
    token = _WITHOUT_ASSEMBLY.set(True)
    try:
        yield
    finally:
        _WITHOUT_ASSEMBLY.reset(token)


# Of GDN2GEN_UNVERIFIED in processes that verify, which need not be warned.
VERIFYING: Final = "verify"


def unverified() -> str | None:
    """Whether head dims may run that the accuracy suite has not passed on a GPU: None if not."""
    return unverified_by(os.environ.get("GDN2GEN_UNVERIFIED"))


def unverified_by(value: str | None) -> str | None:
    """The same where the environment said this."""
    return None if is_off(value) else value


@contextmanager
def verifying() -> Iterator[None]:
    """Inside, head dims run that were not verified, in this process and those that it starts."""
    before = os.environ.get("GDN2GEN_UNVERIFIED")
    os.environ["GDN2GEN_UNVERIFIED"] = VERIFYING
    try:
        yield
    finally:
        if before is None:
            del os.environ["GDN2GEN_UNVERIFIED"]
        else:
            os.environ["GDN2GEN_UNVERIFIED"] = before


def binds_launches() -> bool:
    """Whether passes that have run are bound to their launches, unless GDN2GEN_BOUND=0.

    Asked when a pass is about to be bound: what is bound stays so.
    """
    value = os.environ.get("GDN2GEN_BOUND")
    return not value or not is_off(value)


def records_programs() -> bool:
    """Whether launches of TileLang's programs are bound without these, unless
    GDN2GEN_BOUND=programs. Asked, and lasting, as `binds_launches`."""
    return os.environ.get("GDN2GEN_BOUND", "") != "programs"


def slopes_together() -> bool:
    """Whether what sigmoids of a layer's projections hand back is written beside the convolutions'
    gradients, so that one product takes all (GDN2GEN_SLOPES_TOGETHER=1)."""
    return not is_off(values_of(_TOGETHER)[0])


_TOGETHER: Final = ("GDN2GEN_SLOPES_TOGETHER",)


def norm_projects() -> bool:
    """Whether the norm at a layer's end projects its gate, where no gradient is wanted
    (GDN2GEN_NORM_PROJECTS=1)."""
    return not is_off(values_of(_PROJECTS)[0])


_PROJECTS: Final = ("GDN2GEN_NORM_PROJECTS",)


def is_batch_invariant() -> bool:
    """Whether results may depend on nothing but their own sequence (GDN2GEN_BATCH_INVARIANT=1)."""
    return not is_off(values_of(_INVARIANT)[0])


_INVARIANT: Final = ("GDN2GEN_BATCH_INVARIANT",)


@contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Inside, what an op computes of a sequence does not depend on what else is in the batch.

    o, states and all gradients of a sequence are then the same bits, alone or among others, packed
    or in rows: its kernels are chosen by the problem and its heads, never by the number of tokens
    and sequences, and no sequence is cut into segments that run side by side. A sequence that goes
    on from a slot has the bits of one call, if it was cut after a multiple of 64 tokens. Gradients
    of what a batch shares, A_log and dt_bias, are sums over it.

    Small batches and long sequences are slower for it. It holds for this process, on all threads,
    and for those that it starts, as does GDN2GEN_BATCH_INVARIANT=1. Enter it outside of what
    torch.compile traces.
    """
    (name,) = _INVARIANT
    before = os.environ.get(name)
    os.environ[name] = "1" if enabled else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def verbose() -> bool:
    """Whether libraries may say on the terminal what they log for their developers."""
    return not is_off(os.environ.get("GDN2GEN_VERBOSE"))


def hush() -> None:
    """Unless `verbose`, ignore warnings that tell a user nothing to do, in this process.

    Of torch, when the first product of a thread is a backward's, and of Triton 3.9 on a default
    that 3.10 changes.
    """
    if not verbose():
        for message in ("Attempting to run cuBLAS", "TRITON_DEFAULT_FP_FUSION"):
            warnings.filterwarnings("ignore", message)


def hush_tilelang() -> None:
    """Unless `verbose`, have TileLang log errors alone: it tells of every kernel, on stdout."""
    if not verbose():
        import tilelang  # sets the level of its own log

        log = logging.getLogger(tilelang.__name__)
        if log.level == logging.INFO:  # not what the user has set
            log.setLevel(logging.ERROR)
            for handler in log.handlers:  # its kernel cache's own log has a level of its own
                handler.setLevel(logging.ERROR)


@cache
def cuda_compiler() -> str | None:
    """The nvcc that TileLang would call, if there is one.

    In CUDA_HOME or CUDA_PATH if one is set; else on PATH, in pip's nvidia-cuda-nvcc, in
    /usr/local/cuda.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(str(Path(home) / "bin" / "nvcc"))
    return shutil.which("nvcc") or _wheels_nvcc() or shutil.which("/usr/local/cuda/bin/nvcc")


def _wheels_nvcc() -> str | None:
    try:
        files = metadata.files("nvidia-cuda-nvcc") or ()
    except metadata.PackageNotFoundError:
        return None
    return next((shutil.which(str(x.locate())) for x in files if x.name == "nvcc"), None)
