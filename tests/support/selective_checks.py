"""selective_state_update beside Mamba-2's recurrence in fp64: o, every slot, and what is between.

Each check raises AssertionError, or returns errors.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final

import torch
from decoding_cases import BOUNDS, SENTINEL, error, same_bits
from torch import Tensor

from gdn2gen import selective_state_update
from gdn2gen.base.environment import verifying
from gdn2gen.family.mamba2 import recurrent

FP32, BF16 = torch.float32, torch.bfloat16
HEADS: Final = 4


@dataclass(frozen=True)
class Case:
    """A call, as Mamba-2's layers make it or servers do."""

    b: int = 3
    T: int | None = None
    """Tokens of each sequence, where x has an axis of them."""
    lengths: tuple[int, ...] | None = None
    """Of packed sequences, and a token after the last one."""
    groups: int = 2
    P: int = 16
    N: int = 24
    heads: int = HEADS
    dtype: torch.dtype = FP32
    gate_dtype: torch.dtype = FP32
    state_dtype: torch.dtype = FP32
    softplus: bool = True
    bias: bool = True
    skip: str = "tied"
    """D: `tied` (repeated over a head), `full`, or none."""
    gated: bool = True
    indices: str = "plain"
    """`plain` with sequence 1 as padding, `guessed` [b, 1+S], or none: sequence n has slot n."""
    gap: int = 8
    """Elements between slots."""
    views: bool = False
    """x, B, C are slices of one projection, and z another's."""
    null_slot: int | None = None


def draw(case: Case, device: str) -> tuple[dict[str, Any], Tensor]:
    """Arguments, and the storage of which state is a part, with slots of nobody."""
    rng = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    h, P, N, g = case.heads, case.P, case.N, case.groups
    rows = [case.b] if case.T is None else [case.b, case.T]
    rows = rows if case.lengths is None else [sum(case.lengths) + 1]
    x, B, C = normal(*rows, h, P), normal(*rows, g, N), normal(*rows, g, N)
    dt = normal(*rows, h) if case.softplus else normal(*rows, h).abs()
    given: dict[str, Any] = {"x": x.to(device, case.dtype), "dt": dt.to(device, case.gate_dtype)}
    given |= {"B": B.to(device, case.dtype), "C": C.to(device, case.dtype)}
    if case.gated:
        given["z"] = normal(*rows, h, P).to(device, case.dtype)
    if case.views:
        wide = torch.cat([given[y].flatten(-2) for y in ("x", "B", "C")], -1)
        parts = wide.split([h * P, g * N, g * N], -1)
        given |= {
            y: part.unflatten(-1, given[y].shape[-2:]) for y, part in zip("xBC", parts, strict=True)
        }
    given["dt"] = given["dt"][..., None].expand(*rows, h, P)
    given["A"] = (-normal(h).exp()).to(device)[:, None, None].expand(h, P, N)
    if case.bias:
        given["dt_bias"] = normal(h).abs().to(device)[:, None].expand(h, P)
    if case.skip:
        given["D"] = normal(h, P if case.skip == "full" else 1).to(device).expand(h, P)
    given["dt_softplus"] = case.softplus
    sequences = case.b if case.lengths is None else len(case.lengths)
    if case.lengths is not None:
        ends = torch.tensor([0, *case.lengths]).cumsum(0)
        given["cu_seqlens"] = ends.to(device, torch.int32)
    width = max(case.lengths or (case.T or 1,)) if case.indices == "guessed" else 1
    slots = sequences * width + 3
    storage = torch.full((slots + 2, h * P * N + case.gap), SENTINEL).to(device, case.state_dtype)
    named = torch.randperm(slots, generator=rng)[: sequences * width].view(sequences, width)
    if case.indices == "plain":
        named[1] = -1 if case.null_slot is None else case.null_slot
    if not case.indices:
        named = torch.arange(sequences)[:, None]
    if case.indices:
        index = named if case.indices == "guessed" else named[:, 0]
        given["state_batch_indices"] = index.to(device, torch.int32)
    if case.null_slot is not None:
        given["null_slot"] = case.null_slot
    if case.indices == "guessed":
        given["num_accepted_tokens"] = (torch.arange(sequences) % width + 1).to(device)
    states = normal(slots, h * P * N).to(device, case.state_dtype)
    for slot in named.flatten().tolist():
        if slot >= 0 and slot != case.null_slot:
            storage[slot, : h * P * N] = states[slot]
    given["state"] = storage[:slots, : h * P * N].view(slots, h, P, N)
    return given, storage


