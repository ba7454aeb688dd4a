"""The search space of one stage: knob domains, what cannot work, and how Optuna is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from gdn2gen.base.device import Device
from gdn2gen.codegen.build import Resources
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.problem import Problem
from gdn2gen.kernels import validity
from gdn2gen.kernels.config import SHARED_KNOBS, Config, default_of
from gdn2gen.kernels.extras import OFF, why_no_extra
from gdn2gen.kernels.limits import CHUNKS, Domain, Knob, Place
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import takes_segments
from gdn2gen.kernels.scans import MAX_SEGMENTS
from gdn2gen.kernels.stage import Form, has_operand
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import why_invalid

if TYPE_CHECKING:
    import optuna

# A few spilled registers outside the loops are free; whole tiles on the stack (4 KB a thread was
# met) cost more than any other knob wins. Never measured beyond, so never run.
MAX_SPILL_BYTES: Final = 512

# A config this much slower than the best at one shape is not timed at the others. Stages by chunk
# rank alike at all shapes; of the scans' two forms one wins at many heads, the other at few, and
# the loser there took 1.8 times as long at train4k.
_HOPELESS: Final = 1.3
_HOPELESS_CHAIN: Final = 2.5


# Extras that a search tries, of forms that take them: of the scans in segments `reach` took a
# forward of long32k from 0.562 to 0.465 ms on an H200 (Gated DeltaNet), `merge` one of few8k from
# 0.101 to 0.099 (GDN-2, K = V = 64). Others say what runs beside a launch, which its own time does
# not show.
_SEARCHED: Final[Mapping[str, Knob]] = {"merge": "cut", "reach": 64}


def asked(stage: str, place: Place) -> dict[str, Domain]:
    """Knobs that a sampler is asked for: those that the stage shares with no other, and what each
    may be in some form that serves there."""
    return _asked(stage, place.problem, place.BT, place.arch)


@lru_cache(maxsize=1024)
def _asked(stage: str, problem: Compiled, BT: int, arch: str | None) -> dict[str, Domain]:
    found = STAGES[stage].domains_at(Place(problem, BT, arch))
    return {name: x for name, x in found.items() if name not in SHARED_KNOBS}


def extras_asked(config: Config, place: Place) -> dict[str, Domain]:
    """Extras that a search tries of the form that a config is of, and what each may be."""
    form = STAGES[config.stage].form_of(config)
    if form is None:
        return {}
    return {
        name: (OFF, value)
        for name, value in _SEARCHED.items()
        if why_no_extra({**config, name: value}, form, config.stage, place) is None
    }


# A proposal next to the best looks at a hundred configs, mostly those of the one before.
@lru_cache(maxsize=2**16)
def why_hopeless(config: Config, problem: Problem, device: Device) -> str | None:
    """Why `config` need not even be compiled for `device`, or None."""
    return why_invalid(config, problem, device.arch) or _why_too_wide(config, problem, device)


def _why_too_wide(config: Config, problem: Problem, device: Device) -> str | None:
    least = least_shared_bytes(config, problem)
    if least <= device.shared_bytes:
        return None
    return (
        f"its pipelined tiles take at least {least} bytes of shared memory, and a block of "
        f"{device.name} has {device.shared_bytes}"
    )


def least_shared_bytes(config: Config, problem: Problem) -> int:
    """Lower bound of the shared memory of a block, in bytes; 0 where the knobs do not tell.

    `num_stages - 1` copies of what its form loads ahead are in flight, of the products' operands
    alone (the compiler may keep one more).
    """
    ahead = config.form.ahead
    if not ahead:
        return 0
    knobs = {name: x for name, x in config.items() if isinstance(x, int)}
    sizes = {"K": problem.K, "V": problem.V, **knobs}
    return (config.size("num_stages") - 1) * sum(
        x.nbytes(problem, sizes) for x in ahead if has_operand(x, problem)
    )


def why_unfit(resources: Resources, device: Device) -> str | None:
    """Why a compiled kernel must not reach the GPU, or None."""
    if resources.shared_bytes > device.shared_bytes:
        return (
            f"{resources.shared_bytes} bytes of shared memory, and a block of {device.name} "
            f"has {device.shared_bytes}"
        )
    if resources.spill_bytes > MAX_SPILL_BYTES:
        return f"spills {resources.spill_bytes} bytes a thread, more than {MAX_SPILL_BYTES}"
    return None


def valid_configs(stage: str, problem: Problem, device: Device, BT: int) -> Iterator[Config]:
    """Every config of the stage at this chunk size that is worth compiling, form by form."""
    for config in validity.valid_configs(stage, Place(problem, BT, device.arch)):
        if _why_too_wide(config, problem, device) is None:
            yield config


@lru_cache(maxsize=256)
def starts(stage: str, problem: Problem, device: Device, BT: int) -> tuple[Config, ...]:
    """For each form of the stage, the valid config nearest to where it starts.

    Tried first: a form with 18 configs beside one with 660 would hardly be drawn in a short search.
    """
    place = Place(problem, BT, device.arch)
    nearest: dict[Form, tuple[int, Config]] = {}
    defaults: dict[Form, Config] = {}
    for config in valid_configs(stage, problem, device, BT):
        form = config.form
        if form not in defaults:
            defaults[form] = default_of(stage, form, place)
        apart = sum(x != y for x, y in zip(config.knobs, defaults[form].knobs, strict=True))
        if form not in nearest or apart < nearest[form][0]:
            nearest[form] = apart, config
    return tuple(config for _, config in nearest.values())


@lru_cache(maxsize=2**12)
def neighbours(config: Config, problem: Problem, device: Device) -> tuple[Config, ...]:
    """Every config worth compiling that differs in one of the stage's own knobs, or in an extra."""
    place = Place(problem, config.size("BT"), device.arch)
    others = [
        config.replace(**{name: value})
        for name, domain in {**asked(config.stage, place), **extras_asked(config, place)}.items()
        for value in domain
        if value != config.get(name, OFF)
    ]
    return tuple(x for x in others if why_hopeless(x, problem, device) is None)


