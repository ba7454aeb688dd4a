"""The search space of one stage: knob domains, what cannot work, and how Optuna is asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gdn2gen.base.device import Device
from gdn2gen.codegen.build import Resources
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.anchors import FROM_START
from gdn2gen.kernels.config import (
    CHUNKS,
    DOMAINS,
    SHARED_KNOBS,
    Config,
    Knob,
    default_config,
    language_of,
)
from gdn2gen.kernels.stages import DTYPE_BYTES, MAX_SEGMENTS
from gdn2gen.kernels.validity import why_invalid

if TYPE_CHECKING:
    import optuna

# A few spilled registers outside the loops are free; whole tiles on the stack (4 KB a thread was
# met) cost more than any other knob wins. Never measured beyond, so never run.
MAX_SPILL_BYTES: Final = 512

_AMPERE: Final = ("sm_80", "sm_86", "sm_89")
_SCANS: Final = ("scan", "scan_states", "rescan", "reverse_scan")
# Knobs whose values are kernels of their own rather than settings of one.
_FORMS: Final = ("language", "decay", "segments")
# Where the search of a TileLang form starts, beside the default's other knobs. From the config
# nearest to Triton's default, one program to a multiprocessor, a search from an empty store left
# prepare in Triton: train4k 1.60 ms on an H200, where 1.46 was known.
_TILELANG_START: Final[Mapping[str, Mapping[str, Knob]]] = {
    "prepare": {"chunks": 4, "maxnreg": 80, "solve": "halves"},
    "reprepare": {"chunks": 4, "maxnreg": 80},
    "sum_decay": {"chunks": 4},
    "grad_value": {"chunks": 1, "maxnreg": 80},
    "grad_key": {"chunks": 16, "maxnreg": 128, "num_stages": 1},
    **{scan: {"num_stages": 3} for scan in _SCANS},
}
# A config this much slower than the best at one shape is not timed at the others. Stages by chunk
# rank alike at all shapes; of the scans' two forms one wins at many heads, the other at few, and
# the loser there took 1.8 times as long at train4k.
_HOPELESS: Final = 1.3
_HOPELESS_SCAN: Final = 2.5


def own_knobs(stage: str) -> dict[str, tuple[Knob, ...]]:
    """Knobs that the stage does not share with the others, with their domains."""
    return {name: x for name, x in DOMAINS[stage].items() if name not in SHARED_KNOBS}


def why_hopeless(config: Config, problem: Problem, device: Device) -> str | None:
    """Why `config` need not even be compiled for `device`, or None."""
    reason = why_invalid(config, problem)
    if reason is not None:
        return reason
    if language_of(config) == "tilelang" and device.arch != "sm_90":
        if device.arch not in _AMPERE:
            return f"TileLang kernels were not compiled for {device.arch} ({device.name})"
        if config.get("maxnreg"):
            return f"{device.arch} hands no registers to other warps: maxnreg={config['maxnreg']}"
        if config.size("num_stages") > 1:
            # its waits for asynchronous copies take a constant count there (0.1.15)
            return f"TileLang compiles loops of any length for {device.arch} with one stage only"
    if config.stage == "grad_key" and device.arch == "sm_90" and _reads_past_its_tiles(config):
        return "Triton 3.6 compiles it for sm_90 to a kernel that reads past its memory"
    least = least_shared_bytes(config, problem)
    if least > device.shared_bytes:
        return (
            f"its pipelined tiles take at least {least} bytes of shared memory, and a block of "
            f"{device.name} has {device.shared_bytes}"
        )
    return None


def least_shared_bytes(config: Config, problem: Problem) -> int:
    """Lower bound of the shared memory of a block, in bytes; 0 where the knobs do not tell.

    A scan loads its chunk's factors ahead: `num_stages - 1` copies of them are in flight, of the
    products' operands alone (the compiler may keep one more).
    """
    if config.stage == "grad_key" and config["decay"] in FROM_START:
        if language_of(config) == "tilelang":
            return 0
        return _least_of_grad_key(config, problem)
    if config.stage not in _SCANS:
        return 0
    BT, BV, K = config.size("BT"), config.size("BV"), problem.K
    wide = 2 if config.stage == "rescan" else 3
    scores = 1 if config.stage == "rescan" else 2
    elements = wide * BT * K + scores * BT * BT
    if config.stage == "reverse_scan":
        elements += BT * BV
    return (config.size("num_stages") - 1) * elements * DTYPE_BYTES[problem.dtype]


def _reads_past_its_tiles(config: Config) -> bool:
    """Seen nine times on an H200, and never with other sizes; not understood.

    Products of 64 rows go by wgmma there, and that of BK by BK, S dS, does not.
    """
    slices = config.size("BT") == 64 and config.size("BK") < 64
    return slices and config["decay"] in FROM_START and language_of(config) == "triton"


def _least_of_grad_key(config: Config, problem: Problem) -> int:
    """Two tiles of states, three of values, three of keys, and one of G in fp32, loaded ahead."""
    BT, BK, V = config.size("BT"), config.size("BK"), problem.V
    elements = 2 * V * BK + 3 * BT * V + 3 * BT * BK
    each = DTYPE_BYTES[problem.dtype] * elements + DTYPE_BYTES["fp32"] * BT * BK
    return (config.size("num_stages") - 1) * each


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
    """Every config of the stage at this chunk size that is worth compiling."""
    knobs = own_knobs(stage)
    for values in itertools.product(*knobs.values()):
        config = Config.of(stage, {"BT": BT, **dict(zip(knobs, values, strict=True))})
        if why_hopeless(config, problem, device) is None:
            yield config


def forms(stage: str, problem: Problem, device: Device, BT: int) -> list[Config]:
    """For each form of the stage's kernel, the valid config nearest to where the form starts.

    Tried first: a form with 18 configs beside one with 660 would hardly be drawn in a short search.
    """
    default = default_config(stage, problem, BT=BT, arch=device.arch)
    # in fp16 the dyadic placements are the default
    dyadic = {**default_config(stage, replace(problem, dtype="fp16"), BT=BT)}
    dyadic |= {name: x for name, x in default.items() if name == "solve"}
    tilelang = {**default, **_TILELANG_START.get(stage, {})}
    if stage == "prepare" and problem.K < 128:
        tilelang["maxnreg"] = 64  # four programs to a multiprocessor, where their tiles fit
    nearest: dict[tuple[Knob | None, ...], Config] = {}
    for config in valid_configs(stage, problem, device, BT):
        form = form_of(config)
        start: Mapping[str, Knob] = tilelang if language_of(config) == "tilelang" else default
        if config.get("decay") in ("log", "tree"):
            start = dyadic
        if form not in nearest or _apart(config, start) < _apart(nearest[form], start):
            nearest[form] = config
    return list(nearest.values())


def form_of(config: Config) -> tuple[Knob | None, ...]:
    """What tells a kernel of its own from others of the stage."""
    return tuple(config.get(name) for name in _FORMS)


def neighbours(config: Config, problem: Problem, device: Device) -> Iterator[Config]:
    """Every config worth compiling that differs in one of the stage's own knobs."""
    for name, domain in own_knobs(config.stage).items():
        for value in domain:
            other = config.replace(**{name: value})
            if other != config and why_hopeless(other, problem, device) is None:
                yield other


