"""The ledger remembers refusals for as long as nothing that they depend on changed."""

from __future__ import annotations

import json

import pytest

from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.tuning.records.ledger import Ledger, read_ledger

PROBLEM = Problem()
CONFIG = default_config("scan", PROBLEM)
TOOLS = {"triton": "3.6.0"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger" / "gpu.jsonl"


def refused(path, *, gpu="GPU", tools=TOOLS, digest="d1", problem=PROBLEM, config=CONFIG):
    return Ledger(path, gpu, tools).why_refused(problem, config, digest)


def test_a_refusal_is_remembered_with_reason_and_errors(path):
    Ledger(path, "GPU", TOOLS).add("wrong", PROBLEM, CONFIG, "d1", errors={"dg": 0.3})
    assert refused(path) == "wrong"
    (entry,) = read_ledger(path)
    assert entry.errors == {"dg": 0.3}
    assert entry.config == dict(CONFIG)
    assert entry.date


def test_a_refusal_lapses_with_digest_toolchain_gpu_problem_or_config(path):
    Ledger(path, "GPU", TOOLS).add("wrong", PROBLEM, CONFIG, "d1")
    assert refused(path, digest="d2") is None
    assert refused(path, tools={"triton": "3.9.0"}) is None
    assert refused(path, gpu="other") is None
    assert refused(path, problem=Problem(K=64)) is None
    assert refused(path, config=CONFIG.replace(num_warps=8)) is None


def test_a_torn_last_line_loses_only_itself(path):
    ledger = Ledger(path, "GPU", TOOLS)
    ledger.add("first", PROBLEM, CONFIG, "d1")
    with path.open("a") as file:
        file.write('{"reason": "torn", "stage": "sc')
    again = Ledger(path, "GPU", TOOLS)
    assert again.why_refused(PROBLEM, CONFIG, "d1") == "first"
    other = CONFIG.replace(num_warps=8)
    again.add("second", PROBLEM, other, "d1")
    assert [entry.reason for entry in read_ledger(path)] == ["first", "second"]


def test_the_same_refusal_is_filed_once(path):
    ledger = Ledger(path, "GPU", TOOLS)
    ledger.add("first", PROBLEM, CONFIG, "d1")
    ledger.add("again", PROBLEM, CONFIG, "d1")
    lines = path.read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["reason"] == "first"


def test_recipes_are_kept_apart_from_stages(path):
    ledger = Ledger(path, "GPU", TOOLS)
    recipe = Recipe.default(PROBLEM)
    ledger.add_recipe("together", recipe, "d1")
    assert ledger.why_refused(PROBLEM, CONFIG, "d1") is None
    again = Ledger(path, "GPU", TOOLS)
    assert again.why_recipe_refused(recipe, "d1") == "together"
    assert again.why_recipe_refused(Recipe.default(PROBLEM, "fast"), "d1") is None
