"""mamba_chunk_scan_combined beside its recurrence in fp64, every output and gradient."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen import mamba_chunk_scan_combined
from gdn2gen.base.environment import verifying
from gdn2gen.family.mamba2 import recurrent
from gdn2gen.measure.accuracy import relative_errors

LIMIT: Final = 1e-5
CASES: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "layer": {"D": (4,), "dt_bias": (4,), "z": True, "dt_softplus": True},
    "D-of-channels": {"D": (4, 16), "dt_bias": (4,), "dt_softplus": True, "dt_limit": (0.05, 0.4)},
    "seq_idx": {"seq_idx": (0, 0, 3, 3, 3, 9), "D": (4,)},
    "packed": {"cu_seqlens": (0, 0, 7, 40), "z": True},
    "one-group": {"groups": 1, "states": False},
}


def draw(case: dict[str, Any], T: int = 40) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and options; P = 16, N = 24, four heads."""
    rng = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    packed = "cu_seqlens" in case
    b, groups = 1 if packed else 2, case.get("groups", 2)
    made = {
        "x": normal(b, T, 4, 16), "dt": normal(b, T, 4), "A": -normal(4).exp(),
        "B": normal(b, T, groups, 24), "C": normal(b, T, groups, 24),
    }  # fmt: skip
    if not case.get("dt_softplus"):
        made["dt"] = 0.3 * made["dt"].abs()
    for name in ("D", "dt_bias"):
        if name in case:
            made[name] = normal(*case[name])
    if case.get("z"):
        made["z"] = normal(*made["x"].shape)
    options = {x: case[x] for x in ("dt_softplus", "dt_limit") if x in case}
    if packed:
        options["cu_seqlens"] = torch.tensor(case["cu_seqlens"])
    if "seq_idx" in case:
        numbers = torch.tensor(case["seq_idx"]).repeat_interleave(7)[:T]
        options["seq_idx"] = torch.stack([numbers, numbers.flip(0)])
    if case.get("states", True):
        made["initial_states"] = normal(len(case["cu_seqlens"]) - 1 if packed else b, 4, 16, 24)
    return made, options


@verifying()
def errors(name: str) -> dict[str, float]:
    made, options = draw(CASES[name])
    asked = {"return_final_states": "cu_seqlens" not in options}
    asked["return_varlen_states"] = not asked["return_final_states"]
    leaves = {x: y.clone().requires_grad_() for x, y in made.items()}
    exact = {x: y.double().requires_grad_() for x, y in made.items()}
    found = mamba_chunk_scan_combined(**leaves, chunk_size=256, **options, **asked)
    assert isinstance(found, tuple)
    right = recurrent(**exact, **options)
    results = dict(zip(("out", "states"), (x.detach() for x in found), strict=True))
    expected = dict(zip(("out", "states"), (x.detach() for x in right), strict=True))
    seeds = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in found]
    ours = torch.autograd.grad(found, [*leaves.values()], seeds)
    theirs = torch.autograd.grad(right, [*exact.values()], [x.double() for x in seeds])
    results |= {f"d{x}": y for x, y in zip(leaves, ours, strict=True)}
    expected |= {f"d{x}": y for x, y in zip(exact, theirs, strict=True)}
    return relative_errors(results, expected)
