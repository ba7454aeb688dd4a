"""Compile or load in this process what calls will want, before they come."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

import gdn2gen
from gdn2gen.base.decay import expected
from gdn2gen.base.device import present_device
from gdn2gen.base.environment import interpreted
from gdn2gen.base.errors import DeviceError, InputError
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.family.mamba3_problem import MAMBA3, Mamba3Problem, usual_mamba3_problem
from gdn2gen.family.prefill import INTERMEDIATE_TOKENS
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.plans import LEVELS
from gdn2gen.measure.accuracy import inputs_of, op_flags, output_gradients, public_op
from gdn2gen.store.dispatch import Found
from gdn2gen.store.gates import find_call
from gdn2gen.store.mamba3 import Mamba3Found, find_mamba3
from gdn2gen.workflows._mamba3_calls import call_mamba3, call_mamba3_step
from gdn2gen.workflows.mamba3 import at_shape
from gdn2gen.workflows.wanted import (
    Shapes,
    at,
    decoding_problem_from,
    levels_from,
    problem_from,
    shapes_from,
    usual_shapes,
)


@dataclass(frozen=True)
class Warmed:
    """One kind of call that now finds all of its kernels loaded."""

    call: str
    """The public op."""
    shape: Shape
    level: str | None
    """None of a call over a few tokens."""
    found: Found | Mamba3Found | None
    """The recipe that it runs, and why, of Mamba-3 with the knobs around it; None of a call over a
    few tokens, and of one for serving."""
    seconds: float
    """That it took, of which most was for compiling and loading."""


def warmup(
    shapes: Shapes | None = None,
    *,
    op: str = "gdn2",
    head_dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bf16",
    levels: str | Iterable[str] = LEVELS[0],
    backward: bool = True,
    decode: Shapes = (),
    decode_fields: Mapping[str, bool] | None = None,
    serving: bool = False,
    device: int | str | torch.device | None = None,
    **fields: Any,
) -> list[Warmed]:
    """Make the calls that a process is going to make, on random tensors, so that the first real one
    finds its kernels compiled and loaded, and its sizes looked up.

    shapes: names, or sizes BxTxH (train4k; of Mamba's ops mamba4k); () for none. A call without
    gradients is made at each, and with `backward` one with them: memory for the tensors of a call
    is needed, and given back.
    levels: `lean`, or `fast`, what `disable_recompute=True` asks for. Calls expect the decay that
    the process does: warm up inside of `gdn2gen.expected_decay` for those that will run so.
    decode, decode_fields: as in `gdn2gen compile`: calls of the op over a few tokens.
    serving: also calls of prefill at `shapes`, with states in slots of a pool in fp32, with
    checkpoints in it, and with `return_intermediate_states`.
    device: a GPU (the current one).
    fields: of `family.problem.Problem`, such as gate, gate_dtype, l2norm, varlen, initial_state.

    Of `op="mamba3"` head_dim is N, value_dim P, the fields those of `Mamba3Problem`, and `decode`
    names steps of one token: `64x1x32/1` is one of 64 sequences.

    Returns what was called, with the recipe, its source and the seconds. Head dims that were not
    verified are refused as in any call. Raises DeviceError where there is no GPU.
    """
    if op == MAMBA3 and (serving or decode_fields):
        raise InputError("mamba3 has no states in a pool: leave serving and decode_fields out")
    shapes = usual_shapes(shapes, op)
    place = _place(device)
    there = torch.cuda.device(place) if place.type == "cuda" else nullcontext()
    if op == MAMBA3:
        asked = usual_mamba3_problem(head_dim, value_dim, dtype, fields)
        with there:
            return _of_mamba3(asked, shapes, levels_from(levels), backward, decode, place)
    problem = problem_from(op, head_dim, value_dim, dtype, fields)
    warmed = []
    with there:
        for shape in shapes_from(shapes) if shapes else ():
            for level in levels_from(levels):
                wanted = at(problem, shape)
                warmed.append(_chunked(wanted, shape, level, place, backward=backward))
            if serving:
                warmed.append(_served(at(problem, shape), shape, place))
        for shape in shapes_from(decode) if decode else ():
            decoding = decoding_problem_from(problem, decode_fields or {}, shape)
            warmed.append(_decoded(decoding, shape, place))
        if place.type == "cuda":
            torch.cuda.synchronize()
    return warmed


def _of_mamba3(
    problem: Mamba3Problem,
    shapes: Shapes,
    levels: tuple[str, ...],
    backward: bool,
    decode: Shapes,
    place: torch.device,
) -> list[Warmed]:
    warmed, gpu = [], present_device(place.index) if place.type == "cuda" else None
    for shape, level in product(shapes_from(shapes) if shapes else (), levels):
        started, wanted = time.monotonic(), at_shape(problem, shape)
        call_mamba3(wanted, shape, level, place, backward=backward)
        found = None if gpu is None else find_mamba3(wanted, shape, gpu, level=level)
        took = time.monotonic() - started
        warmed.append(Warmed("mamba3_siso_combined", shape, level, found, took))
    for shape in shapes_from(decode) if decode else ():
        started = time.monotonic()
        call_mamba3_step(problem, shape, place)
        took = time.monotonic() - started
        warmed.append(Warmed("mamba3_siso_step", shape, None, None, took))
    return warmed


def _place(device: int | str | torch.device | None) -> torch.device:
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            "warmup loads kernels into a GPU, but torch sees none here; `gdn2gen compile` needs "
            "none"
        )
    index = device if isinstance(device, int) else None
    given = torch.device("cuda" if device is None or index is not None else device)
    if given.type != "cuda":
        raise DeviceError(f"warmup loads kernels into a GPU, but got device={device!r}")
    index = given.index if index is None else index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def _chunked(
    problem: Problem, shape: Shape, level: str, place: torch.device, *, backward: bool
) -> Warmed:
    started, function = time.monotonic(), public_op(problem.op)
    inputs = inputs_of(problem, shape, "layer", 0, str(place))
    flags = {**op_flags(problem), "output_final_state": problem.final_state}
    flags["disable_recompute"] = level != LEVELS[0]
    with torch.no_grad():
        function(**inputs, **flags)
    if backward:
        # wherever the caller is
        with torch.inference_mode(False), torch.enable_grad():
            _backward(problem, shape, place, flags)
    if place.type == "cuda":
        torch.cuda.synchronize()
    gpu = present_device(place.index) if place.type == "cuda" else None
    found = (
        None
        if gpu is None
        else find_call(problem, shape.regime, gpu, level=level, decay=expected())
    )
    name = recurrence_named(problem.op).public.chunk
    return Warmed(name, shape, level, found, time.monotonic() - started)


def _served(problem: Problem, shape: Shape, place: torch.device) -> Warmed:
    """Prefill with states in a pool, with checkpoints, of which none is wanted, and on the way."""
    started, function = time.monotonic(), public_op(problem.op)
    plain = replace(problem, initial_state=False)
    inputs, flags = inputs_of(plain, shape, "layer", 0, str(place)), op_flags(plain)
    N, inner = shape.regime.sequences, (problem.K, problem.V)
    inner = inner[::-1] if problem.state_v_first else inner
    slots = torch.arange(N, dtype=torch.int32, device=place)
    pool: dict[str, Any] = {
        "state_pool": torch.zeros(N, shape.H, *inner, device=place),
        "ssm_state_indices": slots,
    }
    kept = {
        "has_initial_state": slots >= 0,
        "checkpoint_every_n_tokens": INTERMEDIATE_TOKENS,
        "checkpoint_state_indices": torch.full_like(slots, -1)[:, None],
    }
    with torch.no_grad():
        for given in (pool, pool | kept, {"return_intermediate_states": True}):
            function(**inputs, **flags, **given)
    if place.type == "cuda":
        torch.cuda.synchronize()
    name = recurrence_named(problem.op).public.chunk
    return Warmed(name, shape, LEVELS[0], None, time.monotonic() - started)


def _backward(problem: Problem, shape: Shape, place: torch.device, flags: dict[str, Any]) -> None:
    """With a gradient of o alone, and with one of the final state, too."""
    inputs = inputs_of(problem, shape, "layer", 0, str(place))
    arrived = output_gradients(problem, shape, 0, str(place))
    for x in recurrence_named(problem.op).inputs:
        if x.name in inputs:
            inputs[x.name].requires_grad_(x.differentiable)
    leaves = [x for x in inputs.values() if x.requires_grad]
    o, state = public_op(problem.op)(**inputs, **flags)
    do = arrived["o"].to(o.dtype)
    torch.autograd.grad([o], leaves, [do], retain_graph=state is not None)
    if state is not None:
        torch.autograd.grad([o, state], leaves, [do, arrived["final_state"]])


def _decoded(problem: DecodingProblem, shape: Shape, place: torch.device) -> Warmed:
    """One call of the op over a few tokens, whose tensors lie as `problem` says."""
    started, asked = time.monotonic(), shape
    shape = _of_tokens(problem, shape)
    of_chunks = replace(_plain(problem), final_state=False, initial_state=problem.initial_state)
    inputs = inputs_of(of_chunks, shape, "layer", 0, str(place))
    if problem.strided:
        inputs = {
            x: _apart(y) if y.shape[:2] == (shape.B, shape.T) else y for x, y in inputs.items()
        }
    if problem.varlen and shape.cu_seqlens is None:
        inputs["cu_seqlens"] = torch.arange(shape.T + 1, dtype=torch.int32, device=place)
    if problem.tied_D:
        inputs["D"] = inputs["D"][:, :1].expand_as(inputs["D"])
    given: dict[str, Any] = {}
    if problem.pool:
        given = _pool(problem, shape, inputs.get("cu_seqlens"), place)
    elif problem.initial_state:
        inputs["initial_state"] = inputs["initial_state"].to(_dtype(problem))
    name = recurrence_named(problem.op).public.recurrent
    flags = {k: v for k, v in op_flags(of_chunks).items() if k not in _ONLY_OF_CHUNKS}
    there = dict(recurrence_named(problem.op).public.recurrent_names)
    with torch.no_grad():
        getattr(gdn2gen, str(name))(
            **{there.get(x, x): y for x, y in inputs.items()},
            **flags,
            **given,
            output_final_state=problem.final_state,
        )
    if place.type == "cuda":
        torch.cuda.synchronize()
    return Warmed(str(name), asked, None, None, time.monotonic() - started)


def _of_tokens(problem: DecodingProblem, shape: Shape) -> Shape:
    """The shape with as many tokens as the kernel is for, which is the same for any number but one;
    packed sequences as one row of tokens."""
    if problem.varlen and shape.cu_seqlens is None:
        return replace(shape, B=1, T=shape.B * shape.T)
    if problem.one_token:
        return replace(shape, T=1)
    return shape if problem.varlen else replace(shape, T=max(shape.T, 2))


def _apart(x: Tensor) -> Tensor:
    """The same values in rows that lie further apart than they need to."""
    gap = x.new_zeros(*x.shape[:2], 8)
    wide = torch.cat([x.flatten(2), gap], -1)
    return wide[..., : x[0, 0].numel()].view(x.shape)


def _dtype(problem: DecodingProblem) -> torch.dtype:
    return torch.bfloat16 if problem.state_bf16 else torch.float32


def _pool(
    problem: DecodingProblem, shape: Shape, cu_seqlens: Tensor | None, place: torch.device
) -> dict[str, Any]:
    """A pool, and what says which of its slots sequences have."""
    N = shape.B if cu_seqlens is None else len(cu_seqlens) - 1
    tokens = shape.T if problem.speculative else 1
    inner = (problem.V, problem.K) if problem.state_v_first else (problem.K, problem.V)
    size = shape.H * problem.K * problem.V
    # how far apart they lie shows where there are two
    slots = max(N * tokens, 2)
    rows = torch.zeros(slots, size + int(problem.odd_slots), dtype=_dtype(problem), device=place)
    given: dict[str, Any] = {"state_pool": rows[:, :size].view(slots, shape.H, *inner)}
    if problem.indexed:
        indices = torch.arange(N * tokens, dtype=torch.int32, device=place)
        given["ssm_state_indices"] = indices.view(N, tokens) if problem.speculative else indices
    if problem.accepted:
        given["num_accepted_tokens"] = torch.ones(N, dtype=torch.int32, device=place)
    return given


_ONLY_OF_CHUNKS = ("safe_gate", "disable_recompute", "chunk_size")


def _plain(problem: DecodingProblem) -> Problem:
    """Without what only decoding has."""
    names = Problem.__dataclass_fields__
    return Problem(**{name: getattr(problem, name) for name in names})
