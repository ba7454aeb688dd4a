"""The search space: valid, hopeless and unfit configs, and predicted ranking."""

from __future__ import annotations

import dataclasses
import random

import optuna
import pytest
from taken import having

from gdn2gen.base.device import named_device
from gdn2gen.codegen.build import Resources
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.limits import Place
from gdn2gen.kernels.stages import STAGES
from gdn2gen.tuning import space
from gdn2gen.tuning.offline.predict import blocks_per_sm, predicted_bytes
from gdn2gen.tuning.search import climb

H200 = named_device("H200")
SMALL = named_device("sm_89")
PROBLEM = Problem()


@pytest.mark.parametrize("stage", [x for x in STAGES if not x.startswith("forward")])
@pytest.mark.parametrize("K", [32, 128])
def test_every_suggestion_is_a_config_within_the_head_dims(stage, K):
    problem = having(Problem(K=K, V=K), stage)
    K = problem.K
    places = (Place(problem, BT, "sm_90") for BT in (64, 32))
    place = next(x for x in places if any(form.serves(x) for form in STAGES[stage].forms))
    assert place.BT == 64 or stage.startswith("grad_blocks")
    # those of blocks in TileLang have no tiles below 64
    most = max(K, *(form.tiled_by for form in STAGES[stage].forms if form.serves(place)))
    assert most == K or STAGES[stage].every
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        config = space.suggest(study.ask(), stage, place)
        assert config["BT"] == place.BT
        assert config.get("BK", 0) <= most and config.get("BV", 0) <= most
        parameters = space.parameters(config, place)
        assert set(parameters) == set(space.distributions(config, place))


@pytest.mark.parametrize("stage", [x for x in STAGES if not x.startswith("forward")])
@pytest.mark.parametrize("K", [32, 64, 128])
def test_the_default_is_in_the_space(stage, K):
    problem = having(Problem(K=K, V=K), stage)
    config = default_config(stage, problem)
    assert space.parameters(config, Place(problem, config.size("BT"), "sm_90")) is not None
    assert config in set(space.valid_configs(stage, problem, H200, config.size("BT")))


def test_a_scan_that_cannot_fit_is_hopeless_only_where_it_cannot():
    config = default_config("scan", PROBLEM).replace(BT=64, BV=128, num_stages=4)
    assert space.why_hopeless(config, PROBLEM, H200) is None
    reason = space.why_hopeless(config, PROBLEM, SMALL)
    assert reason is not None and str(SMALL.shared_bytes) in reason


def test_every_form_of_a_kernel_is_tried_first_near_the_default():
    forms = space.starts("grad_key", PROBLEM, H200, 32)
    kinds = {(config["language"], config["decay"]) for config in forms}
    assert {("triton", "log"), ("triton", "anchored"), ("tilelang", "anchored")} <= kinds
    assert len(kinds) == len(forms)
    default = default_config("grad_key", PROBLEM, BT=32)
    same = (default["language"], default["decay"])
    assert default in forms and same in kinds
    for config in forms:
        assert space.why_hopeless(config, PROBLEM, H200) is None
    tilelang = [x for x in forms if x["language"] == "tilelang"]
    assert [x["decay"] for x in tilelang] == ["anchored", "centred"]
    assert {(x["chunks"], x["maxnreg"]) for x in tilelang} == {(16, 128)}
    for K, BT, maxnreg, solve in ((64, 32, 64, "halves"), (128, 32, 80, "halves")):
        prepare = space.starts("prepare", Problem(K=K), H200, BT)[-1]
        assert (prepare["language"], prepare["maxnreg"]) == ("tilelang", maxnreg)
        assert prepare["solve"] == solve
    wide = space.starts("prepare", Problem(K=64), H200, 64)[-1]
    assert (wide["maxnreg"], wide["solve"]) in ((0, "ieee"), (128, "ieee"))
    first, other = space.starts("sum_decay", PROBLEM, H200, 32)
    assert first == default_config("sum_decay", PROBLEM, BT=32)
    assert other["language"] == "tilelang"
    assert space.starts("sum_decay", PROBLEM, named_device("RTX 5090"), 32) == (first,)
    for form in space.starts("prepare", PROBLEM, named_device("A100"), 32):
        assert form["language"] == "triton" or (form["maxnreg"], form["num_stages"]) == (0, 1)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"BT": 64, "BK": 32, "num_stages": 1}, "reads past its memory"),
        ({"BT": 64, "num_stages": 1}, None),
        ({"BK": 32}, None),
        ({"language": "tilelang", "BT": 16, "num_stages": 2}, "every second is off"),
        ({"language": "tilelang", "BT": 16, "num_stages": 1}, None),
    ],
)
def test_configs_that_took_the_gpu_down_are_not_tried_again(knobs, message):
    config = default_config("grad_key", PROBLEM, BT=32).replace(**knobs)
    reason = space.why_hopeless(config, PROBLEM, H200)
    assert reason is None if message is None else message in str(reason)


