"""Which configs can serve a problem, decided from their knobs alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from gdn2gen.family.compiled import Compiled
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.extras import known, why_no_extra
from gdn2gen.kernels.limits import Limit, Place
from gdn2gen.kernels.plans import stages_of
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.stage import Form
from gdn2gen.kernels.stages import EVERY_STAGE, STAGES

_HEADS: Final = {"K": "key", "V": "value"}


def why_invalid(config: Config, problem: Compiled, arch: str | None = None) -> str | None:
    """Say why `config` cannot serve `problem`, or None if it can. Decides without compiling.

    With `arch`, as in `sm_90`, also what is known of kernels on it.
    """
    place = Place(problem, config.size("BT"), arch)
    form = EVERY_STAGE[config.stage].form_of(config)
    if form is None:
        return EVERY_STAGE[config.stage].why_no_form(config)
    if config.stage in STAGES and config.stage not in stages_of(problem.op):
        return f"{problem.op} has no such stage, but {', '.join(stages_of(problem.op))}"
    for tile, dim in form.tiles:
        size, widest = getattr(problem, dim), _covering(form, place, dim)
        if tile in config and config.size(tile) > widest:
            return (
                f"{tile}={config[tile]} exceeds the {widest} that cover the {_HEADS[dim]} "
                f"head dim {dim}={size}"
            )
    reason = _why_off_limits(config, form, place)
    if reason is None and form.refuses is not None:
        reason = form.refuses(place)
    return reason or why_no_extra(config, form, config.stage, place)


def _covering(form: Form, place: Place, dim: str) -> int:
    size = form.tiled(place)[dim]
    assert isinstance(size, int)
    return covering(size)


def why_not_there(config: Config, problem: Compiled, arch: str) -> str | None:
    """Why knobs of `config` beside those of its form cannot be on at GPUs of `arch`, or None.

    Of what is run there as it was given: that the rest of it serves is known, or found out.
    """
    if not known(config):
        return None
    place = Place(problem, config.size("BT"), arch)
    return why_no_extra(config, config.form, config.stage, place)


def valid_configs(stage: str, place: Place) -> Iterator[Config]:
    """Every config of the stage there, form by form: those that `why_invalid` has nothing against.

    Each is a product of what its form takes there, so that none is made and then refused.
    """
    for form in EVERY_STAGE[stage].forms:
        if not form.serves(place):
            continue
        given = {"BT": place.BT, **EVERY_STAGE[stage].selecting(form)}
        domains = form.domains(place)
        fixed = [(name, value) for name, value in given.items() if name not in domains]
        for values in itertools.product(*domains.values()):
            # not checked again: 49,398 of grad_key took 3 s
            knobs = sorted([*fixed, *zip(domains, values, strict=True)])
            yield Config(stage, tuple(knobs))


@lru_cache(maxsize=1024)
def _limits(
    form: Form, problem: Compiled, BT: int, arch: str | None
) -> tuple[Place, tuple[Limit, ...]]:
    """The same for all configs there: what a search asks 100,000 times."""
    place = Place(problem, BT, arch)
    return form.tiled(place), tuple(form.limits_at(place))


def _why_off_limits(config: Config, form: Form, place: Place) -> str | None:
    which = f"the {form.title} {config.stage}"
    tiled, limits = _limits(form, place.problem, place.BT, place.arch)
    for limit in limits:
        name = limit.name
        given = config[name] if name in config else tiled[name]
        if given not in limit.values:
            why = limit.why.format(form=form.name)
            return f"{which} takes {_one_of(name, limit.values)}, not {given}: {why}"
    for name, values in form.knobs.items():
        if config[name] not in values:
            return f"{which} takes {_one_of(name, values)}, not {config[name]}"
    for tile, dim in form.tiles:
        widest = form.widest(tile, tiled[dim]) if tile in form.whole else config.get(tile)
        if config.get(tile) != widest:
            size = place[dim]
            return f"{which} takes {dim}={size} in tiles of {widest}, not {tile}={config[tile]}"
    return None


def _one_of(name: str, values: tuple[object, ...]) -> str:
    return f"{name} of {', '.join(map(str, values))}"
