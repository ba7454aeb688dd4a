"""mamba3_siso_combined on a GPU at a model's sizes: beside fp64, and beside mamba_ssm's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from gpu_support import DEVICE
from mamba3_checks import arguments, check_compiled, check_steps, draw, results

import gdn2gen
from gdn2gen import mamba3_siso_combined
from gdn2gen.base.device import present_device
from gdn2gen.base.environment import verifying
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.family.tolerances import LIMITS
from gdn2gen.measure.accuracy import relative_errors
from gdn2gen.measure.mamba3_cases import MAMBA3_CASES, Mamba3Case
from gdn2gen.measure.mamba3_rows import bench_mamba3
from gdn2gen.measure.mamba3_runs import (
    mamba3_inputs,
    mamba3_results,
    run_mamba3_case,
)
from gdn2gen.runtime import mamba3_reverse_scan, mamba3_turning_scan
from gdn2gen.runtime.mamba3_chunk_ops import chunks_forced
from gdn2gen.runtime.mamba3_loaded import force, force_scan
from gdn2gen.runtime.mamba3_reverse_scan import force_reverse_scan
from gdn2gen.runtime.mamba3_turning_scan import force_turning_scan
from gdn2gen.runtime.passes import poisoned
from gdn2gen.store.dispatch import reload
from gdn2gen.store.mamba3 import find_mamba3
from gdn2gen.tuning.mamba3 import tune_mamba3
from gdn2gen.tuning.views.progress import Progress

pytestmark = pytest.mark.gpu

BOUNDS: Final = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
LAYER: Final[dict[str, Any]] = {
    "sizes": (8, 64, 128), "groups": 1, "angles": 32, "T": 517, "D": True, "Z": True,
}  # fmt: skip
CASES: Final[dict[str, dict[str, Any]]] = {
    "layer": LAYER | {"states": True},
    "packed": LAYER | {"cu_seqlens": (0, 0, 1, 130, 131, 517), "states": True},
    "strong": LAYER | {"decay": 60.0},
    "groups": {"sizes": (6, 96, 64), "groups": 3, "angles": 7, "T": 200, "states": True},
}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    made = draw(CASES[name], dtype, str(DEVICE))
    with poisoned():
        mine, theirs = results(made)
    found, bounds = relative_errors(mine, theirs), dict.fromkeys(theirs, BOUNDS[dtype])
    # no more than the others, though they are sums over all later tokens: 4e-3 after 700 in bf16
    bounds |= dict.fromkeys({"dAngles", "dDT"} & {*bounds}, BOUNDS[dtype] / 3)
    assert not {x: y for x, y in found.items() if not y < bounds[x]}, found


def test_steps_are_the_whole() -> None:
    for sizes in ({"sizes": (8, 64, 128), "angles": 32}, {"sizes": (6, 96, 80), "groups": 3}):
        check_steps(str(DEVICE), **sizes)


def test_compiled() -> None:
    for chosen in (True, False):
        with chunks_forced(chosen):
            check_compiled(str(DEVICE))


def test_the_same_bits_twice_and_before_later_tokens() -> None:
    case = LAYER | {"sizes": (16, 64, 128), "T": 2048, "states": True}
    made = arguments(draw(case, torch.bfloat16, str(DEVICE)))
    first, again = (mamba3_siso_combined(**made, return_final_states=True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    for name in ("Q", "K", "V", "Angles", "Z"):
        made[name][:, 1001:] *= -3.0
    for name in ("ADT", "DT", "Trap"):
        made[name][..., 1001:] *= 2.5
    changed = mamba3_siso_combined(**made)
    assert torch.equal(first[0][:, :1001], changed[:, :1001])


FORMS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "two programs": {"mamba3_gradient": {"parts": 2}},
    "four to a multiprocessor": {"mamba3_gradient": {"maxnreg": 128}},
    "heads in a pipeline": {"mamba3_output": {"BH": 4, "maxnreg": 0, "num_stages": 2}},
}


@pytest.mark.parametrize("name", ["layer", "packed", "strong"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_no_rule_takes(form: str, name: str) -> None:
    made = draw(CASES[name], torch.bfloat16, str(DEVICE))
    for stage, knobs in FORMS[form].items():
        force(stage, dict(knobs))
    try:
        with poisoned():
            found = relative_errors(*results(made))
    finally:
        for stage in FORMS[form]:
            force(stage, None)
    assert max(found.values()) < BOUNDS[torch.bfloat16] / 3, found


SCANNED_BACK: Final[dict[str, dict[str, Any]]] = {
    "layer": LAYER | {"T": 516, "states": True},
    "strong": LAYER | {"T": 516, "decay": 60.0},
    # at every token as much: the last one writes 5e8 times what is left of all before it
    "steady": LAYER | {"T": 516, "nats": 20.0, "states": True},
    "plain": {"sizes": (6, 64, 64), "groups": 3, "angles": 7, "T": 200},
    "no angles": {"sizes": (8, 64, 128), "angles": 0, "T": 4, "states": True, "D": True},
    "all angles": {"sizes": (8, 64, 128), "angles": 64, "T": 260, "Z": True},
    # has no such form: the stages that it stands for
    "packed": CASES["packed"],
}


@contextmanager
def scanned_back(chosen: bool) -> Iterator[list[bool]]:
    """The backward's products in one stage wherever that can be, or nowhere; whether each call
    took it."""
    taken: list[bool] = []
    launches = mamba3_reverse_scan.launches_at_once

    def told(*given: Any) -> Any:
        found = launches(*given)
        taken.append(found is not None)
        return found

    force_reverse_scan(chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba3_reverse_scan, "launches_at_once", told)
        try:
            yield taken
        finally:
            force_reverse_scan(None)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "lean"])
@pytest.mark.parametrize("name", SCANNED_BACK)
def test_the_backwards_products_in_one_stage(name: str, fast: bool) -> None:
    """Every gradient beside fp64 with NaN in all that is to be written, no worse than by the
    stages that it stands for, and of the same bits twice."""
    made = draw(SCANNED_BACK[name], torch.bfloat16, str(DEVICE))
    op = partial(mamba3_siso_combined, disable_recompute=fast)
    found = {}
    for chosen in (True, False):
        with scanned_back(chosen) as taken, poisoned(), verifying():
            mine, theirs = mamba3_results(made, op)
            again, _ = mamba3_results(made, op)
        assert taken == [chosen and name != "packed"] * 2
        assert all(torch.equal(mine[x], again[x]) for x in mine), "not the same bits twice"
        found[chosen] = relative_errors(mine, theirs)
    worse = {
        x: (y, found[False][x])
        for x, y in found[True].items()
        if not y < min(1.5 * found[False][x] + 5e-4, BOUNDS[torch.bfloat16] / 3)
    }
    assert not worse, worse


BY_TOKENS = {"order": "tokens", "BH": 2}
FORMS = {
    "sums, loads ahead": ("mamba3_sums", {**BY_TOKENS, "num_warps": 4, "num_stages": 3}),
    "sums": ("mamba3_sums", {**BY_TOKENS, "num_warps": 8, "num_stages": 1}),
    "two chunks' loads": ("mamba3_scan", {"num_stages": 2}),
    "pairs once": ("mamba3_reverse_scan", {"pairs": 1}),
}


@pytest.mark.parametrize("name", ["layer", "strong", "steady", "no angles", "all angles"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_a_search_alone_picks(name: str, form: str) -> None:
    """Sums token by token, loads of two chunks, pairs made once; and of the same bits twice.

    Errors are those of other roundings: dQ_bias without angles 2.64e-3 for 2.52e-3 with pairs once.
    """
    made = draw(SCANNED_BACK[name], torch.bfloat16, str(DEVICE))
    H, G = SCANNED_BACK[name]["sizes"][0], SCANNED_BACK[name].get("groups", 1)
    stage, knobs = FORMS[form]
    knobs = {**knobs, "BG": H // G} if "order" in knobs else knobs
    op = partial(mamba3_siso_combined, disable_recompute=True)
    found = {}
    for chosen in (True, False):
        force(stage, knobs if chosen else None)
        force_scan(True)
        try:
            with scanned_back(True) as taken, poisoned(), verifying():
                mine, theirs = mamba3_results(made, op)
                again, _ = mamba3_results(made, op)
        finally:
            force_scan(None)
            force(stage, None)
        assert taken == [True] * 2
        assert all(torch.equal(mine[x], again[x]) for x in mine), "not the same bits twice"
        found[chosen] = relative_errors(mine, theirs)
    worse = {
        x: (y, found[False][x])
        for x, y in found[True].items()
        if not y < min(1.1 * found[False][x] + 1e-4, BOUNDS[torch.bfloat16] / 3)
    }
    assert not worse, worse


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "lean"])
@pytest.mark.parametrize("knobs", [{}, {"ahead": 0, "maxnreg": 72}], ids=["rule", "late"])
@pytest.mark.parametrize("name", SCANNED_BACK)
def test_queries_and_keys_turned_within_the_scan(
    name: str, knobs: dict[str, int], fast: bool
) -> None:
    """Every output and gradient with NaN in all that is to be written, no worse than where they are
    turned before, and of the same bits twice."""
    made = draw(SCANNED_BACK[name], torch.bfloat16, str(DEVICE))
    op = partial(mamba3_siso_combined, disable_recompute=fast)
    found = {}
    for chosen in (True, False):
        force("mamba3_turning_scan", {**knobs})
        force_turning_scan(chosen)
        force_scan(True)
        try:
            with turned_within() as taken, poisoned(), verifying():
                mine, theirs = mamba3_results(made, op)
                again, _ = mamba3_results(made, op)
        finally:
            force_scan(None)
            force_turning_scan(None)
            force("mamba3_turning_scan", None)
        assert taken == [chosen and name != "packed"] * 2
        assert all(torch.equal(mine[x], again[x]) for x in mine), "not the same bits twice"
        found[chosen] = relative_errors(mine, theirs)
    worse = {
        x: (y, found[False][x])
        for x, y in found[True].items()
        if not y < min(1.1 * found[False][x] + 1e-4, BOUNDS[torch.bfloat16] / 3)
    }
    assert not worse, worse


@contextmanager
def turned_within() -> Iterator[list[bool]]:
    """Whether each forward turned queries and keys within its scan."""
    taken: list[bool] = []
    launches = mamba3_turning_scan.turning_launches

    def told(*given: Any) -> Any:
        found = launches(*given)
        taken.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba3_turning_scan, "turning_launches", told)
        yield taken


def test_over_chunks_is_as_around_a_scan() -> None:
    """Both ways in both dtypes, whatever a call takes.

    Around a scan dTheta is of dq and dk in 16 bits, and the initial angle's gradient is its sum
    over all tokens, in which pairs cancel: 4.0e-2 is left in bf16, where no call runs that.
    """
    for dtype in (torch.bfloat16, torch.float32):
        made = draw(LAYER | {"states": True}, dtype, str(DEVICE))
        for chosen in (True, False):
            with chunks_forced(chosen), poisoned():
                mine, theirs = results(made)
            found = relative_errors(mine, theirs)
            if dtype is torch.bfloat16 and not chosen:
                del found["dangle"]
            assert max(found.values()) < BOUNDS[dtype], (chosen, found)


# its autotuning takes minutes, and its times, which others on the GPU would spoil
@pytest.mark.gpu_alone
@pytest.mark.parametrize("name", ["layer", "packed", "strong"])
def test_no_worse_than_mamba_ssm(name: str) -> None:
    """Every output and gradient beside fp64. What it rounds to bfloat16 comes as such."""
    theirs = pytest.importorskip("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined")
    made = draw(CASES[name], torch.bfloat16, str(DEVICE))
    for x in ("Trap", "Angles"):
        made[x] = made[x].bfloat16()
    if "cu_seqlens" in made:
        made["cu_seqlens"] = made["cu_seqlens"].int()
        made["cu_seqlens"][1] = 1  # its kernels want tokens in every sequence
        made["cu_seqlens"][2] = 2
    ours = relative_errors(*results(made))
    peer = relative_errors(*results(made, op=theirs.mamba3_siso_combined))
    worse = {x: (ours[x], peer[x]) for x in ours if ours[x] > 1.5 * peer[x] + 1e-3}
    assert not worse, worse


SUITE = [x for x in MAMBA3_CASES if not x.interpreter]


@pytest.mark.parametrize(
    "case", [x for x in SUITE if x.name.startswith("mamba3-K128-V64")], ids=lambda x: x.name
)
def test_the_suite_at_a_models_head_dims(case: Mamba3Case) -> None:
    result = run_mamba3_case(case, "cuda")
    assert result.passed, result.message


@pytest.mark.gpu_alone
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_one_minute_tune_files_entries_that_calls_find(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "tuned"))
    problem, device = Mamba3Problem(angles=32, skip=True, gate=True, dtype=dtype), present_device()
    shape = Shape("1x1024x8/1", 1, 1024, 8, groups=1)
    report = tune_mamba3(
        problem, [shape], device,
        budget_minutes=2.0, out_dir=tmp_path / "tuned", progress=Progress(), command="test",
        levels=("fast",),
    )  # fmt: skip
    kind = "chunks" if dtype == "bf16" else "around"
    assert [x.kind for x in report.entries] == [kind, *["step"] * 4], report.skipped
    levels = {x.level for x in report.scan.results} if report.scan is not None else set()
    assert levels == (set() if dtype == "bf16" else {"fast"})
    reload()
    found = find_mamba3(problem, shape, device, level="fast")
    assert {*found.sources.values()} == {"tuned"}
    assert found.scan is None or found.scan.source != "default"
    made = mamba3_inputs(problem, shape, "layer", 0, "cuda")
    errors = relative_errors(
        *mamba3_results(made, partial(mamba3_siso_combined, disable_recompute=True))
    )
    assert max(errors.values()) < LIMITS[dtype], errors


@pytest.mark.gpu_alone
@pytest.mark.parametrize("level", ["lean", "fast"])
def test_bench_measures_both_decays_and_every_kernel(level: str) -> None:
    shape = Shape("1x1024x8/1", 1, 1024, 8, groups=1)
    (row,) = bench_mamba3([shape], 128, 64, "bf16", vs=None, stages=True, level=level)
    assert row.level == level and row.recipe.startswith("chunks (")
    assert {*row.ours.decays} == {"weak", "strong"} and len(row.stages) == 7
    assert row.ours.forward.median > row.floor_forward_ms


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_package_passes_its_own_test(dtype: str, tmp_path: Path) -> None:
    """In a process that cannot import gdn2gen."""
    package = gdn2gen.generate(
        tmp_path / "made", op="mamba3", head_dim=128, value_dim=64, dtype=dtype, shape="1x512x8/1",
        carried=True, packed=True,
    )  # fmt: skip
    assert package.files
    words = "import sys; sys.modules['gdn2gen'] = None; import runpy"
    words += "; runpy.run_module('made.test_kernels', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
