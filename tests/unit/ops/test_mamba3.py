"""mamba3_siso_combined: values and gradients, packed and split sequences, what it refuses."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import mamba3_checks as checks
import pytest
import torch
from mamba3_checks import CASES, LIMIT, arguments, draw, errors
from mamba3_isolation import changed_by

from gdn2gen import mamba3_siso_combined, mamba3_siso_step
from gdn2gen.base.errors import InputError

Check = Callable[..., Any]
CHECKS = checks


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    found = errors(name)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("name", ["layer", "packed", "strong", "no-angles", "all-angles"])
def test_values_and_gradients_by_kernels(name: str, interpreter: Check) -> None:
    found = interpreter("mamba3_checks:poisoned_errors", name)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize(
    "name",
    [
        "layer",
        "packed",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("strong", "one-token", "plain")),
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("no-angles", "all-angles")),
    ],
)
def test_values_and_gradients_over_chunks(name: str, interpreter: Check) -> None:
    found = interpreter("mamba3_checks:chunk_errors", name)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize(
    ("name", "fast"),
    [
        ("layer", True),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (("layer", False), ("plain", True))),
    ],
)
def test_states_and_outputs_in_one_stage(name: str, fast: bool, interpreter: Check) -> None:
    """What keeps nothing is asked for where no backward comes."""
    kept, found = interpreter("mamba3_checks:errors_at_once", name, fast)
    assert kept == [(2 if fast else 1, True), (0, True)]
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize(
    ("name", "fast"),
    [
        ("layer", True),
        ("all-angles", False),
        *(
            pytest.param(x, y, marks=pytest.mark.slow)
            for x, y in (("no-angles", True), ("plain", False), ("one-token", True))
        ),
    ],
)
def test_queries_and_keys_turned_within_the_scan(name: str, fast: bool, interpreter: Check) -> None:
    """What a backward reads of the scan is what the stages before it would have left."""
    kept, found = interpreter("mamba3_turning_checks:errors_turned_within", name, fast)
    assert kept == [(2 if fast else 1, True), (0, True)]
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize(
    ("name", "fast"),
    [
        ("layer", True),
        ("all-angles", False),
        *(
            pytest.param(x, y, marks=pytest.mark.slow)
            for x, y in (("strong", False), ("plain", True))
        ),
        *(pytest.param(x, True, marks=pytest.mark.slow) for x in ("no-angles", "one-token")),
    ],
)
def test_the_backwards_products_in_one_stage(name: str, fast: bool, interpreter: Check) -> None:
    whole, found = interpreter("mamba3_checks:errors_scanned_back", name, fast)
    assert whole == [True]
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize(
    "name",
    [
        "layer",
        "all-angles",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("no-angles", "strong", "one-token")),
    ],
)
def test_what_it_leaves_is_added_up_token_by_token(name: str, interpreter: Check) -> None:
    whole, found = interpreter("mamba3_checks:errors_scanned_back", name, True, 1, "tokens")
    assert whole == [True]
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize(("N", "S"), [(128, 32), (40, 12)])
def test_sums_token_by_token_in_16_bits(N: int, S: int, interpreter: Check) -> None:
    """Pairs of channels are read and written as one number there."""
    found = interpreter("mamba3_checks:sums_in_16_bits", N, S)
    narrow = ("dQ ", "dK ")
    assert all(y < (2**-8 if x.startswith(narrow) else 1e-5) for x, y in found.items()), found


@pytest.mark.parametrize("name", ["steady", "strong"])
def test_strong_decay_in_16_bits_over_chunks(name: str, interpreter: Check) -> None:
    """At every token 20 nats, dADT was off by 0.3 where it was a sum of all less one of most; in
    sequences of none, of one token, and of a tile and one more."""
    found = interpreter("mamba3_checks:chunk_errors", name, "bfloat16")
    assert max(found.values()) < 6e-3, found


@pytest.mark.parametrize("cu_seqlens", [False, True])
def test_one_graph_serves_all_lengths_without_kernels(cu_seqlens: bool) -> None:
    torch._dynamo.reset()
    made: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def call(given: dict[str, Any]) -> Any:
        return mamba3_siso_combined(**given, return_final_states=True)

    for T in (20, 33, 71):
        ends = {"cu_seqlens": (0, 5, 5, 12, T)} if cu_seqlens else {"T": T}
        given = arguments(draw({**ends, "D": True, "Z": True, "states": True}))
        right = mamba3_siso_combined(**given, return_final_states=True)
        for x, y in zip(call(given), right, strict=True):
            assert torch.equal(x, y)
    assert len(made) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("odd", range(4))
def test_what_is_no_number_stays_in_its_sequence(odd: int, value: float) -> None:
    """Sums went on over the whole row, and a sequence without tokens had its neighbours'."""
    assert changed_by(odd, value) == []


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("odd", range(4))
def test_nor_does_it_leave_it_by_kernels(odd: int, chunked: bool, interpreter: Check) -> None:
    assert interpreter("mamba3_isolation:changed_by", odd, math.nan, chunked) == []


