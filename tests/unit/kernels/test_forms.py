"""Forms: one for every config, no combination that is refused, and the same configs as ever."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace

import pytest
from taken import having
from tilelang_configs import tilelang_config

from gdn2gen.base.device import named_device
from gdn2gen.base.paths import templates_dir
from gdn2gen.codegen.render import template_name
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, default_config, default_of, in_triton
from gdn2gen.kernels.limits import Place, Setting
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import valid_configs, why_invalid
from gdn2gen.tuning import space

PROBLEMS = (
    Problem(),
    Problem(K=64, V=32, dtype="fp16"),
    Problem(K=32, V=64, dtype="fp32"),
    Problem(gate="sigmoid", bound=2),
    Problem(varlen=True),
)
ARCHS = ("sm_90", "sm_80", "sm_120")
# Configs worth compiling, over all of these and every chunk size, and a digest of them. Another
# form, or another value of a knob, changes what a stage has here.
WORTH = {
    "prepare": (25815, "69d9d5050a4f"),
    "reprepare": (2421, "4d94c08709dc"),
    "sum_decay": (444, "bf152e6bb9bf"),
    "scan": (7930, "8789cb7387b5"),
    "scan_states": (7930, "8789cb7387b5"),
    "rescan": (1845, "e26332f8cdf4"),
    "reverse_scan": (7852, "53807c3a043f"),
    "grad_value": (6072, "245575cc52c6"),
    "grad_key": (44457, "4bd651253709"),
    "reprepare_factors": (2160, "8670be95a346"),
    "scan_blocks2": (7951, "35c5d02aae83"),
    "rescan_blocks2": (1836, "bfc2a19af419"),
    "reverse_scan_blocks2": (7729, "c193e49ae29c"),
    "grad_blocks2": (3852, "00e5df19ee0c"),
    "scan_transitions": (4150, "6b0ee59eb795"),
    "scan_blocks2_transitions": (4120, "d885d311165f"),
    "reverse_scan_blocks2_transitions": (796, "de6a8cf406f0"),
    **dict.fromkeys(("forward", "forward_blocks2"), (1, "264c47a1a45f")),
    **dict.fromkeys(("forward_outside", "forward_outside_blocks2"), (0, "e3b0c44298fc")),
    # of head dims of 64 alone
    "forward_blocks1": (0, "e3b0c44298fc"),
    # of members whose heads share scores alone
    **dict.fromkeys(
        ("prepare_group", "scan_group", "rescan_group", "reverse_scan_group", "grad_group"),
        (0, "e3b0c44298fc"),
    ),
}


# Stages of blocks of 1 and 4 chunks have the forms of those of 2.
OTHER_BLOCKS = tuple(x for x in STAGES if STAGES[x].every in (1, 4))
OWN_FORMS = tuple(x for x in STAGES if x not in OTHER_BLOCKS)
# Those that have no form in Triton, and serve some problems alone.
IN_TILELANG_ALONE = tuple(x for x in STAGES if x.startswith("forward"))


def test_blocks_of_any_size_have_the_same_forms_in_triton() -> None:
    """In TileLang scans have both of theirs, rescan its one, and gradients one for a decay inside
    of products and one for the others, but for blocks of 4."""
    for stage in OTHER_BLOCKS:
        alike = [x for x in STAGES[f"{stage[:-1]}2"].forms if x.language == "triton"]
        found = [x for x in STAGES[stage].forms if x.language == "triton"]
        assert [(x.template, x.knobs) for x in found] == [(x.template, x.knobs) for x in alike]
        others = [x.name for x in STAGES[stage].forms if x.language == "tilelang"]
        scans = ["serial", "parallel"] if STAGES[stage].is_chain else ["anchored", "outside"]
        known = {"rescan_blocks1": ["serial"], "rescan_blocks4": ["serial"], "grad_blocks4": []}
        assert others == known.get(stage, scans)


@pytest.mark.parametrize("stage", OWN_FORMS)
def test_the_same_configs_are_worth_compiling(stage: str) -> None:
    lines = []
    for problem, arch, BT in itertools.product(PROBLEMS, ARCHS, (16, 32, 64)):
        configs = space.valid_configs(stage, problem, named_device(arch), BT)
        place = f"{problem.document} {arch}"
        lines += [f"{place} {config}" for config in sorted(map(str, configs))]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    assert (len(lines), digest) == WORTH[stage]


@pytest.mark.parametrize("stage", ["grad_blocks1", "grad_blocks2"])
@pytest.mark.parametrize("op", ["gated_delta_rule", "delta_rule"])
@pytest.mark.parametrize("size", [64, 128])
def test_a_search_has_blocks_of_one_tile_in_both_languages(size: int, op: str, stage: str) -> None:
    """Where the decay is outside of products; a call without tuning takes Triton's."""
    BT = 64 // STAGES[stage].every
    problem = Problem(op, K=size, V=size)
    place, config = Place(problem, BT, "sm_90"), tilelang_config(stage, problem, BT)
    assert why_invalid(config, problem, "sm_90") is None
    tried = {x["language"] for x in valid_configs(stage, place)}
    assert tried == {*STAGES[stage].domains_at(place)["language"]} == {"triton", "tilelang"}
    assert default_config(stage, problem, BT=BT, arch="sm_90")["language"] == "triton"
    for other in (Problem(op, K=96), Problem(op, V=256)):
        assert why_invalid(config, other, "sm_90") is not None


