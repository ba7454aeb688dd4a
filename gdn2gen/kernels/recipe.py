"""Recipe: how a problem is solved, whole: its plan, and a config for every stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.config import Config, default_config, default_of, language_of
from gdn2gen.kernels.extras import OFF
from gdn2gen.kernels.limits import Knob, Place
from gdn2gen.kernels.options import serves_every_option
from gdn2gen.kernels.plans import LEVELS, PLANS, Level, Plan, level_of, plan_for, plans_of
from gdn2gen.kernels.scans import MAX_SEGMENTS, SEGMENT
from gdn2gen.kernels.stages import EVERY_STAGE
from gdn2gen.kernels.validity import why_invalid

# Chunks of which programs of four, as they are tuned, would be one to a multiprocessor of an H200,
# where two of `prepare` have room.
_FEW_CHUNKS: Final = 512
# Programs of `prepare` that an H200 has room for: more would be a second round.
_ONE_ROUND: Final = 264
_USUAL_CHUNK: Final = 32


@dataclass(frozen=True)
class Recipe:
    """A problem, a plan, and one config for each of its stages: `recipe["scan"]`.

    Crosses process borders; equal recipes run the same kernels, wherever they came from.
    """

    problem: Problem
    plan: Plan
    configs: tuple[Config, ...]
    """In the order of the plan's stages."""

    @classmethod
    def of(cls, problem: Problem, plan: str, configs: Mapping[str, Config]) -> Recipe:
        """Take the configs of the plan's stages out of `configs` (KeyError if one is missing).

        Raises UnsupportedError for a plan that does not serve the problem's recurrence.
        """
        chain = plan_for(plan, problem.op)
        return cls(problem, chain, tuple(configs[stage] for stage in chain.stages))

    @classmethod
    def default(
        cls,
        problem: Problem,
        plan: str | None = None,
        BT: int | None = None,
        *,
        arch: str | None = None,
    ) -> Recipe:
        """Every stage at its default: valid for every problem and device, and meant for `arch`.

        Of the plan that keeps least, unless one is named; in chunks of BT tokens (None: the
        default). Raises UnsupportedError for a plan that does not serve the problem's recurrence.
        """
        chosen = plans_of(LEVELS[0], problem.op)[0] if plan is None else plan
        chain = plan_for(chosen, problem.op)
        configs = (default_config(x, problem, BT=BT, arch=arch) for x in chain.stages)
        return cls(problem, chain, tuple(configs))

    def __getitem__(self, stage: str) -> Config:
        """The config of a stage; KeyError if the plan has no such stage."""
        return self.by_stage[stage]

    @property
    def by_stage(self) -> dict[str, Config]:
        return {config.stage: config for config in self.configs}

    @property
    def level(self) -> Level:
        """What the plan lets the forward keep."""
        return level_of(self.plan.name)

    @property
    def BT(self) -> int:
        """Tokens of a chunk, in all stages."""
        return self.configs[0].size("BT")

    @property
    def needs_triton_alone(self) -> bool:
        """Whether no stage is in another language, which not every machine can compile."""
        return all(language_of(config) == "triton" for config in self.configs)

    @property
    def serves_every_option(self) -> bool:
        """Whether no call that may run what is filed for the problem is refused, whatever its
        options. States on the way are one of them, which a scan of its own keeps."""
        configs = self.configs
        return not self.plan.instead and all(serves_every_option(x, self.problem) for x in configs)

    def max_segments(self, stage: str) -> int:
        """Segments of all heads and sequences at most; the forward's where they are given."""
        return self[self.plan.forward[-1] if takes_segments(stage) else stage].max_segments

    @property
    def saved_segments(self) -> int:
        """`max_segments` of the forward's scan, which what it saves depends on."""
        return self.max_segments(self.plan.forward[-1])

    def with_config(self, *configs: Config) -> Recipe:
        """The same with the configs of their stages exchanged."""
        changed = {config.stage: config for config in configs}
        return Recipe.of(self.problem, self.plan.name, {**self.by_stage, **changed})

    def everywhere(self, arch: str | None = None) -> Recipe:
        """What does the same and keeps the same in stages that serve every problem, and have forms
        in Triton: those that its plan has not are at their defaults (`Plan.instead`)."""
        if not self.plan.instead:
            return self
        default = Recipe.default(self.problem, self.plan.instead, self.BT, arch=arch)
        return default.with_config(*(x for x in self.configs if x.stage in default.by_stage))

    def serial(self, *stages: str) -> Recipe:
        """The same with one chain per sequence, in Triton, in those of the stages that it has."""
        recipe = self.everywhere()
        found = [recipe[x] for x in stages if x in recipe.plan.stages]
        return recipe.with_config(*(_serial(x, self.problem) for x in found))

    def keeping(self) -> Recipe:
        """The same with a scan that can keep states on the way."""
        return self.serial(*(name for name, x in EVERY_STAGE.items() if x.checkpoint_scalars))

    def for_few(self, regime: Regime) -> Recipe:
        """The same for sizes that leave most of a GPU idle, where it was chosen for larger ones.

        Chunks have programs of their own, for a program takes them one after the other, or share
        one with another where that is one round of programs and not two (1,024 tokens of 16 heads
        take 53.7 us for 55.7 on an H200). And short sequences, one segment each, have a serial
        scan, in the same language: a parallel one has nothing to join there, but a kernel that
        copies states.
        """
        sequences = max(1, regime.sequences)
        chunks = -(-regime.tokens // (sequences * self.BT))  # of a sequence
        changed = {}
        programs = chunks * sequences * regime.heads
        if "prepare" in self.plan.forward and programs <= _FEW_CHUNKS:
            own = self["prepare"].replace(chunks=1 if programs <= _ONE_ROUND else 2)
            fits = why_invalid(own, self.problem) is None
            changed["prepare"] = own if fits else own.replace(chunks=1)
        short = chunks <= SEGMENT and sequences * regime.heads <= MAX_SEGMENTS
        if "scan" in self.plan.forward and short:
            changed["scan"] = _chained(self["scan"])
        found = [
            x for name, x in changed.items()
            if x != self[name] and why_invalid(x, self.problem) is None
        ]  # fmt: skip
        return self.with_config(*found) if found else self

    def dependent(
        self, arch: str | None = None, *, signals: bool = True, backward: bool = True
    ) -> Recipe:
        """The same with launches that begin before the one before them in the pass has ended, in
        every stage that can, or the forward's alone; `signals`: as its programs say, and not as
        they end."""
        values = ("signal", "wait") if signals else ("wait",)
        found = []
        for config in self.configs if backward else map(self.__getitem__, self.plan.forward):
            others = (config.replace(pdl=x) for x in values)
            valid = (x for x in others if why_invalid(x, self.problem, arch) is None)
            found.append(next(valid, config))
        return self.with_config(*found)

    def independent(self) -> Recipe:
        """The same with launches that follow each other, as those are that nothing comes before."""
        if not any("pdl" in x for x in self.configs):
            return self
        return self.with_config(*(x.replace(pdl=OFF) for x in self.configs if "pdl" in x))

    def fitted(self, problem: Problem, arch: str | None = None) -> Recipe:
        """The same for other head dims: tiles no wider than these need, and the default config of
        a stage whose form has no kernels for them; of a plan that has none, the one instead."""
        own = [self[x] for x in self.plan.forward]
        refused = any(why_invalid(x, problem, arch) is not None for x in own)
        recipe = self.everywhere(arch) if refused else self
        configs = (fitted(x, problem, arch) for x in recipe.configs)
        return Recipe(problem, recipe.plan, tuple(configs))

    def distance(self, other: Recipe) -> int:
        """Number of knobs in which two recipes of one plan differ."""
        pairs = zip(self.configs, other.configs, strict=True)
        return sum(a.get(name) != b.get(name) for a, b in pairs for name in {*a, *b})

    def __str__(self) -> str:
        return f"{self.plan.name}: " + "; ".join(f"{x.stage} [{x}]" for x in self.configs)


def takes_segments(stage: str) -> bool:
    """Whether it starts from what the forward kept of its segments: states, or transitions."""
    return any(x.name in ("S_seg", "M_seg") for x in EVERY_STAGE[stage].inputs)


def is_served(plan: str, problem: Problem, arch: str | None = None) -> bool:
    """Whether the plan can serve the problem there: all can but those that name one instead."""
    if not plan_for(plan, problem.op).instead:
        return True
    configs = Recipe.default(problem, plan, arch=arch).configs
    return all(why_invalid(x, problem, arch) is None for x in configs)


def has_use(plan: str, regime: Regime) -> bool:
    """Whether the plan may do better at such sizes than the one that it names instead: transitions
    are kept of all segments but the first and the last, and a forward in one kernel has none, but
    one chain a sequence (GDN-2's at few8k: 0.35 ms and more for 0.14)."""
    chain = PLANS[plan]
    keeps = any("M_seg" in {x.name for x in EVERY_STAGE[y].inputs} for y in chain.backward)
    if not keeps and len(chain.forward) > 1:
        return True
    sequences = max(1, regime.sequences)
    longest = -(-regime.tokens // (sequences * _USUAL_CHUNK * SEGMENT))
    many = min(longest, MAX_SEGMENTS // (sequences * regime.heads)) > 2
    return many if keeps else not many


def _chained(config: Config) -> Config:
    """Its serial form in the same language; there may be none. Some stages have no other. What
    merges and folds segments goes with them: with it no config of the serial form is valid."""
    chained: dict[str, Knob] = {"segments": "serial", "max_segments": MAX_SEGMENTS}
    chained |= {"merge": OFF, "reach": OFF}
    return config.replace(**{name: x for name, x in chained.items() if name in config})


def _serial(config: Config, problem: Problem) -> Config:
    """As tuned where the tuned form is in Triton, else the default of the serial one."""
    if language_of(config) == "triton":
        found = _chained(config)
        if why_invalid(found, problem) is None:
            return found
    place, stage = Place(problem, config.size("BT")), EVERY_STAGE[config.stage]
    (form,) = (x for x in stage.forms if (x.language, x.name) == ("triton", "serial"))
    return default_of(config.stage, form, place)


def fitted(config: Config, problem: Problem, arch: str | None) -> Config:
    """The same with tiles no wider than the problem needs; the default of its stage where its form
    has no kernels for the problem."""
    form = config.form
    place = form.tiled(Place(problem, config.size("BT"), arch))
    tiles = {tile: config.size(tile) for tile, _ in form.tiles if tile in config}
    for tile, dim in form.tiles:
        if tile in tiles:
            widest = form.widest(tile, place[dim])
            tiles[tile] = widest if tile in form.whole else min(tiles[tile], widest)
    # a tile that is exactly as wide as a head dim may be none that the form takes
    if all(width in form.knobs[tile] for tile, width in tiles.items()):
        found = config.replace(**tiles)
        if why_invalid(found, problem, arch) is None:
            return found
    return default_config(config.stage, problem, BT=place.BT, arch=arch)
