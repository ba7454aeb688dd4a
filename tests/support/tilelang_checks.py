"""TileLang's forms of scans and of blocks beside Triton's, whose launches they take tensors of.

They need TRITON_INTERPRET=1 before triton is imported, so the tests call this in a process of its
own: `python tilelang_checks.py 'gdn2 64 40 layer 1' ...`, a member, head dim (104x128 where values
have another), tokens, gate pattern, and chunks of a block (0: the scans of plan `states`); then, of
the scans in segments alone, chunks of a segment (or -), and flags of the problem, `twice` (two
sequences and heads), `stateless`, `raw` (no l2norm), `lean` (with the scan again; of 0, the scans
of that plan), `wide` (programs of 128 rows, two warp groups), `transitions` (of segments, kept for
the backward), `cut` (merge_kernel of halves that are cut, in TileLang's modules alone),
`reach=64` (fold of what counts, likewise), `tile_step=64` (the knob, of the scans), `maxnreg=128`
(of the gradients of blocks: what a search alone picks) and `nan` (the
decay of a token; what is NaN in Triton's results has to be written by TileLang's, and NaN).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from tilelang_configs import tilelang_config
from tilelang_standin import run_all
from torch import Tensor

from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import OUTSIDE_OPS
from gdn2gen.family.shapes import Shape
from gdn2gen.family.tolerances import limit_of, over, roundings_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stages import STAGES
from gdn2gen.measure.accuracy import public_op, run_op
from gdn2gen.measure.case_runs import errors_in_range
from gdn2gen.measure.check import drawn, exact, forced
from gdn2gen.runtime import call

WRITES = {
    "scan": ("o", "S_seg", "final_state"),
    "rescan": ("h", "R"),
    "scan_states": ("o", "h", "R", "final_state"),
    "reverse_scan": ("dh", "dX", "dX_rest", "dh0"),
    "scan_blocks": ("o", "h", "R", "final_state"),
    "reverse_scan_blocks": ("dh", "dX", "dv", "dw", "z_dot", "dh0"),
    "rescan_blocks": ("h", "R"),
    "grad_blocks": ("beta_dot", "dq", "dk", "dg", "dg_part", "db", "dbeta_part"),
}
UNWRITTEN = 7.0  # where NaN is what comes out
OF_RUNS = {"twice", "stateless", "raw", "lean", "wide", "transitions", "cut", "nan"}
SCRATCH = {"S_seg", "M_seg", "dS_seg"}
# Both round alike, but sum in other orders: a few values in 16 bits round the other way. Triton's
# programs with all channels of a token make what the norm's backward projects out another way. Of
# blocks of two they round the state between the chunks, and TileLang's what takes its place.
LIMITS = {0: 2e-3, 1: 2e-3, 2: 4e-3, 4: 2e-3}


def root_of(stage: str) -> str:
    """Its name, whatever the blocks' chunks, and whether transitions are kept."""
    return stage.removesuffix("_transitions").rstrip("0123456789")


