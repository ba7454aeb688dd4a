"""A folder of kernels that ships in a container, so that a process there compiles nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from gdn2gen.base.device import Device
from gdn2gen.base.errors import BuildError, DispatchError, InputError
from gdn2gen.base.worker import Worker
from gdn2gen.codegen import shipped
from gdn2gen.codegen.ship import (
    ship_launcher,
    ship_slots,
    ship_stage,
    ship_tables,
    surroundings,
)
from gdn2gen.family.mamba3_problem import MAMBA3, Mamba3Problem, usual_mamba3_problem
from gdn2gen.family.parts import DecayGateProblem, PartProblem
from gdn2gen.family.prefill import PrefillProblem
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, default_config, language_of
from gdn2gen.kernels.mamba3_chunks import by_chunks
from gdn2gen.kernels.parts import DECAY_GATE, DECAY_GATE_BACKWARD, decay_gate_knobs
from gdn2gen.kernels.plans import LEVELS, keeps_least
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store.dispatch import find_recipe, in_triton
from gdn2gen.store.gates import find_call
from gdn2gen.store.mamba3 import scan_problem, scan_shape
from gdn2gen.store.pins import Pin
from gdn2gen.workflows.mamba3 import (
    at_shape,
    mamba3_stages,
    mamba3_step_stage,
)
from gdn2gen.workflows.wanted import (
    Shapes,
    at,
    decoding_problem_from,
    expected_from,
    levels_from,
    present_or,
    problem_from,
    shapes_from,
    usual_shapes,
)

# A program of TileLang takes 10 s, and one of a wide head dim several times as long.
_TIMEOUT_S: Final = 900.0

Task = tuple[str, tuple[Any, ...]]
"""What a worker does: `module:function` and its arguments but for the device."""


@dataclass(frozen=True)
class Compiled:
    """What `compile_kernels` wrote."""

    folder: Path
    device: Device
    recipes: list[Recipe]
    seconds: dict[str, float]
    """Of each kernel, by stage and config."""
    lacks: str | None
    """What the folder could not be given here, and how it can be; None if it is whole."""

    @property
    def nbytes(self) -> int:
        """Of all that lies in the folder."""
        return sum(x.stat().st_size for x in self.folder.rglob("*") if x.is_file())


def compile_kernels(
    out_dir: str | Path,
    shapes: Shapes | None = None,
    *,
    op: str = "gdn2",
    head_dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bf16",
    levels: str | Iterable[str] = LEVELS[0],
    decay: str | None = None,
    backward: bool = True,
    decode: Shapes = (),
    decode_fields: Mapping[str, bool] | None = None,
    serving: bool = False,
    target: str | None = None,
    language: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    **fields: Any,
) -> Compiled:
    """Compile what calls at these shapes run into `out_dir`, as `gdn2gen compile` does.

    A process whose GDN2GEN_COMPILED_DIR names the folder runs these kernels and their recipes
    without nvcc, a C compiler or a folder that it may write; at other lengths it runs the recipe
    that is compiled for the nearest. A folder of the same toolchain and GPU is added to.

    decay: `weak` or `strong`, what the calls expect (None: what this process does, see
    `gdn2gen.expected_decay`). Where strong decay is expected and nothing is compiled for it, calls
    run what is compiled for weak decay.
    backward: also the kernels of gradients.
    decode: shapes of calls over a few tokens (`64x1x16`: 64 sequences of one token, 16 value
    heads); decode_fields: of `family.decoding.DecodingProblem`, such as pool, indexed, state_bf16.
    serving: also the kernels of prefill with states in slots of a pool, fp32 or bf16, at multiples
    of 8 elements, of checkpoints in it, and of `return_intermediate_states`; at level lean, which
    these run.
    language: `triton` for a folder that needs no TileLang.
    The rest is as in `gdn2gen.explain`.

    Needs no GPU, but the compilers: a C compiler, and nvcc or NVRTC for TileLang. Raises BuildError
    with a compiler's words, and InputError for a folder of another toolchain or GPU.
    """
    if language not in (None, "triton"):
        raise InputError(f"kernels are as tuned or language='triton', but got {language!r}")
    shapes = usual_shapes(shapes, op)
    folder = Path(out_dir).resolve()
    device, present = present_or(target)
    known = _known(folder, device)
    tasks: dict[Task, None] = {("ship_launcher", ()): None}
    if op == MAMBA3:
        if serving or decode_fields:
            raise InputError("mamba3 has no states in a pool: leave serving and decode_fields out")
        asked = usual_mamba3_problem(head_dim, value_dim, dtype, fields)
        tasks |= dict.fromkeys(_around(asked, shapes, decode, device, backward=backward))
        # its scan is that of calls of chunk_simple_gla, at the levels of its own
        wanted = shapes_from(shapes) if shapes and not by_chunks(asked.dtype) else ()
        scans = [scan_shape(x) for x in wanted]
        shapes, decode, problem = scans, (), scan_problem(asked)
    else:
        problem = problem_from(op, head_dim, value_dim, dtype, fields)
    pins: list[Pin] = []
    for shape in shapes_from(shapes) if shapes else ():
        for level in levels_from(levels):
            given: dict[str, Any] = {"level": level, "decay": expected_from(decay)}
            # without TileLang what has its gate in the kernels is no slower
            find = find_recipe if language else find_call
            found = find(at(problem, shape), shape.regime, device, **given)
            recipe = (in_triton(found) if language else found).recipe
            where = level, device.name, device.arch
            pins.append(Pin(recipe, shape.regime, *where, found.decay))
            tasks |= dict.fromkeys(_tasks(recipe, backward=backward))
            if found.gate_apart is not None:
                tasks |= dict.fromkeys(_gate(at(problem, shape), backward=backward))
            if serving:
                tasks |= dict.fromkeys(_serving(recipe))
    for shape in shapes_from(decode) if decode else ():
        tasks |= dict.fromkeys(_decoding(problem, decode_fields or {}, shape, device))
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    seconds, lacks = _run([*tasks], folder, device, present, say)
    documents = [x.document for x in pins]
    documents += [x for x in known if x not in documents]
    shipped.write_manifest(folder, device.name, device.arch, documents)
    return Compiled(folder, device, [x.recipe for x in pins], seconds, lacks)


def _known(folder: Path, device: Device) -> list[dict[str, Any]]:
    """The recipes of a folder that is there. Raises InputError unless it can be added to."""
    if not folder.exists() or not any(folder.iterdir()):
        return []
    if {x.name for x in folder.iterdir()} <= {"triton", "programs", "kernels"}:
        return []  # what a run that was interrupted left
    try:
        found = shipped.read_manifest(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} holds something else than compiled kernels ({error}); name a new folder"
        ) from error
    made = found.get("toolchain"), found.get("arch")
    if made != (shipped.toolchain(), device.arch):
        raise InputError(
            f"{folder} was compiled by {made[0]} for {made[1]}, but {shipped.toolchain()} and "
            f"{device.arch} are wanted; name a new folder"
        )
    return [x for x in found.get("recipes") or () if _is_current(x)]


def _is_current(document: dict[str, Any]) -> bool:
    """Whether a recipe that a folder has is of the present templates: others are dropped."""
    try:
        Pin.of_document(document)
    except DispatchError:
        return False
    return True


def _tasks(recipe: Recipe, *, backward: bool) -> Iterator[Task]:
    """A worker's calls for all kernels of a recipe."""
    problem, plan = recipe.problem, recipe.plan
    for stage in plan.forward:
        yield "ship_stage", (problem, stage, recipe[stage])
    if backward:
        # without a gradient of the final state, which a training step seldom has, and with it
        for wanted in dict.fromkeys((replace(problem, final_state=False), problem)):
            for stage in plan.backward:
                yield "ship_stage", (wanted, stage, recipe[stage])
    if problem.varlen:
        yield "ship_tables", (problem, recipe.BT)


