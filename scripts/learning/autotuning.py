"""Peers' autotuners, told to hurry: hundreds of configs a layer, on a GPU whose minutes are few.

Triton's autotuner compiles a config, times it for an eighth of a second, and goes on to the next.
Compilers want one core each, and a median is known after a sixth of that time.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

# Of one config, before and while it is timed; Triton's own are 25 and 100.
WARM_MS: Final = 5
TIMED_MS: Final = 20
Bench = Callable[..., list[float]]


@dataclass
class Searched:
    """What a search has cost so far."""

    configs: int = 0
    compile_seconds: float = 0.0
    time_seconds: float = 0.0


@contextmanager
def searching(threads: int, lock: Path) -> Iterator[Searched]:
    """Inside, an autotuner that has no result for a call compiles all of its configs side by side,
    in so many threads, and then times each of them shortly.

    lock: a file that is locked while a config is timed, so that of processes that search at the
        same time one has the GPU.
    """
    from triton.runtime.autotuner import Autotuner

    bench, found = Autotuner._bench, Searched()
    begun: dict[int, Any] = {}
    pool = ThreadPoolExecutor(threads, thread_name_prefix="autotune")

    def timed(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        # each call of a kernel has arguments of its own, and all configs of a search the same
        if begun.get(id(self)) is not self.nargs:
            begun[id(self)] = self.nargs
            with _clock(found, "compile_seconds"):
                _compile(self, args, meta, pool)
        found.configs += 1
        with _short(self), _locked(lock), _clock(found, "time_seconds"):
            return bench(self, *args, config=config, **meta)

    Autotuner._bench = timed
    try:
        yield found
    finally:
        Autotuner._bench = bench
        pool.shutdown()


@contextmanager
def alone() -> Iterator[Searched]:
    """The same for a process that has the machine to itself."""
    threads = os.cpu_count() or 1
    with TemporaryDirectory() as folder, searching(threads, Path(folder) / "lock") as found:
        yield found


def _compile(tuner: Any, args: tuple[Any, ...], meta: dict[str, Any], pool: Any) -> None:
    """All configs, without a launch. What a config raises, it raises again where it is timed."""
    from triton.runtime._async_compile import AsyncCompileMode

    with AsyncCompileMode(pool, ignore_errors=True):
        for config in tuner.prune_configs(meta):
            with suppress(Exception):
                tuner.fn.run(*args, **{**meta, **config.all_kwargs(), "warmup": True})


@contextmanager
def _short(tuner: Any) -> Iterator[None]:
    before = vars(tuner).get("do_bench")
    tuner.do_bench = shortly()
    try:
        yield
    finally:
        if before is None:
            del tuner.do_bench
        else:
            tuner.do_bench = before


def shortly() -> Bench:
    """What times a config."""
    from triton.testing import do_bench

    return partial(do_bench, warmup=WARM_MS, rep=TIMED_MS)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        yield


@contextmanager
def _clock(found: Searched, name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        setattr(found, name, getattr(found, name) + time.perf_counter() - started)
