"""What the shapes, dtypes and flags of a call decide, looked up once: its sizes and its kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch

from gdn2gen.base.decay import WEAK
from gdn2gen.base.device import Device, has_gpu, named_device, present_device
from gdn2gen.base.errors import DispatchError
from gdn2gen.family.problem import Problem, Regime, bound_of
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.plans import LEVELS, keeps_least
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.runtime.arguments import IO_DTYPES, Dims
from gdn2gen.runtime.call import Call
from gdn2gen.runtime.runner import Runner, SizedRunner
from gdn2gen.runtime.signature import signature_of
from gdn2gen.store import dispatch, pins
from gdn2gen.store.dispatch import Found, find_recipe
from gdn2gen.store.surroundings import Surroundings, surroundings


@dataclass(frozen=True, eq=False)
class Request:
    """The problem of a call, and its sizes. Those that are looked up are equal if identical."""

    problem: Problem
    call: Call


def make_problem(
    op: str,
    K: int,
    V: int,
    dtypes: tuple[torch.dtype, ...],
    given: tuple[bool, ...],
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    beta_sigmoid: bool = False,
    neg_eigval: bool = False,
) -> Problem:
    """Of head dims, the dtypes of `Signature.typed_by`, which of the optional tensors are `given`,
    and the flags."""
    dtype, gate_dtype, factor_dtype = (IO_DTYPES[x] for x in dtypes)
    if recurrence_named(op).decay is None:
        gate_dtype = Problem.gate_dtype  # of none: not that of q, in whose place it stands
    gate = "none"
    if gate_in_kernel:
        gate = "softplus" if lower_bound is None else "sigmoid"
    return Problem(
        op=op,
        K=K,
        V=V,
        dtype=dtype,
        gate_dtype=gate_dtype,
        l2norm=l2norm,
        gate=gate,
        final_state=output_final_state,
        state_v_first=state_v_first,
        beta_sigmoid=beta_sigmoid,
        neg_eigval=neg_eigval,
        beta_fp32=factor_dtype != dtype,
        bound=bound_of(lower_bound) if gate == "sigmoid" and lower_bound is not None else 0,
        **dict(zip(signature_of(op).conditions, given, strict=True)),
    )


def make_request(
    op: str,
    shapes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    given: tuple[bool, ...],
    sequences: int | None,
    scale: float | None,
    lower_bound: float | None,
    *flags: bool,
) -> Request:
    """Of the shapes that say all sizes, dtypes, which optional tensors but cu_seqlens are `given`,
    and the flags (see `make_problem`).

    `sequences` are those of a packed batch, else None.
    """
    sizes = signature_of(op).bind(shapes)
    packed = sequences is not None
    # head dims are numbers: where they were symbols, they count as what they are for good
    K, V = int(sizes["K"]), int(sizes["V"])
    problem = make_problem(op, K, V, dtypes, (*given, packed), lower_bound, *flags)
    call = Call(
        B=sizes["B"],
        T=sizes["T"],
        H=sizes["H"],
        HV=sizes["HV"],
        HG=sizes["HG"],
        N=sizes["B"] if sequences is None else sequences,
        scale=K**-0.5 if scale is None else scale,
        lower_bound=lower_bound,
        packed=packed,
        device=device,
    )
    return Request(problem, call)


known_request = lru_cache(maxsize=512)(make_request)
"""`make_request` for sizes that are numbers; those of a graph being traced may be symbols."""


@lru_cache(maxsize=512)
def request_at(dims: Dims, *options: Any, rows: tuple[tuple[str, int], ...] = ()) -> Request:
    """The request of a call that was checked; `options` are `Options`, `rows` those of `Call`."""
    request = known_request(*dims.key, *options)
    return replace(request, call=replace(request.call, rows=rows)) if rows else request


def find_runner(
    request: Request,
    level: str,
    gradient: bool = True,
    decay: str = WEAK,
    read: tuple[Any, ...] | None = None,
) -> SizedRunner:
    """The kernels of a request that was looked up, at its sizes; `gradient`: is one wanted?
    `decay`: what is expected of it. `read`: the `surroundings`, where they were read before.

    Looked up in turn, by what else a recipe depends on: to find it took 17 us, and this takes 2.
    """
    return _found(request, level, gradient, decay, surroundings() if read is None else read)


@lru_cache(maxsize=512)
def _found(
    request: Request, level: str, gradient: bool, decay: str, read: tuple[Any, ...]
) -> SizedRunner:
    around = Surroundings.of(read)
    return _runner(find_for(request, level, gradient, decay, around)).at(request.call)


def find_for(
    request: Request,
    level: str,
    gradient: bool,
    decay: str,
    around: Surroundings,
    *,
    scan_apart: bool = False,
) -> Found:
    """The recipe of a request, and of the sizes of its call; `gradient`: is one wanted?
    `decay`, `around` and `scan_apart` as in `find_recipe`."""
    found = _find(request, level, decay, around, scan_apart=scan_apart)
    if not (gradient or keeps_least(found.recipe.plan) or around.batch_invariant):
        # no use to have a scan keep states; unless only what keeps them is tuned
        try:
            leaner = _find(request, LEVELS[0], decay, around, strict=False, scan_apart=scan_apart)
        except DispatchError:  # pinned are others, strictly
            leaner = found
        if (leaner.source, leaner.tuned_decay) == (found.source, found.tuned_decay):
            found = leaner
    return found


def _find(
    request: Request,
    level: str,
    decay: str,
    around: Surroundings,
    strict: bool | None = None,
    *,
    scan_apart: bool = False,
) -> Found:
    """`decay`, `around`, `strict` and `scan_apart` as in `find_recipe`."""
    call = request.call
    regime = Regime(tokens=call.B * call.T, sequences=call.N, heads=call.HV)
    device = device_of(call.device)
    found = find_recipe(
        request.problem,
        regime,
        device,
        level=level,
        decay=decay,
        strict=strict,
        scan_apart=scan_apart,
        around=around,
    )
    if found.source != "forced":
        # a call that keeps states on the way may run another one than the rest of its size
        pins.record(found.recipe, regime, device, level, decay, again=not scan_apart)
    return found


# What a tracer sees: forward and backward are ops of their own, which share nothing but tensors and
# a text. They must agree on what is saved, at sizes that the tracer does not know, and whatever is
# tuned meanwhile.


class Agreement(NamedTuple):
    """What the ops of a traced call agree on: a recipe may change, but not what it saves."""

    level: str
    decay: str
    plan: str
    BT: int
    max_segments: int
    """`Found.saved_segments`."""

    @classmethod
    def on(cls, level: str, decay: str, found: Found) -> Agreement:
        recipe = found.recipe
        return cls(level, decay, recipe.plan.name, recipe.BT, found.saved_segments)

    def kept_by(self, found: Found) -> Found | None:
        """The same with as many segments as was agreed on, if that makes it save the same."""
        own = Agreement.on(self.level, self.decay, found)
        if own == self:
            return found
        if own._replace(max_segments=self.max_segments) != self:
            return None
        return replace(found, agreed_segments=self.max_segments)

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Agreement:
        level, decay, plan, BT, max_segments = text.split()
        return cls(level, decay, plan, int(BT), int(max_segments))


NOTHING: Final = "nothing"
"""Agreed on where no kernels run: on CPU tensors, and those without data."""
_FORCED: Final = "forced "
_forced_recipes: dict[str, Recipe] = {}
# What a length that is not known counts as: the tokens, sequences and heads of train4k.
_USUAL: Final = Regime(tokens=16384, sequences=4, heads=16)


def agree(request: Request, level: str, decay: str = WEAK) -> str:
    """What the ops of a call agree on whose sizes are known."""
    around = Surroundings.of()
    found = around.forced
    if found is None:
        return str(Agreement.on(level, decay, _find(request, level, decay, around)))
    dispatch.check_there(found.recipe, device_of(request.call.device))
    text = f"{_FORCED}{found.recipe}"
    _forced_recipes[text] = found.recipe  # autograd's threads could not see it
    return text


def agree_while_compiling(device: torch.device, level: str, decay: str, *options: Any) -> str:
    """The same while torch.compile traces, for all sizes; `options` are those of `make_problem`."""
    problem = make_problem(*options)
    found = find_recipe(problem, _USUAL, device_of(device), level=level, decay=decay, strict=False)
    return str(Agreement.on(level, decay, found))


# What torch.compiler.assume_constant_result marks a function with, but that imports torch._dynamo.
agree_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def agreed_runner(request: Request, agreement: str) -> SizedRunner:
    """The best kernels that keep to what was agreed on, at the sizes of `request`."""
    return _agreed(request, agreement, surroundings())


@lru_cache(maxsize=512)
def _agreed(request: Request, text: str, read: tuple[Any, ...]) -> SizedRunner:
    if text.startswith(_FORCED):
        return _runner(_forced(text, request.problem)).at(request.call)
    agreement, around = Agreement.parse(text), Surroundings.of(read)
    usual = replace(request.call, B=_USUAL.sequences, N=_USUAL.sequences, HV=_USUAL.heads)
    usual = replace(usual, T=_USUAL.tokens // _USUAL.sequences)
    for call in (request.call, usual):
        found = _find(replace(request, call=call), agreement.level, agreement.decay, around)
        keeping = agreement.kept_by(found)
        if keeping is not None:
            return _runner(keeping).at(request.call)
    return _runner(_default_for(agreement, request.problem)).at(request.call)


def _forced(text: str, problem: Problem) -> Found:
    """What was forced when the ops agreed on it, in so many words."""
    return Found(replace(_forced_recipes[text], problem=problem), "forced", "it was agreed on")


def _default_for(agreement: Agreement, problem: Problem) -> Found:
    """Default configs that save what was agreed on; slower, but right."""
    recipe = Recipe.default(problem, agreement.plan, agreement.BT)
    found = agreement.kept_by(Found(recipe, "default", "it keeps to what was agreed on"))
    assert found is not None
    return found


def saved_nbytes(request: Request, agreement: str) -> int:
    """Bytes of what the forward saves; a formula where the sizes of the request are symbols."""
    if agreement.startswith(_FORCED):
        found = _forced(agreement, request.problem)
    else:
        found = _default_for(Agreement.parse(agreement), request.problem)
    return _runner(found).layout_at(request.call).nbytes


@lru_cache(maxsize=4096)
def _runner(found: Found) -> Runner:
    return Runner(found.recipe, found.agreed_segments)


def device_of(device: torch.device) -> Device:
    """The GPU that kernels for tensors on `device` are chosen for."""
    # the interpreter stands in for the GPU that the defaults were chosen on, and so do the shapes
    # of a GPU's tensors where there is none
    on_gpu = device.type == "cuda" and has_gpu()
    return present_device(device.index) if on_gpu else named_device("sm_90")
