"""A package of kernels for a recipe that has not run yet: compiled and checked, then written."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from gdn2gen.base.decay import WEAK
from gdn2gen.base.device import Device
from gdn2gen.base.environment import check_compiles
from gdn2gen.base.errors import BuildError, TuneError
from gdn2gen.base.outcome import Outcome
from gdn2gen.codegen.build import Resources
from gdn2gen.codegen.package import check_folder, generate_package
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, default_config, language_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store.dispatch import Found, generate_command, in_triton
from gdn2gen.store.sizes import find_recipe_of_any_size
from gdn2gen.store.verified import Place, is_verified
from gdn2gen.tuning.gpu.attempt import fitting, right
from gdn2gen.tuning.gpu.backend import WorkerBackend
from gdn2gen.tuning.offline.run import ProcessBackend
from gdn2gen.tuning.proof import Proof
from gdn2gen.tuning.space import neighbours


@dataclass(frozen=True)
class RecipeProof(Proof):
    """And of which recipe that is."""

    recipe: Recipe


def is_proven(found: Found) -> bool:
    """Whether its kernels have run at these head dims: what is on file has, and so have the
    defaults of what is verified there."""
    known = found.source in ("exact", "nearest")
    return known or (found.source == "default" and _is_verified(found))


def _is_verified(found: Found) -> bool:
    arch = None if found.device is None else found.device.arch
    return is_verified(*Place.of(found.recipe.problem), arch)


def prove(
    recipe: Recipe,
    device: Device,
    *,
    present: bool,
    say: Callable[[str], None] = lambda _: None,
) -> RecipeProof:
    """Compile every stage for `device`, and compare the results with the fp64 reference: on the GPU
    if it is `present`, else in Triton's interpreter in fp32.

    A stage whose kernel does not compile, or does not fit, gets its default config, or where that
    does not fit either (in fp32 grad_key's spills 1048 bytes a thread at K = 48) the first of those
    one knob away that does, or spills least. The interpreter checks Triton's default for a stage in
    TileLang, which only a GPU can run. Raises BuildError if none of them compiles into the shared
    memory that there is, and TuneError if results are off.
    """
    backend = WorkerBackend(device) if present else ProcessBackend(device)
    try:
        recipe, resources, instead = _compiled(recipe, device, backend.compile, say)
        if isinstance(backend, WorkerBackend):
            say(f"checking on {device.name}")
            where, checked = device.name, right(backend.check(recipe, full=False))
        else:
            say("checking in Triton's interpreter")
            interpreted = _interpretable(recipe)
            where, checked = _place(recipe), right(backend.interpret(interpreted))
    finally:
        backend.close()
    if not checked.ok:
        raise TuneError(
            f"the kernels of {recipe} failed their check on {where}, and nothing was written: "
            f"{checked.reason}"
        )
    return RecipeProof(resources, instead, where, dict(checked.get().errors), recipe)


def _compiled(
    recipe: Recipe,
    device: Device,
    compiles: Callable[[Problem, Config], Future[Outcome[Resources]]],
    say: Callable[[str], None],
) -> tuple[Recipe, dict[str, Resources], dict[str, str]]:
    problem, resources, instead = recipe.problem, dict[str, Resources](), dict[str, str]()
    waiting = {config.stage: compiles(problem, config) for config in recipe.configs}
    for stage, future in waiting.items():
        say(f"compiling {stage}")
        compiled = future.result()
        built = fitting(compiled, device)
        if not built.ok:
            instead[stage] = built.reason
            config, built = _standing_in(recipe, stage, device, compiles, compiled)
            recipe = recipe.with_config(config)
        resources[stage] = built.get()
    return recipe, resources, instead


def _standing_in(
    recipe: Recipe,
    stage: str,
    device: Device,
    compiles: Callable[[Problem, Config], Future[Outcome[Resources]]],
    compiled: Outcome[Resources],
) -> tuple[Config, Outcome[Resources]]:
    """The default config of a stage whose own came to `compiled`, or the first beside it that fits;
    or where all of them spill more than a search lets onto a GPU, the one that does so least. Calls
    would run the default: of fp32 its scan for sm_120 spills 952 bytes at K = 256, V = 512."""
    default = default_config(stage, recipe.problem, BT=recipe.BT, arch=device.arch)
    tried = {recipe[stage]: compiled}
    for config in (default, *neighbours(default, recipe.problem, device)):
        if config not in tried:
            tried[config] = compiles(recipe.problem, config).result()
            if fitting(tried[config], device).ok:
                return config, tried[config]
    spilled = {
        config: built.get().spill_bytes
        for config, built in tried.items()
        if built.ok and built.get().shared_bytes <= device.shared_bytes
    }
    if not spilled:
        raise BuildError(
            f"the default {stage} [{default}] does not fit {device.name}: "
            f"{fitting(tried[default], device).reason}; nor does any config one knob away from it. "
            "`gdn2gen generate --tune` searches among all"
        )
    least = min(spilled, key=lambda config: spilled[config])
    return least, tried[least]


def _interpretable(recipe: Recipe) -> Recipe:
    """The same with Triton's default for every stage in another language."""
    recipe = recipe.everywhere()
    others = [x.stage for x in recipe.configs if language_of(x) != "triton"]
    return recipe.with_config(*(default_config(x, recipe.problem, BT=recipe.BT) for x in others))


def _place(recipe: Recipe) -> str:
    stages = [x.stage for x in recipe.configs if language_of(x) != "triton"]
    where = "Triton's interpreter in fp32"
    return f"{where} (not {', '.join(stages)}, in TileLang)" if stages else where


def proven(found: Found, proof: RecipeProof) -> Found:
    """`found` with the recipe that was proven."""
    why = found.why
    if proof.instead:
        why += f"; what fits better stands in for {', '.join(proof.instead)}"
    return replace(found, recipe=proof.recipe, why=why)


@dataclass(frozen=True)
class Package:
    """What `generate` wrote."""

    files: list[Path]
    found: Found
    """The recipe, and where it came from."""
    proof: Proof | None
    """None for a recipe whose kernels had run before."""


def make(
    problem: Problem,
    shape: Shape,
    device: Device,
    out_dir: str | Path,
    *,
    present: bool,
    level: str,
    language: str | None,
    force: bool,
    say: Callable[[str], None],
    decay: str = WEAK,
) -> Package:
    """Find the recipe, prove it unless its kernels ran at these head dims, write the package."""
    check_compiles()  # and of what had run before, no text as the interpreter takes it is written
    check_folder(Path(out_dir), force=force)
    found = find_recipe_of_any_size(problem, shape.regime, device, level=level, decay=decay)
    found = in_triton(found) if language == "triton" else found
    proof = None
    if not is_proven(found):
        proof = prove(found.recipe, device, present=present, say=say)
        found = proven(found, proof)
    command = generate_command(found)
    # less the folders of this machine
    origin = f"{found.source}: {found.why.partition('; looked at')[0]}"
    files = generate_package(found.recipe, out_dir, command, origin=origin, force=force)
    return Package(files, found, proof)
