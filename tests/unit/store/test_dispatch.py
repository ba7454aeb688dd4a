"""dispatch.py: the look-up order, and that nothing doubtful is used in silence."""

from __future__ import annotations

import dataclasses
import pickle
import threading
import time
import warnings

import pytest
import torch
from tilelang_configs import tilelang_config

from gdn2gen.base import paths
from gdn2gen.base.device import named_device
from gdn2gen.base.errors import DispatchError, TunedFileWarning, UnsupportedError
from gdn2gen.codegen import render
from gdn2gen.family.problem import USUAL_DIMS, Problem, Regime
from gdn2gen.family.registry import OPS, RECURRENCES, recurrence_named
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.plans import PLANS, filed_levels, plan_named, plans_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.store import dispatch
from gdn2gen.store._claims import always_checked
from gdn2gen.store.dispatch import Found, explain_recipe, find_recipe, forced_recipe
from gdn2gen.store.tuned_files import (
    Entry,
    TunedFile,
    merge_entries,
    metadata_for,
    tuned_path,
    write_tuned,
)

H200 = named_device("H200")
PROBLEM = Problem()
REGIME = Regime(16384, 4, 16)


@pytest.fixture(autouse=True)
def house(monkeypatch, tmp_path):
    """Empty folders of the user and of the package, templates of known digests, no GPU asked."""

    def asked(*_):
        raise AssertionError("a GPU was queried")

    for name in ("is_available", "current_device", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, asked)
    monkeypatch.setattr(render, "template_digest", lambda config: f"d-{config.stage}")
    monkeypatch.setattr(paths, "packaged_tuned_dir", lambda: tmp_path / "packaged")
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "user"))
    monkeypatch.delenv("GDN2GEN_STRICT", raising=False)


@pytest.fixture
def user(tmp_path):
    return tmp_path / "user"


@pytest.fixture
def packaged(tmp_path):
    return tmp_path / "packaged"


def make_entry(regime=REGIME, *, mark=4, problem=PROBLEM, plan="lean", **changes):
    """An entry that is told by `mark`, the num_stages of its scan."""
    stages = plan_named(plan).stages
    configs = {stage: default_config(stage, problem) for stage in stages}
    configs["scan"] = configs["scan"].replace(num_stages=mark)
    entry = Entry(
        problem_key=problem.key,
        regime_key=regime.key,
        level=plan,
        plan=plan,
        configs=configs,
        templates={stage: f"d-{stage}" for stage in stages},
        measured={"forward_ms": 1.0, "forward_backward_ms": 2.0},
        gate=dict.fromkeys(always_checked("gdn2"), 1e-5),
        provenance="measured",
    )
    return dataclasses.replace(entry, **changes)


def file_in(folder, *entries, device=H200):
    path = tuned_path(folder, "gdn2", device)
    write_tuned(path, TunedFile(metadata_for(device, {}, "test", "2026"), entries))
    return path


def mark_of(found):
    return found.recipe["scan"]["num_stages"]


def find(problem=PROBLEM, regime=REGIME, device=H200, **options):
    return find_recipe(problem, regime, device, **options)


@pytest.mark.parametrize("plan", [x for x in RECURRENCES["gdn2"].plans if not PLANS[x].instead])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_default_is_valid_for_every_problem(plan, dtype):
    for K in USUAL_DIMS:
        for V in USUAL_DIMS:
            problem = Problem(K=K, V=V, dtype=dtype)
            recipe = Recipe.default(problem, plan)
            assert [x.stage for x in recipe.configs] == [*recipe.plan.stages]
            assert all(why_invalid(x, problem) is None for x in recipe.configs)
    with pytest.raises(DispatchError, match=r"unknown plan 'clever'"):
        Recipe.default(PROBLEM, "clever")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_that_does_not_serve_the_op_is_refused(op, plan):
    problem, serving = Problem(op=op), Recipe.default(Problem(op=op))
    served = recurrence_named(op).plans
    if plan in served:
        assert Recipe.default(problem, plan).plan.name == plan
        return
    said = f"plan '{plan}' does not serve {op}; use one that does: {', '.join(served)}"
    with pytest.raises(UnsupportedError, match=said):
        Recipe.default(problem, plan)
    with pytest.raises(UnsupportedError, match=said):
        Recipe.of(problem, plan, serving.by_stage)


