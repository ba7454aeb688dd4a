"""The TileLang forms of blocks beside Triton's, whose launches they take the tensors of.

They need TRITON_INTERPRET=1 before triton is imported, so the tests call this in a process of its
own: `python tilelang_checks.py gdn2 64 40 layer`, a member, head dim, tokens and gate pattern.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import torch
from tilelang_configs import tilelang_config
from tilelang_standin import run_all

from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import public_op, run_op
from gdn2gen.measure.check import drawn, forced

WRITES = {
    "reverse_scan_blocks1": ("dh", "dX", "dv", "dw", "z_dot", "dh0"),
    "grad_blocks1": ("beta_dot", "dq", "dk", "dg", "db", "dbeta_part"),
}
# Both round alike, but sum in other orders: a few values in 16 bits round the other way. Triton's
# programs with all channels of a token make what the norm's backward projects out another way.
LIMIT = 2e-3


def compare(module: ModuleType, other: ModuleType, stage: str, K: int, found: list[str]) -> None:
    """Have each launch of `module` run `other`'s programs on its tensors, too."""
    launch = module.launch
    names = list(inspect.signature(launch).parameters)

    def both(*args: Any, **kwargs: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
        written = [x for x in WRITES[stage] if x in tensors]
        for name in written:
            given[name].fill_(float("nan"))
            tensors[name].fill_(float("nan"))
        launch(*args, **kwargs)
        sizes = {name: given.get(name, 1) for name in ("T", "H", "HV", "HG")}
        B, NT, NZ = len(tensors["do"]), len(tensors["dX"]), K // 16
        sizes |= {"B": B, "NT": NT, "NZ": NZ, "NK": K // 64}
        scalars = [given[x] for x in ("scale", "lower_bound") if x in given]
        results = run_all(other, tensors, sizes, *scalars)
        for name in written:
            # what is past the last token is written by some, and read by none
            wanted = given[name].float()
            kept = ~wanted.isnan()
            off = (results[name] - wanted)[kept].norm() / wanted[kept].norm()
            found.append(f"{stage} {name} {off:.1e}")
            if not (kept.any() and off < LIMIT):  # a NaN is no less
                raise AssertionError(found[-1])

    vars(module)["launch"] = both


def main(op: str, K: str, T: str, pattern: str) -> None:
    problem = Problem(op, K=int(K), V=int(K), initial_state=True, final_state=True)
    recipe = Recipe.default(problem, "blocks1", 32, arch="sm_90")
    found: list[str] = []
    for stage in WRITES:
        other = load(render(problem, stage, tilelang_config(stage, problem)))
        compare(load(render(problem, stage, recipe[stage])), other, stage, int(K), found)
    with forced(recipe):
        run_op(public_op(op), problem, *drawn(problem, Shape("tiny", 1, int(T), 1), pattern, "cpu"))
    print("\n".join(found))
    assert len({x.split()[0] for x in found}) == len(WRITES), "a stage was not launched"


if __name__ == "__main__":
    main(*sys.argv[1:])