def test_slices_of_values_and_blocks_of_heads_over_chunks(interpreter: Check) -> None:
    found = interpreter("mamba3_checks:slices_and_blocks")
    assert max(found.values()) < LIMIT, found


def test_in_16_bits_over_chunks(interpreter: Check) -> None:
    found = interpreter("mamba3_checks:angle_errors", True, 90)
    assert max(found.values()) < 6e-3, found


@pytest.mark.slow
def test_sums_over_later_tokens_keep_none_of_their_roundings(interpreter: Check) -> None:
    """dAngles and dDT, in which pairs of later tokens cancel."""
    chunks, scan = (interpreter("mamba3_checks:angle_errors", x, 400) for x in (True, False))
    summed = [max(x["dAngles"], x["dDT"]) for x in (chunks, scan)]
    assert summed[0] < 6e-3 < 1e-2 < summed[1], (chunks, scan)


def test_blocks_of_heads(interpreter: Check) -> None:
    found = interpreter("mamba3_checks:blocks_of_heads")
    assert max(found.values()) < LIMIT, found


def test_level_fast_is_the_scans(interpreter: Check) -> None:
    told, found = interpreter("mamba3_checks:fast_errors")
    assert told == [True] and max(found.values()) < LIMIT, (told, found)


def test_in_16_bits(interpreter: Check) -> None:
    found = interpreter("mamba3_checks:poisoned_errors", "layer", "bfloat16")
    assert max(found.values()) < 6e-3, found


def test_packed_sequences_are_each_by_itself(run: Check) -> None:
    run("check_packed")


@pytest.mark.parametrize("chosen", [True, False], ids=["chunks", "around"])
def test_tokens_of_no_sequence(chosen: bool, interpreter: Check) -> None:
    """dD was a sum over what lay in memory there."""
    interpreter("mamba3_checks:check_uncovered", chosen)


def test_no_output_depends_on_a_later_token(run: Check) -> None:
    run("check_causal")


def test_two_halves_are_the_whole(run: Check) -> None:
    run("check_halves")


def test_the_signature_is_that_of_mamba_ssm() -> None:
    found = inspect.signature(mamba3_siso_combined).parameters
    required = ("Q", "K", "V", "ADT", "DT", "Trap", "Q_bias", "K_bias", "Angles")
    wanted = {
        **dict.fromkeys(required, inspect.Parameter.empty),
        **dict.fromkeys(("D", "Z", "Input_States")),
        "chunk_size": 64,
        "return_final_states": False,
        "cu_seqlens": None,
        "disable_recompute": False,  # ours, after theirs
    }
    assert [(name, x.default) for name, x in found.items()] == [*wanted.items()]


def test_what_is_returned_is_what_is_asked_for() -> None:
    made = arguments(draw(CASES["packed-from-nothing"]))
    out = mamba3_siso_combined(**made)
    found = mamba3_siso_combined(**made, return_final_states=True, chunk_size=16)
    assert isinstance(out, torch.Tensor) and torch.equal(found[0], out)
    shapes = [(1, 40, 2, 16), (4, 2, 6), (4, 2, 16, 24), (4, 2, 24), (4, 2, 16)]
    assert [tuple(x.shape) for x in found] == shapes
    assert all((x[0] == 0).all() for x in found[1:])  # of no tokens


