"""A package of Mamba-3's kernels over chunks: found, compiled and checked, then written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from gdn2gen.base.device import Device
from gdn2gen.base.environment import check_compiles
from gdn2gen.base.errors import BuildError, InputError, TuneError
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.worker import CompilePool, Worker, compile_slots
from gdn2gen.codegen.build import Resources
from gdn2gen.codegen.package import check_folder, configs_of, generate_mamba3_package
from gdn2gen.family.mamba3_problem import MAMBA3, Mamba3Problem, usual_mamba3_problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3_chunks import CHUNKS
from gdn2gen.measure.compiling import COMPILE_SECONDS
from gdn2gen.store.mamba3 import Mamba3Found, find_mamba3
from gdn2gen.store.verified import Place, is_verified
from gdn2gen.tuning.gpu.attempt import fitting
from gdn2gen.tuning.gpu.parts import check_parts, interpret_parts, interpreting_worker, parts_worker
from gdn2gen.tuning.proof import Proof

Knobs = Mapping[str, Mapping[str, Knob]]
Compile = Callable[[Mamba3Problem, Config], Future[Outcome[Resources]]]
# Heads of the check in the interpreter, and tokens: more than a chunk.
_FEWEST: Final = 2
_CHECKED_TOKENS: Final = 70


@dataclass(frozen=True)
class Mamba3Package:
    """What `generate` wrote of Mamba-3."""

    files: list[Path]
    found: Mamba3Found
    """Its kernels' knobs, and where they came from."""
    proof: Proof | None
    """None for kernels that had run before at these head dims."""


def make_mamba3(
    problem: Mamba3Problem,
    shape: Shape,
    device: Device,
    out_dir: str | Path,
    *,
    present: bool,
    level: str,
    language: str | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Mamba3Package:
    """Find the knobs, prove the kernels unless they ran at these head dims, write the package.

    All its kernels are in Triton, whatever `language` is. Level `fast` has its calls keep the
    states before chunks unless they say otherwise.
    """
    if problem.weight_dtype != Mamba3Problem.weight_dtype:
        raise InputError(
            f"a package takes biases and D of any dtype, and casts them to fp32: leave "
            f"weight_dtype out, got {problem.weight_dtype!r}"
        )
    check_compiles()
    check_folder(Path(out_dir), force=force)
    found = find_mamba3(problem, shape, device, level=level, kind=CHUNKS)
    found = replace(found, knobs={x: found.knobs[x] for x in configs_of(problem, found.knobs)})
    proof = None
    if not is_verified(*Place.of(problem), device.arch):
        proof, knobs = _prove(found, present=present, say=say)
        found = replace(found, knobs=found.knobs | knobs)
    files = generate_mamba3_package(
        problem,
        found.knobs,
        out_dir,
        mamba3_command(problem, shape),
        origin=_origin(found),
        fast=level == "fast",
        force=force,
    )
    return Mamba3Package(files, found, proof)


def mamba3_command(problem: Mamba3Problem, shape: Shape) -> str:
    """What makes the package again, less the GPU."""
    usual = usual_mamba3_problem(problem.state_size, problem.head_dim, problem.dtype, {})
    words = []
    for x in fields(problem):
        value = getattr(problem, x.name)
        if value != getattr(usual, x.name):
            said = "no" if value is False else value
            words.append(x.name if value is True else f"{x.name}:{said}")
    given = f"--with {','.join(words)} " if words else ""
    return (
        f"gdn2gen generate --op {MAMBA3} --head-dim {problem.state_size},{problem.head_dim} "
        f"--dtype {problem.dtype} {given}--shape {shape.name} --out DIR"
    )


def _origin(found: Mamba3Found) -> str:
    """Where its knobs came from, in words."""
    stages = configs_of(found.problem, found.knobs)
    words = {
        "tuned": f"tuned on {found.device.name}",
        "transferred": f"tuned on another {found.device.arch}, not on {found.device.name}",
        "rule": "by a rule on the sizes, not tuned",
    }
    of = {source: [x for x in stages if found.sources[x] == source] for source in words}
    said = [f"{', '.join(names)}: {words[source]}" for source, names in of.items() if names]
    return f"{'; '.join(said)}; for {found.shape.name}"


def _prove(
    found: Mamba3Found, *, present: bool, say: Callable[[str], None]
) -> tuple[Proof, dict[str, dict[str, Knob]]]:
    """Compile every kernel for the device, and compare results with the fp64 reference: on the GPU
    if it is `present`, else in Triton's interpreter in fp32; and the knobs that do.

    Raises BuildError if a default does not compile, and TuneError if results are off.
    """
    pool = CompilePool(compile_slots())

    def compile_one(problem: Mamba3Problem, config: Config) -> Future[Outcome[Resources]]:
        target = "gdn2gen.codegen.build:compile_ahead"
        given = (problem, config.stage, config, found.device)
        return pool.submit(target, *given, timeout=COMPILE_SECONDS)

    try:
        knobs, resources, instead = _compiled(found, compile_one, say)
    finally:
        pool.close()
    worker = parts_worker() if present else interpreting_worker()
    where = found.device.name if present else "Triton's interpreter in fp32"
    say(f"checking on {where}")
    try:
        checked = _check(worker, found, knobs, present=present)
    finally:
        worker.close()
    errors, wrong = checked.value if checked.value is not None else ({}, checked.reason)
    if wrong:
        raise TuneError(
            f"the kernels of {MAMBA3} [{knobs}] failed their check on {where}, and nothing was "
            f"written: {wrong}"
        )
    return Proof(resources, instead, where, errors), knobs


def _check(
    worker: Worker, found: Mamba3Found, knobs: Knobs, *, present: bool
) -> Outcome[tuple[dict[str, float], str]]:
    BT = int(next(iter(knobs.values()))["BT"])
    if present:
        return check_parts(worker.call, found.problem, found.shape, BT, knobs)
    heads = math.lcm(_FEWEST, *(int(x["BH"]) for x in knobs.values() if "BH" in x))
    small = Shape(f"1x{_CHECKED_TOKENS}x{heads}/1", 1, _CHECKED_TOKENS, heads, groups=1)
    return interpret_parts(worker.call, replace(found.problem, dtype="fp32"), small, BT, knobs)


def _compiled(
    found: Mamba3Found, compiles: Compile, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, Knob]], dict[str, Resources], dict[str, str]]:
    """Knobs by stage, of defaults where others do not compile or fit; and why."""
    knobs: dict[str, dict[str, Knob]] = {}
    resources: dict[str, Resources] = {}
    instead: dict[str, str] = {}
    configs = configs_of(found.problem, found.knobs)
    waiting = {stage: compiles(own, config) for stage, (own, config) in configs.items()}
    for stage, future in waiting.items():
        say(f"compiling {stage}")
        own, config = configs[stage]
        built = fitting(future.result(), found.device)
        if not built.ok:
            instead[stage] = built.reason
            config = default_config(stage, own, BT=config.size("BT"), arch=found.device.arch)
            built = fitting(compiles(own, config).result(), found.device)
        if not built.ok:
            raise BuildError(
                f"the default {stage} [{config}] does not fit {found.device.name}: {built.reason}"
            )
        given: dict[str, Any] = dict(config)
        knobs[stage] = {x: y for x, y in given.items() if x != "language"}
        resources[stage] = built.get()
    return knobs, resources, instead
