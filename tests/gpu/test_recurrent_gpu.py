"""The ops over a few tokens on a GPU: values, pools, a server in small, graphs, torch.compile.

Everything beside fp64, in pools whose other slots and gaps are compared bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import pytest
import torch
from decoding_cases import (
    Case,
    Drawn,
    check,
    check_all,
    check_with,
    compare,
    draw,
    expected,
    public_op,
    same_bits,
)
from gpu_support import DEVICE, other_stream
from serving_simulation import simulate
from torch import Tensor

from gdn2gen.base.environment import verifying
from gdn2gen.family.registry import DECODING_OPS

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES: Final = ((16, 16), (32, 64), (64, 64), (80, 48), (96, 192), (128, 128), (192, 256),
                (256, 256), (256, 512))  # fmt: skip
GATED: Final[dict[str, dict[str, Any]]] = {op: {} for op in DECODING_OPS} | {
    "gdn2": {"gate": "softplus"},
    "kda": {"gate": "sigmoid", "beta": "neg"},
    "gated_delta_rule": {"gate": "softplus", "beta": "neg"},
    "mamba2": {"gate": "softplus", "rate": True, "skip": "tied", "output_gate": True},
}
# As a layer calls it at a few sequences, and at so many that tiles are as large as they get.
LAYER: Final = Case(K=128, V=128, H=16, HV=16, N=4, dtype=BF16, gap=8)
MANY: Final = replace(LAYER, N=64, T=2)


def cases_of(K: int, V: int, op: str) -> list[Case]:
    """Both layouts of states, each with three kinds of calls: those of a layout lie together."""
    sizes = Case(op=op, K=K, V=V, H=2, HV=4, N=5, padding=(3,), gap=8, **GATED[op])
    return [
        replace(sizes, v_first=v_first, state_dtype=state, dtype=dtype, T=T, states=states)
        for (v_first, state), (dtype, T, states) in itertools.product(
            ((False, FP32), (True, BF16)),
            ((BF16, 1, "pool"), (FP32, 4, "speculative"), (FP16, 3, "pool")),
        )
    ]


@pytest.mark.parametrize("op", DECODING_OPS)
@pytest.mark.parametrize(("K", "V"), SIZES)
def test_head_dims(K: int, V: int, op: str) -> None:
    """Two of `cases_of`, which every size, and every op, meets all of."""
    turn = SIZES.index((K, V)) + DECODING_OPS.index(op)
    cases = cases_of(K, V, op)
    check_all([cases[turn % 3], cases[3 + (turn + 1) % 3]], DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("op", DECODING_OPS)
@pytest.mark.parametrize(("K", "V"), SIZES)
def test_head_dims_in_every_kind_of_call(K: int, V: int, op: str) -> None:
    check_all(cases_of(K, V, op), DEVICE)


@pytest.mark.parametrize("op", DECODING_OPS)
@pytest.mark.parametrize("v_first", [False, True], ids=["K-first", "V-first"])
def test_sizes_of_a_layer(v_first: bool, op: str) -> None:
    cases = [replace(x, op=op, v_first=v_first, **GATED[op]) for x in (LAYER, MANY)]
    cases += [replace(x, state_dtype=BF16) for x in cases]
    check_all(cases, DEVICE)


def knobs_cases(op: str, *kinds: dict[str, Any]) -> list[Case]:
    """Both layouts, either dtype of states, each with every kind of calls, padding among them."""
    sizes = replace(LAYER, op=op, N=6, padding=(0, 3), **GATED[op])
    return [
        replace(sizes, v_first=v_first, state_dtype=state, **kind)
        for v_first, state, kind in itertools.product((True, False), (BF16, FP32), kinds)
    ]


AHEAD: Final = (
    {},
    {"states": "speculative", "T": 3, "holes": True},
    {"N": 300},
    {"K": 96, "V": 80},
)
TILED: Final = ({"N": 300}, {"states": "speculative"}, {"V": 80})


@pytest.mark.parametrize("op", DECODING_OPS)
def test_loads_ahead_of_the_branch(op: str) -> None:
    """Where a search has a state's loads ahead: with padding, guessed tokens, masked tiles."""
    turn = DECODING_OPS.index(op)
    cases = knobs_cases(op, *AHEAD)
    chosen = [cases[4 * i + (turn + i) % 4] for i in range(4)]  # all that there are of each
    for evict, some in (("usual", chosen[:3]), ("first", chosen[3:])):
        assert check_with({"loads": "ahead", "evict": evict}, some, DEVICE) == len(some)


