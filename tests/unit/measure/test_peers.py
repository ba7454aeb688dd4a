"""A peer's errors are measured without its search for the fastest config, and leave no trace."""

from __future__ import annotations

from typing import Any

import pytest

from gdn2gen.measure.peers import untuned

triton = pytest.importorskip("triton")


class Kernel:
    """What an autotuner calls: notes the configs, and does not fit with those named."""

    arg_names = ("n",)
    fn = staticmethod(lambda n: n)  # for its name

    def __init__(self, *unfit: int) -> None:
        self.unfit, self.ran = unfit, []

    def run(self, *_: Any, BLOCK: int, **__: Any) -> int:
        if BLOCK in self.unfit:
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        self.ran.append(BLOCK)
        return BLOCK


def autotuner(kernel: Kernel, searched: list[int]) -> Any:
    configs = [triton.Config({"BLOCK": x}) for x in (16, 32, 64)]

    def timed(call: Any, **_: Any) -> list[float]:
        call()
        searched.append(kernel.ran[-1])
        return [1.0 / kernel.ran[-1]] * 3

    return triton.autotune(configs, key=["n"], do_bench=timed)(kernel)


def test_the_first_config_runs_and_is_forgotten() -> None:
    searched: list[int] = []
    tuner = autotuner(Kernel(), searched)
    with untuned():
        assert tuner.run(8) == 16
    assert searched in ([], [16])  # Tritons differ in whether one config is timed
    searched.clear()
    assert tuner.run(8) == 64 and set(searched) == {16, 32, 64}
    with untuned():
        assert tuner.run(8) == 16
    assert tuner.run(8) == 64


def test_one_that_does_not_fit_is_searched_for() -> None:
    searched: list[int] = []
    tuner = autotuner(Kernel(16), searched)
    with untuned():
        assert tuner.run(8) == 64
    assert not tuner.cache


def test_a_tuner_of_another_class_prunes_its_own_way() -> None:
    """And one context within another leaves the tuner as it was, whatever fails."""
    searched: list[int] = []
    tuner = autotuner(Kernel(32), searched)

    class Own(type(tuner)):
        def prune_configs(self, _: Any) -> tuple[Any, ...]:
            return (*self.configs[1:],)

    tuner.__class__ = Own
    with untuned(), untuned():
        assert tuner.run(8) == 64
    with untuned():
        assert tuner.run(8) == 64
    assert not tuner.cache and "prune_configs" not in vars(tuner)
    nothing_fits = autotuner(Kernel(16, 32, 64), searched)
    with pytest.raises(triton.runtime.errors.OutOfResources), untuned(), untuned():
        nothing_fits.run(8)
    assert "prune_configs" not in vars(nothing_fits)
