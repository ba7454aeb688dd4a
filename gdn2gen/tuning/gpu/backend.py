"""Backend: what the search asks of compilers and of the GPU; tests put a fake in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Lock
from typing import Final, Protocol

from gdn2gen.base.device import Device
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.worker import CompilePool, Worker, compile_slots
from gdn2gen.codegen.build import Resources
from gdn2gen.family.decays import LAYER, Drawn
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import CheckResult
from gdn2gen.measure.compiling import compile_in
from gdn2gen.measure.timing import Timing
from gdn2gen.tuning.gpu.jobs import RecipeTiming
from gdn2gen.tuning.views.report import Phase

# Includes importing torch and loading kernels. The first check also computes the references.
GATE_SECONDS: Final = 180.0
TIME_SECONDS: Final = 90.0


class Backend(Protocol):
    """Compiles in parallel, runs on one GPU; failures come back as outcomes, never as raises."""

    slots: int

    def compile(self, problem: Problem, config: Config) -> Future[Outcome[Resources]]:
        """Queue the compile of one stage."""
        ...

    def check(self, recipe: Recipe, *, full: bool) -> Outcome[CheckResult]:
        """Check accuracy and repetition; `full` as finalists are checked."""
        ...

    def time_stages(
        self, recipe: Recipe, stages: tuple[str, ...], shape: Shape
    ) -> Outcome[dict[str, Timing]]:
        """Time single stages of a recipe, in ms."""
        ...

    def time_recipe(
        self, recipe: Recipe, shape: Shape, *, with_peak: bool
    ) -> Outcome[RecipeTiming]:
        """Time the whole recipe through the public op, in ms; its peak memory in MiB."""
        ...

    def close(self) -> None:
        """End every process."""
        ...


class MeteredBackend:
    """Another backend, for one thread at a time, and the seconds that its GPU spent in checks and
    in timings.
    """

    def __init__(self, backend: Backend, clock: Callable[[], float]) -> None:
        self._backend, self._clock = backend, clock
        self.slots = backend.slots
        self.checking = 0.0
        self.timing = 0.0
        self.phases: dict[str, Phase] = {}
        self._gpu = Lock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside towards a phase."""
        started, busy = self._clock(), self.checking + self.timing
        try:
            yield
        finally:
            phase = self.phases.setdefault(name, Phase())
            phase.seconds += self._clock() - started
            phase.busy += self.checking + self.timing - busy

    def compile(self, problem: Problem, config: Config) -> Future[Outcome[Resources]]:
        return self._backend.compile(problem, config)

    def check(self, recipe: Recipe, *, full: bool) -> Outcome[CheckResult]:
        with self._gpu:
            started = self._clock()
            try:
                return self._backend.check(recipe, full=full)
            finally:
                self.checking += self._clock() - started

    def time_stages(
        self, recipe: Recipe, stages: tuple[str, ...], shape: Shape
    ) -> Outcome[dict[str, Timing]]:
        with self._gpu:
            started = self._clock()
            try:
                return self._backend.time_stages(recipe, stages, shape)
            finally:
                self.timing += self._clock() - started

    def time_recipe(
        self, recipe: Recipe, shape: Shape, *, with_peak: bool
    ) -> Outcome[RecipeTiming]:
        with self._gpu:
            started = self._clock()
            try:
                return self._backend.time_recipe(recipe, shape, with_peak=with_peak)
            finally:
                self.timing += self._clock() - started

    def close(self) -> None:
        self._backend.close()


class WorkerBackend:
    """The real one: a pool of compilers, and one process that owns the present GPU.

    What is timed has inputs whose decay is of `pattern`."""

    def __init__(self, device: Device, slots: int | None = None, pattern: Drawn = LAYER) -> None:
        self.device = device
        self.pattern = pattern
        self.slots = slots or compile_slots()
        self._pool = CompilePool(self.slots)
        self._worker = Worker()

    def compile(self, problem: Problem, config: Config) -> Future[Outcome[Resources]]:
        return compile_in(self._pool, problem, config, self.device)

    def check(self, recipe: Recipe, *, full: bool) -> Outcome[CheckResult]:
        name = "check_full" if full else "check_quick"
        return self._worker.call(f"gdn2gen.tuning.gpu.jobs:{name}", recipe, timeout=GATE_SECONDS)

    def time_stages(
        self, recipe: Recipe, stages: tuple[str, ...], shape: Shape
    ) -> Outcome[dict[str, Timing]]:
        return self._worker.call(
            "gdn2gen.tuning.gpu.jobs:time_stages",
            *(recipe, stages, shape, self.pattern),
            timeout=TIME_SECONDS,
        )

    def time_recipe(
        self, recipe: Recipe, shape: Shape, *, with_peak: bool
    ) -> Outcome[RecipeTiming]:
        return self._worker.call(
            "gdn2gen.tuning.gpu.jobs:time_recipe",
            *(recipe, shape, with_peak, self.pattern),
            timeout=TIME_SECONDS,
        )

    def close(self) -> None:
        self._pool.close()
        self._worker.close()
