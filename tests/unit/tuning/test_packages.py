"""Packages at head dims that were never tuned: found, compiled, checked, written."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gdn2gen
from gdn2gen.base import outcome
from gdn2gen.base.device import named_device
from gdn2gen.base.errors import BuildError, InputError, TuneError, UnsupportedError
from gdn2gen.base.outcome import Outcome
from gdn2gen.cli import program
from gdn2gen.codegen.build import Resources
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import CheckResult
from gdn2gen.store.dispatch import Found
from gdn2gen.store.sizes import find_recipe_of_any_size, transferred
from gdn2gen.tuning import packages
from gdn2gen.workflows import generate as generating

H200 = named_device("H200")
ODD = Problem(K=96, V=192)
USED = Resources(registers=128, spill_bytes=8, shared_bytes=65536, threads=128, seconds=1.0)
WIDE = replace(USED, shared_bytes=300_000)


class Backend:
    """Compiles by what it is told of a config, and finds every result right, or none."""

    def __init__(self, built: Callable[[Config], Outcome[Resources]], right: bool = True) -> None:
        self.built, self.right = built, right
        self.checked: list[Recipe] = []
        self.closed = False

    def compile(self, problem: Problem, config: Config) -> Future[Outcome[Resources]]:
        future: Future[Outcome[Resources]] = Future()
        future.set_result(self.built(config))
        return future

    def interpret(self, recipe: Recipe) -> Outcome[CheckResult]:
        self.checked.append(recipe)
        return Outcome(outcome.OK, CheckResult(self.right, {"dq": 3e-6, "o": 1e-6}, "dq is off"))

    def close(self) -> None:
        self.closed = True


def prove(backend: Backend, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> packages.Proof:
    monkeypatch.setattr(packages, "ProcessBackend", lambda device: backend)
    try:
        return packages.prove(recipe, H200, present=False)
    finally:
        assert backend.closed


def fits(config: Config) -> Outcome[Resources]:
    return Outcome(outcome.OK, USED)


def test_the_nearest_head_dims_give_their_recipe_as_transferred() -> None:
    """Of the packaged entries; the same as a call's where the head dims themselves were tuned."""
    regime = SHAPES["train4k"].regime
    found = find_recipe_of_any_size(ODD, regime, H200)
    assert found.source == "transferred" and found.recipe.problem == ODD
    assert "K=192 V=192, with tiles that fit, and not timed" in found.why
    assert not packages.is_proven(found)
    tuned = find_recipe_of_any_size(Problem(), regime, H200)
    assert tuned.source == "exact" and packages.is_proven(tuned)
    other = transferred(Problem(), regime, H200)
    assert other is not None and other.source == "transferred" and "K=160 V=160" in other.why
    # usual sizes run what a call does
    known = find_recipe_of_any_size(replace(ODD, K=64, V=128), regime, H200)
    assert known.source == "default" and packages.is_proven(known)
    nothing = find_recipe_of_any_size(ODD, regime, named_device("sm_80"))
    assert nothing.source == "default" and not packages.is_proven(nothing)


def test_a_stage_that_does_not_fit_runs_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Recipe.default(ODD).with_config(
        default_config("scan", ODD).replace(num_stages=4),
        default_config("grad_key", ODD).replace(num_warps=8),
    )

    def built(config: Config) -> Outcome[Resources]:
        if config == wanted["scan"]:
            return Outcome(outcome.OK, WIDE)
        if config == wanted["grad_key"]:
            return Outcome(outcome.BUILD_ERROR, detail="a compiler's words")
        return fits(config)

    backend = Backend(built)
    proof = prove(backend, wanted, monkeypatch)
    assert proof.recipe == Recipe.default(ODD) and backend.checked == [proof.recipe]
    assert {*proof.resources} == {*proof.recipe.plan.stages}
    assert "300000 bytes of shared memory" in proof.instead["scan"]
    assert "a compiler's words" in proof.instead["grad_key"]
    assert "worst dq, off by 3.0e-06" in proof.words and "scan runs the default" in proof.words


def test_where_a_default_does_not_fit_the_first_beside_it_that_does_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in fp32, where grad_key's spills more than is let onto a GPU at every head dim."""
    recipe = Recipe.default(replace(ODD, K=48, V=48, dtype="fp32"), arch=H200.arch)
    default = recipe["grad_key"]
    tried: list[Config] = []

    def built(config: Config) -> Outcome[Resources]:
        if config.stage != "grad_key":
            return fits(config)
        tried.append(config)
        small = config["num_warps"] == 8
        return Outcome(outcome.OK, replace(USED, spill_bytes=264 if small else 1048))

    backend = Backend(built)
    proof = prove(backend, recipe, monkeypatch)
    assert proof.recipe["grad_key"] == default.replace(num_warps=8)
    assert backend.checked == [proof.recipe]
    assert tried[0] == default and len(tried) == len({*tried})
    assert "spills 1048 bytes" in proof.instead["grad_key"]


