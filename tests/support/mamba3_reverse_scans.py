"""The text of Mamba-3's reverse scan, carried out in Python, beside gradients of its recurrence.

    python mamba3_reverse_scans.py TOKENS STATE_SIZE PATTERN [FLAGS]

`gradients` are autograd's of the recurrence token by token in fp64, and sums of pairs as they are
defined. Queries and keys are turned already. FLAGS are fields of the problem with commas,
`angles` for as many as half of the channels have, or `angles=7`, and knobs as `pairs=1`. A process
of its own, since it is some seconds of Python threads.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from mamba3_scans import BT, drawn
from tilelang_threads import run_all
from torch import Tensor

from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.mamba3_reverse_scan import MAMBA3_REVERSE_SCAN, reverse_scan_problem

LIMIT = 6e-3


def gradients(x: dict[str, Tensor], S: int, BT: int = BT) -> dict[str, Tensor]:
    """All that the stage makes, by name; of `dtheta_part` the sum of its parts."""
    wide = {name: y.double() for name, y in x.items()}
    B, T, H, _ = wide["V"].shape
    NT = -(-T // BT)
    # as the stage knows it, unless there is better
    first = wide.get("initial_ssm", wide["h"].unflatten(0, (B, NT))[:, 0])
    leaves = {y: wide[y].clone().requires_grad_() for y in ("q", "k", "V")}
    first = first.clone().requires_grad_()
    with torch.enable_grad():
        states, y = _outputs(wide | leaves, first, BT)
        wanted = [*leaves.values(), *states]
        loss = (y * wide["dy"]).sum() + (states[-1] * wide["dfinal_ssm"]).sum()
        dq, dk, dV, *dstates = torch.autograd.grad(loss, wanted)
    h, dh = (torch.stack(z, 1).detach() for z in (states, dstates))
    made = {"dQ_head": dq, "dK_head": dk, "dv": dV, "dinitial_ssm": dh[:, 0]}
    made["kept_part"] = (h[:, :-1] * dh[:, 1:]).sum(-1).flatten(0, 1)
    made["sums"] = torch.stack(_sums(wide, h, dh, BT), 2)
    made["dtheta"] = _cross(dq, wide["q"], S) + _cross(dk, wide["k"], S)
    # nothing comes after the last chunk
    across = torch.full((B, NT, H, S), torch.nan).double()
    across[:, :-1] = -_cross(dh[:, 1:-1], h[:, 1:-1], S).sum(3)
    made["dtheta_part"] = across.flatten(0, 1)
    return made


def _outputs(x: dict[str, Tensor], state: Tensor, BT: int) -> tuple[list[Tensor], Tensor]:
    """The state before each chunk and after the last token, and y."""
    outputs, states = [], []
    for t in range(x["V"].shape[1]):
        if t % BT == 0:
            # an operation of its own, so that its gradient is of what comes after it
            state = state * 1.0
            states.append(state)
        q, k, v = (x[y][:, t] for y in ("q", "k", "V"))
        s, own = (x[y][..., t, None] for y in ("weight_s", "own_dt"))
        state = state * _decay(x, t, BT)[..., None, None]
        seen = own * (q * k).sum(-1, keepdim=True)
        if "D" in x:
            seen = seen + x["D"][:, None]
        outputs.append((state @ q[..., None])[..., 0] + seen * v)
        state = state + s[..., None] * v[..., None] * k[..., None, :]
    return [*states, state], torch.stack(outputs, 1)


def _decay(x: dict[str, Tensor], t: int, BT: int) -> Tensor:
    if "adt" in x:
        return x["adt"][..., t].exp()
    before: Any = x["within"][..., t - 1] if t % BT else 0.0
    return (x["within"][..., t] - before).exp2()


def _sums(x: dict[str, Tensor], h: Tensor, dh: Tensor, BT: int) -> list[Tensor]:
    """Of each token, [B, H, T] each, in the order of the rows of `sums`."""
    B, T, H, _ = x["V"].shape
    rows: list[list[Tensor]] = [[] for _ in range(5)]
    for c, begin in enumerate(range(0, T, BT)):
        part = slice(begin, begin + BT)
        q, k, v, dy = (x[y][:, part].transpose(1, 2) for y in ("q", "k", "V", "dy"))
        n = q.shape[2]
        # from token j to token i > j, decay by decay
        L = torch.zeros(B, H, n, n).double()
        for j in range(n):
            kept = torch.ones(B, H).double()
            for i in range(j + 1, n):
                kept = kept * _decay(x, begin + i, BT)
                L[:, :, j, i] = kept
        pairs = (v @ dy.mT) * (k @ q.mT)
        lost = (pairs * L).sum(3)
        rows[0].append(lost)
        rows[1].append(lost + pairs.diagonal(dim1=2, dim2=3))
        rows[2].append((pairs * L * x["weight_s"][..., part, None]).sum(2))
        rows[3].append((dy * (q @ h[:, c].mT)).sum(3))
        rows[4].append((v * (k @ dh[:, c + 1].mT)).sum(3))
    return [torch.cat(y, 2) for y in rows]


def _cross(d: Tensor, x: Tensor, S: int) -> Tensor:
    """d x x, of each of the S pairs of channels."""
    (d0, d1), (x0, x1) = ((y[..., : 2 * S : 2], y[..., 1 : 2 * S : 2]) for y in (d, x))
    return d1 * x0 - d0 * x1


def operands_of(problem: Mamba3Problem) -> dict[str, list[str]]:
    return {x.name: x.dims.split() for x in MAMBA3_REVERSE_SCAN.operands(problem)}


def main(tokens: str, state_size: str, pattern: str, flags: str = "") -> None:
    named: dict[str, Any] = {}
    for flag in (x for x in flags.split(",") if x):
        name, _, value = flag.partition("=")
        named[name] = int(value) if value else int(state_size) // 4 if name == "angles" else True
    S, knobs = named.pop("angles", 0), {x: named.pop(x) for x in ("pairs",) if x in named}
    problem = reverse_scan_problem(Mamba3Problem(state_size=int(state_size), angles=S, **named))
    config = default_config("mamba3_reverse_scan", problem).replace(**knobs)
    module = load(render(problem, "mamba3_reverse_scan", config))
    B, T, H, P, N = 1, int(tokens), 2, problem.head_dim, problem.state_size
    x, NT = drawn(problem, B, T, H, pattern), -(-T // BT)
    right_h = _outputs(
        {y: z.double() for y, z in x.items()},
        x.get("initial_ssm", torch.zeros(B, H, P, N)).double(),
        BT,
    )[0]
    x["h"] = torch.stack(right_h[:-1], 1).flatten(0, 1).bfloat16()
    x["dy"] = torch.randn(B, T, H, P).bfloat16()
    x["dfinal_ssm"] = torch.randn(B, H, P, N)
    right, operands = gradients(x, S), operands_of(problem)
    sizes = {"B": B, "T": T, "H": H, "M": NT * B, "n": B, "P": P, "N": N, "S": S, "4": 4, "5": 5}
    places = {
        y.name: torch.full(
            [sizes[z] for z in y.dims.split()],
            torch.nan,
            dtype=torch.float32 if y.dtype_in(problem) == "fp32" else torch.bfloat16,
        )
        for y in MAMBA3_REVERSE_SCAN.operands(problem)
        if y.name not in x
    }

    def compiled(*given: Tensor) -> None:
        pointers = {y.data_ptr(): name for name, y in (x | places).items()}
        passed = [pointers[y.data_ptr()] for y in given]
        results = run_all(module, dict(zip(passed, given, strict=True)), sizes)
        for name in passed:
            (x | places)[name].copy_(results[name])

    vars(module)["compiled"] = lambda: compiled
    module.launch(*((x | places)[y] for y in operands), T=T)
    if S:
        places["dtheta_part"] = places["dtheta_part"].sum(2)
    for name, found in sorted(places.items()):
        rows = 5 if name == "sums" else 1
        for i, (ours, theirs) in enumerate(
            zip(found.chunk(rows, 2), right[name].chunk(rows, 2), strict=True)
        ):
            there = ~theirs.isnan()
            if name != "dtheta_part" and not there.all():
                raise AssertionError(f"the truth of {name} has no numbers")
            off = (ours.double() - theirs)[there].norm() / theirs[there].norm().clamp_min(1e-9)
            print(f"{name}{i if rows > 1 else ''} {off:.1e}")
            if not (off < LIMIT or (name == "dtheta_part" and not there.any())):
                raise AssertionError(f"{name} is {off:.1e} off")


if __name__ == "__main__":
    main(*sys.argv[1:])