def test_nothing_tuned_gives_the_default(user, packaged):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find()
        fast = find(level="fast")
    assert found.recipe == Recipe.default(PROBLEM)
    assert found.source == "default"
    assert (found.file, found.stale) == (None, False)
    for part in (str(user), str(packaged), "NVIDIA H200", "K=128"):
        assert part in found.why
    assert fast.recipe.plan is plan_named("fast")


def test_the_default_is_meant_for_the_architecture():
    """Three Tritons spill up to 888 bytes in scans of 64 rows where those go to tensor memory."""
    blackwell = find(device=named_device("B200"))
    assert blackwell.source == "default"
    assert blackwell.recipe == Recipe.default(PROBLEM, arch="sm_100")
    moved = {x.stage for x in find().recipe.configs if x != blackwell.recipe[x.stage]}
    assert moved == {"scan", "rescan", "reverse_scan"}


def test_exact_before_all(user, packaged):
    near = Regime(16384, 4, 32)
    file_in(user, make_entry(near, mark=2))
    path = file_in(packaged, make_entry(mark=3), make_entry(near, mark=1))
    found = find()
    assert (found.source, mark_of(found), found.file) == ("exact", 3, str(path))
    assert (found.regime, found.device) == (REGIME, H200)


def _for_large(language, regime=REGIME):
    """An entry of programs over four chunks, and a parallel scan."""
    entry = make_entry(regime)
    tiled = {
        "language": "tilelang",
        "chunks": 4,
        "num_warps": 4,
        "solve": "halves",
        "maxnreg": 80,
        "BK": 128,
    }
    changed = {"scan": {"language": language, "segments": "parallel", "max_segments": 64}}
    if language == "tilelang":
        changed["prepare"] = tiled
    return make_entry(
        regime,
        configs=entry.configs | {x: entry.configs[x].replace(**y) for x, y in changed.items()},
    )


@pytest.mark.parametrize("language", ["triton", "tilelang"])
def test_few_chunks_have_a_program_each_and_no_segments(user, language):
    """From an entry of other sizes; what is saved has the segments that the entry says."""
    entry = _for_large(language)
    file_in(user, entry)

    def chosen(*regime):
        found = find(regime=Regime(*regime))
        for stage, config in entry.configs.items():
            assert stage in ("prepare", "scan") or found.recipe[stage] == config
        assert found.saved_segments == 64
        assert found.recipe["scan"]["language"] == language
        assert (found.agreed_segments is None) == ("so few" not in found.why)
        return found.recipe["prepare"]["chunks"], found.recipe["scan"]["segments"]

    many = entry.configs["prepare"]["chunks"]
    assert chosen(16, 1, 16) == chosen(1024, 1, 16) == (1, "serial")
    # 528 programs are too many; 33 chunks are two segments
    assert chosen(1056, 1, 16) == (many, "parallel")
    assert chosen(1024, 1, 17) == (many, "serial")
    assert chosen(1056, 1, 8) == (1, "parallel")
    # of many sequences
    assert chosen(64 * 32, 64, 4) == (1, "parallel")
    assert chosen(16384, 4, 16) == chosen(8192, 1, 16) == (many, "parallel")


def test_few_chunks_of_an_entry_that_cuts_its_merges_have_no_segments(user):
    """A knob of parallel scans alone, with which no serial one is valid."""
    entry = _for_large("tilelang")
    scan = entry.configs["scan"].replace(merge="cut")
    assert scan["segments"] == "parallel"
    file_in(user, make_entry(REGIME, configs=entry.configs | {"scan": scan}))
    few, many = (find(regime=Regime(x, 1, 16)).recipe["scan"] for x in (64, 8192))
    assert (few["segments"], few.get("merge")) == ("serial", None)
    assert (many["segments"], many.get("merge")) == ("parallel", "cut")