def test_where_all_spill_the_one_that_does_so_least_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the scan of fp32 at 256 channels for sm_120, which a call would run at its default."""
    recipe = Recipe.default(replace(ODD, K=256, V=512, dtype="fp32"), arch=H200.arch)
    default = recipe["scan"]

    def built(config: Config) -> Outcome[Resources]:
        if config.stage != "scan":
            return fits(config)
        if config["num_warps"] == 2:  # the least spills, but not in the memory that there is
            return Outcome(outcome.OK, replace(WIDE, spill_bytes=600))
        spills = 700 if config["num_warps"] == 8 else 952
        return Outcome(outcome.OK, replace(USED, spill_bytes=spills))

    proof = prove(Backend(built), recipe, monkeypatch)
    assert proof.recipe["scan"] == default.replace(num_warps=8)
    assert proof.resources["scan"].spill_bytes == 700
    assert "at most 65536 bytes of shared memory and 700 spilled a thread" in proof.words


def test_what_neither_compiles_nor_is_right_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.default(ODD)
    with pytest.raises(
        BuildError,
        match=r"the default prepare \[.*does not fit NVIDIA H200.*300000.*generate --tune",
    ):
        prove(Backend(lambda config: Outcome(outcome.OK, WIDE)), recipe, monkeypatch)
    with pytest.raises(TuneError, match=r"nothing was written: .*dq is off"):
        prove(Backend(fits, right=False), recipe, monkeypatch)


def test_the_interpreter_checks_a_default_for_what_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = Problem(V=64)
    tuned = default_config("scan", problem).replace(language="tilelang", num_stages=3)
    backend = Backend(fits)
    proof = prove(backend, Recipe.default(problem).with_config(tuned), monkeypatch)
    assert proof.recipe["scan"] == tuned
    assert backend.checked == [Recipe.default(problem)]
    assert "Triton's interpreter in fp32 (not scan, in TileLang)" in proof.words


def test_a_package_of_a_new_size_is_compiled_and_checked(tmp_path: Path) -> None:
    said: list[str] = []
    # of a member with the fewest and least kernels
    made = gdn2gen.generate(
        tmp_path / "odd", op="simple_gla", head_dim=24, value_dim=16, target="sm_90",
        say=said.append,
    )  # fmt: skip
    assert {x.name for x in made.files} >= {"__init__.py", "prepare.py", "grad_key.py"}
    assert made.proof is not None and max(made.proof.errors.values()) < 1e-4
    assert made.found.recipe == made.proof.recipe and "checking in Triton's interpreter" in said
    assert "K=24 V=16" in (tmp_path / "odd/prepare.py").read_text()


def test_one_that_ran_before_is_written_at_once(tmp_path: Path) -> None:
    made = gdn2gen.generate(tmp_path / "known", head_dim=64, language="triton", target="H200")
    assert made.proof is None and made.found.source == "exact"
    with pytest.raises(UnsupportedError, match="use 96 or 104"):
        gdn2gen.generate(tmp_path / "other", head_dim=100)
    assert not (tmp_path / "other").exists()


def test_one_that_is_tuned_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the words of the package; a folder of others is refused before minutes are spent."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(generating, "tune", lambda x, **given: asked.append({"at": x, **given}))
    words: dict[str, Any] = {"head_dim": 64, "language": "triton", "target": "H200"}
    words |= {"tune_minutes": 3.0, "initial_state": True, "shape": "train2k", "level": "fast"}
    made = gdn2gen.generate(tmp_path / "tuned", **words)
    assert isinstance(made.found, Found) and made.found.recipe.problem.initial_state
    usual = {"op": "gdn2", "value_dim": None, "dtype": "bf16", "decay": "weak"}
    given = {"head_dim": 64, "target": "H200", "initial_state": True, "levels": "fast"}
    assert asked == [{"at": SHAPES["train2k"], "budget_minutes": 3.0, **usual, **given}]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"did not write"):
        gdn2gen.generate(tmp_path, **words)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [({"language": "tilelang"}, "language='triton'"), ({"shape": "train4k,few8k"}, "one shape")],
)
def test_what_no_package_is_made_for(given: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        gdn2gen.generate(tmp_path / "x", **given)  # type: ignore[arg-type]


def test_a_folder_of_others_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(packages, "prove", lambda *_, **__: pytest.fail("it was compiled"))
    with pytest.raises(InputError, match=r"did not write \(notes.txt\)"):
        gdn2gen.generate(tmp_path, head_dim=96)
    assert [x.name for x in tmp_path.iterdir()] == ["notes.txt"]


def test_two_ways_to_say_v_that_differ(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["generate", "--head-dim", "64,32", "--value-dim", "64", "--out", str(tmp_path / "x")]
    assert program.main(words) == program.EXIT_USAGE
    assert "two values of V" in capsys.readouterr().err
