"""What is looked up once for all calls of the same shapes is right for every other call, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_launches import (
    FLAGS,
    GATED,
    HEADS,
    Launched,
    forget,
    make,
    packed,
    recorded,
    train,
)
from torch import Tensor

import gdn2gen
from gdn2gen import chunk_gdn2
from gdn2gen.base.device import named_device
from gdn2gen.base.errors import DispatchError, InputError, UnsupportedError
from gdn2gen.codegen import render
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.family.registry import RECURRENCES
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.ops import _call
from gdn2gen.runtime import call, lookup, prefill, runner
from gdn2gen.runtime._kernels import request_of
from gdn2gen.runtime.layout import Layout
from gdn2gen.runtime.signature import signature_of
from gdn2gen.store import dispatch, pins
from gdn2gen.store._claims import always_checked
from gdn2gen.store.dispatch import Found, forced_recipe
from gdn2gen.store.surroundings import surroundings
from gdn2gen.store.tuned_files import Entry, TunedFile, metadata_for, tuned_path, write_tuned

SM_90 = named_device("sm_90")


@pytest.fixture(name="launched")
def _launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launched]:
    yield from recorded(monkeypatch, tmp_path)


CALLS: dict[str, dict[str, Any]] = {
    "tokens": make(T=41),
    "batch": make(B=3),
    "value heads": make(HV=2),
    "heads of the gate": make(HG=2),
    "V": make(V=32),
    "dtype": make(dtype=torch.float16),
    "dtype of the gate": make(gate_dtype=torch.bfloat16),
    "no l2norm": make() | {"use_qk_l2norm_in_kernel": False},
    "scale": make() | {"scale": 2},
    "state": make(initial_state=True),
    "final state": make() | {"output_final_state": True},
    "states, V first": make()
    | {"output_final_state": True, "state_v_first": True}
    | {"initial_state": torch.ones(2, HEADS, 64, 32)},
    "fast": make() | {"disable_recompute": True},
    "packed": packed(0, 7, 40),
    "packed otherwise": packed(0, 7, 9, 40),
    "softplus": make() | GATED,
    "with a bias": make() | GATED | {"dt_bias": torch.zeros(HEADS * 32)},
    "sigmoid": make() | GATED | {"lower_bound": -5},
    "sigmoid, another bound": make() | GATED | {"lower_bound": -4.0},
    "sigmoid, without A_log": make() | {"use_gate_in_kernel": True, "lower_bound": -4.0},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_after_another_is_launched_like_a_first_one(name: str, launched: Launched) -> None:
    call = FLAGS | CALLS[name]
    first = train(**call)
    expected = launched.looks()
    forget()
    for other in (make(), *CALLS.values()):
        train(**(FLAGS | other))
    launched.clear()
    again = train(**call)
    assert launched.looks() == expected
    assert [(x.shape, x.dtype) for x in again] == [(x.shape, x.dtype) for x in first]
    wanted = [x for x in call.values() if isinstance(x, Tensor) and x.is_floating_point()]
    grads = again[len(again) - len(wanted) :]
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in wanted]


def test_calls_of_the_same_sizes_share_what_was_looked_up(launched: Launched) -> None:
    chunk_gdn2(**make(), **FLAGS)
    before = [x.cache_info().misses for x in (lookup.known_request, runner._sized)]
    chunk_gdn2(**make(), **FLAGS)
    assert [x.cache_info().misses for x in (lookup.known_request, runner._sized)] == before


def test_a_bound_that_is_an_integer_is_a_float_in_the_kernels(launched: Launched) -> None:
    train(**(make() | GATED | {"lower_bound": -5}))
    given = [scalars["lower_bound"] for *_, scalars in launched if "lower_bound" in scalars]
    assert given and all(type(x) is float for x in given)


def test_devices_are_told_apart(launched: Launched) -> None:
    inputs = make()
    chunk_gdn2(**inputs, **FLAGS)
    with pytest.raises(InputError, match="k must be on cpu like q, but is on meta"):
        chunk_gdn2(**inputs | {"k": inputs["k"].to("meta")}, **FLAGS)
    x = inputs["q"]
    what = ("gdn2", (x.shape,) * 3, (x.dtype,) * 3)
    rest = ((False, False, False), None, 1.0, None, *[False] * 4)
    requests = [
        lookup.known_request(*what, torch.device("cuda", index), *rest) for index in (0, 1, 0)
    ]
    assert [x.call.device.index for x in requests] == [0, 1, 0]
    assert requests[0] is requests[2]


def test_a_problem_has_what_its_op_takes_of_beta() -> None:
    drawn = make(op="kda")
    signature = signature_of("kda")
    tensors = tuple(drawn.get(name) for name in signature.names[:-1])
    for of_beta in ((False, False), (True, False), (True, True)):
        flags = (None, None, True, False, False, False, *of_beta)
        problem = request_of(signature, tensors, None, flags).problem
        assert (problem.op, problem.beta_sigmoid, problem.neg_eigval) == ("kda", *of_beta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_problem_says_whether_its_beta_is_wider_than_q(dtype: torch.dtype) -> None:
    signature = signature_of("kda")
    flags = (None, None, True, False, False, False, False, False)
    for factor_dtype in (None, torch.float32):
        drawn = make(op="kda", dtype=dtype, factor_dtype=factor_dtype)
        tensors = tuple(drawn.get(name) for name in signature.names[:-1])
        problem = request_of(signature, tensors, None, flags).problem
        assert problem.beta_fp32 == (drawn["beta"].dtype != dtype)
        assert problem.key == replace(problem, beta_fp32=False).key


def test_what_is_refused_is_refused_again(launched: Launched) -> None:
    right = make()
    for _ in range(2):
        chunk_gdn2(**right, **FLAGS)
        with pytest.raises(InputError, match="k must be"):
            chunk_gdn2(**right | {"k": right["k"][:, 1:]}, **FLAGS)
        with pytest.raises(InputError, match="w must have the dtype"):
            chunk_gdn2(**right | {"w": right["w"].float()}, **FLAGS)
        with pytest.raises(InputError, match="b must be a tensor, but got NoneType"):
            chunk_gdn2(**right | {"b": None}, **FLAGS)
        with pytest.raises(UnsupportedError, match="K=48"):
            chunk_gdn2(**make(K=48), **FLAGS)
        with pytest.raises(InputError, match="cu_seqlens must not fall"):
            chunk_gdn2(**packed(0, 9, 5, 40), **FLAGS)
        chunk_gdn2(**packed(0, 5, 9, 40), **FLAGS)


# Recipes

REGIME = Regime(tokens=80, sequences=2, heads=HEADS)


def tune(folder: Path, num_stages: int) -> None:
    """File an entry for `make()`, told by the num_stages of its scan."""
    problem = Problem(K=32, V=64)
    recipe = Recipe.default(problem)
    configs = recipe.with_config(recipe["scan"].replace(num_stages=num_stages)).by_stage
    digests = {stage: render.template_digest(config) for stage, config in configs.items()}
    times = {"forward_ms": 1.0, "forward_backward_ms": 2.0}
    errors = dict.fromkeys(always_checked("gdn2"), 4e-3)
    entry = Entry(
        *(problem.key, REGIME.key, "lean", "lean", configs, digests, times, errors, "measured")
    )
    path = tuned_path(folder, "gdn2", SM_90)
    write_tuned(path, TunedFile(metadata_for(SM_90, {}, "test", "2026"), (entry,)))


def scan_of(launched: Launched) -> int:
    """The num_stages of the scan that a call runs."""
    launched.clear()
    chunk_gdn2(**make(), **FLAGS)
    (config,) = [config for stage, config, *_ in launched if stage == "scan"]
    return int(config["num_stages"])


def test_what_this_process_tunes_is_noticed_and_what_others_do_when_asked(
    launched: Launched, tmp_path: Path
) -> None:
    default = default_config("scan", Problem(K=32, V=64)).size("num_stages")
    assert scan_of(launched) == default
    tune(tmp_path / "packaged", 1)
    assert scan_of(launched) == 1
    tune(tmp_path / "user", 3)
    assert scan_of(launched) == 3
    tuned_path(tmp_path / "user", "gdn2", SM_90).unlink()  # as another process would
    assert scan_of(launched) == 3
    gdn2gen.reload()
    assert scan_of(launched) == 1


def test_the_environment_is_asked_in_every_call(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(tmp_path / "user", 1)
    tune(tmp_path / "elsewhere", 3)
    assert scan_of(launched) == 1
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "elsewhere"))
    assert scan_of(launched) == 3
    chunk_gdn2(**make(T=50), **FLAGS)
    monkeypatch.setenv("GDN2GEN_STRICT", "1")
    assert scan_of(launched) == 3
    for _ in range(2):
        with pytest.raises(DispatchError, match="strict"):
            chunk_gdn2(**make(T=50), **FLAGS)
    monkeypatch.delenv("GDN2GEN_STRICT")
    chunk_gdn2(**make(T=50), **FLAGS)


def forced(num_stages: int) -> Recipe:
    recipe = Recipe.default(Problem(K=32, V=64))
    return recipe.with_config(recipe["scan"].replace(num_stages=num_stages))


def test_the_forced_recipe_is_the_innermost_one(launched: Launched) -> None:
    unforced = scan_of(launched)
    with forced_recipe(forced(1)):
        assert scan_of(launched) == 1
        with forced_recipe(forced(3)):
            assert scan_of(launched) == 3
        assert scan_of(launched) == 1
    assert scan_of(launched) == unforced


def test_the_backward_runs_what_the_forward_found(launched: Launched, tmp_path: Path) -> None:
    """On autograd's thread, after the forced recipe is gone and another one is on file."""
    recipe = Recipe.default(Problem(K=32, V=64), "fast")
    inputs = {name: x.requires_grad_() for name, x in make().items()}
    with forced_recipe(recipe):
        o, _ = chunk_gdn2(**inputs, **FLAGS)
    tune(tmp_path / "user", 3)
    torch.autograd.backward(o.sum())
    assert [stage for stage, *_ in launched] == [*recipe.plan.forward, *recipe.plan.backward]