def expected(case: Case, given: dict[str, Any], storage: Tensor) -> tuple[Tensor, Tensor]:
    """out and the storage, in fp64, sequence by sequence, token by token."""
    exact = {
        name: y.double().cpu() if y.is_floating_point() else y.cpu()
        for name, y in given.items()
        if isinstance(y, Tensor)
    }
    slots, x = storage.double().cpu(), exact["x"]
    state = slots[: len(given["state"]), : -case.gap or None].view(given["state"].shape)
    out = torch.zeros_like(x)
    cut = case.lengths is not None
    spans = [0, *torch.tensor(case.lengths).cumsum(0).tolist()] if case.lengths else []
    indices = exact.get("state_batch_indices")
    for n in range(len(spans) - 1 if cut else case.b):
        own = slice(spans[n], spans[n + 1]) if cut else n
        token = {y: exact[y][own] for y in ("x", "dt", "B", "C", "z") if y in exact}
        if case.T is None and not cut:
            token = {y: v[None] for y, v in token.items()}
        row = [n] if indices is None else indices[n].reshape(-1).tolist()
        accepted = exact.get("num_accepted_tokens")
        read = row[0 if accepted is None else int(accepted[n]) - 1]
        if read < 0 or read == case.null_slot:
            continue
        now = state[read].clone()
        for t in range(len(token["x"])):
            one = {y: v[None, t : t + 1] for y, v in token.items()}
            one["dt"] = one["dt"][..., 0]
            y, after = recurrent(
                **one, A=exact["A"][:, 0, 0], D=exact.get("D"), initial_states=now[None],
                dt_bias=exact["dt_bias"][:, 0] if case.bias else None, dt_softplus=case.softplus,
            )  # fmt: skip
            now = after[0]
            target = out[own] if case.T is not None or cut else out[n][None]
            target[t] = y[0, 0]
            if case.indices == "guessed":
                state[row[t]] = now
        if case.indices != "guessed" and len(token["x"]):
            state[read] = now
    return out, slots


@verifying()
def check(case: Case, device: str = "cpu", call: Any = selective_state_update) -> dict[str, float]:
    given, storage = draw(case, device)
    before = storage.clone()
    out, slots = expected(case, given, storage)
    with torch.no_grad():
        found = call(**given)
    assert found.shape == given["x"].shape and found.dtype == case.dtype
    untouched = (slots == before.double().cpu()).to(device)
    touched = ~untouched
    errors = {"out": error(found, out), "state": error(storage[touched], slots[touched.cpu()])}
    rounded = max((case.dtype, case.state_dtype), key=lambda x: BOUNDS[x])
    assert errors["out"] < BOUNDS[rounded], (case, errors)
    assert errors["state"] < BOUNDS[case.state_dtype], (case, errors)
    assert same_bits(storage[untouched], before[untouched]), f"{case}: a slot of nobody"
    assert bool(untouched[-2:].all()) and not bool(untouched.all())
    return errors


CASES: Final = {
    "a layer": [Case(indices="", gap=0), Case(skip="full", gated=False), Case(skip="", groups=1)],
    "views": [Case(views=True, gate_dtype=BF16), Case(views=True, T=2, state_dtype=BF16, gap=3)],
    "no softplus": [Case(softplus=False, bias=False), Case(softplus=False)],
    "padding": [Case(null_slot=0), Case(T=2)],
    "guessed": [Case(T=3, indices="guessed"), Case(indices="guessed")],
    "packed": [Case(lengths=(2, 0, 3), indices="guessed"), Case(lengths=(1, 2, 1), indices="")],
    "dtypes": [Case(dtype=torch.float16, state_dtype=BF16), Case(P=32, N=16, gap=5)],
}


