"""What fold of the parallel scans leaves out with `reach`, in Triton's interpreter.

It needs TRITON_INTERPRET=1 before triton is imported, so the tests call this in a process of its
own. `counts`: what reach_kernel counts, beside a count in fp64. `passes`: every output and gradient
of a plan beside fp64 in several patterns, in segments of four chunks. `forgotten`: a NaN whose
chunk does not reach its segment's end comes out of no later one. `longer`: where steps make a state
longer than their decay says, fold leaves nothing out that is there.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import public_op, run_op
from gdn2gen.measure.case_runs import errors_in_range
from gdn2gen.measure.check import drawn, exact, forced
from gdn2gen.runtime import call

PROBLEM = Problem(
    "gated_delta_rule", K=64, V=64, dtype="fp32", initial_state=True, final_state=True
)
SHAPE = Shape("tiny", 1, 300, 2)
CHUNKS = 4
PLANS = ("direct_blocks2", "direct_blocks2_transitions", "direct_blocks2_states")


def wanted(decay: Tensor, bits: float) -> int:
    """Chunks up to the first that nothing is left before, of logarithms in their order."""
    decay = decay.clamp(-120, 0)
    before = (decay.cumsum(0) - decay).tolist()
    return next((i for i, x in enumerate(before) if x < -bits), len(before))


def counts() -> None:
    """Of two sequences and three heads; 300 chunks are three loads of them."""
    torch.manual_seed(0)
    N, HV, n_chunks = 2, 3, 700
    for stage, back in (("scan", False), ("reverse_scan_blocks2", True)):
        for bits, segment in ((32, 300), (100, 300), (64, 128), (64, 7)):
            config = default_config(stage, PROBLEM, BT=16).replace(segments="parallel", BV=16)
            module = load(render(PROBLEM, stage, config.replace(reach=bits)))
            NS = -(-n_chunks // segment)
            # from heads that forget within a chunk to one that never does, and a reset
            log = -torch.rand(N * n_chunks, HV, dtype=torch.float64) * torch.tensor([40, 0.5, 0])
            log[3, 2] = log[N * n_chunks - 9, 2] = -math.inf
            beta = 2 * torch.rand(N * n_chunks, HV, 16, dtype=torch.float64)
            # steps past 2 or below 0, a chunk that grows, and a NaN, of which nothing is left out
            beta[5, 0, 3], beta[6, 1, 15], log[7, 0] = 2.0**40, -3.0, 11.0
            beta[N * n_chunks - 4, 0, 0] = math.nan
            steps = (1 - beta).abs().clamp(min=1).log2().sum(2) + log.clamp(min=0)
            kept = torch.full((N, HV, NS, PROBLEM.V, PROBLEM.K), float("nan"))
            names = module.reach_kernel.arg_names
            given: dict[str, Tensor | int | None] = dict.fromkeys(names)
            given |= {"gamma_C": log.exp2().float(), "k_beta": beta.float()}
            given["dS_seg" if back else "S_seg"] = kept
            given |= {"T": n_chunks * 16 - 5, "HV": HV, "NS": NS, "segment": segment, "H": HV}
            sizes = {"K": PROBLEM.K, "V": PROBLEM.V, "BT": 16, "BC": module.BC}
            positional = [given[x] for x in names if x not in sizes]
            module.reach_kernel[(N * HV * (NS - 1),)](*positional, **sizes)
            found = kept[:, :, NS - 1 if back else 0].flatten(2)
            for n in range(N):
                for h in range(HV):
                    for s in range(1, NS) if back else range(NS - 1):
                        at = slice(n * n_chunks, (n + 1) * n_chunks), h
                        of = slice(s * segment, (s + 1) * segment)
                        own, grown = log[at][of], float(steps[at][of].sum())
                        front, end = (wanted(x, bits + grown) for x in (own, own.flip(0)))
                        values, transition = (front, end) if back else (end, front)
                        half = PROBLEM.K * PROBLEM.V // 2
                        got = [int(found[n, h, s]), int(found[n, h, half + s])]
                        assert got == [values, transition], (stage, bits, n, h, s, got)
            written = int(kept.isfinite().sum())
            assert written == N * HV * (NS - 1) * 2, written
            print("counts", stage, bits, segment)


def recipe_of(plan: str, **knobs: Knob) -> Recipe:
    """In segments wherever the plan has scans, of chunks of 16."""
    recipe = Recipe.default(PROBLEM, plan, 16)
    scans = [recipe[x] for x in recipe.plan.stages if "segments" in recipe[x]]
    return recipe.with_config(*(x.replace(segments="parallel", BV=16, **knobs) for x in scans))


def passes(plan: str) -> None:
    call.SEGMENT = CHUNKS
    for pattern in ("layer", "sparse", "constant", "zero", "correlated"):
        inputs, grads = drawn(PROBLEM, SHAPE, pattern, "cpu")
        reference = exact(PROBLEM, SHAPE, pattern, "cpu")
        for bits in (32, 100):
            with forced(recipe_of(plan, reach=bits)):
                made = run_op(public_op(PROBLEM.op), PROBLEM, inputs, grads)
            errors = errors_in_range(made, reference, PROBLEM.dtype)
            assert {*errors} == {*reference}
            assert max(errors.values()) < 2e-6, (pattern, bits, errors)
            print(plan, pattern, bits, f"{max(errors.values()):.1e}")


def forgotten() -> None:
    """With 5.95 nats a token a chunk leaves 2^-137 of what it begins with."""
    call.SEGMENT = CHUNKS
    inputs, grads = drawn(PROBLEM, SHAPE, "constant", "cpu")
    inputs["v"][:, 5] = float("nan")
    grads["o"][:, -3] = float("nan")
    segment = CHUNKS * 16
    last = (SHAPE.T - 1) // segment * segment
    for bits in ("off", 100):
        with forced(recipe_of(PLANS[0], reach=bits)):
            made = run_op(public_op(PROBLEM.op), PROBLEM, inputs, grads)
        later = made["o"][:, segment:].isfinite().all() and made["final_state"].isfinite().all()
        earlier = made["dv"][:, segment:last].isfinite().all()
        print("forgotten", bits, bool(later), bool(earlier))
        assert (bool(later), bool(earlier)) == (bits != "off", bits != "off")
        assert made["o"][:, :16].isnan().any() and made["dv"][:, last:].isnan().any()


def longer() -> None:
    """All keys are one, and beta is 4.5: a token leaves 0.875 of what lies along it where its decay
    is a fourth, 1e-2 over two chunks, of which decay alone leaves 2^-64."""
    call.SEGMENT = CHUNKS
    inputs, grads = drawn(PROBLEM, SHAPE, "layer", "cpu")
    inputs |= {"k": inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()}
    inputs |= {"g": torch.full_like(inputs["g"], -math.log(4))}
    inputs |= {"beta": torch.full_like(inputs["beta"], 4.5)}
    made = []
    for bits in ("off", 32):
        with forced(recipe_of(PLANS[1], reach=bits)):
            made.append(run_op(public_op(PROBLEM.op), PROBLEM, inputs, grads))
    whole, found = made
    off = {x: float((found[x] - y).norm() / y.norm()) for x, y in whole.items()}
    assert max(off.values()) < 2e-6, off
    print("longer", f"{max(off.values()):.1e}")


if __name__ == "__main__":
    checks = {"counts": counts, "passes": passes, "forgotten": forgotten, "longer": longer}
    checks[sys.argv[1]](*sys.argv[2:])