def test_each_direction_has_the_segments_of_its_own_scan(launched, monkeypatch) -> None:
    monkeypatch.setattr(call, "SEGMENT", 1)
    problem = Problem(K=32, V=64)
    recipe = Recipe.default(problem)
    chosen = {"scan": 64, "reverse_scan": 112}
    configs = (
        recipe[stage].replace(segments="parallel", BV=32, max_segments=max_segments)
        for stage, max_segments in chosen.items()
    )
    with forced_recipe(recipe.with_config(*configs)):
        train(**make(B=1, T=50 * 32), **FLAGS)
    scans = {name: (numbers, given) for name, _, given, numbers in launched if "NS" in numbers}
    # 16 and 28 segments of 4 heads would be 4 and 2 chunks long, of 50
    assert {name: (x["NS"], x["segment"]) for name, (x, _) in scans.items()} == {
        "scan": (13, 4),
        "rescan": (13, 4),
        "reverse_scan": (25, 2),
    }
    kept = {
        name: [x.shape[2] for y, x in operands.items() if y in ("S_seg", "M_seg", "dS_seg")]
        for name, (_, operands) in scans.items()
    }
    assert kept == {"scan": [13, 13], "rescan": [13], "reverse_scan": [25, 25]}


@pytest.mark.parametrize("plan", [x for x in RECURRENCES["gdn2"].plans if not PLANS[x].instead])
def test_what_is_saved_is_as_the_fake_says(plan: str, launched: Launched) -> None:
    problem = Problem(K=32, V=64)
    recipe = Recipe.default(problem, plan)
    inputs = make(B=2, T=1100)
    with forced_recipe(recipe):
        train(**inputs, **FLAGS)
        loaded = runner.Runner(recipe)
        signature = signature_of("gdn2")
        tensors = tuple(inputs.get(name) for name in signature.names[:-1])
        given = request_of(signature, tensors, None, (1.0, None, True, False, False, False)).call
    sizes = given.sizes(problem, loaded.BT, recipe.saved_segments)
    made = {name: x for _, _, operands, _ in launched for name, x in operands.items()}
    layout = Layout.of(loaded.saved, problem, sizes)
    said = layout.split(torch.empty(layout.nbytes, dtype=torch.uint8))
    assert {"A", "Aqk"} <= {*said}
    for name, x in said.items():
        assert (made[name].shape, made[name].dtype) == (x.shape, x.dtype), name


