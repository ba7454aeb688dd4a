"""Batch-invariant mode by interpreted kernels: a sequence alone has the bits it has among others.

Two recipes are on file, for few tokens and for many, with chunks of other sizes and a scan in
segments: without the mode they give other bits, so that these checks can fail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor

import gdn2gen
from gdn2gen.base.device import named_device
from gdn2gen.base.environment import verifying
from gdn2gen.codegen.render import template_digest
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.tolerances import LIMITS
from gdn2gen.kernels.plans import plans_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import public_op
from gdn2gen.ops import recurrent
from gdn2gen.store._claims import always_checked
from gdn2gen.store.tuned_files import Entry, TunedFile, metadata_for, tuned_path, write_tuned

LENGTHS: Final = (20, 0, 37)
_FEW, _MANY = Regime(tokens=20, sequences=1, heads=2), Regime(tokens=70, sequences=3, heads=2)


@contextmanager
def two_recipes(op: str, level: str = "lean") -> Iterator[None]:
    """On file for all calls inside."""
    problem = Problem(op=op, K=32, V=32, dtype="fp32")
    device = named_device("sm_90")
    entries = []
    for regime, BT, segments in ((_FEW, 16, "parallel"), (_MANY, 32, "serial")):
        recipe = Recipe.default(problem, plans_of(level, op)[0], BT=BT)
        scans = (recipe.plan.forward[-1], "reverse_scan")
        recipe = recipe.with_config(*(recipe[x].replace(segments=segments) for x in scans))
        configs = recipe.by_stage
        digests = {stage: template_digest(config) for stage, config in configs.items()}
        times = {"forward_ms": 1.0, "forward_backward_ms": 2.0}
        errors = dict.fromkeys(always_checked(op), 1e-6)
        filed = (problem.key, regime.key, level, recipe.plan.name, configs, digests, times, errors)
        entries.append(Entry(*filed, "measured"))
    with TemporaryDirectory() as folder:
        before = os.environ.get("GDN2GEN_TUNED_DIR")
        os.environ["GDN2GEN_TUNED_DIR"] = folder
        metadata = metadata_for(device, {}, "test", "2026")
        write_tuned(tuned_path(Path(folder), op, device), TunedFile(metadata, tuple(entries)))
        gdn2gen.reload()
        try:
            yield
        finally:
            os.environ.pop("GDN2GEN_TUNED_DIR")
            if before is not None:
                os.environ["GDN2GEN_TUNED_DIR"] = before
            gdn2gen.reload()


def flags_of(op: str) -> dict[str, Any]:
    return {"use_qk_l2norm_in_kernel": True} if recurrence_named(op).normalises else {}


def leaves_of(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {
        x: y.detach().requires_grad_() if y.is_floating_point() else y for x, y in inputs.items()
    }


def train(op: str, inputs: dict[str, Tensor], seeds: list[Tensor], level: str) -> dict[str, Tensor]:
    """o, the final state and every gradient."""
    leaves = leaves_of(inputs)
    o, state = public_op(op)(
        **leaves, **flags_of(op), output_final_state=True, disable_recompute=level == "fast"
    )
    wanted = {x: y for x, y in leaves.items() if y.requires_grad}
    grads = torch.autograd.grad([o, state], [*wanted.values()], seeds)  # type: ignore[list-item]
    assert state is not None
    return {"o": o, "state": state, **dict(zip(wanted, grads, strict=True))}


def batch(op: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Packed sequences, with initial states, and what arrives at o and the final states."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    inputs = make_inputs(
        1,
        int(ends[-1]),
        1,
        32,
        32,
        op=op,
        HV=2,
        cu_seqlens=tuple(ends.tolist()),
        initial_state=True,
    )
    generator = torch.Generator().manual_seed(5)
    shapes = (inputs["v"].shape, inputs["initial_state"].shape)
    return {**inputs}, [torch.randn(x, generator=generator) for x in shapes]


def one_of(
    inputs: dict[str, Tensor], seeds: list[Tensor], n: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A sequence of the batch, alone in a row."""
    start, end = [*pairwise(inputs["cu_seqlens"].tolist())][n]
    alone = {
        x: y[n : n + 1] if "state" in x else y[:, start:end]
        for x, y in inputs.items()
        if x != "cu_seqlens"
    }
    return alone, [seeds[0][:, start:end], seeds[1][n : n + 1]]