def _gate(problem: Problem, *, backward: bool) -> Iterator[Task]:
    """A worker's calls for the kernels of a decay's gate before such calls."""
    own = DecayGateProblem(dtype=problem.gate_dtype, size=problem.K, gate=problem.gate)
    for stage in (DECAY_GATE, DECAY_GATE_BACKWARD)[: 2 if backward else 1]:
        config = default_config(stage.name, own).replace(**decay_gate_knobs(stage))
        yield "ship_stage", (own, stage.name, config)


def _around(
    problem: Mamba3Problem, shapes: Shapes, decode: Shapes, device: Device, *, backward: bool
) -> Iterator[Task]:
    """A worker's calls for the kernels around Mamba-3's scan, and of its steps."""
    for shape in shapes_from(shapes) if shapes else ():
        for found in mamba3_stages(at_shape(problem, shape), shape, device, backward=backward):
            yield "ship_stage", found
    for shape in shapes_from(decode) if decode else ():
        yield "ship_stage", mamba3_step_stage(problem, shape, device)


def _serving(recipe: Recipe) -> Iterator[Task]:
    """Of prefill with states in a pool, and on the way, if the recipe is one that it runs."""
    if not keeps_least(recipe.plan):
        return
    pooled = replace(recipe.problem, initial_state=True, final_state=True)
    yield from _tasks(replace(recipe, problem=pooled), backward=False)
    apart = recipe.keeping()
    last = apart.plan.forward[-1]
    scan = apart[last]
    # where the recipe's own is a stage that keeps no states on the way
    for stage in apart.plan.forward[:-1]:
        if stage not in recipe.plan.forward:
            for problem in dict.fromkeys((recipe.problem, pooled)):
                yield "ship_stage", (problem, stage, apart[stage])
    for problem in dict.fromkeys((recipe.problem, pooled)):
        yield "ship_stage", (PrefillProblem.of(problem, problem.dtype, False), last, scan)
    for pool, indices in product(("fp32", "bf16"), ("int32", "int64")):
        yield "ship_stage", (PrefillProblem.of(pooled, pool, False), last, scan)
        for flagged, checkpoints in product((False, True), (False, True)):
            yield "ship_slots", (pooled, pool, indices, flagged, checkpoints)


