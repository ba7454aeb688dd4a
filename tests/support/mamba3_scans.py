"""The text of Mamba-3's scan, carried out in Python, beside its recurrence token by token in fp64.

    python mamba3_scans.py TOKENS STATE_SIZE KEEP PATTERN [FLAGS]

Queries and keys are those of `mamba3_rotate`, so that nothing is turned here; weights of tokens are
made of ADT, DT and Trap as they are defined, and not as kernels sum them. FLAGS are fields of the
problem with commas. A process of its own, since it is some seconds of Python threads.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from tilelang_threads import run_all
from torch import Tensor

from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.mamba3_scan import MAMBA3_SCAN, scan_problem

BT = 64
LIMIT = 5e-3
# Nats a token; sparse: nothing is left at some tokens, and all of it at the others.
PATTERNS = {"zero": 0.0, "layer": -0.05, "strong": -20.0, "sparse": 0.0}


@dataclass
class Right:
    """In fp64: y, out, the state before each chunk, and after the last token."""

    y: Tensor
    out: Tensor
    h: Tensor
    last: Tensor


def drawn(problem: Mamba3Problem, B: int, T: int, H: int, pattern: str) -> dict[str, Tensor]:
    """What the scan reads, and ADT, by name."""
    torch.manual_seed(0)
    N, P = problem.state_size, problem.head_dim
    normal = {x: torch.randn(B, T, H, y).bfloat16() for x, y in (("q", N), ("k", N), ("V", P))}
    adt = PATTERNS[pattern] * (0.5 + torch.rand(B, H, T))
    if pattern == "sparse":
        adt = torch.where(torch.rand(B, H, T) < 0.1, -200.0, 0.0)
    dt, share = torch.rand(B, H, T), torch.rand(B, H, T)
    later = torch.nn.functional.pad((1 - share) * dt, (0, 1))[..., 1:]
    logs = (adt * 1.4426950408889634).clamp_min(-150.0).double()
    chunks = torch.nn.functional.pad(logs, (0, -T % BT)).unflatten(2, (-1, BT))
    within = chunks.cumsum(3)
    after = chunks.flip(3).cumsum(3).flip(3) - chunks
    numbers = {
        "within": within.flatten(2)[..., :T].float(),
        "tail_decay": after.exp2().flatten(2)[..., :T].float(),
        "weight_s": share * dt + later,
        "own_dt": share * dt,
    }
    more = {"adt": adt}
    if problem.skip:
        more["D"] = torch.randn(H)
    if problem.gate:
        more["Z"] = torch.randn(B, T, H, P).bfloat16()
    if problem.carried:
        more["initial_ssm"] = torch.randn(B, H, P, N)
    return {x: y.contiguous() for x, y in (normal | numbers | more).items()}


def recurrent(x: dict[str, Tensor], BT: int = BT) -> Right:
    """A token after the other; decays are those from a chunk's start, as differences of numbers
    that are exact enough, where ADT is not given."""
    wide = {name: y.double() for name, y in x.items()}
    B, T, H, P = wide["V"].shape
    state = wide.get("initial_ssm", torch.zeros(B, H, P, wide["k"].shape[3]).double())
    outputs, kept = [], []
    for t in range(T):
        if t % BT == 0:
            kept.append(state)
        q, k, v = (wide[y][:, t] for y in ("q", "k", "V"))
        s, own = (wide[y][..., t, None] for y in ("weight_s", "own_dt"))
        before = wide["within"][..., t - 1] if t % BT else 0.0
        decay = (
            wide["adt"][..., t].exp() if "adt" in wide else (wide["within"][..., t] - before).exp2()
        )
        state = state * decay[..., None, None]
        seen = own * (q * k).sum(-1, keepdim=True) + wide.get("D", torch.zeros(H))[:, None]
        outputs.append((state @ q[..., None])[..., 0] + seen * v)
        state = state + s[..., None] * v[..., None] * k[..., None, :]
    y = torch.stack(outputs, 1)
    gated = y * torch.nn.functional.silu(wide["Z"]) if "Z" in wide else y
    return Right(y, gated, torch.stack(kept, 1).flatten(0, 1), state)


def main(tokens: str, state_size: str, keep: str, pattern: str, flags: str = "") -> None:
    named: dict[str, bool] = dict.fromkeys([x for x in flags.split(",") if x], True)
    stages = 2 if named.pop("ahead", False) else 1
    problem = scan_problem(Mamba3Problem(state_size=int(state_size), **named))  # type: ignore[arg-type]
    config = default_config(MAMBA3_SCAN.name, problem).replace(keep=int(keep), num_stages=stages)
    module = load(render(problem, MAMBA3_SCAN.name, config))
    B, T, H, P, N = 1, int(tokens), 2, problem.head_dim, problem.state_size
    x = drawn(problem, B, T, H, pattern)
    right, NT = recurrent(x), -(-T // BT)
    places = {
        "out": torch.full((B, T, H, P), torch.nan).bfloat16(),
        "ungated": torch.full((B, T, H, P), torch.nan).bfloat16(),
        "h": torch.full((NT * B, H, P, N), torch.nan).bfloat16(),
        "final_ssm": torch.full((B, H, P, N), torch.nan),
    }
    passed: list[str] = []

    def compiled(*given: Tensor) -> None:
        pointers = {y.data_ptr(): name for name, y in (x | places).items()}
        passed.extend(pointers[y.data_ptr()] for y in given)
        sizes = {"B": B, "T": T, "H": H, "M": NT * B}
        results = run_all(module, dict(zip(passed, given, strict=True)), sizes)
        for name in passed:
            (x | places)[name].copy_(results[name])

    vars(module)["compiled"] = lambda: compiled
    operands = [y.name for y in MAMBA3_SCAN.operands(problem)]
    module.launch(*((x | places)[y] for y in operands), T=T)
    wanted = {"out": right.out, "ungated": right.y, "h": right.h, "final_ssm": right.last}
    kept = {"out", "final_ssm", *(["ungated"] if problem.gate and keep != "0" else [])}
    kept |= {"h"} if keep == "2" else set()
    if not kept == wanted.keys() & {*passed}:
        raise AssertionError(f"given were {passed}, but kept are {kept}")
    for name in sorted(kept):
        off = (places[name].double() - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-9)
        print(f"{name} {off:.1e}")
        if not off < LIMIT:
            raise AssertionError(f"{name} is {off:.1e} off")


if __name__ == "__main__":
    main(*sys.argv[1:])
