"""GLA's TileLang form `centred` carried out in Python within the op, held against the reference.

It needs TRITON_INTERPRET=1 before triton is imported, so the tests call this in a process of its
own: `python centred_checks.py grad_key 64 70 strong`, a stage, head dim, tokens and gate pattern.
Triton's kernels make the rest. Prints the worst errors.
"""

from __future__ import annotations

import inspect
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
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import check_recipe

WRITES = {"prepare": ("Aqk", "Qg", "Ktail", "gamma_C"), "grad_key": ("dq", "dk", "dg")}


def stand_in(module: ModuleType, other: ModuleType, stage: str, K: int) -> list[str]:
    """Have each launch of `module` run `other`'s programs instead; lists them."""
    names = list(inspect.signature(module.launch).parameters)
    launched: list[str] = []
    run_all = {"prepare": tilelang_threads, "grad_key": tilelang_standin}[stage].run_all

    def instead(*args: Any, **kwargs: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        B, T = tensors["q"].shape[:2]
        sizes = {name: given[name] for name in ("T", "H", "HV", "HG")}
        sizes |= {"B": B, "T": T, "NT": given["n_chunks"]}
        results = run_all(other, tensors, sizes, given["scale"], given["lower_bound"])
        for name in WRITES[stage]:
            tensors[name].copy_(results[name])
        launched.append(stage)

    vars(module)["launch"] = instead
    return launched


def main(stage: str, K: str, T: str, pattern: str, *packed: str) -> None:
    problem = Problem("gla", K=int(K), V=int(K), varlen=bool(packed))
    problem = replace(problem, initial_state=True, final_state=True)
    recipe = Recipe.default(problem, "linear_fast", 32, arch="sm_90")
    config = tilelang_by_chunk(stage, problem).replace(decay="centred")
    module = load(render(problem, stage, recipe[stage]))
    launched = stand_in(module, load(render(problem, stage, config)), stage, int(K))
    bounds = (0, 0, int(T) // 3, int(T)) if packed else ()
    shape = Shape("tiny", 1, int(T), 1, bounds) if packed else Shape("tiny", 1, int(T), 1)
    found = check_recipe(
        recipe, patterns=(pattern,), repeats=1, shapes=(shape, shape), device="cpu"
    )
    print(" ".join(f"{name}={x:.1e}" for name, x in found.errors.items()))
    assert found.ok, found.reason
    assert launched, f"{stage} was not launched"


if __name__ == "__main__":
    main(*sys.argv[1:])
