"""Proposals next to what was best so far: one knob away, form by form."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Final

from gdn2gen.base.device import Device
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.options import serves_every_option
from gdn2gen.kernels.stage import Form
from gdn2gen.tuning import space

# Forms this much slower than the best are searched further; others are left to the sampler.
_NEAR_BEST: Final = 1.3
# Of proposals, those next to the best that serves every option, where no form that does is near:
# what calls with an option run, if it is not the winner. A choice, not measured.
_SERVING_ALL: Final = 0.25


def next_to_best(
    means: Mapping[Config, float],
    is_new: Callable[[Config], bool],
    problem: Problem,
    device: Device,
    draw: random.Random,
) -> Config | None:
    """A config one knob away from the best of a form that may yet win, or None if all were seen.

    `means` holds the mean time of each config so far. A form that is behind may be so for one knob:
    at long32k the best scan on an H200 is Triton's, two knobs from where that form starts, which
    is 1.3 times slower than TileLang's best. Trials to come within 3% of it, next to the one best
    config and next to the best of each form: 47 and 18 (median of 20 seeds), 161 and 59 in 9 of 10.
    """
    ranked = sorted(means, key=lambda config: means[config])
    serving_all = next((x for x in ranked if serves_every_option(x, problem)), None)
    ranked = [x for x in ranked if means[x] <= _NEAR_BEST * means[ranked[0]]]
    best: dict[Form, Config] = {}
    for config in ranked:
        best.setdefault(config.form, config)
    wide: list[list[Config]] = []
    if serving_all is not None and serving_all not in best.values():
        wide = [[serving_all]] if draw.random() < _SERVING_ALL else []
    # once all of these were seen: next to the others, one after the other
    for group in (*wide, [*best.values()], *([config] for config in ranked)):
        unseen = [
            other
            for config in group
            for other in space.neighbours(config, problem, device)
            if is_new(other)
        ]
        if unseen:
            return draw.choice(unseen)
    return None