def _decoding(
    problem: Problem, fields: Mapping[str, bool], shape: Shape, device: Device
) -> Iterator[Task]:
    from gdn2gen.runtime.decoding import configs_at

    wanted = decoding_problem_from(problem, fields, shape)
    # where it is shipped to, this machine's tuned files may not be
    for config in configs_at(wanted, shape.regime.sequences, shape.H, device):
        yield "ship_stage", (wanted, "recurrent", config)


def _run(
    tasks: list[Task], folder: Path, device: Device, present: bool, say: Callable[[str], None]
) -> tuple[dict[str, float], str | None]:
    """Seconds of each kernel, and what the launcher lacks. Raises BuildError."""
    module, lacks, seconds = ship_stage.__module__, None, dict[str, float]()
    assert {ship_stage, ship_tables, ship_slots, ship_launcher}
    with tempfile.TemporaryDirectory() as scratch:
        workers = [
            Worker(surroundings(folder, Path(scratch)))
            for _ in range(min(len(tasks), os.cpu_count() or 1, 16))
        ]
        free: SimpleQueue[Worker] = SimpleQueue()
        for worker in workers:
            free.put(worker)

        def run(task: Task) -> Any:
            name, given = task
            arguments = (present,) if name == "ship_launcher" else (*given, device, present)
            worker = free.get()
            try:
                return worker.call(f"{module}:{name}", *arguments, timeout=_TIMEOUT_S)
            finally:
                free.put(worker)

        try:
            with ThreadPoolExecutor(len(workers)) as pool:
                for task, outcome in zip(tasks, pool.map(run, tasks), strict=True):
                    if not outcome.ok:
                        raise BuildError(f"{_name(task)}: {outcome.reason}")
                    if task[0] == "ship_launcher":
                        lacks = outcome.value
                        continue
                    seconds[_name(task)] = outcome.get()
                    say(f"compiled {len(seconds)} of {len(tasks) - 1}: {_name(task)}")
        finally:
            for worker in workers:
                worker.close()
    return seconds, lacks


def _name(task: Task) -> str:
    name, given = task
    if name == "ship_launcher":
        return "Triton's launcher"
    if name == "ship_tables":
        return f"chunk_tables [BT={given[1]}]"
    if name == "ship_slots":
        _, pool, indices, *extras = given
        words = ("has_initial_state", "checkpoints")
        with_them = [x for x, wanted in zip(words, extras, strict=True) if wanted]
        return " ".join([f"state_slots [{pool} {indices}]", *with_them])
    problem, stage, config = given
    if isinstance(problem, PartProblem):
        return " ".join([f"{stage} [{config}]", *problem.extras])
    assert isinstance(problem, Problem) and isinstance(config, Config)
    state = " final_state" if problem.final_state else ""
    if isinstance(problem, PrefillProblem):
        state += f" checkpoints={problem.checkpoints}"
    return f"{stage} [{config} language={language_of(config)}]{state}"
