"""The TileLang forms of blocks beside Triton's, whose launches they take the tensors of.

They need TRITON_INTERPRET=1 before triton is imported, so the tests call this in a process of its
own: `python tilelang_checks.py gdn2 64 40 layer 1`, a member, head dim, tokens, gate pattern, and
chunks of a block.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
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
    "scan_blocks": ("o", "h", "R", "final_state"),
    "reverse_scan_blocks": ("dh", "dX", "dv", "dw", "z_dot", "dh0"),
    "grad_blocks": ("beta_dot", "dq", "dk", "dg", "db", "dbeta_part"),
}
# Both round alike, but sum in other orders: a few values in 16 bits round the other way. Triton's
# programs with all channels of a token make what the norm's backward projects out another way. Of
# blocks of two they round the state between the chunks, and TileLang's what takes its place.
LIMITS = {1: 2e-3, 2: 4e-3, 4: 2e-3}


def _sizes(module: ModuleType, given: Mapping[str, Any]) -> dict[str, int]:
    """What dims of tensors are, by their names."""
    sizes: dict[str, int] = {name: given.get(name, 1) for name in ("T", "H", "HV", "HG", "NS")}
    tokens, chunks, states = (
        len(next(given[x] for x in names if x in given))
        for names in (("o", "do"), ("R", "dX"), ("h", "dh"))
    )
    slices = module.K // getattr(module, "BK", module.K)
    sizes |= {"B": tokens, "NT": chunks, "NT2": states, "NT4": states}
    return sizes | {"NZ": module.V // 16, "NK": slices}


def _scalars(stage: str, given: Mapping[str, Any]) -> list[float]:
    """What a stage's program takes after its tensors."""
    names = {"scan_blocks1": ["segment"], "grad_blocks": ["scale", "lower_bound"]}
    return [given[x] for start, more in names.items() if stage.startswith(start) for x in more]


def compare(
    module: ModuleType, other: ModuleType, stage: str, every: int, found: list[str]
) -> None:
    """Have each launch of `module` run `other`'s programs on its tensors, too."""
    launch, writes = module.launch, WRITES[stage.rstrip("0123456789")]
    names = list(inspect.signature(launch).parameters)

    def both(*args: Any, **kwargs: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
        written = [x for x in writes if x in tensors]
        for name in written:
            given[name].fill_(float("nan"))
            tensors[name].fill_(float("nan"))
        launch(*args, **kwargs)
        results = run_all(other, tensors, _sizes(other, given), *_scalars(stage, given))
        for name in written:
            # what is past the last token is written by some, and read by none
            wanted = given[name].float()
            kept = ~wanted.isnan()
            off = (results[name] - wanted)[kept].norm() / wanted[kept].norm()
            found.append(f"{stage} {name} {off:.1e}")
            if not (kept.any() and off < LIMITS[every]):  # a NaN is no less
                raise AssertionError(found[-1])

    vars(module)["launch"] = both


def main(op: str, K: str, T: str, pattern: str, every: str) -> None:
    problem = Problem(op, K=int(K), V=int(K), initial_state=True, final_state=True)
    recipe = Recipe.default(problem, f"blocks{every}_states", 32, arch="sm_90")
    found: list[str] = []
    stages = [x for x in (f"{x}{every}" for x in WRITES) if x != "grad_blocks4"]
    for stage in stages:
        other = load(render(problem, stage, tilelang_config(stage, problem)))
        compare(load(render(problem, stage, recipe[stage])), other, stage, int(every), found)
    with forced(recipe):
        run_op(public_op(op), problem, *drawn(problem, Shape("tiny", 1, int(T), 1), pattern, "cpu"))
    print("\n".join(found))
    assert len({x.split()[0] for x in found}) == len(stages), "a stage was not launched"


if __name__ == "__main__":
    main(*sys.argv[1:])
