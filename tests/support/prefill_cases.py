"""Prefill for serving beside its fp64 reference: in the interpreter, by the reference, on a GPU.

A pool has slots that nothing names, and gaps between slots: both must come out bit for bit as they
went in. Each check raises AssertionError, or returns what a test asks for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import torch
from decoding_cases import BOUNDS, error, same_bits
from torch import Tensor

import gdn2gen
from gdn2gen.base.environment import verifying
from gdn2gen.base.errors import InputError
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.prefill_reference import prefill
from gdn2gen.family.registry import recurrence_named
from gdn2gen.measure.accuracy import public_op
from gdn2gen.ops import recurrent

FP32, BF16 = torch.float32, torch.bfloat16
SENTINEL: Final = -1234.5


@dataclass(frozen=True)
class Case:
    """A call of an op over whole sequences with states in a pool."""

    op: str = "gdn2"
    lengths: tuple[int, ...] | None = (70, 0, 128, 5)
    """Of packed sequences; None: a batch of N sequences of T tokens."""
    N: int = 2
    T: int = 130
    K: int = 32
    V: int = 32
    H: int = 1
    HV: int = 2
    dtype: torch.dtype = FP32
    state_dtype: torch.dtype = FP32
    v_first: bool = False
    gap: int = 8
    indexed: bool = True
    padding: tuple[int, ...] = (3,)
    null_slot: int | None = None
    begins: tuple[bool, ...] | None = (True, False, True, True)
    every: int = 0
    index_dtype: torch.dtype = torch.int32
    uncovered: int = 0
    beside: tuple[str, ...] = ()
    """Inputs that calls may leave out, and this one does not."""

    @property
    def sequences(self) -> int:
        return self.N if self.lengths is None else len(self.lengths)

    @property
    def flags(self) -> dict[str, Any]:
        member = recurrence_named(self.op)
        found = {
            "use_qk_l2norm_in_kernel": member.normalises,
            "state_v_first": self.v_first and member.takes("state_v_first"),
            "use_gate_in_kernel": "dt_bias" in self.beside,
        }
        return {name: x for name, x in found.items() if member.takes(name)}

    @property
    def inner(self) -> tuple[int, int]:
        return (self.V, self.K) if self.flags.get("state_v_first") else (self.K, self.V)


@dataclass
class Drawn:
    inputs: dict[str, Tensor]
    serving: dict[str, Any]
    storage: Tensor


def draw(case: Case, device: str = "cpu") -> Drawn:
    """Slots in a random order, twice as many as are named."""
    cu_seqlens, B, T = None, case.N, case.T
    if case.lengths is not None:
        cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0)
        B, T = 1, int(cu_seqlens[-1]) + case.uncovered
    inputs = make_inputs(
        B, T, case.H, case.K, case.V, op=case.op, HV=case.HV, dtype=case.dtype, device=device
    )
    inputs |= _beside(case, B, T, device)
    if cu_seqlens is not None:
        inputs["cu_seqlens"] = cu_seqlens.to(device)
    N = case.sequences
    C = 0 if not case.every else max(case.lengths or (case.T,)) // case.every + 1
    slots = 2 * N * (1 + C)
    size = case.HV * case.K * case.V
    storage = torch.full((slots, size + case.gap), SENTINEL, dtype=case.state_dtype, device=device)
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(3)).tolist()
    order = [x for x in order if x != case.null_slot]
    own = order[:N] if case.indexed else [*range(N)]
    for slot in own:
        generator = torch.Generator(device).manual_seed(slot)
        values = torch.empty(size, device=device).normal_(generator=generator)
        storage[slot, :size] = values.to(case.state_dtype)
    serving: dict[str, Any] = {
        "state_pool": storage[:, :size].unflatten(1, (case.HV, *case.inner)),
        "null_slot": case.null_slot,
    }
    for n in [x for x in case.padding if x < N and case.indexed]:
        own[n] = (-1, slots)[n % 2] if case.null_slot is None else case.null_slot
    if case.indexed:
        serving["ssm_state_indices"] = torch.tensor(own, dtype=case.index_dtype, device=device)
    if case.begins is not None:
        serving["has_initial_state"] = torch.tensor(case.begins[:N], device=device)
    if case.every:
        others = [x for x in order if x not in own][: N * C]
        table = torch.tensor(others, dtype=case.index_dtype).view(N, C)
        table[0, 0] = -1  # none is wanted there
        # a table of pages has columns beside those of a call
        wide = torch.full((N, C + 3), -7, dtype=case.index_dtype)
        wide[:, :C] = table
        serving["checkpoint_state_indices"] = wide.to(device)[:, :C]
        serving["checkpoint_every_n_tokens"] = case.every
    return Drawn(inputs, serving, storage)


def _beside(case: Case, B: int, T: int, device: str) -> dict[str, Tensor]:
    """Mamba-2's own; z as the half of a projection, whose rows lie apart."""
    if not case.beside:
        return {}
    generator = torch.Generator(device).manual_seed(7)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    made = {
        "rate": -torch.rand(case.HV, device=device, generator=generator),
        "dt_bias": normal(case.HV) - 1,
        "D": normal(case.HV, case.V),
        "z": normal(B, T, case.HV, 2 * case.V).to(case.dtype)[..., case.V :],
    }
    return {name: made[name] for name in case.beside}


