"""Mamba-2's step in mamba_ssm's words on a GPU: values at its models' sizes, slots, graphs, a peer.

The same op by the family's words is in test_recurrent_gpu.py.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any, Final

import pytest
import torch
from decoding_cases import BOUNDS, error, same_bits
from gpu_support import DEVICE
from selective_checks import CASES, Case, check, check_all, draw, expected

from gdn2gen import selective_state_update
from gdn2gen.base.environment import verifying

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
LAYER: Final = Case(b=8, groups=1, P=64, N=128, heads=24, dtype=BF16, gate_dtype=BF16, views=True)
LAYERS: Final = {
    "as it is": LAYER,
    "states in bf16": replace(LAYER, state_dtype=BF16),
    "a large batch": replace(LAYER, b=256, null_slot=0),
    "several groups": replace(LAYER, groups=8),
    "guessed": replace(LAYER, T=4, indices="guessed"),
    "packed": replace(LAYER, lengths=(3, 0, 1, 5), indices="guessed"),
    "without z, D": replace(LAYER, gated=False, skip=""),
}


@pytest.mark.parametrize("name", CASES)
def test_small_calls(name: str) -> None:
    check_all(name, DEVICE)


@pytest.mark.parametrize("name", LAYERS)
def test_sizes_of_layers(name: str) -> None:
    """Twice: the second call is known by its tensors."""
    for _ in range(2):
        check(LAYERS[name], DEVICE)


def test_a_slot_past_32_bits() -> None:
    """Slots whose offsets no int32 holds: 2^31 elements into a pool of bf16 states."""
    h, P, N = 2, 64, 128
    far = 2**31 // (h * P * N) + 5
    given, _ = draw(replace(LAYER, b=2, heads=h, indices="", state_dtype=BF16, gap=0), DEVICE)
    small = given["state"].clone()
    pool = torch.zeros(far + 2, h, P, N, dtype=BF16, device=DEVICE)
    pool[[far, 3]] = small[:2]
    slots = torch.tensor([far, 3], device=DEVICE, dtype=torch.int32)
    with verifying(), torch.no_grad():
        y = selective_state_update(**given | {"state": pool, "state_batch_indices": slots})
        right = selective_state_update(**given | {"state": small})
    assert same_bits(y, right) and same_bits(pool[[far, 3]], small[:2])
    for start in range(0, far, 4096):
        rest = pool[start : min(start + 4096, far)]
        kept = rest.flatten(1).any(1).nonzero().flatten() + start
        assert kept.tolist() == ([3] if start == 0 else [])


@verifying()
def test_replays_with_other_contents() -> None:
    case = replace(LAYER, b=4)
    given, storage = draw(case, DEVICE)
    out = torch.empty_like(given["x"].contiguous())
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.cuda.stream(stream):
        selective_state_update(**given, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        selective_state_update(**given, out=out)
    for seed in range(3):
        torch.manual_seed(seed)
        for name in ("x", "B", "C", "z", "state"):
            given[name].normal_()
        order = torch.randperm(len(given["state"]), device=DEVICE)[:4].int()
        order[seed % 4] = -1
        given["state_batch_indices"].copy_(order)
        y, slots = expected(case, given, storage)
        out.fill_(float("nan"))
        graph.replay()
        assert error(out, y) < BOUNDS[BF16] and error(storage, slots) < BOUNDS[FP32]


@pytest.mark.parametrize("state", [FP32, BF16])
def test_beside_mamba_ssm(state: torch.dtype) -> None:
    """No less accurate than its op, to a quarter, on the same call."""
    home = "mamba_ssm.ops.triton.selective_state_update"
    try:
        theirs: Any = import_module(home).selective_state_update
    except Exception as error_:  # its modules import much that may be missing
        pytest.skip(f"{home}: {error_}")
    case = replace(LAYER, state_dtype=state, indices="", gap=0)
    found = {}
    for name, call in (("ours", selective_state_update), ("theirs", theirs)):
        given, storage = draw(case, DEVICE)
        out, slots = expected(case, given, storage)
        with torch.no_grad(), verifying():
            y = call(**given)
        found[name] = error(y, out), error(storage, slots)
    for ours, other in zip(found["ours"], found["theirs"], strict=True):
        assert ours <= max(1.25 * other, BOUNDS[FP32]), found


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_whole_graphs(mode: str) -> None:
    torch._dynamo.reset()
    call = torch.compile(selective_state_update, fullgraph=True, dynamic=True, mode=mode)
    for b in (3, 5):
        check(replace(LAYER, b=b), DEVICE, call)