def stages_moved(config: Config, plan: str) -> tuple[str, ...]:
    """Other stages of the plan whose time depends on the config.

    rescan runs the segments whose starts scan kept. Ranked by its own time, scan had one segment a
    sequence instead of two at train4k: 0.323 ms forward for 0.328, and 1.515 for 1.475 in all. So
    it is with transitions that a reverse scan is given.
    """
    chain, own = PLANS[plan], config.max_segments != MAX_SEGMENTS
    if config.stage != chain.forward[-1] or not own:
        return ()
    return tuple(x for x in chain.backward if takes_segments(x))


def is_hopeless(stage: str, ms: float, best_ms: float) -> bool:
    """Whether a config with this time at one shape need not be timed at the others."""
    return ms > best_ms * (_HOPELESS_CHAIN if STAGES[stage].is_chain else _HOPELESS)


def suggest(trial: optuna.Trial, stage: str, place: Place) -> Config:
    """Ask the sampler for a config (define-by-run); may return what is hopeless.

    Asking for a form first, and then only for what that form takes, was tried: nothing is hopeless
    then, but it takes no fewer trials. Until the best scan at long32k is within 3% they were 22
    instead of 18 (median of 20 seeds; 43 and 59 in 9 of 10).
    """
    knobs: dict[str, Knob] = {"BT": place.BT}
    for name, domain in asked(stage, place).items():
        chosen = trial.suggest_categorical(name, domain)
        assert isinstance(chosen, int | str)
        knobs[name] = chosen
    config = Config.of(stage, knobs)
    for name, domain in extras_asked(config, place).items():
        chosen = trial.suggest_categorical(name, domain)
        assert isinstance(chosen, int | str)
        config = config.replace(**{name: chosen})
    return config


def distributions(config: Config, place: Place) -> dict[str, optuna.distributions.BaseDistribution]:
    """What `suggest` asks for on its way to a config, for trials that are filed without asking."""
    from optuna.distributions import CategoricalDistribution

    domains = {**asked(config.stage, place), **extras_asked(config, place)}
    return {name: CategoricalDistribution(domain) for name, domain in domains.items()}


def parameters(config: Config, place: Place) -> dict[str, Knob] | None:
    """The config as the sampler would have suggested it, less extras that no search tries; or None
    where it never would."""
    domains = asked(config.stage, place)
    found = {name: config[name] for name in domains}
    if any(value not in domains[name] for name, value in found.items()):
        return None
    extras = {
        name: x if (x := config.get(name)) in domain else OFF
        for name, domain in extras_asked(config, place).items()
    }
    return {**found, **extras}


def chunk_sizes(preferred: int) -> tuple[int, ...]:
    """Chunk sizes in the order of the search: the default's first, then from large to small."""
    return (preferred, *(x for x in sorted(CHUNKS, reverse=True) if x != preferred))


def stored_config(stage: str, knobs: Mapping[str, Knob]) -> Config | None:
    """A config read from a file, or None where its knobs are not ours any more."""
    from gdn2gen.base.errors import ConfigError

    try:
        return Config.of(stage, knobs)
    except ConfigError:
        return None
