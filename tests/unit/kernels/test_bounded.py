"""The bounded placement of the decay: only where a gate's bound keeps every chunk in one frame."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tilelang_configs import tilelang_by_chunk

from gdn2gen.base import paths
from gdn2gen.base.device import named_device
from gdn2gen.base.errors import ConfigError, DispatchError, InputError, StoreError
from gdn2gen.cli import program
from gdn2gen.codegen import render
from gdn2gen.codegen.digests import templates_of
from gdn2gen.codegen.package import package_source
from gdn2gen.family.problem import Problem, Regime, bound_of
from gdn2gen.kernels.anchors import anchor_range, chunk_loss
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import CHUNKS, Place
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.measure.accuracy import lower_bound_of
from gdn2gen.runtime.lookup import make_request
from gdn2gen.store import tuned_files
from gdn2gen.store._claims import always_checked
from gdn2gen.store.dispatch import (
    Found,
    explain_recipe,
    find_recipe,
    forced_recipe,
    generate_command,
)
from gdn2gen.store.tuned_files import (
    Entry,
    TunedFile,
    merge_entries,
    metadata_for,
    read_tuned,
    tuned_path,
)
from gdn2gen.tuning import space
from gdn2gen.tuning.records.ledger import Ledger

H200 = named_device("H200")
REGIME = Regime(16384, 4, 16)
STAGES = ("prepare", "grad_key")
SIGMOID = Problem(gate="sigmoid")
BOUND_2 = replace(SIGMOID, bound=2)


def bounded(stage: str, problem: Problem, BT: int = 32) -> Config:
    """What is the default in bf16, with the bounded placement."""
    config = default_config(stage, replace(problem, dtype="bf16"), BT=BT)
    return config.replace(**{"decay": "bounded", **({"BV": problem.V} if "BV" in config else {})})


# The bound


@pytest.mark.parametrize(
    ("lower_bound", "nats"), [(-5, 5), (-2.0, 2), (-2.001, 3), (-1e-30, 1), (-0.5, 1)]
)
def test_a_lower_bound_is_covered_by_whole_nats(lower_bound: float, nats: int) -> None:
    assert bound_of(lower_bound) == nats
    assert lower_bound_of(replace(SIGMOID, bound=nats)) == -nats
    sizes = torch.Size((1, 64, 2, 128))
    for in_kernel, expected in ((True, nats), (False, 0)):
        request = make_request(
            *("gdn2", (sizes,) * 3, (torch.bfloat16, torch.float32, torch.bfloat16)),
            *(torch.device("cpu"), (False, False, False), None, 1.0),
            *(lower_bound, True, in_kernel, False, False),
        )
        assert request.problem.bound == expected
        assert request.call.lower_bound == lower_bound


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bound": 2}, "only the sigmoid gate has a bound.*gate='none'"),
        ({"bound": 2, "gate": "softplus", "has_A_log": True}, "gate='softplus'"),
        ({"bound": 6, "gate": "sigmoid"}, "0 to 5 nats, but got 6"),
        ({"bound": -1, "gate": "sigmoid"}, "but got -1"),
        ({"bound": 1.5, "gate": "sigmoid"}, "but got 1.5"),
    ],
)
def test_a_bound_that_no_gate_enforces_is_refused(
    changes: Mapping[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        replace(Problem(), **changes)  # type: ignore[arg-type]


# Validity


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("problem", "BT", "message"),
    [
        (Problem(), 32, "gate=sigmoid, but got gate=none: use decay=anchored"),
        (Problem(gate="softplus", has_A_log=True), 16, "but got gate=softplus"),
        (SIGMOID, 16, r"none is known \(bound=0\): give it .*--lower-bound"),
        (replace(SIGMOID, bound=3), 32, "32 tokens of at most 3 nats .* 2\\^-139.*smaller BT"),
        (replace(SIGMOID, bound=5), 16, "2\\^-116"),
        (replace(SIGMOID, bound=2), 64, "2\\^-185"),
        (replace(SIGMOID, bound=2, l2norm=False), 32, "no more than 2\\^-64"),
        (replace(BOUND_2, dtype="fp16"), 32, "bounded factors .* fp16"),
    ],
)
def test_refused_where_a_chunk_may_leave_the_frame(
    stage: str, problem: Problem, BT: int, message: str
) -> None:
    reason = why_invalid(bounded(stage, problem, BT), problem)
    assert reason is not None and re.search(message, reason), reason
    with pytest.raises(ConfigError, match=message):
        render.render(problem, stage, bounded(stage, problem, BT))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("BT", CHUNKS)
@pytest.mark.parametrize("l2norm", [True, False])
def test_taken_up_to_the_bound_that_fits(stage: str, BT: int, l2norm: bool) -> None:
    largest = {16: 4, 32: 2, 64: 1} if l2norm else {16: 2, 32: 1, 64: 0}
    for bound in range(1, 6):
        problem = replace(SIGMOID, bound=bound, l2norm=l2norm)
        taken = why_invalid(bounded(stage, problem, BT), problem) is None
        assert taken == (bound <= largest[BT])
        assert taken == (chunk_loss(problem, BT) <= anchor_range(problem, stage))
        anchored = bounded(stage, problem, BT).replace(decay="anchored")
        assert why_invalid(anchored, problem) is None


# What is rendered


@pytest.mark.parametrize("language", ["triton", "tilelang"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("varlen", [True, False])
def test_what_only_later_frames_need_is_gone(stage: str, language: str, varlen: bool) -> None:
    """Every name that the module defines is read, and none of the second pass is left."""
    problem = replace(BOUND_2, has_A_log=True, has_dt_bias=True, varlen=varlen)
    config = bounded(stage, problem)
    if language == "tilelang":
        config = tilelang_by_chunk(stage, problem).replace(decay="bounded")
    source = render.render(problem, stage, config).source
    for word in ("RANGE", "LEAST", "next_frame", "later_frames", "strong_decay", "m_frame"):
        assert word not in source, word
    tree = ast.parse(source)
    defined = {x.name for x in tree.body if isinstance(x, ast.FunctionDef)} - {"launch"}
    for x in tree.body:
        if isinstance(x, ast.Assign):
            defined |= {y.id for y in ast.walk(x) if isinstance(y, ast.Name)}
    # read by `gdn2gen.codegen.build`
    defined -= {"tl", "PASSES"}
    names = [x for x in ast.walk(tree) if isinstance(x, ast.Name)]
    read = {x.id for x in names if isinstance(x.ctx, ast.Load)}
    assert defined <= read, defined - read
    words = " ".join(source.split())
    assert "gate's bound makes" in words and "2^-93 over a chunk" in words
    assert render.template_digest(config) == render.template_digest(
        config.replace(decay="anchored")
    )


@pytest.mark.parametrize("stage", PLANS["lean"].stages)
def test_other_kernels_do_not_depend_on_the_bound(stage: str) -> None:
    config = default_config(stage, SIGMOID)
    assert default_config(stage, BOUND_2) == config
    sources = {render.render(x, stage, config) for x in (SIGMOID, BOUND_2)}
    assert len(sources) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_in_a_kernel_regenerates_it(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = render.render(BOUND_2, stage, bounded(stage, BOUND_2)).source
    (command,) = re.findall(r"gdn2gen (generate [^\\\n]*(?:\\\n[^\\\n]*)*)", source)
    assert "--lower-bound -2" in command
    assert program.main(shlex.split(command.replace("\\\n", " "))) == 0
    assert capsys.readouterr().out == source


def test_a_lower_bound_on_the_command_line_needs_its_gate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["generate", "--stage", "prepare", "--lower-bound"]
    assert program.main([*words, "-2"]) != 0
    assert "--lower-bound is of --gate sigmoid, but got --gate none" in capsys.readouterr().err
    assert program.main([*words, "-6", "--gate", "sigmoid"]) != 0
    assert "-5 <= lower_bound < 0" in capsys.readouterr().err


def recipe_of(problem: Problem, *, one_frame: bool = True) -> Recipe:
    recipe = Recipe.default(problem)
    if not one_frame:
        return recipe
    return recipe.with_config(*(bounded(x, problem) for x in STAGES))


def _package(recipe: Recipe) -> str:
    return package_source(recipe, generate_command(Found(recipe, "default", "")))


def test_a_package_refuses_calls_below_the_bound_of_its_kernels() -> None:
    source = _package(recipe_of(BOUND_2))
    assert "not -2.0 <= lower_bound < 0.0" in source
    assert "lower_bound in [-2, 0)" in source
    assert "--lower-bound -2" in " ".join(source.split())
    for problem in (SIGMOID, BOUND_2):
        source = _package(recipe_of(problem, one_frame=False))
        assert "not -5.0 <= lower_bound < 0.0" in source


# Files


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(paths, "packaged_tuned_dir", lambda: tmp_path / "packaged")
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "user"))
    monkeypatch.delenv("GDN2GEN_STRICT", raising=False)
    return tmp_path / "user"


def entry_of(problem: Problem, *, one_frame: bool) -> Entry:
    recipe = recipe_of(problem, one_frame=one_frame)
    return Entry(
        problem_key=problem.key,
        regime_key=REGIME.key,
        level="lean",
        plan="lean",
        configs=recipe.by_stage,
        templates=templates_of(recipe),
        measured={"forward_ms": 1.0, "forward_backward_ms": 2.0},
        gate=dict.fromkeys(always_checked("gdn2"), 4e-3),
        provenance="measured",
    )


def file_in(folder: Path, *entries: Entry) -> Path:
    path = tuned_path(folder, "gdn2", H200)
    merge_entries(path, metadata_for(H200, {}, "test"), entries)
    return path


def test_a_key_has_the_bound_only_where_it_is_known() -> None:
    assert "bound" not in SIGMOID.key and "bound" not in Problem().key
    assert BOUND_2.key == {**SIGMOID.key, "bound": 2}
    assert "bound" not in SIGMOID.document and BOUND_2.document["bound"] == 2
    assert Problem(**BOUND_2.document) == BOUND_2


def test_an_entry_under_a_bound_survives_the_file(tmp_path: Path) -> None:
    entries = [entry_of(BOUND_2, one_frame=True), entry_of(SIGMOID, one_frame=False)]
    path = file_in(tmp_path, *entries)
    file = read_tuned(path, H200)
    assert file is not None and not file.unread
    assert {x.key for x in file.entries} == {x.key for x in entries}
    assert entries[0] in file.entries and "bound=2" in entries[0].label
    tuned_files.write_tuned(tmp_path / "again.json", file)
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    # it replaces its own kind only
    file_in(tmp_path, entry_of(replace(SIGMOID, bound=1), one_frame=True))
    merged = read_tuned(path, H200)
    assert merged is not None and len(merged.entries) == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bound": 0}, "left out where it is not known"),
        ({"bound": 4}, "cannot serve this problem"),
        ({"bound": 2.0}, "problem.bound must be of int"),
        ({"bound": 2, "gate": "none"}, "only the sigmoid gate has a bound"),
    ],
)
def test_a_key_that_does_not_permit_its_configs_is_not_filed(
    tmp_path: Path, changes: Mapping[str, int | str], reason: str
) -> None:
    entry = entry_of(BOUND_2, one_frame=True)
    entry = dataclasses.replace(entry, problem_key={**entry.problem_key, **changes})
    path = tmp_path / "x.json"
    with pytest.raises(StoreError, match=reason):
        tuned_files.write_tuned(path, TunedFile(metadata_for(H200, {}, "test"), (entry,)))


def test_an_entry_under_a_bound_serves_that_bound_alone(user: Path) -> None:
    file_in(user, entry_of(BOUND_2, one_frame=True))
    found = find_recipe(BOUND_2, REGIME, H200, strict=True)
    assert found.source == "exact"
    assert {found.recipe[x]["decay"] for x in STAGES} == {"bounded"}
    others = [replace(SIGMOID, bound=x) for x in (1, 3, 4, 5)]
    for problem in (*others, SIGMOID, Problem()):
        assert find_recipe(problem, REGIME, H200).source == "default", problem


def test_an_entry_without_a_bound_serves_every_bound(user: Path) -> None:
    file_in(user, entry_of(SIGMOID, one_frame=False))
    found = find_recipe(BOUND_2, REGIME, H200, strict=True)
    assert found.source == "exact"
    assert "the call has bound=2, which moves the speed only a little" in explain_recipe(found)
    file_in(user, entry_of(BOUND_2, one_frame=True))
    assert find_recipe(BOUND_2, REGIME, H200).recipe["prepare"]["decay"] == "bounded"
    assert find_recipe(SIGMOID, REGIME, H200).recipe["prepare"]["decay"] == "anchored"
    # of another gate, it is the nearest, as before
    assert find_recipe(Problem(), REGIME, H200).source == "nearest"


def test_a_forced_recipe_is_refused_by_a_call_with_a_lower_bound() -> None:
    with forced_recipe(recipe_of(BOUND_2)):
        problem = replace(BOUND_2, bound=1)
        assert find_recipe(problem, REGIME, H200).recipe["prepare"]["decay"] == "bounded"
        for problem in (replace(SIGMOID, bound=3), SIGMOID, Problem()):
            with pytest.raises(DispatchError, match="the bounded"):
                find_recipe(problem, REGIME, H200)


def test_the_ledger_keeps_refusals_from_before_there_were_bounds(tmp_path: Path) -> None:
    config = default_config("scan", SIGMOID)
    Ledger(tmp_path / "x", "GPU", {}).add("wrong", SIGMOID, config, "d")
    assert '"bound"' not in (tmp_path / "x").read_text()
    ledger = Ledger(tmp_path / "x", "GPU", {})
    assert ledger.why_refused(SIGMOID, config, "d") == "wrong"
    assert ledger.why_refused(BOUND_2, config, "d") is None


# The search


@pytest.mark.parametrize("stage", STAGES)
def test_searched_only_where_a_bound_is_known(stage: str) -> None:
    for problem, expected in ((Problem(), False), (SIGMOID, False), (BOUND_2, True)):
        forms = {x["decay"] for x in space.starts(stage, problem, H200, 32)}
        assert ("bounded" in forms) == expected
        begin = default_config(stage, problem, BT=32)
        asked = space.distributions(begin, Place(problem, 32, "sm_90"))["decay"]
        assert ("bounded" in asked.choices) == expected  # type: ignore[attr-defined]
    assert space.parameters(bounded(stage, SIGMOID), Place(SIGMOID, 32, "sm_90")) is None
    for BT, expected in ((32, {"triton", "tilelang"}), (64, set())):
        valid = space.valid_configs(stage, BOUND_2, H200, BT)
        assert {x["language"] for x in valid if x["decay"] == "bounded"} == expected