def test_launches_of_few_chunks_overlap_where_a_gpu_has_such(user):
    """In the forward alone, and `explain` says so."""
    for device, overlaps in ((H200, True), (named_device("A100"), False)):
        file_in(user, _for_large("triton"), device=device)
        found = find(regime=Regime(64, 1, 16), device=device)
        forward = {x: found.recipe[x].get("pdl") for x in found.recipe.plan.forward}
        expected = {"prepare": "signal", "scan": "wait"} if overlaps else {}
        assert {x: y for x, y in forward.items() if y} == expected
        assert not any("pdl" in found.recipe[x] for x in found.recipe.plan.backward)
        assert ("launches of the forward overlap" in found.why) == overlaps
        assert "so few chunks" in explain_recipe(found)


def test_what_was_measured_at_few_chunks_stays(user):
    file_in(user, _for_large("triton", Regime(64, 1, 16)))
    found = find(regime=Regime(64, 1, 16))
    assert (found.source, found.recipe["scan"]["segments"]) == ("exact", "parallel")
    assert find(regime=Regime(32, 1, 16)).recipe["scan"]["segments"] == "serial"


def test_few_chunks_are_none_of_a_batch_that_may_not_count(user, monkeypatch):
    monkeypatch.setenv("GDN2GEN_BATCH_INVARIANT", "1")
    file_in(user, _for_large("triton"))
    few, many = (find(regime=Regime(x, 1, 16)).recipe for x in (64, 65536))
    assert few == many


def test_user_before_packaged(user, packaged, monkeypatch):
    file_in(packaged, make_entry(mark=3))
    assert mark_of(find()) == 3
    file_in(user, make_entry(mark=2))
    assert mark_of(find()) == 2
    monkeypatch.delenv("GDN2GEN_TUNED_DIR")
    assert mark_of(find()) == 3


def test_flags_that_only_add_arguments_are_exact(user):
    file_in(user, make_entry())
    problem = Problem(varlen=True, initial_state=True, final_state=True, state_v_first=True)
    found = find(problem)
    assert (found.source, found.recipe.problem) == ("exact", problem)


def test_nearest_regime(user, packaged):
    path = file_in(user, make_entry(Regime(1024, 1, 16), mark=1), make_entry(mark=2))
    found = find(regime=Regime(12000, 3, 16))
    assert (found.source, mark_of(found), found.file) == ("nearest", 2, str(path))
    assert "tokens=16384" in found.why
    assert "nearest to tokens=12000 sequences=3 heads=16" in found.why
    assert mark_of(find(regime=Regime(1025, 1, 16))) == 1
    # nearer in the package than in the user's folder
    file_in(packaged, make_entry(Regime(12000, 4, 16), mark=3))
    assert mark_of(find(regime=Regime(12000, 3, 16))) == 3


def test_empty_regimes_are_served(user):
    file_in(user, make_entry(Regime(1, 1, 16)))
    assert find(regime=Regime(0, 0, 16)).source == "nearest"


@pytest.mark.parametrize(
    "other",
    [Problem(K=64), Problem(V=64), Problem(dtype="fp16"), Problem(dtype="fp32")],
)
def test_head_dims_and_dtype_are_never_fuzzy(user, other):
    file_in(user, make_entry(problem=other))
    file_in(user, make_entry(problem=other), device=named_device("H100"))
    assert find().source == "default"


def test_head_dims_that_are_tiled_alike_serve(user):
    """104 has the tiles of 128, masked; what is narrower serves nothing wider."""
    file_in(user, make_entry(mark=2), make_entry(problem=Problem(K=96, V=96), mark=3))
    for K, V, mark in ((104, 128, 2), (120, 112, 2), (80, 80, 3), (96, 88, 3)):
        found = find(Problem(K=K, V=V))
        assert (found.source, mark_of(found)) == ("nearest", mark)
        assert (found.recipe.problem.K, found.recipe.problem.V) == (K, V)
    for K, V in ((96, 128), (136, 128), (128, 64), (64, 64)):
        assert find(Problem(K=K, V=V)).source == "default"