def exact(case: Case, drawn: Drawn) -> tuple[Tensor, Tensor]:
    """o and the pool's storage in fp64, on the CPU."""
    inputs = {
        x: y.cpu().double() if y.is_floating_point() else y.cpu() for x, y in drawn.inputs.items()
    }
    serving = {x: y.cpu() if isinstance(y, Tensor) else y for x, y in drawn.serving.items()}
    storage = drawn.storage.cpu().double()
    pool = serving["state_pool"]
    serving["state_pool"] = storage[:, : pool[0].numel()].unflatten(1, pool.shape[1:])
    every = serving.pop("checkpoint_every_n_tokens", 0)
    o = torch.zeros_like(inputs["v"])
    prefill(recurrence_named(case.op), inputs, o, every=every, **serving, **case.flags)
    return o, storage


@verifying()
def check(case: Case, device: str = "cpu") -> dict[str, float]:
    """One call beside the reference: its errors."""
    drawn = draw(case, device)
    before = drawn.storage.clone()
    o_exact, storage_exact = exact(case, drawn)
    with torch.no_grad():
        o, pool = public_op(case.op)(
            **drawn.inputs, **drawn.serving, **case.flags, output_final_state=True
        )
    assert pool is drawn.serving["state_pool"]
    return compare(case, drawn, before, o, o_exact, storage_exact)


def compare(
    case: Case, drawn: Drawn, before: Tensor, o: Tensor, o_exact: Tensor, storage_exact: Tensor
) -> dict[str, float]:
    """Errors; asserts that nothing but what the reference wrote has changed."""
    same = (storage_exact == before.cpu().double()).all(1)
    written = ~same
    assert same_bits(drawn.storage.cpu()[same], before.cpu()[same]), f"{case}: a slot of nobody"
    size = drawn.serving["state_pool"][0].numel()
    assert same_bits(drawn.storage[:, size:], before[:, size:]), f"{case}: between slots"
    assert written.sum() > 0
    errors = {
        "o": error(o, o_exact),
        "states": error(drawn.storage.cpu()[written, :size], storage_exact[written, :size]),
    }
    coarser = max((case.dtype, case.state_dtype), key=lambda x: BOUNDS[x])
    # whole sequences, of which the bounds of a few tokens say too little
    assert max(errors.values()) < 2 * BOUNDS[coarser], (case, errors)
    unseen = [n for n in case.padding if case.indexed and case.lengths]
    ends = [0, *torch.tensor(case.lengths).cumsum(0).tolist()] if case.lengths else []
    for n, (start, end) in enumerate(pairwise(ends)):
        assert n not in unseen or not o[0, start:end].any(), f"{case}: padding is not zero"
    return errors


def check_all(cases: list[Case], device: str = "cpu") -> list[dict[str, float]]:
    return [check(case, device) for case in cases]