def test_no_product_of_knobs_is_made_to_be_refused() -> None:
    """But for 60 of grad_key that no block's shared memory holds."""
    place, device = Place(Problem(), 32, "sm_90"), named_device("H200")
    made = {x: len([*valid_configs(x, place)]) for x in OWN_FORMS}
    worth = {x: len([*space.valid_configs(x, Problem(), device, 32)]) for x in OWN_FORMS}
    kept = [x for x in OWN_FORMS if x.endswith("_transitions")]
    others = [x for x in OWN_FORMS if x == "reprepare_factors" or STAGES[x].every]
    counts = [sum(made[x] for x in names) for names in ({*others} - {*kept}, kept)]
    assert counts == [885, 616]
    assert (sum(made.values()), sum(worth.values())) == (3659 + 885 + 616, 3599 + 885 + 616)
    assert {x for x in made if made[x] != worth[x]} == {"grad_key"}


@pytest.mark.parametrize(
    ("problem", "stage"),
    [
        pytest.param(
            x,
            stage,
            id=f"{x.dtype}-{stage}",
            # 2 s each: what they take in fp16 is in the digests above, and bf16 differs from fp32
            marks=[pytest.mark.slow] * (x.dtype == "fp16" and stage in ("prepare", "grad_key")),
        )
        for x in PROBLEMS[1:4]
        for stage in OWN_FORMS
    ],
)
def test_forms_take_what_validity_takes(stage: str, problem: Problem) -> None:
    """Every combination of the stage's knobs, with BT=16 on a GPU of the Ampere generation."""
    place = Place(problem, 16, "sm_80")
    domains = {**STAGES[stage].domains, "BT": (place.BT,)}
    configs = (
        Config(stage, tuple(sorted(zip(domains, values, strict=True))))
        for values in itertools.product(*domains.values())
    )
    taken = {x for x in configs if why_invalid(x, problem, place.arch) is None}
    found = [*valid_configs(stage, place)]
    assert {*found} == taken and len(found) == len(taken)


@pytest.mark.parametrize("stage", STAGES)
def test_every_form_starts_within_its_own_knobs(stage: str) -> None:
    for problem, arch, form in itertools.product(PROBLEMS, (None, *ARCHS), STAGES[stage].forms):
        problem = having(problem, stage)
        place = Place(problem, 32, arch)
        config = default_of(stage, form, place)
        assert config.form is form
        if form is STAGES[stage].default_form(place) and stage not in IN_TILELANG_ALONE:
            assert config == default_config(stage, problem, BT=32, arch=arch)
            assert why_invalid(config, problem, arch) is None


def test_every_form_has_its_template() -> None:
    for stage in STAGES.values():
        for form in stage.forms:
            assert (templates_dir() / template_name(form)).is_file()


