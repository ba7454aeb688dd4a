"""Checks of packed batches over the kernels in Triton's interpreter; see op_checks."""

from __future__ import annotations

import itertools
import random
from typing import Any
from unittest import mock

import torch
from op_checks import make
from torch import Tensor

from gdn2gen import chunk_gdn2
from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render_tables
from gdn2gen.family.problem import Problem
from gdn2gen.measure.accuracy import relative_errors
from gdn2gen.ops import _call
from gdn2gen.runtime import arguments

BT = 32


def within(given: list[int], T: int) -> list[int]:
    """What the kernels take for cu_seqlens: within 0 .. T, and rising."""
    found: list[int] = []
    for x in given:
        found.append(max(min(max(x, 0), T), *found[-1:], 0))
    return found


def _contents(draw: random.Random, kind: str, T: int, N: int) -> list[int]:
    if kind == "rising":
        return sorted([0, T, *(draw.randint(0, T) for _ in range(N - 1))])
    if kind == "partly":
        return sorted(draw.randint(0, T) for _ in range(N + 1))
    wild = [draw.randint(-2 * T - 5, 2 * T + 5) for _ in range(N + 1)]
    return [x * draw.choice([1, 1, 10**12]) for x in wild]


def tables(kind: str, dtype: torch.dtype) -> str:
    """Tables of random batches, and rows of o that are cleared, against plain Python."""
    draw = random.Random(kind)
    module = load(render_tables(Problem(K=32, V=32, dtype="fp32", varlen=True), BT))
    for T, N in ((0, 1), (1, 3), (40, 2), (100, 127), (3000, 128), (3000, 129), (70, 300)):
        given = _contents(draw, kind, T, N)
        given_tensor = torch.tensor(given, dtype=torch.int64).clamp(*_range(dtype)).to(dtype)
        NT = T // BT + N
        o = torch.full((1, T, 2, 32), torch.nan)
        made = [torch.full(shape, -7, dtype=torch.int32) for shape in ((N + 1,), (N + 1,), (NT, 2))]
        module.launch(given_tensor, o, *made, n_sequences=N, n_chunks=NT, T=T, HV=2)
        cu_seqlens, offsets, table = (x.tolist() for x in made)
        right = within(given, T)
        assert cu_seqlens == right, (given, T)
        chunks = [
            [[t, min(BT, end - t)] for t in range(start, end, BT)]
            for start, end in itertools.pairwise(right)
        ]
        assert offsets == [0, *torch.tensor([len(x) for x in chunks]).cumsum(0).tolist()]
        listed = [x for one in chunks for x in one]
        assert table[: len(listed)] == listed
        assert all(token <= T and rows == 0 for token, rows in table[len(listed) :])
        assert not o[0, : right[0]].any() and not o[0, right[-1] :].any()
        assert o[0, right[0] : right[-1]].isnan().all()
    return "done"


def _range(dtype: torch.dtype) -> tuple[int, int]:
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def any_contents(given: list[int], level: str) -> dict[str, float]:
    """Errors against the sequences that are there; all else is zero, however it is called."""
    T = 40
    inputs = make(B=1, T=T, cu_seqlens=(0, *[T] * (len(given) - 1)))
    right = within(given, T)
    o, state, grads = _train(inputs | {"cu_seqlens": torch.tensor(given)}, level)
    start, end = right[0], right[-1]
    covered = {x: y[:, start:end] for x, y in inputs.items() if y.dim() == 4 and y.shape[1] == T}
    covered |= {"initial_state": inputs["initial_state"]}
    covered["cu_seqlens"] = torch.tensor([x - start for x in right])
    expected_o, expected_state, expected = _train(covered, level)
    for name, x in {"o": o, **grads}.items():
        if name != "dinitial_state":
            assert not x[:, :start].any() and not x[:, end:].any(), name
    found = {x: y if x == "dinitial_state" else y[:, start:end] for x, y in grads.items()}
    for n, (a, b) in enumerate(itertools.pairwise(right)):
        if a == b:
            assert torch.equal(state[n], inputs["initial_state"][n])
            assert torch.equal(grads["dinitial_state"][n], torch.ones_like(state[n]))
    results = {"o": o[:, start:end], "final_state": state, **found}
    exact = {"o": expected_o, "final_state": expected_state, **expected}
    held = {name for name, x in exact.items() if x.numel()}
    return relative_errors(results, {name: exact[name] for name in held})


def _train(inputs: dict[str, Any], level: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Unchecked, as on a GPU, where only the kernels read cu_seqlens."""
    leaves = {
        name: x.detach().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    # of a call, and of one whose kind is known
    with (
        mock.patch.object(arguments, "check_cu_seqlens"),
        mock.patch.object(_call, "check_cu_seqlens"),
    ):
        o, state = chunk_gdn2(
            **leaves,
            use_qk_l2norm_in_kernel=True,
            output_final_state=True,
            disable_recompute=level == "fast",
        )
    assert state is not None
    names = [name for name, x in leaves.items() if x.is_floating_point()]
    grads = torch.autograd.grad(o.sum() + state.sum(), [leaves[name] for name in names])
    return o.detach(), state.detach(), {f"d{x}": y for x, y in zip(names, grads, strict=True)}
