"""mamba3_siso_combined on a GPU at a model's sizes: beside fp64, and beside mamba_ssm's."""

from __future__ import annotations

from typing import Any, Final

import pytest
import torch
from gpu_support import DEVICE
from mamba3_checks import arguments, check_compiled, check_steps, draw, poisoned, results

from gdn2gen import mamba3_siso_combined
from gdn2gen.measure.accuracy import relative_errors

pytestmark = pytest.mark.gpu

BOUNDS: Final = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
LAYER: Final[dict[str, Any]] = {
    "sizes": (8, 64, 128), "groups": 1, "angles": 32, "T": 517, "D": True, "Z": True,
}  # fmt: skip
CASES: Final[dict[str, dict[str, Any]]] = {
    "layer": LAYER | {"states": True},
    "packed": LAYER | {"cu_seqlens": (0, 0, 1, 130, 131, 517), "states": True},
    "strong": LAYER | {"decay": 60.0},
    "groups": {"sizes": (6, 96, 64), "groups": 3, "angles": 7, "T": 200, "states": True},
}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    with poisoned():
        found = relative_errors(*results(draw(CASES[name], dtype, str(DEVICE))))
    assert max(found.values()) < BOUNDS[dtype], found


def test_steps_are_the_whole() -> None:
    for sizes in ({"sizes": (8, 64, 128), "angles": 32}, {"sizes": (6, 96, 80), "groups": 3}):
        check_steps(str(DEVICE), **sizes)


def test_compiled() -> None:
    check_compiled(str(DEVICE))


def test_the_same_bits_twice_and_before_later_tokens() -> None:
    case = LAYER | {"sizes": (16, 64, 128), "T": 2048, "states": True}
    made = arguments(draw(case, torch.bfloat16, str(DEVICE)))
    first, again = (mamba3_siso_combined(**made, return_final_states=True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    for name in ("Q", "K", "V", "Angles", "Z"):
        made[name][:, 1001:] *= -3.0
    for name in ("ADT", "DT", "Trap"):
        made[name][..., 1001:] *= 2.5
    changed = mamba3_siso_combined(**made)
    assert torch.equal(first[0][:, :1001], changed[:, :1001])


@pytest.mark.parametrize("name", ["layer", "packed", "strong"])
def test_no_worse_than_mamba_ssm(name: str) -> None:
    """Every output and gradient beside fp64. What it rounds to bfloat16 comes as such."""
    theirs = pytest.importorskip("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined")
    made = draw(CASES[name], torch.bfloat16, str(DEVICE))
    for x in ("Trap", "Angles"):
        made[x] = made[x].bfloat16()
    if "cu_seqlens" in made:
        made["cu_seqlens"] = made["cu_seqlens"].int()
        made["cu_seqlens"][1] = 1  # its kernels want tokens in every sequence
        made["cu_seqlens"][2] = 2
    ours = relative_errors(*results(made))
    peer = relative_errors(*results(made, op=theirs.mamba3_siso_combined))
    worse = {x: (ours[x], peer[x]) for x in ours if ours[x] > 1.5 * peer[x] + 1e-3}
    assert not worse, worse
