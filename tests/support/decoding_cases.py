"""Calls of the ops over a few tokens, beside the fp64 reference: in the interpreter, on a GPU.

A pool has slots that no index names, and gaps between slots: both must come out bit for bit as they
went in. Each check raises AssertionError, or returns errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.base.environment import verifying
from gdn2gen.family.decoding_reference import decode
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.registry import recurrence_named
from gdn2gen.ops import recurrent
from gdn2gen.runtime import decoding

# Worst error of o and of states, by the coarsest dtype that rounds them, over the largest value.
BOUNDS: Final = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# Bits that no state has: nothing that is left alone may change, not even to itself.
SENTINEL: Final = -1234.5
# Slots that follow the pool in memory, which an index past its end would write.
PAST_THE_END: Final = 6


@dataclass(frozen=True)
class Case:
    """A call: sizes, dtypes, flags, and how its states are given."""

    op: str = "gdn2"
    K: int = 32
    V: int = 32
    H: int = 1
    HV: int = 2
    HG: int | None = None
    N: int = 3
    T: int = 1
    lengths: tuple[int, ...] | None = None
    """Of packed sequences."""
    uncovered: int = 0
    """Tokens past the last packed sequence."""
    dtype: torch.dtype = torch.float32
    gate_dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype | None = None
    state_dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    states: str = "pool"
    """`none`, `initial` (and final), `slots` (a pool without indices), `pool`, `speculative`."""
    gate: str = "none"
    parameters: bool = True
    """With a gate: A_log and dt_bias."""
    l2norm: bool = True
    beta: str = ""
    """`sigmoid`, or `neg` for twice that."""
    rate: bool = False
    """Of a step: also the rate that it decays by."""
    skip: str = ""
    """D: `tied` for one number a head, repeated by a stride of 0, or `full`."""
    output_gate: bool = False
    """z."""
    v_first: bool = False
    gap: int = 0
    """Elements between slots."""
    padding: tuple[int, ...] = ()
    """Sequences that are padding."""
    null_slot: int | None = None
    index_dtype: torch.dtype = torch.int32
    accepted: bool = True
    narrow: int = 0
    """Tokens of the longest packed sequence for which there is no slot."""
    holes: bool = False
    """Every other slot of a sequence is none, but for the first."""
    wide_rows: bool = False
    """q, k, v, and what else has rows for tokens, are views of one wide tensor."""
    pattern: str = "layer"
    scale: float | None = None
    seed: int = 0

    @property
    def width(self) -> int:
        """Slots of a sequence."""
        most = max(self.lengths or (self.T,)) - self.narrow
        return most if self.states == "speculative" else 1

    @property
    def flags(self) -> dict[str, Any]:
        member = recurrence_named(self.op)
        found: dict[str, Any] = {
            "scale": self.scale,
            "use_qk_l2norm_in_kernel": self.normalised,
            "use_gate_in_kernel": self.gate != "none",
            "lower_bound": -5.0 if self.gate == "sigmoid" else None,
            "state_v_first": self.values_first,
        }
        found["use_beta_sigmoid_in_kernel"] = self.beta != ""
        found["allow_neg_eigval"] = self.beta == "neg"
        known = member.public.recurrent_arguments
        return {name: x for name, x in found.items() if name in known}

    @property
    def values_first(self) -> bool:
        return self.v_first and recurrence_named(self.op).takes("state_v_first")

    @property
    def normalised(self) -> bool:
        return self.l2norm and recurrence_named(self.op).normalises


@dataclass
class Drawn:
    """Arguments of a call, and the storage of its pool."""

    inputs: dict[str, Tensor]
    serving: dict[str, Any]
    storage: Tensor | None = None
    named: tuple[int, ...] = ()
    """Slots that may be written."""


Op = Callable[..., tuple[Tensor, Tensor | None]]


def public_op(op: str) -> Op:
    """The op of a recurrence, which takes inputs by the names that are declared."""
    public = recurrence_named(op).public
    function: Op = getattr(recurrent, public.recurrent)
    if not public.recurrent_names:
        return function
    there = dict(public.recurrent_names)
    return lambda **given: function(**{there.get(name, name): x for name, x in given.items()})


def draw(case: Case, device: str) -> Drawn:
    """Random arguments of a call."""
    cu_seqlens, B, T = None, case.N, case.T
    if case.lengths is not None:
        ends = torch.tensor([0, *case.lengths]).cumsum(0)
        cu_seqlens, B, T = ends.to(case.index_dtype), 1, int(ends[-1]) + case.uncovered
    inputs = make_inputs(
        B, T, case.H, case.K, case.V,
        op=case.op, HV=case.HV, HG=case.HG, dtype=case.dtype, gate_dtype=case.gate_dtype,
        factor_dtype=case.factor_dtype, device=device, pattern=case.pattern, seed=case.seed,
        rate=case.rate,
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(case.seed + 1)
    if cu_seqlens is not None:
        inputs["cu_seqlens"] = cu_seqlens.to(device)
    member = recurrence_named(case.op)
    if case.gate != "none":
        assert member.decay is not None
        g = inputs[member.decay.input].normal_(generator=generator)
        if case.parameters:
            heads = g.shape[2]
            rate = torch.empty(heads, device=device).uniform_(0.5, 4.0, generator=generator)
            sizes = {"HG": heads, "HV": heads, "K": case.K}
            dims = [sizes[x] for x in member.named["dt_bias"].symbols]
            bias = torch.empty(dims, device=device).uniform_(-4, 0, generator=generator)
            if not member.stepped:
                inputs["A_log"] = rate.log().to(case.parameter_dtype)
            inputs["dt_bias"] = bias.to(case.parameter_dtype)
    if case.beta:
        inputs["beta"].normal_(generator=generator)
    if case.output_gate:
        inputs["z"] = torch.empty_like(inputs["v"]).normal_(generator=generator)
    if case.wide_rows:
        inputs |= _in_one_tensor({x: y for x, y in inputs.items() if y.ndim > 2 and x != "beta"})
    if case.skip:
        D = torch.empty(case.HV, case.V if case.skip == "full" else 1, device=device)
        D = D.normal_(generator=generator).to(case.parameter_dtype)
        inputs["D"] = D.expand(case.HV, case.V)
    N = case.N if case.lengths is None else len(case.lengths)
    drawn = Drawn(inputs, {})
    inner = (case.V, case.K) if case.values_first else (case.K, case.V)
    if case.states == "initial":
        state = torch.empty(N, case.HV, *inner, device=device).normal_(generator=generator)
        inputs["initial_state"] = state.to(case.state_dtype)
    elif case.states != "none":
        _draw_pool(case, N, inner, drawn, generator)
    return drawn


def _in_one_tensor(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values as views of rows of one tensor for each dtype."""
    found = {}
    for dtype in {x.dtype for x in given.values()}:
        same = {name: x for name, x in given.items() if x.dtype == dtype}
        flat = torch.cat([x.flatten(2) for x in same.values()], -1)
        parts = flat.split([x[0, 0].numel() for x in same.values()], -1)
        found |= {
            n: y.unflatten(-1, x.shape[2:]) for (n, x), y in zip(same.items(), parts, strict=True)
        }
    return found