@pytest.mark.parametrize(("BV", "tiles"), [(8, 4), (16, 2), (32, 2)])
@pytest.mark.parametrize("op", DECODING_OPS)
def test_several_tiles_share_a_token(op: str, BV: int, tiles: int) -> None:
    turn = DECODING_OPS.index(op) + BV // 8
    cases = knobs_cases(op, *TILED)
    chosen = [cases[turn % 6], cases[6 + (turn + 1) % 6]]  # of either layout
    knobs = {"BV": BV, "tiles": tiles, "loads": "ahead", "maxnreg": 168}
    assert check_with(knobs, chosen, DEVICE) == len(chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs", [{"loads": "ahead"}, {"tiles": 2}, {"BV": 8, "tiles": 4, "loads": "ahead"}]
)
@pytest.mark.parametrize("op", DECODING_OPS)
def test_knobs_in_every_kind_of_call(op: str, knobs: dict[str, Any]) -> None:
    cases = knobs_cases(op, *(TILED if "tiles" in knobs else AHEAD))
    assert check_with(knobs, cases, DEVICE) == len(cases)


OTHERS: Final = {
    "states": [
        Case(states=x, T=t, v_first=v, state_dtype=d)
        for x, t, v, d in itertools.product(
            ("none", "initial", "slots"), (0, 1, 3), (False, True), (FP32, BF16)
        )
        if d == FP32 or x != "none"
    ],
    "slots at odd places": [Case(gap=x, v_first=x > 4, state_dtype=BF16) for x in (1, 3, 5, 7)],
    "padding": [
        Case(N=4, padding=x, null_slot=y, T=t, index_dtype=torch.int64)
        for x, y, t in itertools.product(((0,), (1, 2), (0, 1, 2, 3)), (None, 0), (1, 3))
    ],
    "speculation": [
        Case(states="speculative", T=t, N=6, padding=(1,), seed=t, accepted=a, v_first=t % 2 == 0)
        for t, a in itertools.product((1, 2, 5, 8), (False, True))
    ]
    + [
        Case(states="speculative", T=5, N=4, holes=True, null_slot=x, accepted=a)
        for x, a in itertools.product((None, 1), (False, True))
    ]
    + [Case(lengths=(3, 1, 4, 2), states="speculative", narrow=x) for x in (1, 2, 3)],
    "packed": [
        Case(lengths=(1, 0, 3, 64), uncovered=2, states=x, wide_rows=w)
        for x, w in itertools.product(("pool", "speculative", "initial", "slots"), (False, True))
    ],
    "gates": [
        Case(gate=g, parameters=p, HG=h, gate_dtype=d, parameter_dtype=d, T=2)
        for g, p, h, d in itertools.product(
            ("softplus", "sigmoid"), (True, False), (1, 2), (FP32, BF16)
        )
        if p or g == "sigmoid"
    ],
    "beta": [
        Case(op="kda", beta=b, dtype=BF16, factor_dtype=f, l2norm=n, scale=0.3, K=16, T=2)
        for b, f, n in itertools.product(("", "sigmoid", "neg"), (BF16, FP32), (True, False))
    ],
    "decay": [
        Case(op=op, pattern=x, T=8)
        for op, x in itertools.product(
            DECODING_OPS, ("layer", "zero", "strong", "uniform", "sparse")
        )
    ],
    "rows that lie apart": [
        Case(op=op, wide_rows=True, T=t, dtype=BF16, gate_dtype=BF16, HV=4, H=2)
        for op, t in itertools.product(DECODING_OPS, (1, 3))
    ],
    "64 tokens": [Case(T=64, K=128, V=128)],
}