def test_autocast_narrows_nothing() -> None:
    made = arguments(draw(CASES["layer"]))
    wanted = mamba3_siso_combined(**made, return_final_states=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = mamba3_siso_combined(**made, return_final_states=True)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", ["layer", "packed-from-nothing"])
def test_no_tokens(name: str) -> None:
    made = arguments(draw(CASES[name] | {"T": 0}))
    if "cu_seqlens" in made:
        made["cu_seqlens"] = torch.tensor([0, 0])
    out, *states = mamba3_siso_combined(**made, return_final_states=True)
    assert out.shape == (made["V"].shape[0], 0, 2, 16)
    given = made.get("Input_States") or [torch.zeros_like(x) for x in states]
    assert all(torch.equal(x, y) for x, y in zip(states, given, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chunk_size": 48}, "chunk_size must be a power of two, but got 48"),
        ({"return_final_states": 1}, "return_final_states must be True or False, but got 1"),
        ({"disable_recompute": "no"}, "disable_recompute must be True or False, but got 'no'"),
        ({"Trap": None}, "Trap must be a tensor, but got NoneType"),
        ({"DT": torch.zeros(2, 40, 2)}, r"DT must be \[b, h, l\] = \(2, 2, 40\), but got \(2, 40"),
        ({"Q_bias": torch.zeros(2)}, r"Q_bias must be \[h, N\], but got \(2,\)"),
        ({"D": torch.zeros(2, 16)}, r"D must be \[h\], but got \(2, 16\)"),
        ({"K": torch.zeros(2, 40, 1, 24).half()}, "K must have the dtype of V, torch.float32"),
        ({"Q": torch.zeros(2, 40, 3, 24), "K": torch.zeros(2, 40, 3, 24)}, "but got 2 and 3"),
        ({"Angles": torch.zeros(2, 40, 2, 13)}, "at most N / 2 = 12 of them, but got S=13"),
        ({"Angles": torch.zeros(2, 40, 2, 6).int()}, "Angles must be of floating point"),
        ({"Z": torch.zeros(2, 40, 2, 16, device="meta")}, "Z must be on cpu like V"),
        (
            {"Input_States": torch.zeros(4)},
            "must be a tuple of angle, ssm, k and v, but got Tensor",
        ),
        ({"Input_States": (torch.zeros(2, 4, 6),)}, "but got 1 of them"),
        ({"cu_seqlens": torch.tensor([0, 40])}, "cu_seqlens wants b = 1, but V has 2 rows"),
        ({"cu_seqlens": torch.tensor([0.0, 40.0])}, "cu_seqlens must be int32 or int64"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        mamba3_siso_combined(**{**arguments(draw(CASES["plain"])), **change})


@pytest.mark.parametrize(
    ("place", "state", "said"),
    [
        (0, torch.zeros(2, 2, 5), r"angle of Input_States must be \(2, 2, 6\)"),
        (1, torch.zeros(2, 2, 24, 16), r"ssm of Input_States must be \(2, 2, 16, 24\)"),
        (1, torch.zeros(2, 2, 16, 24).half(), "ssm of Input_States must be float32"),
        (2, None, "k of Input_States must be a tensor, but got NoneType"),
        (3, torch.zeros(2, 2, 16, device="meta"), "v of Input_States must be on cpu"),
    ],
)
def test_bad_states_are_refused(place: int, state: Any, said: str) -> None:
    made = arguments(draw(CASES["layer"]))
    states = [*made["Input_States"]]
    states[place] = state
    with pytest.raises(InputError, match=said):
        mamba3_siso_combined(**{**made, "Input_States": tuple(states)})


@pytest.mark.parametrize(
    ("ends", "said"), [((0, 9, 7, 40), "must not fall"), ((0, 39), "end at T")]
)
def test_bad_sequences_are_refused(ends: tuple[int, ...], said: str) -> None:
    made = arguments(draw(CASES["packed-from-nothing"]))
    with pytest.raises(InputError, match=said):
        mamba3_siso_combined(**made | {"cu_seqlens": torch.tensor(ends)})


def test_steps_are_the_whole(run: Check) -> None:
    run("check_steps")
    run("check_steps_of_groups")


def test_a_step_has_a_gradient_and_needs_states() -> None:
    made = arguments(draw(CASES["layer"]))
    states = made.pop("Input_States")
    token = checks.token_of(made, 0)
    token["V"] = token["V"].clone().requires_grad_()
    out, _ = mamba3_siso_step(**token, Input_States=states)
    (found,) = torch.autograd.grad(out.sum(), [token["V"]])
    assert found.abs().min() > 0
    with pytest.raises(InputError, match="a step needs Input_States, but got None"):
        mamba3_siso_step(**token)
    with pytest.raises(InputError, match=r"DT must be \[b, h\], but got \(2, 2, 40\)"):
        mamba3_siso_step(**token | {"DT": made["DT"]}, Input_States=states)


def test_as_torch_sees_it(interpreter: Check) -> None:
    assert interpreter("mamba3_checks:check_ops")


@pytest.mark.slow
def test_compiled(interpreter: Check) -> None:
    assert interpreter("mamba3_checks:check_compiled")
    assert interpreter("mamba3_checks:check_compiled_over_chunks")


def test_a_tracer_is_told_what_is_made(interpreter: Check) -> None:
    assert interpreter("mamba3_checks:fakes_are_like_what_is_made")
