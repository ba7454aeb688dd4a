"""The TileLang forms of Mamba-2's stages in the place of Triton's, within the interpreted op.

They need TRITON_INTERPRET=1 before triton is imported, so the tests call this in a process of its
own: `python tilelang_groups.py STAGES TOKENS FLAGS PATTERN [HEADS]`, the first and third lists with
commas. Every launch of a stage is carried out by its program's text (tilelang_threads.py), on
the tensors of Triton's kernel, whose results are compared; the op goes on with the program's, and
its outputs and gradients are held to what Triton's are off the fp64 reference.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, Final

import torch
from tilelang_threads import run_all

from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, default_of
from gdn2gen.kernels.limits import Place
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.measure.accuracy import public_op, relative_errors, run_op, run_reference
from gdn2gen.measure.check import drawn, forced

BT: Final = 64
# What Triton's kernels round on the way, these do not: scores of the group are in fp32.
LIMIT: Final = 6e-3
FULL: Final = Problem(
    "mamba2", K=64, V=64, gate="softplus", has_rate=True, has_dt_bias=True, has_D=True,
    has_z=True, initial_state=True, final_state=True,
)  # fmt: skip


def in_tilelang(stage: str, problem: Problem) -> Config:
    form = next(x for x in STAGES[stage].forms if x.language == "tilelang")
    config = default_of(stage, form, Place(problem, BT, "sm_90"))
    assert why_invalid(config, problem, "sm_90") is None
    return config


def by_text(module: ModuleType, sizes: Mapping[str, int]) -> Callable[..., None]:
    """What stands for the compiled program: its text, carried out on the tensors it is given."""

    def run(*given: Any) -> None:
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        names = _parameters(module)[: len(tensors)]
        results = run_all(
            module, dict(zip(names, tensors, strict=True)), sizes, *given[len(tensors) :]
        )
        for name, x in zip(names, tensors, strict=True):
            x.copy_(results[name])

    return run


def _parameters(module: ModuleType) -> list[str]:
    text = inspect.getsource(module.program) if module.__file__ else ""
    inside = text.split("@tile.prim_func")[1].split("):\n")[0]
    return [x.split(":")[0].strip() for x in inside.splitlines() if ": tile." in x]


def exchange(module: ModuleType, other: ModuleType, stage: str, found: list[str]) -> None:
    """Have each launch of `module` be `other`'s once `found` holds a line, and compare what they
    write."""
    launch, names = module.launch, list(inspect.signature(module.launch).parameters)
    outputs = {x.name for x in STAGES[stage].outputs if not x.scratch}

    def both(*args: Any, **kwargs: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        launch(*args, **kwargs)
        if not found:
            return
        mine: dict[str, Any] = {}
        for name in inspect.signature(other.launch).parameters:
            x = given.get(name)
            if isinstance(x, torch.Tensor):
                x = x.clone()
                if name in outputs:
                    x.fill_(float("nan"))
            elif name not in given:
                x = _scratch(name, given)
            mine[name] = x
        chunks = given["log_decay"].shape[0]
        sizes = {x: given.get(x, 1) for x in ("T", "H", "HV", "NS")}
        sizes |= {"B": given["k"].shape[0], "NT": chunks, "HP": given["H"]}
        sizes |= {"N": given.get("n_sequences", 1), "N1": given.get("n_sequences", 1) + 1}
        sizes |= {"z_batch": 1, "z_token": 1}
        vars(other)["compiled"] = lambda: by_text(other, sizes)
        other.launch(**mine)
        for name in outputs & mine.keys():
            wanted, got = given[name].float(), mine[name].float()
            if name == "dD":  # a sum over chunks, which programs may leave in one of them
                wanted, got = wanted.nansum(0), got.nansum(0)
            # what is past the last token is written by some, and read by none
            kept = ~(wanted.isnan() | got.isnan())
            off = (got - wanted)[kept].norm() / wanted[kept].norm().clamp_min(1e-30)
            found.append(f"{stage} {name} {off:.1e}")
            if not (kept.any() and off < LIMIT):
                raise AssertionError(found[-1])
            # of chunks that there are not, what the runtime put there stays
            written = ~mine[name].isnan()
            given[name][written] = mine[name][written]

    vars(module)["launch"] = both


def _scratch(name: str, given: Mapping[str, Any]) -> torch.Tensor:
    NT, HV, _ = given["log_decay"].shape
    sizes = {"NT": NT, "HV": HV, "BT": BT, "NK": given["k"].shape[-1] // 64}
    dims = next(x.dims for x in STAGES["grad_group"].outputs if x.name == name)
    return torch.full([sizes[x] for x in dims.split()], float("nan"))


def main(stages: str, tokens: str, flags: str, pattern: str, heads: str = "2") -> None:
    given = [x for x in flags.split(",") if x]
    changes: dict[str, Any] = {x.lstrip("-"): not x.startswith("-") for x in given}
    if changes.pop("wide", False):  # keys in two slices
        changes["K"] = 128
    problem = replace(FULL, **changes)
    recipe = Recipe.default(problem, "grouped", BT, arch="sm_90")
    T, found = int(tokens), list[str]()
    ends = (0, 0, T // 3, T) if problem.varlen else None
    shape = Shape("tiny", 1, T, int(heads), ends, groups=1)
    inputs, seeds = drawn(problem, shape, pattern, "cpu")
    right = run_reference(problem, inputs, seeds)
    for stage in stages.split(","):
        other = load(render(problem, stage, in_tilelang(stage, problem)))
        exchange(load(render(problem, stage, recipe[stage])), other, stage, found)
    with forced(recipe):
        before = relative_errors(run_op(public_op("mamba2"), problem, inputs, seeds), right)
        found.append(f"{tokens} tokens, {pattern}")
        after = relative_errors(run_op(public_op("mamba2"), problem, inputs, seeds), right)
    print("\n".join(found))
    assert {x.split()[0] for x in found[1:]} == {*stages.split(",")}, "a stage was not launched"
    for name, off in after.items():
        print(f"reference {name} {off:.1e}, {before[name]:.1e} by Triton")
        assert off < 1.3 * before[name] + 5e-4, name


if __name__ == "__main__":
    main(*sys.argv[1:])
