"""A TileLang form of prepare or grad_key carried out in Python within the op, beside the reference.

It needs TRITON_INTERPRET=1 before triton is imported, so the tests call this in a process of its
own: `python centred_checks.py grad_key gdn2 64 70 strong`, a stage, op, head dim, tokens and gate
pattern or a file of one, `packed`, `softplus` for a gate in the kernels, `anchored` for another
form than centred, and knobs as `maxnreg=128`. Triton's kernels make the rest. Prints the worst
errors.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import tilelang_standin
import tilelang_threads
import torch
from tilelang_configs import tilelang_by_chunk

from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render
from gdn2gen.family.decays import DecayPattern
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import LINEAR_OPS
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import check_recipe


def stand_in(module: ModuleType, other: ModuleType, stage: str, names: list[str]) -> list[str]:
    """Have each launch of `module` be one of `other`, whose program is carried out; lists them."""
    launched: list[str] = []
    run_all = {"prepare": tilelang_threads, "grad_key": tilelang_standin}[stage].run_all

    def launch(*args: Any, **kwargs: Any) -> None:
        def program(*given: Any) -> None:
            tensors = dict(zip(names, given, strict=False))
            B, T, H, K = tensors["q"].shape
            HV, HG = tensors["gamma_C"].shape[-2], tensors["g"].shape[2]
            sizes = {"B": B, "T": T, "H": H, "HV": HV, "HG": HG, "NK": -(-K // 64)}
            sizes |= {"NT": len(tensors["gamma_C"])}
            results = run_all(other, tensors, sizes, *given[len(names) :])
            for name, result in results.items():
                tensors[name].copy_(result)
            launched.append(stage)

        vars(other)["compiled"] = lambda: program
        other.launch(*args, **kwargs)

    vars(module)["launch"] = launch
    return launched


def main(stage: str, op: str, K: str, T: str, pattern: Any, *more: str) -> None:
    packed = "packed" in more
    problem = Problem(op, K=int(K), V=int(K), varlen=packed)
    problem = replace(problem, initial_state=True, final_state=True)
    if "softplus" in more:
        problem = replace(problem, gate="softplus", has_A_log=True, has_dt_bias=True)
    recipe = Recipe.default(
        problem, "linear_fast" if op in LINEAR_OPS else "fast", 32, arch="sm_90"
    )
    decay = "anchored" if "anchored" in more else "centred"
    knobs = {name: int(value) for name, _, value in (x.partition("=") for x in more) if value}
    config = tilelang_by_chunk(stage, problem).replace(decay=decay, **knobs)
    names = [x.name for x in config.operands(problem)]
    module = load(render(problem, stage, recipe[stage]))
    launched = stand_in(module, load(render(problem, stage, config)), stage, names)
    bounds = (0, 0, int(T) // 3, int(T)) if packed else ()
    shape = Shape("tiny", 1, int(T), 1, bounds) if packed else Shape("tiny", 1, int(T), 1)
    if pattern.endswith(".json"):
        pattern = DecayPattern.load(pattern)
    found = check_recipe(
        recipe, patterns=(pattern,), repeats=1, shapes=(shape, shape), device="cpu"
    )
    print(" ".join(f"{name}={x:.1e}" for name, x in found.errors.items()))
    assert found.ok, found.reason
    assert launched, f"{stage} was not launched"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
