"""Launches that depend on programs of the ones before: what their texts say, before all else."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import pytest

from gdn2gen.base.device import named_device
from gdn2gen.base.errors import TemplateError
from gdn2gen.codegen import build
from gdn2gen.codegen._dependent import WRITTEN, dependent, launched
from gdn2gen.codegen.package import package_texts
from gdn2gen.codegen.render import render, template_digest
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.kernels.config import Config, default_config, default_of
from gdn2gen.kernels.extras import EXTRAS
from gdn2gen.kernels.limits import Place
from gdn2gen.kernels.plans import PLANS, stages_of
from gdn2gen.kernels.recipe import Recipe, is_served
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import why_invalid

WAITS: Final = ("tl.extra.cuda.gdc_wait()", "tile.pdl_sync()")
SAYS: Final = ("tl.extra.cuda.gdc_launch_dependents()", "tile.pdl_trigger()")
ARCH: Final = "sm_90"


def problem_of(op: str, varlen: bool) -> Problem:
    K, _, V = recurrence_named(op).usual.head_dims[0].partition(",")
    return Problem(op, int(K), int(V or K), varlen=varlen, initial_state=True, final_state=True)


def configs(problem: Problem, stage: str) -> list[Config]:
    """The default of every form that serves, in either language, with each value of the knob."""
    place = Place(problem, 32, ARCH)
    own = [default_of(stage, form, place) for form in STAGES[stage].forms if form.serves(place)]
    given = [x.replace(pdl=value) for x in own for value in EXTRAS["pdl"]]
    return [x for x in given if why_invalid(x, problem, ARCH) is None]


def kernels(tree: ast.Module) -> dict[str, list[str]]:
    """Statements that each kernel, or program, begins with."""
    found = {}
    for x in tree.body:
        if not isinstance(x, ast.FunctionDef):
            continue
        body: list[ast.stmt] = x.body
        if x.name.endswith("program"):
            (grid,) = (y for y in ast.walk(x) if isinstance(y, ast.With))
            body = grid.body
        elif not x.name.endswith("_kernel"):
            continue
        elif ast.get_docstring(x) is not None:
            body = body[1:]
        found[x.name] = [ast.unparse(y) for y in body]
    return found


def early(tree: ast.Module) -> tuple[str, ...]:
    for x in tree.body:
        if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "EARLY":
            names: tuple[str, ...] = ast.literal_eval(x.value)
            return names
    return ()


SLOW: Final = pytest.mark.slow
CASES: Final = (
    ("gdn2", False, ("prepare", "scan", "grad_value")),
    ("kda", True, ("prepare", "scan")),
    ("mamba2", False, PLANS["grouped"].stages),
    *(
        pytest.param(op, varlen, stages_of(op), marks=SLOW, id=f"{op}-{varlen}")
        for op in OPS
        for varlen in (False, True)
    ),
)


@pytest.mark.parametrize(("op", "varlen", "stages"), CASES)
def test_kernels_wait_before_all_else_where_their_launch_is_early(
    op: str, varlen: bool, stages: tuple[str, ...]
) -> None:
    """And in no other launch is the attribute, and no other kernel waits."""
    problem, seen = problem_of(op, varlen), 0
    for config in (x for stage in stages for x in configs(problem, stage)):
        tree = ast.parse(render(problem, config.stage, config).source)
        waiting = early(tree)
        for name, statements in kernels(tree).items():
            assert (statements[0] in WAITS) == (name in waiting), (config, name)
            says = statements[name in waiting] in SAYS
            assert says == (config["pdl"] == "signal"), (config, name)
            assert not {*WAITS, *SAYS} & {*statements[2:]}
            seen += name in waiting
        for x in launched(tree):
            options = {y.arg: ast.unparse(y.value) for y in x.call.keywords}
            in_triton = x.name.endswith("_kernel")
            assert (options.get("launch_pdl") == "True") == (in_triton and x.name in waiting)
    assert seen > 4


def directions(op: str) -> list[tuple[Recipe, tuple[str, ...]]]:
    found = []
    for varlen in (False, True):
        problem = problem_of(op, varlen)
        for plan in (x for x in recurrence_named(op).plans if is_served(x, problem, ARCH)):
            recipe = Recipe.default(problem, plan, arch=ARCH).dependent(ARCH)
            found += [(recipe, recipe.plan.forward), (recipe, recipe.plan.backward)]
    return found


@pytest.mark.parametrize(
    "op", [pytest.param(x, marks=[SLOW] * (x in ("gdn2", "gla", "kda"))) for x in OPS]
)
def test_a_pass_begins_when_all_before_it_has_ended(op: str) -> None:
    """Its first launch waits for nothing, whichever of them is the first; tables of a packed batch
    are. And its last stage says nothing to what comes next."""
    for recipe, stages in directions(op):
        problem = recipe.problem
        trees = [ast.parse(render(problem, x, recipe[x]).source) for x in stages]
        first = launched(trees[0])
        always = next(i for i, x in enumerate(first) if x.always)
        may_be_first = {x.name for x in first[: always + 1]}
        tables = problem.varlen and stages == recipe.plan.forward
        assert ({*early(trees[0])} >= may_be_first) if tables else (
            not {*early(trees[0])} & may_be_first
        )  # fmt: skip
        assert not [x for x in kernels(trees[-1]).values() if {*x[:2]} & {*SAYS}]


@pytest.mark.parametrize("op", ["gdn2", "mamba2"])
def test_without_the_knob_text_and_digest_are_what_they_were(op: str) -> None:
    problem = problem_of(op, False)
    for stage in Recipe.default(problem).plan.stages:
        config = default_config(stage, problem)
        (value,) = {x["pdl"] for x in configs(problem, stage)} - {"wait"} or {"wait"}
        on = config.replace(pdl=value)
        assert on.replace(pdl="off") == config and "pdl" not in config
        assert template_digest(on) != template_digest(config)
        without = render(problem, stage, config).source.splitlines()
        lines = render(problem, stage, on).source.splitlines()
        # header aside, nothing is gone, and nothing but this knob's came
        code = without[next(i for i, x in enumerate(without) if x == "import triton") :]
        left = iter(lines)
        assert all(x in left or "launch(" in x or "kernel[" in x for x in code)


@pytest.mark.parametrize("language", ["triton", "tilelang"])
def test_a_digest_is_of_what_is_written(language: str) -> None:
    """Of all lines that come, and of no code or comment around them."""
    problem = problem_of("gated_delta_rule", False)
    config = default_config("reverse_scan_blocks2", problem)
    config = config.replace(language=language, segments="parallel", BV=64)
    on = config.replace(pdl="signal")
    own = hashlib.sha256(f"{template_digest(config)}{WRITTEN}".encode()).hexdigest()[:16]
    assert template_digest(on) == own == template_digest(config.replace(pdl="wait"))
    plain = {*render(problem, config.stage, config).source.splitlines()}
    code = render(problem, on.stage, on).source.partition("import triton\n")[2]
    came = [x.strip() for x in code.splitlines() if x not in plain]
    assert {x[language == "tilelang"] for x in (WAITS, SAYS)} <= {*came}
    for line in came:
        said = line.partition(" = (")[0] if line.startswith("EARLY") else line
        assert said in WRITTEN or "launch_pdl=True" in said, line
    assert "launch_pdl=True" in WRITTEN


def test_refused_where_there_is_nothing_to_wait_for() -> None:
    problem = problem_of("gdn2", False)
    cases = {
        ("prepare", "wait", ARCH): "a pass begins with it",
        ("scan", "signal", ARCH): "a pass ends with it",
        ("scan", "wait", "sm_80"): "sm_80 has no launches that depend on programs",
    }
    for (stage, value, arch), words in cases.items():
        config = default_config(stage, problem).replace(pdl=value)
        reason = why_invalid(config, problem, arch)
        assert reason is not None and words in reason
    assert Recipe.default(problem).dependent("sm_80") == Recipe.default(problem)


def test_packages_have_launches_that_follow_each_other() -> None:
    recipe = Recipe.default(problem_of("gdn2", False))
    texts = [package_texts(x, "gdn2gen generate") for x in (recipe, recipe.dependent())]
    assert texts[0] == texts[1]


def test_a_text_with_a_kernel_that_is_not_found_is_refused() -> None:
    source = "def launch(x):\n    other_kernel[(1,)](\n        x,\n    )\n"
    with pytest.raises(TemplateError, match="other_kernel"):
        dependent(source, first=False, says=False)


def test_compiled_kernels_wait_before_they_touch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As launches in Triton ask for it: the attribute is one of the compiler's options."""
    compiled: list[Any] = []
    compile_it = build.compile_for_triton
    monkeypatch.setattr(
        build, "compile_for_triton", lambda *x: compiled.append(compile_it(*x)) or compiled[-1]
    )
    problem = replace(problem_of("gdn2", False), K=32, V=32)
    config = default_config("grad_value", problem, BT=16).replace(pdl="signal")
    build.compile_ahead(problem, "grad_value", config, named_device("H200"))
    (kernel,) = compiled
    assert kernel.metadata.launch_pdl is True
    text = kernel.asm["ptx"]
    memory = min(text.index(x) for x in ("ld.global", "st.global"))
    assert text.index("griddepcontrol.wait") < memory
    assert text.index("griddepcontrol.launch_dependents") < memory


@pytest.mark.parametrize(
    ("op", "plan"), [("delta_rule", "direct"), pytest.param("kda", "lean", marks=SLOW)]
)
def test_interpreted_kernels_make_the_same_bits(
    op: str, plan: str, interpreter: Callable[..., Any]
) -> None:
    assert interpreter("dependent_checks:same_bits", op, plan) == "the same"
