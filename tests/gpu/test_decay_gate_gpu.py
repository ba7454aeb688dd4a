"""A decay's gate by itself on a GPU: beside fp64, and calls with it apart beside those without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import gate_cases
import pytest
import torch
from gate_cases import Gate, apart
from gpu_support import DEVICE, other_stream
from part_cases import BOUNDS

from gdn2gen.family.inputs import make_inputs
from gdn2gen.measure.accuracy import public_op

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
OPS: Final = ("gdn2", "kda")
GATES: Final = {
    # tokens that are no multiple of what a program takes
    "many": Gate(rows=(4, 1031), heads=16, size=128, dtype=BF16),
    "bounded": Gate(rows=(4, 1031), heads=16, size=128, dtype=BF16, lower_bound=-5.0),
    "few": Gate(rows=(1, 3), heads=2, size=64, dtype=FP16),
    "odd": Gate(rows=(2, 777), heads=5, size=40, lower_bound=-2.5, parameters=()),
    "fp32": Gate(rows=(2, 777), heads=3, size=72),
    "far out": Gate(rows=(2, 777), heads=4, size=128, hostile=True),
    "more a turn": Gate(rows=(4, 1031), heads=16, size=128, dtype=BF16, knobs=(("ahead", 4),)),
    "wide": Gate(
        rows=(4, 1031), heads=16, size=128, dtype=BF16, knobs=(("BD", 512), ("BR", 1), ("ahead", 2))
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_gate(name: str) -> None:
    case = replace(GATES[name], device=str(DEVICE))
    # sums of millions of terms in fp32
    assert gate_cases.gate(case) < max(BOUNDS[case.dtype], 1e-5)


def test_what_is_not_finite() -> None:
    assert gate_cases.not_finite(str(DEVICE))


def test_as_torch_sees_it() -> None:
    assert gate_cases.opcheck(str(DEVICE))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("changes", [{}, {"lower_bound": -5.0}, {"B": 1, "cu_seqlens": (0, 7, 20)}])
def test_calls_agree(op: str, changes: dict[str, Any]) -> None:
    assert gate_cases.agree(op, str(DEVICE), **changes)


@pytest.mark.parametrize("op", OPS)
def test_calls_like_one_before(op: str) -> None:
    assert gate_cases.repeated(op, str(DEVICE)) >= 2


@pytest.mark.parametrize("op", OPS)
def test_compiled(op: str) -> None:
    assert gate_cases.compiled(op, str(DEVICE), "inductor") == 1


@pytest.mark.parametrize("op", OPS)
def test_served(op: str) -> None:
    assert gate_cases.served(op, str(DEVICE))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_a_captured_step(op: str, fast: bool) -> None:
    """Sizes of what is on file, in a CUDA graph, with contents that change: the bits of eager mode,
    and what the gate in the kernels makes."""
    torch.manual_seed(0)
    given = dict(make_inputs(4, 2048, 4, 128, 128, op=op, dtype=BF16, device=DEVICE))
    given["g"] = torch.randn(4, 2048, 4, 128, device=DEVICE, dtype=BF16)
    given["A_log"], given["dt_bias"] = torch.zeros(4, device=DEVICE), torch.randn(512).to(DEVICE)
    leaves = {x: y.detach().requires_grad_(y.is_floating_point()) for x, y in given.items()}
    flags = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "disable_recompute": fast}

    def step() -> list[torch.Tensor]:
        o, _ = public_op(op)(**leaves, **flags)
        gradients = torch.autograd.grad(o.float().square().sum(), [*leaves.values()])
        # a result with its graph would hold on to nodes of the stream that it was made on
        return [o.detach(), *gradients]

    with apart(False):
        within = step()
    with apart(True):
        with other_stream():
            for _ in range(3):
                eager = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(2):
            graph.replay()
        assert all(map(torch.equal, captured, eager))
        for one, other in zip(within, eager, strict=True):
            assert float((one - other).abs().max()) <= 3e-2 * float(one.abs().max())
        with torch.no_grad():
            leaves["g"].copy_(leaves["g"].flip(1))
        again = step()
        graph.replay()
        assert all(map(torch.equal, captured, again))
