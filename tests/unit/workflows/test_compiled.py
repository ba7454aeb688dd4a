"""A folder of compiled kernels, and a process that has nothing else: no compiler, no home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from source_tree import ROOT

from gdn2gen import compile_kernels
from gdn2gen.base.errors import InputError
from gdn2gen.codegen import shipped
from gdn2gen.family.prefill import PrefillProblem
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import OPS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.workflows import compiled, wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipped") / "kernels"
    compiled = compile_kernels(
        folder,
        "2x40x2",
        head_dim=32,
        target="sm_90",
        language="triton",
        backward=False,
        decode="2x1x2",
    )
    assert compiled.lacks is None, "Triton's launcher is compiled without a GPU"
    assert {x.partition(" ")[0] for x in compiled.seconds} == {"prepare", "scan", "recurrent"}
    return folder


def _first_call(folder: Path, elsewhere: Path, tokens: int, *serving: str) -> Any:
    environment = {
        "GDN2GEN_COMPILED_DIR": str(folder),
        "GDN2GEN_UNVERIFIED": "verify",
        "PATH": "/nonexistent",
        "CUDA_HOME": "/nonexistent",
        "HOME": "/dev/null/home",  # which nobody can make, root included
        "TMPDIR": str(elsewhere),  # where nothing lies from before
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests/support"))),
        "PYTHONDONTWRITEBYTECODE": "1",  # Python's own files, after a change of the sources
    }
    script = ROOT / "tests/support/first_call.py"
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::RuntimeWarning",
            str(script),
            "gdn2",
            "32",
            str(tokens),
            "2",
            *serving,
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_process_without_compiler_and_home_runs_what_ships(folder: Path, tmp_path: Path) -> None:
    """At lengths that were not named, too; and it writes nothing anywhere."""
    before = {x: x.stat().st_mtime_ns for x in folder.rglob("*")}
    found = _first_call(folder, tmp_path, tokens=333)
    assert found["source"] == "pinned" and "compiled ahead" in found["why"]
    assert found["launched"][-1] == "recurrent_kernel"
    assert {"prepare_kernel", "scan_kernel"} <= {*found["launched"]}
    assert [x for x in found["started"] if "--version" not in x] == []
    assert [*tmp_path.rglob("*.cubin")] == [] and found["written"] == []
    assert found["imported"] == []
    assert before == {x: x.stat().st_mtime_ns for x in folder.rglob("*")}


@pytest.mark.slow
def test_prefill_for_serving_runs_what_ships(tmp_path: Path) -> None:
    """States in a pool, checkpoints, and those on the way: nothing is compiled for them."""
    folder, elsewhere = tmp_path / "kernels", tmp_path / "elsewhere"
    elsewhere.mkdir()
    options: dict[str, Any] = {"head_dim": 32, "target": "sm_90", "language": "triton"}
    compile_kernels(folder, "2x40x2", **options, backward=False, serving=True, decode="2x1x2")
    found = _first_call(folder, elsewhere, 333, "serving")
    assert found["launched"].count("read_kernel") == 4 == found["launched"].count("put_back_kernel")
    assert found["launched"].count("scan_kernel") == 6
    assert [x for x in found["started"] if "--version" not in x] == []
    assert [*elsewhere.rglob("*.cubin")] == [] and found["written"] == []


@pytest.mark.parametrize("op", OPS)
def test_prefill_for_serving_ships_the_scan_that_keeps_states(op: str) -> None:
    recipe = Recipe.default(Problem(op=op, K=128, V=64))
    given = [task[1] for task in compiled._serving(recipe) if task[0] == "ship_stage"]
    keeping = [x for x in given if isinstance(x[0], PrefillProblem)]
    assert {x[1] for x in keeping} == {"scan_group" if op == "mamba2" else "scan"}
    assert len(keeping) == 6  # in the dtype of q with a pool and without; in a pool of either dtype
    for problem, stage, config in given:
        assert why_invalid(config, problem) is None, stage


def test_mamba3_is_its_scan_and_what_is_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which tasks workers are given; the folder pins the scan's recipe."""
    given: list[Any] = []

    def run(tasks: list[Any], *_: Any) -> tuple[dict[str, float], None]:
        given.extend(tasks)
        return {}, None

    monkeypatch.setattr(compiled, "_run", run)
    options: dict[str, Any] = {"op": "mamba3", "head_dim": 64, "value_dim": 32, "target": "H200"}
    own = compile_kernels(tmp_path / "own", "2x512x8/1", decode="4x1x8/1", **options)
    stages = [task[1][1] for task in given if task[0] == "ship_stage"]
    forward = ("turns", "rotate", "states", "output")
    over_chunks = (*forward, "gate", "reverse_states", "gradient", "step")
    assert stages == [f"mamba3_{x}" for x in over_chunks] and own.recipes == []
    given.clear()
    compile_kernels(tmp_path / "own-c", "2x512x8/1", backward=False, **options)
    assert [x[1][1] for x in given if x[0] == "ship_stage"] == stages[:4]
    given.clear()
    options["dtype"] = "fp32"
    found = compile_kernels(tmp_path / "a", "2x512x8/1", decode="4x1x8/1", **options)
    stages = [task[1][1] for task in given if task[0] == "ship_stage"]
    around = ("prologue", "prologue_backward", "epilogue", "epilogue_backward", "step")
    assert stages[:5] == [f"mamba3_{x}" for x in around]
    assert {"prepare", "scan", "grad_key"} <= {*stages[5:]}
    problems = {task[1][1]: task[1][0] for task in given if task[0] == "ship_stage"}
    prologue, epilogue = problems["mamba3_prologue"], problems["mamba3_epilogue"]
    assert prologue.state_size == 64 and prologue.angles == 16 and prologue.skip
    assert epilogue.head_dim == 32 and epilogue.gate and problems["mamba3_step"].carried
    assert [x.problem.op for x in found.recipes] == ["simple_gla"]
    with pytest.raises(InputError, match="serving"):
        compile_kernels(tmp_path / "b", "2x512x8/1", **options, serving=True)
    around = [x for x in given if x[0] == "ship_stage" and x[1][1].startswith("mamba3")]
    given.clear()
    both = compile_kernels(
        tmp_path / "b", "2x512x8/1", decode="4x1x8/1", levels=("lean", "fast"), **options
    )
    assert [x.plan.name for x in both.recipes] == ["linear_direct", "linear_direct_states"]
    # those around the scan have no level
    assert [x for x in given if x[0] == "ship_stage" and x[1][1].startswith("mamba3")] == around
    given.clear()
    compile_kernels(tmp_path / "c", "2x512x8/1", backward=False, **options)
    assert not any("backward" in task[1][1] for task in given if task[0] == "ship_stage")


def test_a_folder_of_another_toolchain_is_not_used_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((folder / shipped.MANIFEST).read_text())
    manifest["toolchain"]["triton"] = "2.0.0"
    (tmp_path / shipped.MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setenv("GDN2GEN_COMPILED_DIR", str(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"compiled by .*'triton': '2.0.0'.* is here"):
        assert shipped.shipped() is None
    with pytest.raises(InputError, match=r"compiled by .*2.0.0"):
        compile_kernels(tmp_path, "2x40x2", head_dim=32, target="sm_90")


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds something else than compiled kernels"):
        compile_kernels(tmp_path, "2x40x2", head_dim=32, target="sm_90")
    with pytest.raises(InputError, match="'triton', but got 'tilelang'"):
        compile_kernels(tmp_path / "new", "2x40x2", language="tilelang")
    monkeypatch.setattr(wanted, "DECODING_OPS", ("gdn2",))
    with pytest.raises(InputError, match="kda has no op over a few tokens, but decode=2x1x2"):
        compile_kernels(tmp_path / "new", (), op="kda", decode="2x1x2")
    assert [x.name for x in tmp_path.iterdir()] == ["thesis.tex"]
