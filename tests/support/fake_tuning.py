"""A GPU and its compilers as the tuner sees them, played: any config may fail in any way."""

from __future__ import annotations

from concurrent.futures import Future

from gdn2gen.base import outcome
from gdn2gen.base.device import named_device
from gdn2gen.base.outcome import Outcome
from gdn2gen.codegen.build import Resources
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.measure.check import CheckResult
from gdn2gen.measure.timing import Timing
from gdn2gen.store._claims import always_checked
from gdn2gen.tuning.gpu.jobs import RecipeTiming

DEVICE = named_device("H200")
PROBLEM = Problem(K=64, V=64)
ERRORS = {**dict.fromkeys(always_checked("gdn2"), 3e-3), "dg": 5e-3}
SMALL = Shape("small", 1, 256, 2)
LARGE = Shape("large", 2, 1024, 4)
PACKED = Shape("packed", 1, 256, 2, (0, 100, 256))


class Killed(BaseException):
    """Stands for a kill: nothing in the tuner may catch and swallow it."""


class FakeBackend:
    """Every call takes seconds of a fake clock; a config's time follows from its knobs."""

    def __init__(self, verdict=None, speed=None, kill_after=None):
        self.slots = 2
        self.now = 0.0
        self.compiled, self.checked, self.timed = [], [], []
        self.closed = False
        self._verdict = verdict or (lambda config: None)
        self._speed = speed or self._by_knobs
        self._kill_after = kill_after

    def clock(self):
        return self.now

    def compile(self, problem, config):
        self.now += 1.0
        self.compiled.append(config)
        if self._kill_after is not None and len(self.compiled) > self._kill_after:
            raise Killed
        future = Future()
        accident = self._verdict(config)
        # as where a kernel is rendered: a default need not serve every chunk size
        if why_invalid(config, problem, DEVICE.arch) is not None:
            accident = "no build"
        if accident == "spills":
            future.set_result(Outcome(outcome.OK, Resources(255, 9999, 1000, 128, 1.0)))
        elif accident == "no build":
            future.set_result(Outcome(outcome.BUILD_ERROR, detail="ptxas died"))
        else:
            future.set_result(Outcome(outcome.OK, Resources(128, 0, 50_000, 128, 1.0)))
        return future

    def check(self, recipe, *, full):
        self.now += 0.2
        self.checked.append((recipe, full))
        accidents = {self._verdict(config) for config in recipe.configs}
        refused = [why_invalid(x, recipe.problem, DEVICE.arch) for x in recipe.configs]
        if any(refused):
            return Outcome(outcome.ERROR, detail=next(filter(None, refused)))
        if "crash" in accidents:
            return Outcome(outcome.CRASHED, detail="signal 6: Assertion failed")
        if "hang" in accidents:
            self.now += 5
            return Outcome(outcome.TIMEOUT, detail="no answer within 5 s")
        if "wrong" in accidents or (full and "wrong in full" in accidents):
            return Outcome(outcome.OK, CheckResult(False, {"dg": 0.4}, "dg is off by 4e-01"))
        return Outcome(outcome.OK, CheckResult(True, dict(ERRORS)))

    def time_stages(self, recipe, stages, shape):
        self.now += 0.1
        by_stage = recipe.by_stage
        if any(self._verdict(by_stage[x]) == "memory" for x in stages):
            return Outcome(outcome.OUT_OF_MEMORY, detail="tried to allocate 1 TiB")
        self.timed.append((recipe, stages, shape.name))
        times = {x: self._timing(self._speed(by_stage[x], shape)) for x in stages}
        return Outcome(outcome.OK, times)

    def time_recipe(self, recipe, shape, *, with_peak):
        self.now += 0.3
        total = sum(self._speed(config, shape) for config in recipe.configs)
        timing = self._timing(total)
        return Outcome(outcome.OK, RecipeTiming(timing, timing, 100.0 if with_peak else 0.0))

    def close(self):
        self.closed = True

    @staticmethod
    def _timing(ms):
        return Timing(ms, ms * 0.999, ms * 1.001, 20)

    @staticmethod
    def _by_knobs(config, shape):
        default = default_config(config.stage, PROBLEM)
        ms = 1.0 + 0.2 * (config["BT"] != 64)
        ms -= 0.3 * (config["num_warps"] == 8) + 0.1 * (config["num_stages"] == 2)
        return ms * shape.T / 256 + 0.001 * (config != default)