@pytest.mark.parametrize("name", OTHERS)
def test_values(name: str) -> None:
    check_all(OTHERS[name], DEVICE)


def test_slots_past_2_to_the_31_elements() -> None:
    """Offsets are 64 bits wide."""
    case = replace(LAYER, N=2, states="pool", gap=0)
    size = case.HV * case.K * case.V
    slots = 2**31 // size + 3
    drawn = draw(case, DEVICE)
    pool = torch.zeros(slots, case.HV, case.K, case.V, device=DEVICE)
    near = drawn.serving["state_pool"]
    rows = drawn.serving["ssm_state_indices"]
    far = torch.tensor([slots - 1, slots - 2], device=DEVICE, dtype=torch.int32)
    pool[far] = near[rows]
    run(case, drawn)
    run(case, Drawn(drawn.inputs, {"state_pool": pool, "ssm_state_indices": far}))
    assert torch.equal(pool[far], near[rows]) and not pool[:-2].any()


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize(
    ("op", "null_slot", "v_first", "state"),
    [("gdn2", None, False, FP32), ("kda", 0, True, FP32), ("gdn2", 0, True, BF16)],
)
def test_a_server_of_2000_steps(
    op: str, null_slot: int | None, v_first: bool, state: torch.dtype, packed: bool
) -> None:
    case = Case(op=op, null_slot=null_slot, v_first=v_first, state_dtype=state, gap=8)
    _, served = simulate(case, 2000, DEVICE, speculative=True, packed=packed, seed=1)
    assert served > 500


# Graphs


def run(case: Case, drawn: Drawn, call: Callable[..., Any] | None = None) -> Any:
    with torch.no_grad(), verifying():
        return (call or public_op(case.op))(**drawn.inputs, **drawn.serving, **case.flags)