@pytest.mark.parametrize("stage", ["grad_blocks1", "grad_blocks2", "grad_blocks4"])
def test_chunks_of_64_with_operands_at_wrong_addresses_are_not_tried_again(stage):
    """An H200 met illegal accesses, and gradients off by up to 5.7e2."""
    for op in ("gdn2", "kda"):
        for BK in (32, 64):
            config = default_config(stage, Problem(op), BT=64).replace(BK=BK)
            assert "at wrong addresses" in str(space.why_hopeless(config, Problem(op), H200))
        right = default_config(stage, Problem(op), BT=32, arch="sm_90")
        assert space.why_hopeless(right, Problem(op), H200) is None


def test_extras_of_scans_in_segments_are_searched():
    """Of forms that take them; others that a config has are neither asked for nor in the way."""
    gated = Problem("gated_delta_rule")
    place = Place(gated, 32, "sm_90")
    serial = default_config("scan", gated, BT=32, arch="sm_90").replace(segments="serial")
    parallel = serial.replace(segments="parallel")
    assert space.extras_asked(serial, place) == {}
    assert space.extras_asked(parallel, place) == {"merge": ("off", "cut"), "reach": ("off", 64)}
    both = parallel.replace(merge="cut", reach=64)
    found = set(space.neighbours(parallel, gated, H200))
    assert {parallel.replace(merge="cut"), parallel.replace(reach=64)} < found
    assert not any(x.get("merge") or x.get("reach") for x in space.neighbours(serial, gated, H200))
    # back to serial, which takes neither, is not one knob away
    assert {parallel.replace(merge="cut"), parallel.replace(reach=64)} < {
        *space.neighbours(both, gated, H200)
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for config in (parallel, both, parallel.replace(pdl="wait"), parallel.replace(reach=32)):
        parameters = space.parameters(config, place)
        assert set(parameters) == set(space.distributions(config, place))
        study.enqueue_trial(parameters)
        asked = {x: y for x, y in config.items() if y not in ("wait", 32) or x == "BT"}
        assert dict(space.suggest(study.ask(), "scan", place)) == asked
    kept = Problem("kda", K=128, V=128)
    found = space.extras_asked(
        default_config("scan", kept, BT=32).replace(segments="parallel"), Place(kept, 32, "sm_90")
    )
    assert found == {"merge": ("off", "cut")}


def test_neighbours_differ_in_one_knob_and_can_be_compiled():
    config = default_config("scan", PROBLEM, BT=32)
    near = list(space.neighbours(config, PROBLEM, H200))
    assert len(near) > 3 and len(near) == len(set(near))
    for other in near:
        assert sum(other.get(name) != value for name, value in config.items()) == 1
        assert other["BT"] == 32 and space.why_hopeless(other, PROBLEM, H200) is None


def test_what_is_proposed_lies_next_to_the_best_of_each_form_that_may_win():
    serial = default_config("scan", PROBLEM)
    parallel, tilelang = serial.replace(segments="parallel"), serial.replace(language="tilelang")
    means = {serial: 1.0, parallel: 1.2, tilelang: 1.9, serial.replace(BV=16): 1.25}
    seen = {*means}

    def draw():
        config = climb.next_to_best(means, lambda x: x not in seen, PROBLEM, H200, random.Random(0))
        if config is not None:
            seen.add(config)
        return config

    drawn = list(iter(draw, None))
    near = {*space.neighbours(serial, PROBLEM, H200), *space.neighbours(parallel, PROBLEM, H200)}
    first = [x in near for x in drawn]
    assert {*drawn[: len(near - {*means})]} == near - {*means}
    # then next to what is no form's best; never next to what is too slow
    last = {*space.neighbours(serial.replace(BV=16), PROBLEM, H200)}
    assert not all(first) and {*drawn} == (near | last) - {*means}
    assert climb.next_to_best({}, lambda x: True, PROBLEM, H200, random.Random(0)) is None


@pytest.mark.parametrize("ms", [1.2, 1.9])
def test_a_quarter_of_what_is_proposed_is_for_calls_with_options(ms):
    """Where the forms that serve all are too slow to win, parallel scans refuse packed batches."""
    serial = default_config("scan", PROBLEM)
    parallel = serial.replace(segments="parallel")
    means = {parallel: 1.0, serial.replace(BV=16): ms * 1.2, serial: ms}
    draw = random.Random(0)
    drawn = [
        climb.next_to_best(means, lambda x: x not in means, PROBLEM, H200, draw)
        for _ in range(200)
    ]  # fmt: skip
    if ms > 1.3:
        assert 30 < sum(x["segments"] == "serial" for x in drawn) < 70
        near = {*space.neighbours(serial, PROBLEM, H200)}
        assert {x for x in drawn if x["segments"] == "serial"} <= near
    else:  # both forms as they come
        assert sum(x["segments"] == "serial" for x in drawn) > 70


def test_the_loser_of_two_forms_of_a_scan_is_timed_at_every_shape():
    assert space.is_hopeless("grad_key", 1.4, 1.0) and not space.is_hopeless("grad_key", 1.2, 1.0)
    assert space.is_hopeless("scan", 2.6, 1.0) and not space.is_hopeless("scan", 1.9, 1.0)


def test_unfit_kernels_are_named_with_their_figures():
    fits = Resources(128, 0, 100_000, 128, 1.0)
    assert space.why_unfit(fits, H200) is None
    spills = dataclasses.replace(fits, spill_bytes=space.MAX_SPILL_BYTES + 8)
    assert str(space.MAX_SPILL_BYTES + 8) in space.why_unfit(spills, H200)
    big = dataclasses.replace(fits, shared_bytes=H200.shared_bytes + 1)
    assert "shared memory" in space.why_unfit(big, H200)


def test_a_stored_config_of_another_time_is_left_out():
    config = default_config("scan", PROBLEM)
    assert space.stored_config("scan", dict(config)) == config
    assert space.stored_config("scan", {**config, "gone": 1}) is None
    assert space.stored_config("scan", {**config, "BT": 48}) is None


def test_occupancy_follows_the_scarcest_resource():
    lean = Resources(64, 0, 0, 128, 1.0)
    assert blocks_per_sm(lean, H200) == 8
    assert blocks_per_sm(dataclasses.replace(lean, registers=255), H200) == 2
    assert blocks_per_sm(dataclasses.replace(lean, shared_bytes=100_000), H200) == 2
    assert blocks_per_sm(dataclasses.replace(lean, shared_bytes=200_000), SMALL) == 0
    # TileLang's programs have a group of warps more, which loads
    assert blocks_per_sm(dataclasses.replace(lean, threads=256), H200) == 4
    assert blocks_per_sm(dataclasses.replace(lean, registers=16, threads=256), H200) == 8


def test_prediction_prefers_fewer_spills_and_more_warps():
    config, shape = default_config("prepare", PROBLEM), SHAPES["train4k"]
    lean = Resources(96, 0, 20_000, 128, 1.0)
    best = predicted_bytes(PROBLEM, config, shape, lean, H200)
    assert best > 0
    for worse in ({"spill_bytes": 400}, {"registers": 255}, {"shared_bytes": 200_000}):
        resources = dataclasses.replace(lean, **worse)
        assert predicted_bytes(PROBLEM, config, shape, resources, H200) > best


def test_segments_are_the_parallel_scans_alone_and_no_kernel_of_their_own():
    problem, device = Problem(), named_device("sm_90")
    serial = default_config("scan", problem)
    reason = space.why_hopeless(serial.replace(max_segments=64), problem, device)
    assert reason is not None and "parallel scans" in reason
    parallel = serial.replace(segments="parallel")
    sources = {
        render(problem, "scan", parallel.replace(max_segments=x)).source
        for x in STAGES["scan"].domains["max_segments"]
    }
    assert len(sources) == 1


def test_prediction_of_scans_knows_their_chain_of_chunks():
    """Few heads and many tokens want segments; many heads do without twice the bytes."""
    serial = default_config("scan", PROBLEM).replace(num_stages=3)
    parallel = serial.replace(segments="parallel")
    used = Resources(160, 0, 90_000, 128, 1.0)

    def cost(config, shape, resources=used):
        return predicted_bytes(PROBLEM, config, SHAPES[shape], resources, H200)

    assert cost(parallel, "long32k") < 0.7 * cost(serial, "long32k")
    assert cost(serial, "train4k") < cost(parallel, "train4k")
    assert cost(serial, "long32k") < cost(serial.replace(num_stages=1), "long32k")
    assert cost(serial, "long32k") < cost(serial.replace(num_warps=8), "long32k")
    spilled = dataclasses.replace(used, spill_bytes=200)
    assert cost(serial, "long32k") < cost(serial, "long32k", spilled)
    # the longest sequence of a packed batch decides, and has no segments
    packed = dataclasses.replace(PROBLEM, varlen=True)
    even = dataclasses.replace(SHAPES["varlen8k"], cu_seqlens=tuple(range(0, 8193, 1024)))
    long = dataclasses.replace(even, cu_seqlens=(0, *range(7168, 8193, 128), 8192))
    costs = [predicted_bytes(packed, serial, x, used, H200) for x in (even, long)]
    assert costs[0] < costs[1]