@verifying()
def intermediate(case: Case, device: str = "cpu") -> dict[str, float]:
    """`return_intermediate_states`: states before every 64th token, as many as there are."""
    drawn = draw(replace(case, every=0), device)
    with torch.no_grad():
        o, state, states = public_op(case.op)(  # type: ignore[misc]
            **drawn.inputs, **case.flags, output_final_state=True, return_intermediate_states=True
        )
    lengths = case.lengths or (case.T,) * case.N
    rows = sum(-(-x // 64) for x in lengths)
    inputs = {
        x: y.cpu().double() if y.is_floating_point() else y.cpu() for x, y in drawn.inputs.items()
    }
    o_exact = torch.zeros_like(inputs["v"])
    states_exact = torch.zeros(rows, case.HV, *case.inner, dtype=torch.float64)
    final = torch.zeros(case.sequences, case.HV, *case.inner, dtype=torch.float64)
    member = recurrence_named(case.op)
    prefill(member, inputs, o_exact, final, states_exact, every=64, **case.flags)
    B = 1 if case.lengths else case.N
    assert states.dtype == case.dtype and states.shape[0] == B
    found = states.flatten(0, 1)
    assert not found[rows:].any() and (device != "cpu" or len(found) == rows)
    errors = {
        "o": error(o, o_exact),
        "state": error(state, final),
        "states": error(found[:rows], states_exact),
    }
    assert max(errors.values()) < 2 * BOUNDS[case.dtype], (case, errors)
    return errors


@verifying()
def with_wide_pool(every: int) -> str:
    """What kernels say of a pool in fp64."""
    drawn = draw(Case(every=every))
    drawn.serving["state_pool"] = drawn.serving["state_pool"].double()
    try:
        with torch.no_grad():
            public_op("gdn2")(**drawn.inputs, **drawn.serving)
    except InputError as error:
        return str(error)
    return ""


@verifying()
def in_pieces(op: str, device: str = "cpu", dtype: torch.dtype = FP32) -> bool:
    """Sequences in three calls that go on from their slots: the bits of one call, where results do
    not depend on the batch."""
    beside = ("rate", "dt_bias", "D", "z") if op == "mamba2" else ()
    case = Case(
        op=op, lengths=None, N=1, T=140, padding=(), begins=None, dtype=dtype, beside=beside
    )
    whole, cut = draw(case, device), draw(case, device)
    op_of = public_op(op)
    with torch.no_grad(), gdn2gen.batch_invariant():
        expected, _ = op_of(**whole.inputs, **whole.serving, **case.flags)
        parts = []
        for start, end in ((0, 64), (64, 128), (128, 140)):
            inputs = _tokens(cut.inputs, case, start, end)
            parts.append(op_of(**inputs, **cut.serving, **case.flags)[0])
    assert torch.equal(torch.cat(parts, 1), expected)
    assert same_bits(whole.storage, cut.storage)
    return True


def _tokens(inputs: dict[str, Tensor], case: Case, start: int, end: int) -> dict[str, Tensor]:
    """Of what has a row for each token only those."""
    of_tokens = {x.name for x in recurrence_named(case.op).inputs if x.symbols[:2] == ("B", "T")}
    return {x: y[:, start:end] if x in of_tokens else y for x, y in inputs.items()}


@verifying()
def prefill_then_steps(op: str, device: str = "cpu") -> dict[str, float]:
    """A server in small: prompts in two pieces, then tokens one by one, in the slots of one pool,
    while another sequence is padding; beside fp64."""
    case = Case(op=op, lengths=None, N=3, T=75, padding=(1,), begins=None, null_slot=0)
    whole, served = draw(case, device), draw(case, device)
    o_exact, storage_exact = exact(case, whole)
    member = recurrence_named(op)
    step = getattr(recurrent, member.public.recurrent)
    there = dict(member.public.recurrent_names)
    parts = []
    with torch.no_grad():
        for start, end in ((0, 64), (64, 70)):
            inputs = {name: x[:, start:end] for name, x in served.inputs.items()}
            parts.append(public_op(op)(**inputs, **served.serving, **case.flags)[0])
        for t in range(70, 75):
            token = {there.get(x, x): y[:, t : t + 1] for x, y in served.inputs.items()}
            parts.append(step(**token, **served.serving, **case.flags)[0])
    before = draw(case, device).storage
    return compare(case, served, before, torch.cat(parts, 1), o_exact, storage_exact)


@verifying()
def opcheck(op: str, every: int) -> bool:
    """torch's own checks of the schema, the fake and what tracers make of the op."""
    case = Case(op=op, every=every, lengths=(70, 0, 65), padding=(), begins=(True, False, True))
    drawn = draw(case)
    member = recurrence_named(op)
    tensors = [drawn.inputs.get(x.name) for x in member.inputs]
    names = ("state_pool", "ssm_state_indices", "has_initial_state", "checkpoint_state_indices")
    pools = [drawn.serving.get(x) for x in names]
    flags = [None, None, member.normalises, False, False, False]
    flags += [False, False] if member.activates_beta else []
    o = torch.empty_like(drawn.inputs["v"])
    torch.library.opcheck(
        getattr(torch.ops.gdn2gen, f"{op}_prefill").default,
        (*tensors, *pools, o, None, None, *flags, None, every, "weak"),
    )
    return True


@verifying()
def compiled(op: str) -> int:
    """How many whole graphs serve two batches."""
    torch._dynamo.reset()
    made: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def call(given: dict[str, Any], flags: dict[str, Any]) -> Tensor:
        o, _, states = public_op(op)(  # type: ignore[misc]
            **given, **flags, output_final_state=True, return_intermediate_states=True
        )
        return o + states.sum()

    for lengths in ((70, 3, 130), (20, 30, 65)):
        case = Case(op=op, lengths=lengths, padding=(), begins=(True, False, True))
        drawn, again = draw(case), draw(case)
        with torch.no_grad():
            found = call({**drawn.inputs, **drawn.serving}, case.flags)
            o, _, states = public_op(op)(  # type: ignore[misc]
                **again.inputs, **again.serving, **case.flags, return_intermediate_states=True
            )
        torch.testing.assert_close(found, o + states.sum())
        assert same_bits(drawn.storage, again.storage)
    return len(made)
