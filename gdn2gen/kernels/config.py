"""Config: one frozen set of knobs of a stage, which tell its form; and the one without tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from gdn2gen.base.errors import ConfigError
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import STEP_OPS
from gdn2gen.kernels.extras import EXTRAS, OFF, known
from gdn2gen.kernels.limits import Knob, Place
from gdn2gen.kernels.scans import MAX_SEGMENTS
from gdn2gen.kernels.stage import Form, Operand, Stage
from gdn2gen.kernels.stages import EVERY_STAGE

# The same for all stages of a plan.
SHARED_KNOBS: Final = ("BT",)
# What only the host reads: configs that differ in these have the same kernels.
HOST_KNOBS: Final = ("max_segments",)


@dataclass(frozen=True)
class Config(Mapping[str, Knob]):
    """One frozen set of knobs of one stage; reads like a mapping and sorts its knobs by name."""

    stage: str
    knobs: tuple[tuple[str, Knob], ...]

    @classmethod
    def of(cls, stage: str, knobs: Mapping[str, Knob]) -> Config:
        """Check `knobs` against the domains of `stage` and freeze them.

        All must be given, but for extras: a config without one has it off.
        """
        if stage not in EVERY_STAGE:
            raise ConfigError(f"unknown stage {stage!r}; known: {', '.join(EVERY_STAGE)}")
        domains = EVERY_STAGE[stage].domains
        extra = {name: (*EXTRAS[name], OFF) for name in knobs if name in {*EXTRAS} - {*domains}}
        if set(knobs) != {*domains, *extra}:
            raise ConfigError(f"{stage} takes the knobs {sorted(domains)}, but got {sorted(knobs)}")
        domains = {**domains, **extra}
        for name, value in knobs.items():
            if value not in domains[name]:
                raise ConfigError(
                    f"{stage}.{name} must be one of {domains[name]}, but got {value!r}"
                )
        on = {name: x for name, x in knobs.items() if name not in extra or x != OFF}
        return cls(stage, tuple(sorted(on.items())))

    def __getitem__(self, name: str) -> Knob:
        for key, value in self.knobs:
            if key == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.knobs)

    def __len__(self) -> int:
        return len(self.knobs)

    def size(self, name: str) -> int:
        """An integer knob."""
        value = self[name]
        assert isinstance(value, int), f"{self.stage}.{name} is not a size: {value!r}"
        return value

    def replace(self, **knobs: Knob) -> Config:
        return Config.of(self.stage, {**self, **knobs})

    @property
    def form(self) -> Form:
        """The form that the knobs select; raises ConfigError where the stage has none such."""
        stage = EVERY_STAGE[self.stage]
        form = stage.form_of(self)
        if form is None:
            raise ConfigError(stage.why_no_form(self))
        return form

    def operands(self, problem: Compiled) -> list[Operand]:
        """Arguments of its kernel, in order: its stage's, but for scratch of other forms, and for
        what extras read that it has not."""
        form, stage = self.form, EVERY_STAGE[self.stage]
        return [x for x in stage.operands(problem, known(self)) if form.uses(x)]

    @property
    def max_segments(self) -> int:
        """Of all heads and sequences together; the usual where the stage has no such knob."""
        return self.size("max_segments") if "max_segments" in self else MAX_SEGMENTS

    @property
    def of_kernel(self) -> Config:
        """Less what only the host reads, for templates."""
        knobs = tuple(knob for knob in self.knobs if knob[0] not in HOST_KNOBS)
        return Config(self.stage, knobs)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.knobs)


def language_of(config: Config) -> str:
    """The language of the kernel that the config asks for."""
    return str(config["language"])


def default_config(
    stage: str, problem: Compiled, *, BT: int | None = None, arch: str | None = None
) -> Config:
    """The config used where nothing was tuned: valid for every problem and device.

    For GPUs of `arch` as in `sm_90`, or where that is not known.
    """
    place = Place(problem, BT or _usual_chunk(EVERY_STAGE[stage], problem), arch)
    return default_of(stage, EVERY_STAGE[stage].default_form(place), place)


def _usual_chunk(stage: Stage, problem: Compiled) -> int:
    """Tokens of a chunk where nothing is tuned."""
    if 32 not in stage.chunks:
        return int(stage.chunks[0])
    # Where scores are a group's, longer chunks cost a head nothing, and halve the states between
    # stages; but of fp32 their tiles take too many registers.
    grouped = isinstance(problem, Problem) and problem.op in STEP_OPS
    return 64 if grouped and problem.dtype != "fp32" else 32


def default_of(stage: str, form: Form, place: Place) -> Config:
    """Where a form starts: its knobs without tuning. Not valid where the form cannot run."""
    selecting = EVERY_STAGE[stage].selecting(form)
    return Config.of(stage, {"BT": place.BT, **selecting, **form.default(place)})


def in_triton(config: Config, problem: Compiled) -> Config:
    """What stands in for a config in another language: its operands are the same.

    The default of the Triton form that the stage's selector calls the same, and of the stage where
    there is no such form.
    """
    stage, place = EVERY_STAGE[config.stage], Place(problem, config.size("BT"))
    name = config.form.name
    alike = [x for x in stage.forms if (x.language, x.name) == ("triton", name) and x.serves(place)]
    return default_of(config.stage, alike[0] if alike else stage.default_form(place), place)