def test_minor_flags_serve_after_the_same_flags(user):
    far = Regime(1024, 1, 2)
    plain = Problem(l2norm=False, gate_dtype="bf16")
    sigmoid = Problem(gate="sigmoid")
    file_in(user, make_entry(problem=plain, mark=1), make_entry(problem=sigmoid, mark=2))
    found = find()
    assert (found.source, mark_of(found)) == ("nearest", 2)
    assert "the call has gate=none, which moves the speed only a little" in found.why
    file_in(user, make_entry(problem=sigmoid, mark=2), make_entry(far, mark=3))
    assert mark_of(find()) == 3
    softplus = find(Problem(gate="softplus", has_A_log=True))
    assert softplus.source == "nearest"
    assert softplus.recipe.problem.has_A_log


@pytest.fixture
def in_tilelang(monkeypatch):
    """The configs of an entry some of whose stages are in TileLang."""
    configs = {**make_entry(mark=2).configs}
    for stage in ("scan", "rescan"):
        configs[stage] = configs[stage].replace(language="tilelang")
    return configs


def test_what_needs_triton_alone_serves_where_nothing_else_compiles(user, in_tilelang, monkeypatch):
    times = {"forward_ms": 0.5, "forward_backward_ms": 1.0}
    fast = make_entry(configs=in_tilelang, measured=times)
    file_in(user, fast, make_entry(mark=3))
    assert find().recipe["scan"] == in_tilelang["scan"]
    monkeypatch.setattr(dispatch, "_only_triton_compiles", lambda: True)
    found = find()
    assert (found.source, mark_of(found)) == ("exact", 3)
    assert "neither nvcc nor NVRTC was found" in explain_recipe(found)
    # one for another size, too, rather than defaults in place of the stages in TileLang
    file_in(user, fast, make_entry(Regime(16384, 4, 32), mark=1))
    assert (find().source, mark_of(find())) == ("nearest", 1)
    file_in(user, fast)
    found = find()
    assert found.source == "exact"
    assert "no entry needs Triton alone: scan, rescan run Triton's default" in found.why


def test_what_stands_in_for_tilelang_serves_after_what_is_in_it(user):
    """Blocks in TileLang take no packed sequences. Their stand-in in Triton does; but another
    size's recipe in TileLang is faster (2.09 and 1.42 ms at train4k on an H200)."""
    blocks = make_entry(plan="blocks2", level="lean", mark=2)
    serves_less = {**blocks.configs, "grad_blocks2": tilelang_config("grad_blocks2", PROBLEM)}
    times = {"forward_ms": 0.5, "forward_backward_ms": 1.0}
    fast = dataclasses.replace(blocks, configs=serves_less, measured=times)
    scan = make_entry(mark=3).configs["scan"].replace(language="tilelang")
    other = make_entry(Regime(16384, 8, 16), configs={**make_entry().configs, "scan": scan})
    packed = Problem(varlen=True)
    file_in(user, fast, blocks, other)
    assert find().recipe["grad_blocks2"] == serves_less["grad_blocks2"]
    found = find(packed)
    assert (found.source, found.recipe["scan"]) == ("nearest", scan)
    file_in(user, fast, blocks)  # better than a default
    assert (find(packed).source, mark_of(find(packed))) == ("nearest", 2)


@pytest.fixture
def sized():
    """Three entries of a size: the fastest refuses options, a slower one in TileLang serves all,
    and so does one in Triton alone."""
    blocks = make_entry(plan="blocks2", level="lean", mark=2)
    few = {**blocks.configs, "grad_blocks2": tilelang_config("grad_blocks2", PROBLEM)}
    scan = make_entry(mark=3).configs["scan"].replace(language="tilelang", num_stages=3)

    def timed(entry, ms):
        return dataclasses.replace(entry, measured={"forward_ms": 0.5, "forward_backward_ms": ms})

    narrow = timed(dataclasses.replace(blocks, configs=few), 1.0)
    wide = timed(make_entry(configs={**make_entry().configs, "scan": scan}), 1.4)
    return narrow, wide, timed(make_entry(mark=1), 2.0)


PACKED = Problem(varlen=True)
GATED = Problem(gate="softplus", has_A_log=True)


