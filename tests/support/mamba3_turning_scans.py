"""The text of Mamba-3's scan that turns queries and keys, carried out, beside fp64.

    python mamba3_turning_scans.py TOKENS STATE_SIZE ANGLES KEEP PATTERN [FLAGS]

As `mamba3_scans`, from queries and keys of a group: these are biased and turned in fp64, and
rounded for the recurrence as products read them. FLAGS, with commas, are fields of the problem;
`groups`, where each head has a group of its own; `apart`, where heads share no angles; `nan`, where
an angle is no number.
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
from gdn2gen.kernels.mamba3_turning_scan import (
    MAMBA3_TURNING_SCAN,
    turning_knobs,
    turning_problem,
)

UNIT = 2.0**32
"""Of a turn."""
OF_NAN = 2147483520 / UNIT
"""What later tokens have of one whose angle is no number: the largest integer of these."""
WRONG_TOKEN, WRONG_PAIR = 70, 3


def given(
    problem: Mamba3Problem, T: int, H: int, G: int, HA: int, pattern: str
) -> dict[str, Tensor]:
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
    """q and k in fp64; Theta, in turns, of tokens within chunks, and before these; the last."""
    B, T, G, _ = x["Q"].shape
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


def problem_of(state_size: int, angles: int, flags: str) -> tuple[Mamba3Problem, list[bool]]:
    """And whether there are groups, angles of each head, and one that is no number."""
    named: dict[str, bool] = dict.fromkeys([x for x in flags.split(",") if x], True)
    others = [named.pop(x, False) for x in ("groups", "apart", "nan")]
    sizes = {"state_size": state_size, "angles": angles}
    return turning_problem(Mamba3Problem(**sizes, **named)), others  # type: ignore[arg-type]


def poisoned(B: int, T: int, H: int, problem: Mamba3Problem) -> dict[str, Tensor]:
    """What the program is to write, by name: NaN, or a number that no sum of angles is."""
    N, P, S, NT = problem.state_size, problem.head_dim, problem.angles, -(-T // BT)
    narrow = {"out": (B, T, H, P), "ungated": (B, T, H, P), "h": (NT * B, H, P, N)}
    narrow |= {"q": (B, T, H, N), "k": (B, T, H, N)}
    whole = {"theta": (B, T, H, S), "turns": (NT * B, H, S)}
    wide = {"final_ssm": (B, H, P, N), "last_angle": (B, H, S)}
    return {
        **{x: torch.full(y, torch.nan).bfloat16() for x, y in narrow.items()},
        **{x: torch.full(y, 12345, dtype=torch.int32) for x, y in whole.items()},
        **{x: torch.full(y, torch.nan) for x, y in wide.items()},
    }


def carried_out(
    problem: Mamba3Problem, keep: int, x: dict[str, Tensor], places: dict[str, Tensor]
) -> set[str]:
    """Run the text into `places`; the names of those that it was given."""
    knobs = turning_knobs(problem, keep)
    config = default_config(MAMBA3_TURNING_SCAN.name, problem).replace(**knobs)
    module = load(render(problem, MAMBA3_TURNING_SCAN.name, config))
    B, T, G, _ = x["Q"].shape
    sizes = {"B": B, "T": T, "H": x["V"].shape[2], "G": G, "M": places["h"].shape[0]}
    sizes["HA"] = x["rates"].shape[1] if "rates" in x else 1
    passed: list[str] = []

    def compiled(*taken: Tensor) -> None:
        pointers = {y.data_ptr(): name for name, y in (x | places).items() if y.numel()}
        passed.extend(pointers[y.data_ptr()] for y in taken)
        results = run_all(module, dict(zip(passed, taken, strict=True)), sizes, seed=keep)
        for name in passed:
            (x | places)[name].copy_(results[name])

    vars(module)["compiled"] = lambda: compiled
    operands = [y.name for y in MAMBA3_TURNING_SCAN.operands(problem)]
    module.launch(*((x | places)[y] for y in operands), T=T)
    return places.keys() & {*passed}


def turns_off(name: str, made: Tensor, wanted: Tensor, gone: list[list[int]]) -> Tensor:
    """How far angles are off, in turns; `gone` is where there is none."""
    if name == "last_angle":
        if not ((made >= 0) & (made <= 6.2831855)).all():
            raise AssertionError("an angle is no part of a turn")
        made, wanted = made / (2 * math.pi), wanted / (2 * math.pi)
    else:
        none = made == -(2**31)
        if none.nonzero().tolist() != (gone if name == "theta" else []):
            raise AssertionError(f"{name} is none at {none.nonzero()}")
        made, wanted = torch.where(none, 0.0, made / UNIT), torch.where(none, 0.0, wanted)
    return ((made - wanted) - (made - wanted).round()).abs().max()


def main(T: int, state_size: int, S: int, keep: int, pattern: str, flags: str) -> None:
    problem, (groups, apart, wrong) = problem_of(state_size, S, flags)
    H = 2
    x = given(problem, T, H, H if groups else 1, H if apart else 1, pattern)
    if wrong:
        x["rates"][0, 0, WRONG_TOKEN, WRONG_PAIR] = torch.nan
    # of all heads that share the angle
    gone = [[0, WRONG_TOKEN, h, WRONG_PAIR] for h in range(1 if apart else H) if wrong]
    right = turned(x, S)
    found = recurrent({**x, **{y: right[y].nan_to_num().bfloat16() for y in "qk"}})
    wanted = {"out": found.out, "ungated": found.y, "h": found.h, "final_ssm": found.last, **right}
    places = poisoned(1, T, H, problem)
    kept = {"out", "final_ssm", *(["last_angle"] if S else [])}
    kept |= {"ungated"} if problem.gate and keep else set()
    kept |= {"turns"} if S and keep else set()
    kept |= {"h", "q", "k", *(["theta"] if S else [])} if keep == 2 else set()
    if kept != (passed := carried_out(problem, keep, x, places)):
        raise AssertionError(f"given were {passed}, but kept are {kept}")
    for name in sorted(kept):
        made, limit = places[name].double(), LIMIT
        if name in ("theta", "turns", "last_angle"):
            limit = 1e-6  # dt rate is rounded for each token
            off = turns_off(name, made, wanted[name], gone)
        elif wrong and name not in "qk":
            continue  # NaN from that token on
        else:
            if not torch.equal(made.isnan(), wanted[name].isnan()):
                raise AssertionError(f"{name} is NaN elsewhere")
            made, exact = made.nan_to_num(), wanted[name].nan_to_num()
            off = (made - exact).norm() / exact.norm().clamp_min(1e-9)
        print(f"{name} {off:.1e}")
        if not off < limit:
            raise AssertionError(f"{name} is {off:.1e} off")


if __name__ == "__main__":
    T, N, S, KEEP, PATTERN, *FLAGS = sys.argv[1:]
    main(int(T), int(N), int(S), int(KEEP), PATTERN, FLAGS[0] if FLAGS else "")