def _draw_pool(
    case: Case, N: int, inner: tuple[int, ...], drawn: Drawn, generator: torch.Generator
) -> None:
    """Slots in a random order, a third of them for nobody."""
    device = drawn.inputs["q"].device
    width, size = case.width, case.HV * case.K * case.V
    slots = N if case.states == "slots" else N * width * 3 // 2 + 2
    rows_of = (slots + PAST_THE_END, size + case.gap)
    storage = torch.full(rows_of, SENTINEL, device=device, dtype=case.state_dtype)
    values = torch.empty(slots, size, device=device).normal_(generator=generator)
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(case.seed)).tolist()
    order = [x for x in order if x != case.null_slot]
    rows = [order[n * width : n * width + width] for n in range(N)]
    if case.states == "slots":
        rows = [[n] for n in range(N)]
    for n in case.padding:
        rows[n] = [(-1, slots)[n % 2] if case.null_slot is None else case.null_slot] * width
    if case.holes:
        none = itertools.cycle(
            (-1, slots, slots + 5, -1 if case.null_slot is None else case.null_slot)
        )
        rows = [[x if i % 2 == 0 else next(none) for i, x in enumerate(row)] for row in rows]
    drawn.named = tuple(
        x
        for n, row in enumerate(rows)
        for x in row
        if n not in case.padding and _names(x, slots, case)
    )
    for slot in drawn.named:
        storage[slot, :size] = values[slot].to(case.state_dtype)
    drawn.storage = storage
    drawn.serving["state_pool"] = storage[:slots, :size].unflatten(1, (case.HV, *inner))
    if case.states == "slots":
        return
    indices = torch.tensor(rows, dtype=case.index_dtype, device=device)
    drawn.serving["ssm_state_indices"] = indices if case.states == "speculative" else indices[:, 0]
    if case.states == "speculative" and case.accepted:
        accepted = torch.randint(1, width + 1, (N,), generator=torch.Generator().manual_seed(7))
        if case.holes:  # what is accepted has a slot, but for one sequence, which is padding so
            accepted = (accepted - 1) // 2 * 2 + 1
            accepted[-1] = 2
        drawn.serving["num_accepted_tokens"] = accepted.to(device, case.index_dtype)
    if case.null_slot is not None:
        drawn.serving["null_slot"] = case.null_slot