@pytest.mark.parametrize("order", [1, -1])
def test_calls_with_options_find_what_serves_them_all_at_their_size(user, sized, order):
    """Before whatever other sizes have, and before what needs Triton alone; it is exact."""
    narrow, wide, alone = sized
    other = dataclasses.replace(wide, regime_key=Regime(16384, 8, 16).key)
    file_in(user, *(narrow, wide, alone, other)[::order])
    assert find(strict=True).recipe.configs == (*narrow.configs.values(),)
    found = find(PACKED, strict=True)
    assert (found.source, found.recipe.by_stage) == ("exact", wide.configs)
    assert found.recipe.problem.varlen
    assert f"the entry [{narrow.label}] does not serve the call: grad_blocks2" in found.why
    assert "packed sequences are in Triton's forms alone" in found.why
    gated = find(GATED)  # of another gate nothing is exact
    assert (gated.source, gated.recipe.by_stage) == ("nearest", wide.configs)
    near = find(PACKED, Regime(16384, 5, 16))  # by distance first
    assert (near.source, near.recipe.by_stage) == ("nearest", wide.configs)
    assert near.recipe.by_stage == find(PACKED, Regime(16384, 8, 16)).recipe.by_stage
    plain = find(regime=Regime(16384, 5, 16))
    assert plain.recipe.by_stage == narrow.configs


def test_what_serves_every_option_steps_in_for_what_is_stale(user, sized):
    narrow, wide, alone = sized
    stale = dataclasses.replace(narrow, templates={})
    file_in(user, stale, wide, alone)
    found = find()
    assert (found.source, found.stale, found.recipe.by_stage) == ("exact", True, wide.configs)


def test_where_nothing_compiles_tilelang_options_are_served_in_triton(user, sized, monkeypatch):
    narrow, wide, alone = sized
    parallel = alone.configs["scan"].replace(segments="parallel")
    times = {"forward_ms": 0.5, "forward_backward_ms": 1.9}
    faster = dataclasses.replace(alone, configs={**alone.configs, "scan": parallel}, measured=times)
    file_in(user, narrow, wide, alone, faster)
    monkeypatch.setattr(dispatch, "_only_triton_compiles", lambda: True)
    assert find().recipe["scan"] == parallel
    assert find(PACKED).recipe.by_stage == alone.configs
    assert find(PACKED).source == "exact"


def test_a_users_file_comes_before_the_packaged_one_for_either_call(user, packaged, sized):
    narrow, wide, _ = sized
    scan = wide.configs["scan"].replace(num_stages=2)
    mine = dataclasses.replace(wide, configs={**wide.configs, "scan": scan})
    file_in(packaged, narrow, wide)
    file_in(user, mine)  # all that the user has there
    assert find().recipe["scan"] == find(PACKED).recipe["scan"] == scan
    file_in(user, narrow, mine)
    assert find().recipe.by_stage == narrow.configs
    assert find(PACKED).recipe["scan"] == scan
    # of the user's file what is left is slower than the packaged best
    file_in(user, dataclasses.replace(narrow, templates={}), mine)
    assert find().recipe.by_stage == narrow.configs


def test_states_on_the_way_are_kept_by_a_scan_of_its_own(user, sized):
    _, wide, alone = sized
    whole = make_entry(level="lean")
    recipe = Recipe.default(PROBLEM, "whole")
    whole = dataclasses.replace(
        whole,
        plan="whole",
        configs=recipe.by_stage,
        templates={x: f"d-{x}" for x in recipe.plan.stages},
        measured={"forward_ms": 0.5, "forward_backward_ms": 1.0},
    )
    file_in(user, whole, wide, alone)
    assert find().recipe.plan.name == "whole"
    found = find(scan_apart=True)
    assert found.recipe.by_stage == wide.configs
    assert "plan whole has no scan of its own" in found.why
    file_in(user, whole)
    assert find(scan_apart=True).source == "default"