def scan_launch(launched: Launched, **arguments: Any) -> tuple[str, int, int, tuple[int, ...]]:
    """What a call without gradients scans with: stage, segments, their chunks, what is kept."""
    launched.clear()
    chunk_gdn2(**arguments, **FLAGS)
    (_, (stage, _, operands, scalars)) = launched
    kept = operands.get("S_seg")  # which a serial scan that keeps all states has none of
    shape = () if kept is None else tuple(kept.shape)
    return stage, scalars["NS"], scalars["segment"], shape


def test_without_a_gradient_a_serial_scan_keeps_no_segments(launched, monkeypatch) -> None:
    monkeypatch.setattr(call, "SEGMENT", 1)
    inputs = make(B=1, T=50 * 32)
    assert scan_launch(launched, **inputs) == ("scan", 1, 50, (1, HEADS, 1, 64, 32))
    launched.clear()
    train(**inputs, **FLAGS)
    assert launched[1][3]["NS"] == launched[3][3]["NS"] == 25
    with torch.no_grad():
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        assert scan_launch(launched, **leaves)[:3] == ("scan", 1, 50)
    problem = Problem(K=32, V=64)
    recipe = Recipe.default(problem)
    scan = recipe["scan"].replace(segments="parallel", BV=32)
    with torch.no_grad(), forced_recipe(recipe.with_config(scan)):
        assert scan_launch(launched, **inputs)[:3] == ("scan", 25, 2)