def _rows(found: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    start, end = [*pairwise(torch.tensor([0, *LENGTHS]).cumsum(0).tolist())][n]
    return {x: y[n : n + 1] if "state" in x else y[:, start:end] for x, y in found.items()}


def _differing(x: dict[str, Tensor], y: dict[str, Tensor]) -> list[str]:
    return [name for name in x if not torch.equal(x[name], y[name])]


@verifying()
def alone_and_among_others(op: str, level: str) -> list[str]:
    """Asserts the bits of every sequence packed, in rows and alone; returns what differs without
    the mode."""
    inputs, seeds = batch(op)
    with two_recipes(op, level):
        usual = _rows(train(op, inputs, seeds, level), 0)
        differing = _differing(usual, train(op, *one_of(inputs, seeds, 0), level))
        with gdn2gen.batch_invariant():
            packed = train(op, inputs, seeds, level)
            for n in (0, 2):
                alone = train(op, *one_of(inputs, seeds, n), level)
                assert not _differing(alone, _rows(packed, n)), (
                    n,
                    _differing(alone, _rows(packed, n)),
                )
            row, arriving = one_of(inputs, seeds, 2)
            twice = {x: torch.cat([y, y]) for x, y in row.items()}
            rows = train(op, twice, [torch.cat([x, x]) for x in arriving], level)
            for i in range(2):
                found = _differing({x: y[i : i + 1] for x, y in rows.items()}, _rows(packed, 2))
                assert not found, (i, found)
    return differing


@verifying()
def traced_and_with_checkpoints(op: str) -> bool:
    """A call through torch's own ops, one without gradients, and one that keeps states on the way
    have the bits of any other."""
    inputs, seeds = batch(op)
    flags = flags_of(op)
    with two_recipes(op), gdn2gen.batch_invariant():
        expected = train(op, inputs, seeds, "lean")
        torch._dynamo.reset()

        @torch.compile(backend="aot_eager", fullgraph=True)
        def step(given: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
            flags = {"use_qk_l2norm_in_kernel": True} if recurrence_named(op).normalises else {}
            return public_op(op)(**given, **flags, output_final_state=True)

        leaves = {
            x: y.detach().requires_grad_() if y.is_floating_point() else y
            for x, y in inputs.items()
        }
        o, state = step(leaves)
        wanted = [x for x in leaves.values() if x.requires_grad]
        grads = torch.autograd.grad([o, state], wanted, seeds)  # type: ignore[list-item]
        assert state is not None
        for x, y in zip([o, state, *grads], expected.values(), strict=True):
            assert torch.equal(x, y)
        with torch.no_grad():
            plain = public_op(op)(**inputs, **flags, output_final_state=True)
            kept = public_op(op)(  # type: ignore[call-arg]
                **inputs, **flags, output_final_state=True, return_intermediate_states=True
            )
        for found in (plain, kept):
            assert torch.equal(found[0], expected["o"])
            assert found[1] is not None and torch.equal(found[1], expected["state"])
    return True


@verifying()
def prefill_then_decode(op: str, dtype: torch.dtype, device: str = "cpu") -> float:
    """A prompt in chunks and then token by token, beside one pass in chunks: the worst relative
    difference (norms) of o and the final state, over the bound that is stated for it."""
    member = recurrence_named(op)
    flags = flags_of(op)
    decode = getattr(recurrent, member.public.recurrent)
    there = dict(member.public.recurrent_names)
    bound = LIMITS[{torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]]
    worst = 0.0
    for pattern in ("layer", "sparse"):
        given = make_inputs(
            2, 60, 1, 32, 32, op=op, HV=2, dtype=dtype, pattern=pattern, device=device
        )
        with torch.no_grad(), gdn2gen.batch_invariant():
            o, state = public_op(op)(**given, **flags, output_final_state=True)
            prompt = {x: y[:, :40] for x, y in given.items()}
            _, carried = public_op(op)(**prompt, **flags, output_final_state=True)
            found = []
            for t in range(40, 60):
                token = {there.get(x, x): y[:, t : t + 1] for x, y in given.items()}
                y, carried = decode(
                    **token, initial_state=carried, **flags, output_final_state=True
                )
                found.append(y)
        assert state is not None and carried is not None
        for x, y in ((torch.cat(found, 1), o[:, 40:]), (carried, state)):
            worst = max(worst, float((x.double() - y.double()).norm() / y.double().norm()))
    return worst / bound


@verifying()
def decoding_knobs(op: str) -> bool:
    """A step of one sequence and of a hundred run the same config, in the mode alone."""
    from decoding_cases import Case
    from decoding_torch_checks import plan

    def configs() -> set[Any]:
        sizes: dict[str, Any] = {"K": 64, "V": 64, "H": 4, "HV": 4, "states": "none"}
        return {plan(Case(op=op, N=N, **sizes)).config for N in (1, 7, 600)}

    assert len(configs()) > 1
    with gdn2gen.batch_invariant():
        assert len(configs()) == 1
    return True
