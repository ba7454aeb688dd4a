"""The text of Mamba-3's scan that turns queries and keys, carried out in Python, beside its recurrence in fp64.

    python mamba3_turning_scans.py TOKENS STATE_SIZE ANGLES KEEP PATTERN [FLAGS]

As `mamba3_scans`, from queries and keys of a group: these are biased and turned in fp64, and rounded
for the recurrence as products read them. FLAGS, with commas, are fields of the problem; `groups`, where each head has a group of its
own; `apart`, where heads share no angles; `nan`, where an angle is no number.
"""

from __future__ import annotations

import math
import sys

import torch
from cluster_standin import run_all
from mamba3_scans import BT, LIMIT, drawn, recurrent
from torch import Tensor

from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.mamba3_turning_scan import MAMBA3_TURNING_SCAN, turning_problem

UNIT = 2.0**32
"""Of a turn."""
OF_NAN = 2147483520 / UNIT
"""What later tokens have of one whose angle is no number: the largest integer of these."""
WRONG_TOKEN, WRONG_PAIR = 70, 3


def given(problem: Mamba3Problem, T: int, H: int, G: int, HA: int, pattern: str) -> dict[str, Tensor]:
    """What the program reads, by name, and ADT."""
    B, N, S = 1, problem.state_size, problem.angles
    x = drawn(problem, B, T, H, pattern)
    x = {name: y for name, y in x.items() if name not in "qk"}
    x |= {name: torch.randn(B, T, G, N).bfloat16() for name in "QK"}
    x |= {f"{name}_bias": torch.randn(H, N) for name in "QK"}
    if S:
        x["DT"] = torch.rand(B, H, T)
        x["rates"] = 0.5 * torch.tanh(torch.randn(B, HA, T, S))
    if S and problem.carried:
        x["angle_state"] = 10 * torch.randn(B, H, S)
    return x