def _sizes(module: ModuleType, given: Mapping[str, Any]) -> dict[str, int]:
    """What dims of tensors are, by their names."""
    sizes: dict[str, int] = {name: given.get(name, 1) for name in ("T", "H", "HV", "HG", "NS")}
    tokens, chunks, states = (
        len(next(given[x] for x in names if x in given))
        for names in (("o", "do", "v"), ("A", "R", "dX"), ("h", "dh", "A"))
    )
    slices = -(-module.K // getattr(module, "BK", module.K))
    sizes |= {"B": tokens, "NT": chunks, "NT2": states, "NT4": states}
    return sizes | {"NZ": -(-module.V // 16), "NK": slices}


def _scalars(stage: str, given: Mapping[str, Any]) -> list[float]:
    """What a stage's program takes after its tensors."""
    names = {x: ["segment"] for x in ("scan_blocks1", "scan_states", "rescan_blocks")}
    names |= {"grad_blocks": ["scale", "lower_bound"]}
    if stage in ("scan", "rescan"):
        return [given["segment"]]
    return [given[x] for start, more in names.items() if stage.startswith(start) for x in more]


def _by_program(module: ModuleType, stage: str, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the stage's program leaves, carried out on copies."""
    tensors = {name: x for name, x in given.items() if torch.is_tensor(x)}
    scalars = _scalars(stage, given)
    return run_all(module, tensors, _sizes(module, given), *scalars, unwritten=UNWRITTEN)


def _by_launch(module: ModuleType, stage: str, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same with all kernels in Triton beside the programs: by the module's launch."""
    mine = {name: x.clone() if torch.is_tensor(x) else x for name, x in given.items()}
    for name in SCRATCH & {*mine} - {x.name for x in STAGES[stage].inputs}:
        mine[name].fill_(float("nan"))
    names = [name for name, x in mine.items() if torch.is_tensor(x)]

    def compiled(program: str) -> Callable[..., None]:
        def run(*args: Any) -> None:
            tensors = dict(zip(names, args, strict=False))
            scalars, sizes = args[len(names) :], _sizes(module, given)
            known = {"program": program, "unwritten": UNWRITTEN}
            for name, x in run_all(module, tensors, sizes, *scalars, **known).items():
                tensors[name].copy_(x)

        return run

    vars(module)["compiled"] = lambda: compiled("program")
    vars(module)["compiled_fold"] = lambda: compiled("fold_program")
    module.launch(**mine)
    return {name: mine[name] for name in names}


def compare(
    module: ModuleType, other: ModuleType, stage: str, every: int, found: list[str], nan: bool
) -> None:
    """Have each launch of `module` run `other`'s programs on its tensors, too.

    What comes after it reads what those left; with `nan`, what `module` left.
    """
    launch, writes = module.launch, WRITES[root_of(stage)]
    if "M_seg" in {x.name for x in STAGES[stage].outputs if not x.scratch}:
        writes = (*writes, "M_seg")
    names = list(inspect.signature(launch).parameters)
    # what joins segments, or takes what lost too much for the program
    beside = hasattr(other, "fold_program") or hasattr(other, "strong_decay_kernel")
    run = _by_launch if beside else _by_program

    def both(*args: Any, **kwargs: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        # where there are parts of dg, a kernel in Triton adds them up
        written = [x for x in writes if x in given and not (x == "dg" and "dg_part" in given)]
        if nan:  # as TileLang's prepare leaves it; Triton's takes a chunk's least for its last
            given["gamma_C"][0] = float("nan")
        for name in written:
            given[name].fill_(UNWRITTEN if nan else float("nan"))
        results = run(other, stage, given)
        launch(*args, **kwargs)
        for name in written:
            # what is past the last token is written by some, and read by none
            wanted = given[name].float()
            kept = ~wanted.isnan()
            if nan:
                found.append(f"{stage} {name} {int((~kept).sum())} are NaN")
                if (results[name].isfinite() & ~kept).any():
                    raise AssertionError(f"of {found[-1]}, but not of TileLang's")
                continue
            # strong decay leaves nothing of a state, and transitions are zero
            size = wanted[kept].norm().clamp(min=1e-30)
            off = (results[name] - wanted)[kept].norm() / size
            found.append(f"{stage} {name} {off:.1e}")
            if not (kept.any() and off < LIMITS[every]):  # a NaN is no less
                raise AssertionError(found[-1])
            given[name][kept] = results[name][kept].to(given[name].dtype)

    vars(module)["launch"] = both


def main(
    op: str, size: str, T: str, pattern: str, every: str, segment: str = "", *flags: str
) -> None:
    K, _, V = size.partition("x")
    many = 2 if "twice" in flags else 1
    own = {x for x in flags if "=" not in x}
    given: dict[str, Any] = dict.fromkeys(own - OF_RUNS, True)
    if "raw" in flags:
        given["l2norm"] = False
    if "stateless" not in flags:
        given |= {"initial_state": True, "final_state": True}
    problem = Problem(op, K=int(K), V=int(V or K), **given)
    outside = op in OUTSIDE_OPS
    plan = "states" if every == "0" else f"{'direct_' * outside}blocks{every}"
    plan += "_states" * (every != "0" and "lean" not in flags)
    plan += "_transitions" * ("transitions" in flags)
    plan = "lean" if plan == "states" and "lean" in flags else plan
    BT = 64 if every == "1" and outside else 32
    # where TileLang leads there, what it is compared with is Triton's
    recipe = Recipe.default(problem, plan, BT, arch=None if outside else "sm_90")
    found: list[str] = []
    stages = [x for x in recipe.plan.stages if root_of(x) in WRITES]
    stages = [x for x in stages if x != "grad_blocks4"]
    if outside and every == "1":  # of chunks of 64, whose scans are those of scan_states
        stages = ["grad_blocks1"]
    others = {x: tilelang_config(x, problem, BT) for x in stages}
    if segment.isdigit():
        call.SEGMENT, stages = int(segment), [x for x in stages if STAGES[x].is_chain]
        cut = [x for x in stages if "segments" in recipe[x]]
        recipe = recipe.with_config(*(recipe[x].replace(segments="parallel") for x in cut))
        others |= {x: others[x].replace(segments="parallel") for x in cut}
        others |= {x: others[x].replace(merge="cut") for x in cut if "cut" in flags}
        for bits in (int(x.removeprefix("reach=")) for x in flags if x.startswith("reach=")):
            others |= {x: others[x].replace(reach=bits) for x in cut}
    rows = 128 if "wide" in flags else 64
    others |= {x: y.replace(BV=rows) for x, y in others.items() if STAGES[x].is_chain}
    for tiles in (int(x.removeprefix("tile_step=")) for x in flags if x.startswith("tile_step=")):
        cut = [x for x in others if STAGES[x].is_chain]
        others |= {x: others[x].replace(tile_step=tiles) for x in cut}
    for most in (int(x.removeprefix("maxnreg=")) for x in flags if x.startswith("maxnreg=")):
        own = [x for x in others if x.startswith("grad_blocks")]
        others |= {x: others[x].replace(maxnreg=most) for x in own}
    for stage in stages:
        other = load(render(problem, stage, others[stage]))
        module = load(render(problem, stage, recipe[stage]))
        compare(module, other, stage, int(every), found, "nan" in flags)
    shape = Shape("tiny", many, int(T), many)
    inputs, grads = drawn(problem, shape, pattern, "cpu")
    if "nan" in flags:
        inputs["g"][:, int(T) // 2] = float("nan")
    with forced(recipe):
        made = run_op(public_op(op), problem, inputs, grads)
    print("\n".join(found))
    assert len({x.split()[0] for x in found}) == len(stages), "a stage was not launched"
    if "nan" in flags:
        return
    errors = errors_in_range(made, exact(problem, shape, pattern, "cpu"), problem.dtype)
    print("reference", *(f"{name} {x:.1e}" for name, x in errors.items()))
    assert not over(errors, limit_of(problem.dtype, pattern), op, roundings_of(problem)), errors


if __name__ == "__main__":
    for case in sys.argv[1:]:
        print(f"== {case}")
        main(*case.split())