def check_all(name: str, device: str = "cpu") -> list[dict[str, float]]:
    return [check(case, device) for case in CASES[name]]


def nested(x: Tensor) -> Tensor:
    """Its rows as torch nests them, in one piece: without sizes and strides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor([*x])


def into_a_buffer() -> bool:
    given, _ = draw(Case(), "cpu")
    out = torch.empty_like(given["x"])
    with verifying():
        assert selective_state_update(**given, out=out) is out
        again, _ = draw(Case(), "cpu")
        return torch.equal(out, selective_state_update(**again))


@verifying()
def nothing_is_copied() -> bool:
    """What a layer gives is read as it lies: slices of its projection, and what is repeated."""
    from gdn2gen.ops import _decode

    module: Any = _decode
    seen = []
    launch = module.launch

    def noting(plan: Any, *args: Any, **keywords: Any) -> Any:
        seen.append(plan)
        return launch(plan, *args, **keywords)

    module.launch = noting
    try:
        check(Case(views=True))
    finally:
        module.launch = launch
    (plan,) = seen
    return plan.copied == () and bool(plan.problem.one_token and plan.problem.strided)


@verifying()
def known_calls() -> bool:
    """A call that is known by its own tensors is one like it, and nothing else: the same bits, on
    other tensors; and what is wrong is refused after it, too."""
    from gdn2gen.base.errors import Gdn2genError

    for case in (Case(views=True), Case(T=2), Case(lengths=(2, 0, 1), indices="")):
        for _ in range(3):
            check(case)
        given, _ = draw(case, "cpu")
        dt, x = given["dt"], given["x"]
        wrong: tuple[dict[str, Any], ...] = (
            {"dt": dt.contiguous()}, {"dt_softplus": 1}, {"C": given["C"][:1]},
            {"null_slot": True}, {"x": x.half()}, {"A": given["A"].contiguous()},
            {"x": nested(x)},
        )  # fmt: skip
        for change in wrong:
            try:
                selective_state_update(**given | change)
            except Gdn2genError:
                continue
            raise AssertionError(f"not refused: {[*change]}")
    for softplus in (True, False, True):  # flags and what torch makes are others' kinds
        check(Case(softplus=softplus))
        check(Case(softplus=softplus, bias=False))
    given, _ = draw(Case(), "cpu")
    first = selective_state_update(**given)
    given, _ = draw(Case(), "cpu")
    given["z"] = given["z"].double().float()
    return torch.equal(selective_state_update(**given, out=torch.empty_like(first)), first)


def whole_graphs() -> int:
    """Of calls of several sizes; how many were made."""
    torch._dynamo.reset()
    made: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    call = torch.compile(selective_state_update, fullgraph=True, dynamic=True, backend=count)
    for b in (3, 5, 4):
        check(Case(b=b), call=call)
    return len(made)


@verifying()
def nothing_is_loaded_after_warmup() -> bool:
    """`warmup(decode=...)` loads the kernel that a layer's step runs."""
    import gdn2gen
    from gdn2gen.codegen import build
    from gdn2gen.family.problem import gate_parameters

    case = Case(P=16, N=32, views=True)
    own = {**gate_parameters("mamba2", "softplus"), "has_dt_bias": True, "gate": "softplus"}
    served = {"pool": True, "indexed": True, "strided": True}
    gdn2gen.warmup(
        (), op="mamba2", head_dim=case.N, value_dim=case.P, dtype="fp32",
        decode="3x1x4", decode_fields=served, **own,
    )  # fmt: skip
    loaded = build.load.cache_info().misses
    check(case)
    return bool(loaded) and build.load.cache_info().misses == loaded