@pytest.mark.parametrize("gpu", ["A100", "H200"])
def test_launches_that_no_gpu_of_the_kind_has_are_refused_in_words(user, gpu):
    """ptxas would say that it knows no such instruction."""
    device = named_device(gpu)
    recipe = Recipe.default(PROBLEM).dependent("sm_90")
    file_in(user, make_entry(mark=1), device=device)
    wanted = make_entry(configs=recipe.by_stage, measured={"forward_backward_ms": 1.0})
    file_in(user, wanted, device=device)
    with forced_recipe(recipe):
        if gpu == "H200":
            assert find(device=device).recipe == recipe
        else:
            words = r"forced recipe cannot run on NVIDIA A100.*pdl=.*sm_80 has no launches"
            with pytest.raises(DispatchError, match=words):
                find(device=device)
            with pytest.raises(DispatchError, match=words):
                find(PACKED, device=device)
        with forced_recipe(recipe.independent()):
            assert find(device=device).recipe == recipe.independent()
    found = find(device=device)
    assert found.source == ("exact" if gpu == "H200" else "default")
    assert ("cannot run there: pdl=" in found.why) == (gpu == "A100")


@pytest.mark.parametrize("initialized", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
def test_compilers_matter_to_a_process_with_a_gpu(initialized, compiles, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(dispatch, "has_compiler", lambda: compiles)
    assert dispatch._only_triton_compiles() == (initialized and not compiles)


def test_levels_are_apart(user):
    file_in(user, make_entry(plan="fast", mark=2))
    assert find().source == "default"
    assert mark_of(find(level="fast")) == 2
    with pytest.raises(DispatchError, match=r"level must be one of .*'huge'"):
        find(level="huge")


def test_transferred_from_the_nearest_gpu_of_the_arch(user, packaged):
    file_in(user, make_entry(mark=1), device=named_device("H100 PCIe"))
    file_in(packaged, make_entry(mark=2), device=named_device("H100"))
    file_in(packaged, make_entry(mark=3), device=named_device("B200"))
    found = find()
    assert (found.source, mark_of(found)) == ("transferred", 2)
    assert "NVIDIA H100 80GB HBM3" in found.why
    assert "nothing was measured on NVIDIA H200 itself" in found.why
    assert mark_of(find(device=named_device("sm_100"))) == 3
    assert find(device=named_device("A100")).source == "default"
    # anything measured on the GPU itself comes first, even with other flags
    file_in(user, make_entry(Regime(64, 1, 1), problem=Problem(l2norm=False), mark=1))
    assert (find().source, mark_of(find())) == ("nearest", 1)


def test_stored_provenance_is_kept(user, packaged):
    file_in(user, make_entry(mark=1, measured={}, provenance="predicted"))
    assert (find().source, mark_of(find())) == ("predicted", 1)
    assert "never timed" in find().why
    file_in(packaged, make_entry(mark=2), device=named_device("H100"))
    assert (find().source, mark_of(find())) == ("transferred", 2)
    file_in(packaged, make_entry(mark=3, provenance="transferred"))
    assert (find().source, mark_of(find())) == ("transferred", 3)
    file_in(packaged, make_entry(Regime(1, 1, 1), mark=4))
    assert (find().source, mark_of(find())) == ("nearest", 4)


def test_strict_refuses_all_but_exact(user, monkeypatch):
    with pytest.raises(DispatchError, match=r"'default'.*gdn2gen tune.*GDN2GEN_STRICT"):
        find(strict=True)
    file_in(user, make_entry(Regime(1, 1, 1)))
    monkeypatch.setenv("GDN2GEN_STRICT", "1")
    with pytest.raises(DispatchError, match="'nearest'"):
        find()
    assert find(strict=False).source == "nearest"
    monkeypatch.setenv("GDN2GEN_STRICT", "0")
    assert find().source == "nearest"
    file_in(user, make_entry())
    assert find(strict=True).source == "exact"


def test_stale_entries_are_passed_over(user):
    stale = make_entry(templates={**make_entry().templates, "scan": "older"})
    path = file_in(user, stale)
    found = find()
    assert (found.source, found.stale) == ("default", True)
    assert f"passed over the stale entry [{stale.label}] of {path}" in found.why
    assert "templates of scan changed" in found.why
    assert "stale" in explain_recipe(found)
    with pytest.raises(DispatchError, match="stale"):
        find(strict=True)
    file_in(user, stale, make_entry(Regime(1, 1, 1), mark=2))
    assert (find().source, find().stale, mark_of(find())) == ("nearest", True, 2)
    file_in(user, make_entry(mark=3), dataclasses.replace(stale, regime_key=Regime(1, 1, 1).key))
    assert (find().source, find().stale) == ("exact", False)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: text[: len(text) // 2], "truncated"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "schema is 99"),
        (lambda text: text.replace("NVIDIA H200", "NVIDIA H20"), "is of the GPU 'NVIDIA H20'"),
    ],
)
def test_an_unusable_file_gives_a_warning_and_the_default(user, spoil, reason):
    path = file_in(user, make_entry())
    path.write_text(spoil(path.read_text()))
    before = path.read_bytes()
    with pytest.warns(TunedFileWarning) as caught:
        found = find()
    assert len(caught) == 1
    for text in (str(caught[0].message), found.why):
        assert str(path) in text
        assert reason in text
    assert found.recipe == Recipe.default(PROBLEM)
    assert path.read_bytes() == before
    # once for each state of the file, not once for each call
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find(regime=Regime(7, 1, 1))


def test_an_unusable_file_of_the_user_leaves_the_packaged_one(user, packaged):
    file_in(packaged, make_entry(mark=2))
    path = file_in(user, make_entry(mark=3))
    path.write_text("{")
    with pytest.warns(TunedFileWarning):
        found = find()
    assert (found.source, mark_of(found)) == ("exact", 2)
    assert str(path) in found.why


def test_a_broken_file_of_another_gpu_is_not_read_in_vain(user):
    file_in(user, make_entry())
    (user / "gdn2" / "nvidia-h100-pcie.json").write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find().source == "exact"
    with pytest.warns(TunedFileWarning, match="nvidia-h100-pcie"):
        assert find(Problem(K=64)).source == "default"


def test_entries_that_cannot_be_used_are_named(user):
    path = file_in(user, make_entry(Regime(1, 1, 1), mark=2), make_entry(mark=4))
    path.write_text(path.read_text().replace('"num_stages": 4', '"num_stages": 40'))
    with pytest.warns(TunedFileWarning, match=r"entry 1 .* is skipped: scan.num_stages"):
        found = find()
    assert (found.source, mark_of(found)) == ("nearest", 2)


def test_a_file_is_read_once_until_this_process_writes_or_asks(user):
    path = file_in(user, make_entry(mark=1))
    assert mark_of(find()) == 1
    metadata = metadata_for(H200, {}, "test", "2026")
    merge_entries(path, metadata, [make_entry(mark=2, measured={"forward_backward_ms": 1.0})])
    assert mark_of(find()) == 2
    path.unlink()  # as another process would
    assert mark_of(find()) == 2
    assert mark_of(find(regime=Regime(1, 1, 1))) == 2
    dispatch.reload()
    assert find().source == "default"
    file_in(user, make_entry(mark=3), device=named_device("H100"))
    assert find().source == "transferred"


def test_the_hot_path_takes_microseconds(user):
    file_in(user, make_entry())
    first = find()
    calls, best = 500, float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(calls):
            assert find() is first
        best = min(best, (time.perf_counter() - started) / calls)
    assert best < 200e-6, f"{best * 1e6:.1f} us for each call"


def test_forced(user, monkeypatch):
    file_in(user, make_entry())
    forced = Recipe.default(PROBLEM, "fast")
    monkeypatch.setenv("GDN2GEN_STRICT", "1")
    seen = []
    with forced_recipe(forced) as given:
        assert given is forced
        assert find().recipe is forced
        with forced_recipe(Recipe.default(PROBLEM)):
            assert find().recipe.plan.name == "lean"
        assert find().recipe is forced
        other = find(Problem(final_state=True))
        assert other.recipe == dataclasses.replace(forced, problem=Problem(final_state=True))
        assert other.source == "forced"
        thread = threading.Thread(target=lambda: seen.append(find()))
        thread.start()
        thread.join()
    assert seen[0].source == "exact"
    assert find().source == "exact"
    with pytest.raises(ZeroDivisionError), forced_recipe(forced):
        1 / 0  # noqa: B018
    assert find().source == "exact"


def test_forced_recipe_that_does_not_fit(user):
    default = Recipe.default(PROBLEM)
    forced = default.with_config(default["scan"].replace(BV=128))
    with forced_recipe(forced), pytest.raises(DispatchError, match=r"V=128 .*V=64 .*BV=128"):
        find(Problem(V=64))


def test_recipes_that_run_the_same_are_equal(user):
    file_in(user, make_entry())
    near, exact = find(regime=Regime(3, 1, 1)), find()
    assert near.why != exact.why
    assert near == exact
    assert hash(near) == hash(exact)
    assert near != Recipe.default(PROBLEM)
    copied = pickle.loads(pickle.dumps(exact))
    assert copied == exact
    assert copied.why == exact.why


def test_explain(user):
    path = file_in(user, make_entry())
    text = explain_recipe(find(Problem(varlen=True)))
    for part in (
        "gdn2 K=128 V=128 dtype=bf16 gate_dtype=fp32 l2norm=True gate=none + varlen",
        "tokens=16384 sequences=4 heads=16",
        "NVIDIA H200 (sm_90, 132 SMs)",
        "plan      lean",
        "reverse_scan  BT=32",
        "num_stages=4",
        "source    exact",
        str(path),
        "why ",
    ):
        assert part in text
    assert max(map(len, text.splitlines()[:-2])) <= 100
    assert "regime" not in explain_recipe(Found(Recipe.default(PROBLEM), "default", ""))


def test_recipe_is_frozen_and_crosses_process_borders():
    recipe = Recipe.default(PROBLEM)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.configs = ()
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert {recipe: 1}[Recipe.of(PROBLEM, "lean", recipe.by_stage)] == 1


@pytest.mark.parametrize("filed", ["lean", "fast"])
@pytest.mark.parametrize("asked", ["lean", "fast"])
def test_an_entry_of_the_only_plan_serves_both_levels(user, filed, asked):
    """Mamba-2's, which keeps no more at level fast: it is tuned once."""
    problem = Problem(op="mamba2", gate="softplus")
    recipe = Recipe.default(problem, "grouped")
    scan = recipe["scan_group"].replace(num_stages=3)
    entry = dataclasses.replace(
        make_entry(),
        problem_key=problem.key,
        level=filed,
        plan="grouped",
        configs=recipe.by_stage | {"scan_group": scan},
        templates={stage: f"d-{stage}" for stage in recipe.by_stage},
        gate=dict.fromkeys(always_checked("mamba2"), 1e-5),
    )
    path = tuned_path(user, "mamba2", H200)
    write_tuned(path, TunedFile(metadata_for(H200, {}, "test", "2026"), [entry]))
    found = find(problem, level=asked, strict=True)
    assert found.source == "exact" and found.recipe["scan_group"] == scan
    with pytest.raises(DispatchError, match="level must be one of"):
        find(problem, level="brisk")


@pytest.mark.parametrize("op", OPS)
def test_only_levels_of_the_same_plans_are_one(op):
    one = plans_of("lean", op) == plans_of("fast", op)
    assert filed_levels(("fast", "lean"), op) == (("lean",) if one else ("fast", "lean"))
    assert one == (op == "mamba2")


def test_an_entry_may_choose_a_forward_in_one_kernel_and_others_serve_what_it_does_not(user):
    """Packed sequences and a gate in the kernels take the plan of an entry that serves them."""
    configs = {x: default_config(x, PROBLEM) for x in PLANS["whole"].stages}
    whole = make_entry(
        plan="lean",
        configs=configs,
        templates={x: f"d-{x}" for x in configs},
        measured={"forward_ms": 0.5, "forward_backward_ms": 1.0},
    )
    whole = dataclasses.replace(whole, plan="whole")
    file_in(user, whole, make_entry(mark=3))
    found = find()
    assert (found.source, found.recipe.plan.name) == ("exact", "whole")
    assert "cluster" not in found.why and "plan      whole" in explain_recipe(found)
    for problem in (Problem(varlen=True), Problem(gate="softplus", has_A_log=True)):
        assert (find(problem).recipe.plan.name, mark_of(find(problem))) == ("lean", 3)
    assert find(level="fast").source == "default"