def test_a_form_that_is_declared_wrong_is_refused_at_once() -> None:
    stage = STAGES["sum_decay"]
    form = stage.forms[0]
    with pytest.raises(ValueError, match=r"num_warps=3 is a default, but may only be one of \(1,"):
        replace(form, defaults=(Setting({"num_warps": 3}),))
    with pytest.raises(ValueError, match="forms of sum_decay have different knobs"):
        replace(stage, forms=(form, replace(form, knobs={**form.knobs, "more": (1,)})))


def test_a_config_of_no_form_is_refused_with_those_that_there_are() -> None:
    config = default_config("prepare", Problem()).replace(language="tilelang", decay="log")
    reason = why_invalid(config, Problem())
    assert reason is not None and "language=tilelang decay=log" in reason
    assert "language=tilelang decay=anchored" in reason


def test_refusals_say_what_was_given_what_is_taken_and_why() -> None:
    config = default_config("prepare", Problem()).replace(language="tilelang")
    assert why_invalid(config, Problem()) == (
        "the anchored TileLang prepare takes num_warps of 4, not 2: a warp group computes"
    )
    whole = config.replace(num_warps=4, solve="ieee")
    assert why_invalid(whole, Problem()) == (
        "the anchored TileLang prepare takes K=128 in tiles of 128, not BK=64"
    )
    reason = why_invalid(whole.replace(BK=128), Problem(dtype="fp32"))
    assert reason is not None and "dtype of bf16, fp16, not fp32" in reason


def test_a_tile_of_64_bytes_has_one_stage() -> None:
    """TMA writes to multiples of 128 bytes, and a chunk of 16 betas in fp32 is half of that."""
    form = next(x for x in STAGES["prepare"].forms if x.language == "tilelang")
    config = default_of("prepare", form, Place(Problem(op="kda"), 16))
    ahead = config.replace(num_stages=3, solve="ieee")
    reason = why_invalid(ahead, Problem(op="kda"))
    assert reason is not None and "num_stages of 1, not 3: a chunk's betas are 64 bytes" in reason
    assert why_invalid(ahead, Problem()) is None  # which loads no such tile
    assert why_invalid(ahead.replace(BT=32), Problem(op="kda")) is None


@pytest.mark.parametrize("stage", [x for x in STAGES if x not in IN_TILELANG_ALONE])
def test_what_stands_in_for_another_language_takes_the_same_operands(stage: str) -> None:
    """A call loads it for a config in TileLang where nothing compiles that, and passes these."""
    places = [
        Place(Problem(op=op, initial_state=True, final_state=True), BT)
        for op, BT in itertools.product(("gdn2", "kda"), (16, 32, 64))
    ]
    for place, form in itertools.product(places, STAGES[stage].forms):
        if form.language == "tilelang" and form.serves(place):
            config = default_of(stage, form, place)
            found = in_triton(config, place.problem)
            assert found["language"] == "triton" and found["BT"] == place.BT
            assert why_invalid(found, place.problem) is None
            assert found.operands(place.problem) == config.operands(place.problem)


@pytest.mark.parametrize(
    ("changes", "knobs", "arch", "words"),
    [
        ({"dtype": "fp16"}, {}, "sm_90", "dtype of bf16, not fp16: factors of fp16 would leave"),
        ({}, {"BT": 32}, "sm_90", "BT of 64, not 32: tokens are the 64 rows"),
        ({"K": 80}, {}, "sm_90", "K of 64, 128, not 96: other head dims were not compiled"),
        ({"V": 128}, {}, "sm_90", "V of 64, not 128: values are the 64 rows of <S, dS>"),
        (
            {},
            {"maxnreg": 0},
            "sm_80",
            "not sm_80: it was written for products of that arch's warp groups",
        ),
    ],
)
def test_groups_in_tilelang_say_what_they_do_not_serve(changes, knobs, arch, words) -> None:
    served = Problem("mamba2", V=64, gate="softplus", has_rate=True, has_D=True, has_z=True)
    form = next(x for x in STAGES["grad_group"].forms if x.language == "tilelang")
    config = default_of("grad_group", form, Place(served, 64, "sm_90"))
    for problem in (served, replace(served, varlen=True, initial_state=True, has_dt_bias=True)):
        assert why_invalid(config, problem, "sm_90") is None
    reason = why_invalid(config.replace(**knobs), replace(served, **changes), arch)
    assert reason is not None and words in reason