def _names(index: int, slots: int, case: Case) -> bool:
    return 0 <= index < slots and index != case.null_slot


def expected(case: Case, drawn: Drawn) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """o, the final state and the pool's storage in fp64, on the CPU."""
    member = recurrence_named(case.op)

    def exact(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.double().cpu() if x.is_floating_point() else x.cpu()

    inputs = {name: exact(x) for name, x in drawn.inputs.items()}
    serving = {name: exact(x) for name, x in drawn.serving.items()}
    storage = None
    if drawn.storage is not None:
        pool = serving["state_pool"]
        storage = exact(drawn.storage)
        size = pool[0].numel()
        serving["state_pool"] = storage[: len(pool), :size].unflatten(1, pool.shape[1:])
    o = torch.zeros_like(inputs["v"])
    final = None
    if case.states in ("none", "initial"):
        N = case.N if case.lengths is None else len(case.lengths)
        inner = (case.V, case.K) if case.values_first else (case.K, case.V)
        final = torch.zeros(N, case.HV, *inner, dtype=torch.float64)
    decode(member, inputs, o, final, **serving, **case.flags)
    return o, final, storage


def check(case: Case, device: str = "cpu") -> dict[str, float]:
    """One call beside the reference; returns the errors of what it wrote."""
    drawn = draw(case, device)
    o_exact, final_exact, storage_exact = expected(case, drawn)
    before = None if drawn.storage is None else drawn.storage.clone()
    out = torch.full_like(o_exact.to(case.dtype), float("nan")).to(device)
    with torch.no_grad(), verifying():
        o, state = public_op(case.op)(
            **drawn.inputs, **drawn.serving, **case.flags, output_final_state=True, out=out
        )
    assert o is out
    return compare(case, drawn, before, o, state, (o_exact, final_exact, storage_exact))


def compare(
    case: Case,
    drawn: Drawn,
    before: Tensor | None,
    o: Tensor,
    state: Tensor | None,
    exact: tuple[Tensor, Tensor | None, Tensor | None],
) -> dict[str, float]:
    """Errors of o and of states; asserts that they are within bounds, and nothing else changed."""
    o_exact, final_exact, storage_exact = exact
    errors = {"o": error(o, o_exact)}
    rounded = max((case.dtype, case.state_dtype), key=lambda x: BOUNDS[x])
    assert errors["o"] < BOUNDS[rounded], (case, errors)
    if final_exact is not None:
        assert state is not None and state.dtype == case.state_dtype
        errors["state"] = error(state, final_exact)
    if drawn.storage is not None:
        assert state is drawn.serving["state_pool"]
        assert before is not None and storage_exact is not None
        size = state[0].numel()
        named = sorted(drawn.named)
        others = [x for x in range(len(before)) if x not in named]
        assert same_bits(drawn.storage[others], before[others]), f"{case}: a slot of nobody"
        assert same_bits(drawn.storage[:, size:], before[:, size:]), f"{case}: between slots"
        if named:
            errors["state"] = error(drawn.storage[named, :size], storage_exact[named, :size])
    assert errors.get("state", 0.0) < BOUNDS[case.state_dtype], (case, errors)
    return errors


def error(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest value; infinite where one is not finite."""
    difference = (found.double().cpu() - exact).abs()
    if difference.numel() == 0:
        return 0.0
    worst = float(difference.max() / exact.abs().max().clamp(min=1e-30))
    return worst if difference.isfinite().all() else float("inf")


def same_bits(x: Tensor, y: Tensor) -> bool:
    as_int = {4: torch.int32, 2: torch.int16}[x.dtype.itemsize]
    return torch.equal(x.contiguous().view(as_int), y.contiguous().view(as_int))


def check_all(cases: Sequence[Case], device: str = "cpu") -> list[dict[str, float]]:
    return [check(case, device) for case in cases]


def check_with(knobs: dict[str, int | str], cases: Sequence[Case], device: str = "cpu") -> int:
    """The same by configs with these knobs, where a kernel takes them; how many did."""
    seen: list[bool] = []
    usual = decoding.fixed_launcher

    def noting(problem: Any, config: Any, scalars: Any) -> Any:
        seen.append(all(config[name] == x for name, x in knobs.items()))
        return usual(problem, config, scalars)

    decoding.force(**knobs)
    decoding.fixed_launcher = noting
    try:
        check_all(cases, device)
    finally:
        decoding.fixed_launcher = usual
        decoding.force()
    return sum(seen)


def simulated(case: Case, steps: int, how: dict[str, bool]) -> tuple[float, int]:
    """`serving_simulation.simulate`, where kernels are interpreted."""
    from serving_simulation import simulate

    return simulate(case, steps, "cpu", **how)