def turned(x: dict[str, Tensor], S: int, BT: int = BT) -> dict[str, Tensor]:
    """q and k in fp64; Theta of each token within its chunk, before chunks and after all, in turns."""
    B, T, G, N = x["Q"].shape
    H = x["Q_bias"].shape[0]
    found = {
        name.lower(): x[name].double().repeat_interleave(H // G, 2) + x[f"{name}_bias"].double()
        for name in "QK"
    }
    if not S:
        return found
    steps = x["DT"][..., None].double() * x["rates"].double().expand(B, H, T, S)  # B H T S
    first = x.get("angle_state", torch.zeros(B, H, S)).double() / (2 * math.pi)
    until = steps.nan_to_num(OF_NAN).cumsum(2)
    before = torch.nn.functional.pad(until, (0, 0, 1, 0))[:, :, :-1:BT]  # of each chunk
    found["theta"] = (until - before.repeat_interleave(BT, 2)[:, :, :T]).transpose(1, 2)
    found["turns"] = (first[:, :, None] + before).transpose(1, 2).flatten(0, 1)
    found["last_angle"] = (first + until[:, :, -1]) * 2 * math.pi
    angle = (first[:, :, None] + until).transpose(1, 2) * 2 * math.pi
    angle = angle + 0 * steps.transpose(1, 2)
    for name in "qk":
        pairs = found[name][..., : 2 * S].unflatten(3, (S, 2))
        a, b = pairs.unbind(4)
        cos, sin = angle.cos(), angle.sin()
        both = torch.stack([a * cos - b * sin, b * cos + a * sin], 4).flatten(3)
        found[name] = torch.cat([both, found[name][..., 2 * S :]], 3)
    return found


def around(x: Tensor) -> Tensor:
    """How far turns are from none."""
    return (x - x.round()).abs().max()


def main(tokens: str, state_size: str, angles: str, keep: str, pattern: str, flags: str = "") -> None:
    named: dict[str, bool] = dict.fromkeys([x for x in flags.split(",") if x], True)
    groups, apart, wrong = (named.pop(x, False) for x in ("groups", "apart", "nan"))
    sizes = {"state_size": int(state_size), "angles": int(angles)}
    problem = turning_problem(Mamba3Problem(**sizes, **named))  # type: ignore[arg-type]
    config = default_config(MAMBA3_TURNING_SCAN.name, problem).replace(keep=int(keep))
    module = load(render(problem, MAMBA3_TURNING_SCAN.name, config))
    B, T, H, P, N, S = 1, int(tokens), 2, problem.head_dim, *sizes.values()
    G, HA, NT = H if groups else 1, H if apart else 1, -(-int(tokens) // BT)
    x = given(problem, T, H, G, HA, pattern)
    if wrong:
        x["rates"][0, 0, OF_NAN = 2147483520 / UNIT
"""What later tokens have of one whose angle is no number: the largest integer of these."""
WRONG_TOKEN, WRONG_PAIR] = torch.nan
    right = turned(x, S)
    recurrence = recurrent({**x, **{y: right[y].nan_to_num().bfloat16() for y in "qk"}})
    named_wanted = {
        "out": recurrence.out, "ungated": recurrence.y, "h": recurrence.h,
        "final_ssm": recurrence.last, **right,
    }  # fmt: skip
    places = {
        "out": torch.full((B, T, H, P), torch.nan).bfloat16(),
        "ungated": torch.full((B, T, H, P), torch.nan).bfloat16(),
        "h": torch.full((NT * B, H, P, N), torch.nan).bfloat16(),
        "final_ssm": torch.full((B, H, P, N), torch.nan),
        "q": torch.full((B, T, H, N), torch.nan).bfloat16(),
        "k": torch.full((B, T, H, N), torch.nan).bfloat16(),
        "theta": torch.full((B, T, H, S), 12345, dtype=torch.int32),
        "turns": torch.full((NT * B, H, S), 12345, dtype=torch.int32),
        "last_angle": torch.full((B, H, S), torch.nan),
    }
    passed: list[str] = []

    def compiled(*taken: Tensor) -> None:
        pointers = {y.data_ptr(): name for name, y in (x | places).items() if y.numel()}
        passed.extend(pointers[y.data_ptr()] for y in taken)
        by_name = {"B": B, "T": T, "H": H, "G": G, "HA": HA, "M": NT * B}
        results = run_all(module, dict(zip(passed, taken, strict=True)), by_name, seed=int(keep))
        for name in passed:
            (x | places)[name].copy_(results[name])

    vars(module)["compiled"] = lambda: compiled
    operands = [y.name for y in MAMBA3_TURNING_SCAN.operands(problem)]
    module.launch(*((x | places)[y] for y in operands), T=T)
    kept = {"out", "final_ssm", *(["last_angle"] if S else [])}
    kept |= {"ungated"} if problem.gate and keep != "0" else set()
    kept |= {"turns"} if S and keep != "0" else set()
    kept |= {"h", "q", "k", *(["theta"] if S else [])} if keep == "2" else set()
    if kept != places.keys() & {*passed}:
        raise AssertionError(f"given were {passed}, but kept are {kept}")
    for name in sorted(kept):
        made, wanted = places[name].double(), named_wanted[name]
        limit = LIMIT
        if name in ("theta", "turns", "last_angle"):
            limit = 1e-6  # of dt rate, which is rounded for each token
            unit = UNIT if name != "last_angle" else 2 * math.pi
            no_turn = made == -(2**31)
            if wrong and name == "theta" and no_turn.nonzero().tolist() != [
                [0, WRONG_TOKEN, h, WRONG_PAIR] for h in range(H if HA == 1 else 1)
            ]:
                raise AssertionError(f"no turns are {no_turn.nonzero()}")
            if name == "last_angle" and not ((made >= 0) & (made <= 6.2831855)).all():
                raise AssertionError("an angle is no part of a turn")
            gone = wanted if name != "last_angle" else wanted / unit
            off = around(torch.where(no_turn, 0.0, made / unit - gone))
        elif wrong:
            if name not in "qk":
                continue
            if not torch.equal(made.isnan(), wanted.isnan()):
                raise AssertionError(f"{name} is NaN elsewhere")
            off = (made - wanted).nan_to_num().norm() / wanted.nan_to_num().norm()
        else:
            off = (made - wanted).norm() / wanted.norm().clamp_min(1e-9)
        print(f"{name} {off:.1e}")
        if not off < limit:
            raise AssertionError(f"{name} is {off:.1e} off")


if __name__ == "__main__":
    main(*sys.argv[1:])