def test_what_keeps_states_on_the_way_is_looked_up_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a forward with a scan of its own; and it is not pinned for the calls that keep none."""
    asked: list[bool] = []
    plans = {False: "whole", True: "lean"}

    def find(problem: Problem, *_: Any, scan_apart: bool, **__: Any) -> Found:
        asked.append(scan_apart)
        return Found(Recipe.default(problem, plans[scan_apart], arch="sm_90"), "exact", "")

    monkeypatch.setattr(lookup, "find_recipe", find)
    monkeypatch.setattr(prefill, "Runner", lambda recipe: recipe)
    dims = {"K": 128, "V": 128}
    sized = call.Call(1, 64, 1, 1, 1, 1, 1.0, None, packed=False, device=torch.device("cpu"))
    request: Any = lookup.Request(Problem(**dims, initial_state=True, final_state=True), sized)
    pins.forget()
    look: Any = prefill._runner.__wrapped__
    made: Any = [look(request, "weak", x, False, surroundings()) for x in ("", "bf16", "")]
    assert asked == [False, True, False]
    assert [x.plan.name for x in made] == ["whole", "lean", "whole"]
    assert made[1].problem.checkpoints == "bf16"
    look(request, "weak", "bf16", False, surroundings())
    (pinned,) = gdn2gen.pin()["recipes"]
    assert pinned["plan"] == "whole"
    pins.forget()


def test_without_a_gradient_no_states_are_kept(launched, monkeypatch) -> None:
    """Unless nothing but the plan that keeps them is tuned."""
    states = Recipe.default(Problem(K=32, V=64), "states")
    tuned = {"lean": "exact", "fast": "exact"}

    def find(problem: Problem, *_: Any, level: str, strict: bool | None, **__: Any) -> Found:
        if dispatch.forced() is not None:
            return Found(states, "forced", "")
        recipe = Recipe.default(problem, "lean" if level == "lean" else "states")
        if strict is not False and tuned[level] != "exact":
            raise DispatchError("strict")
        return Found(recipe, tuned[level], "")

    monkeypatch.setattr(lookup, "find_recipe", find)
    inputs = make() | {"disable_recompute": True}
    assert scan_launch(launched, **inputs)[0] == "scan"
    train(**inputs, **FLAGS)
    assert [stage for stage, *_ in launched[2:]] == [*states.plan.forward, *states.plan.backward]
    forget()
    tuned["lean"] = "default"
    assert scan_launch(launched, **inputs)[0] == "scan_states"
    with forced_recipe(states):
        assert scan_launch(launched, **make())[0] == "scan_states"


# Calls that are known, and are not checked again


def test_a_call_that_is_known_is_checked_no_more(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = make()
    chunk_gdn2(**given, **FLAGS)
    first, checked = launched.looks(), []
    for name in ("check_arguments", "check_gate", "check_head_dims"):
        monkeypatch.setattr(_call, name, lambda *_, name=name, **__: checked.append(name))
    launched.clear()
    chunk_gdn2(**make(), **FLAGS)
    assert launched.looks() == first and checked == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"scale": True}, "scale must be a number"),
        ({"scale": torch.ones(())}, "scale must be a number"),
        ({"output_final_state": 0}, "must be True or False"),
        ({"lower_bound": True}, "lower_bound must be a number"),
        ({"g": make()["g"].double()}, "narrower"),
        ({"v": make()["v"][:, :-1]}, "v must be"),
        ({"q": make()["q"].to_sparse()}, "dense"),
        ({"k": None}, "k must be a tensor"),
        ({"w": [1.0]}, "w must be a tensor"),
        ({"cu_seqlens_cpu": torch.tensor([0, 40])}, "without cu_seqlens"),
    ],
)
def test_what_differs_from_a_known_call_is_checked(
    bad: dict[str, Any], message: str, launched: Launched
) -> None:
    """Also where it compares equal: True is 1, and 0 is False."""
    chunk_gdn2(**make(), **FLAGS, scale=1, output_final_state=False)
    before = len(launched)
    with pytest.raises(InputError, match=message):
        chunk_gdn2(**make() | FLAGS | {"scale": 1.0} | bad)
    assert len(launched) == before


def test_values_of_a_known_call_are_checked_every_time(launched: Launched) -> None:
    given = packed(0, 7, 40)
    chunk_gdn2(**given, **FLAGS)
    before = len(launched)
    given["cu_seqlens"].copy_(torch.tensor([0, 41, 40]))
    with pytest.raises(InputError, match="cu_seqlens must not fall"):
        chunk_gdn2(**given, **FLAGS)
    assert len(launched) == before


def test_a_known_call_runs_what_is_forced(launched: Launched) -> None:
    chunk_gdn2(**make(), **FLAGS)
    recipe = Recipe.default(Problem(K=32, V=64), BT=16)
    with forced_recipe(recipe):
        launched.clear()
        chunk_gdn2(**make(), **FLAGS)
        assert [x[1]["BT"] for x in launched] == [16, 16]
    launched.clear()
    chunk_gdn2(**make(), **FLAGS)
    assert [x[1]["BT"] for x in launched] != [16, 16]