def stages_moved(config: Config) -> tuple[str, ...]:
    """Other stages whose time depends on the config.

    rescan runs the segments whose starts scan kept. Ranked by its own time, scan had one segment a
    sequence instead of two at train4k: 0.323 ms forward for 0.328, and 1.515 for 1.475 in all.
    """
    own = config.max_segments != MAX_SEGMENTS
    return ("rescan",) if config.stage == "scan" and own else ()


def is_hopeless(stage: str, ms: float, best_ms: float) -> bool:
    """Whether a config with this time at one shape need not be timed at the others."""
    return ms > best_ms * (_HOPELESS_SCAN if stage in _SCANS else _HOPELESS)


def _apart(a: Config, b: Mapping[str, Knob]) -> int:
    return sum(a[name] != b[name] for name in a)


def suggest(trial: optuna.Trial, stage: str, problem: Problem, BT: int) -> Config:
    """Ask the sampler for the stage's own knobs (define-by-run); may return what is hopeless."""
    knobs: dict[str, Knob] = {"BT": BT}
    for name, domain in own_knobs(stage).items():
        chosen = trial.suggest_categorical(name, _possible(name, domain, problem))
        assert isinstance(chosen, int | str)
        knobs[name] = chosen
    return Config.of(stage, knobs)


def distributions(stage: str, problem: Problem) -> dict[str, optuna.distributions.BaseDistribution]:
    """The same space as `suggest` asks for, for trials that are filed without asking."""
    import optuna

    return {
        name: optuna.distributions.CategoricalDistribution(_possible(name, domain, problem))
        for name, domain in own_knobs(stage).items()
    }


def parameters(config: Config, problem: Problem) -> dict[str, Knob] | None:
    """The config as the sampler would have suggested it, or None where it never would."""
    found = {name: value for name, value in config.items() if name not in SHARED_KNOBS}
    for name, value in found.items():
        if value not in _possible(name, DOMAINS[config.stage][name], problem):
            return None
    return found


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


def _possible(name: str, domain: tuple[Knob, ...], problem: Problem) -> tuple[Knob, ...]:
    if name == "decay" and not problem.bound:
        return tuple(x for x in domain if x != "bounded")
    limit = {"BK": problem.K, "BV": problem.V}.get(name)
    if limit is None:
        return domain
    return tuple(x for x in domain if isinstance(x, int) and x <= limit)