def captured(case: Case, drawn: Drawn) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one call, and its o."""
    with other_stream():
        run(case, drawn)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = run(case, drawn)
    return graph, o


def refill(drawn: Drawn, other: Drawn) -> None:
    """Other contents in the same memory: tensors, lengths, indices, states."""
    for name, x in drawn.inputs.items():
        x.copy_(other.inputs[name])
    for name, x in drawn.serving.items():
        if isinstance(x, Tensor) and name != "state_pool":
            x.copy_(other.serving[name])
    assert drawn.storage is not None and other.storage is not None
    drawn.storage.copy_(other.storage)
    drawn.named = other.named


GRAPHS: Final = {
    "one token": replace(LAYER, N=6, padding=(2,)),
    "speculation": Case(states="speculative", T=4, N=6, padding=(2,), gap=8, v_first=True),
    "packed": Case(lengths=(1, 4, 0, 2), states="speculative", null_slot=0, gate="softplus"),
    "kda": Case(op="kda", lengths=(3, 1, 2, 1), dtype=BF16, beta="sigmoid"),
}
# Of the same sizes, in which other sequences are padding, and lengths are others.
CHANGES: Final = {
    "one token": ({"padding": (0, 5)}, {"padding": ()}),
    "speculation": ({"padding": (0, 1, 2, 3, 4, 5)}, {"padding": ()}),
    "packed": ({"lengths": (4, 0, 0, 0), "uncovered": 3}, {"lengths": (0, 2, 1, 4)}),
    "kda": ({"lengths": (0, 0, 0, 7)}, {"lengths": (1, 1, 1, 1), "uncovered": 3}),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_replay_with_other_contents(name: str) -> None:
    case = GRAPHS[name]
    drawn = draw(case, DEVICE)
    graph, o = captured(case, drawn)
    for seed, changes in enumerate(({}, *CHANGES[name], {}), start=3):
        other = replace(case, seed=seed, **changes)
        fresh = draw(other, DEVICE)
        refill(drawn, fresh)
        exact = expected(other, fresh)
        assert drawn.storage is not None
        before = drawn.storage.clone()
        o.fill_(float("nan"))
        graph.replay()
        compare(other, drawn, before, o, drawn.serving["state_pool"], exact)


def test_replays_go_on_from_each_other() -> None:
    """A graph of one token, replayed, is a sequence of tokens."""
    case = replace(LAYER, T=5, states="initial")
    whole = draw(case, DEVICE)
    exact = expected(case, whole)
    pool = whole.inputs.pop("initial_state").clone()
    token = Drawn({x: y[:, :1].clone() for x, y in whole.inputs.items()}, {"state_pool": pool})
    kept = pool.clone()
    graph, o = captured(case, token)
    pool.copy_(kept)
    outputs = []
    for t in range(case.T):
        for name, x in token.inputs.items():
            x.copy_(whole.inputs[name][:, t : t + 1])
        graph.replay()
        outputs.append(o.clone())
    compare(replace(case, gap=0), whole, None, torch.cat(outputs, 1), pool, exact)


# torch.compile


@pytest.mark.parametrize(
    ("op", "mode"),
    [
        pytest.param(op, mode, marks=() if mode == "default" or op == "gdn2" else pytest.mark.slow)
        for op, mode in itertools.product(DECODING_OPS, ("default", "reduce-overhead"))
    ],
)
def test_whole_graphs(op: str, mode: str) -> None:
    torch._dynamo.reset()
    function = public_op(op)

    @torch.compile(fullgraph=True, dynamic=True, mode=mode)
    def call(*, q: Tensor, **given: Any) -> tuple[Tensor, Tensor | None]:
        o, state = function(q=q * 2.0, **given, output_final_state=True)  # normalised there
        return o + 0.0, state

    for N, states, seed in itertools.product((3, 5), ("pool", "initial", "speculative"), (1, 2)):
        case = Case(op=op, N=N, T=2, states=states, gap=8, seed=seed)
        drawn = draw(case, DEVICE)
        exact = expected(case, drawn)
        before = None if drawn.storage is None else drawn.storage.clone()
        for _ in range(3 if states == "initial" else 1):  # a graph is recorded by the second
            torch.compiler.cudagraph_mark_step_begin()
            o, state = run(case, drawn, lambda **x: call(**x))
        if before is not None:
            assert same_bits(state, drawn.serving["state_pool"])
            state = drawn.serving["state_pool"]
        compare(case, drawn, before, o, state, exact)


def test_the_same_bits_twice_and_on_another_stream() -> None:
    case = replace(MANY, gate="softplus")
    results = []
    for _ in range(3):
        drawn = draw(case, DEVICE)
        with other_stream() if results else torch.no_grad():
            o, _ = run(case, drawn)
        torch.cuda.synchronize()
        assert drawn.storage is not None
        results.append((o, drawn.storage))
    for o, storage in results[1:]:
        assert same_bits(o, results[0][0]) and same_bits(storage, results[0][1])


def test_a_sequence_does_not_depend_on_the_batch() -> None:
    """Of tiles of one size: the same sequence alone, and among others."""
    many = replace(MANY, T=3, states="slots", gap=0)
    drawn = draw(many, DEVICE)
    two = Drawn({x: y[:33].clone() for x, y in drawn.inputs.items()}, {})
    two.serving["state_pool"] = drawn.serving["state_pool"][:33].clone()
    o, _ = run(many, drawn)
    part, _ = run(many, two)
    assert same_bits(o[:33], part)
    assert same_bits(drawn.serving["state_pool"][:33], two.serving["state_pool"])


def test_a_check_that_can_fail() -> None:
    """A state that is rounded where it should not be is seen."""
    case = replace(LAYER, T=3)
    assert check(case, DEVICE)["state"] < 3e-6
    with pytest.raises(AssertionError):
        drawn = draw(case, DEVICE)
        exact = expected(case, drawn)
        assert drawn.storage is not None
        before = drawn.storage.clone()
        drawn.storage.copy_(drawn.storage.bfloat16())
        o, _ = run(case, drawn)
        compare(case, drawn, before, o, drawn.serving["state_pool"], exact)
