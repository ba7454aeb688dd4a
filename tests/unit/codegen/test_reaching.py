"""fold of the parallel scans without what has decayed before it counts (`reach`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import python_path

from gdn2gen.codegen.render import render, template_digest, template_name
from gdn2gen.codegen.templates import text_digest
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import default_config

SUPPORT = Path(__file__).resolve().parents[2] / "support"
PROBLEM = Problem("gated_delta_rule", initial_state=True, final_state=True)
SCANS = ("scan", "scan_states", "scan_blocks2", "reverse_scan", "reverse_scan_blocks2")
KEPT = ("scan_transitions", "scan_blocks2_transitions", "reverse_scan_blocks2_transitions")


def run(*arguments: str) -> list[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": python_path()}
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "reach_checks.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_chunks_are_counted_up_to_what_nothing_is_left_of() -> None:
    assert len(run("counts")) == 8


@pytest.mark.parametrize(
    "plan",
    [
        "direct_blocks2_transitions",
        pytest.param("direct_blocks2", marks=pytest.mark.slow),
        pytest.param("direct_blocks2_states", marks=pytest.mark.slow),
    ],
)
def test_every_output_and_gradient_is_as_near_to_fp64(plan: str) -> None:
    assert len(run("passes", plan)) == 10


def test_what_has_decayed_is_not_read_for_later_segments() -> None:
    assert run("forgotten") == ["forgotten off False False", "forgotten 100 True True"]


def test_what_steps_make_longer_is_not_left_out() -> None:
    assert len(run("longer")) == 1


@pytest.mark.parametrize("language", ["triton", "tilelang"])
@pytest.mark.parametrize("stage", [*SCANS, *KEPT])
def test_nothing_but_fold_is_another_one(stage: str, language: str) -> None:
    """Every kernel after it is as it was, to the letter, but for beta among its arguments, which
    the kernel that counts reads; fold's loop is as long as is counted."""
    config = default_config(stage, PROBLEM).replace(language=language, segments="parallel", BV=64)
    plain = render(PROBLEM, stage, config).source
    found = render(PROBLEM, stage, config.replace(reach=64)).source
    compile(found, stage, "exec")
    assert max(map(len, found.splitlines())) <= max(112, *map(len, plain.splitlines()))

    def parts(source: str) -> tuple[str, str]:
        after = source.index("def merge_kernel")
        return source[source.index("def fold") : after], source[after : source.index("def launch")]

    (fold, rest), (fold_found, rest_found) = parts(plain), parts(found)
    assert rest == re.sub(r"(?m)^ +k_beta(: .*)?,\n", "", rest_found) and fold != fold_found
    assert "k_beta" not in plain and "k_beta" in found
    assert found.count("reach_kernel[") == 1 and "BITS = tl.constexpr(64)" in found
    assert found.index("reach_kernel[") < found.index("fold", found.index("    if NS > 1:\n"))
    if language == "tilelang":
        assert "tile.min(segment, n_chunks - i_s * segment), num_stages" in fold
        assert "tile.min(segment, n_chunks - i_s * segment), num_stages" not in fold_found


def test_both_knobs_of_a_scan_in_segments() -> None:
    config = default_config("scan", PROBLEM).replace(segments="parallel", reach=64)
    both = render(PROBLEM, "scan", config.replace(merge="cut", pdl="wait")).source
    assert "S_high" in both and "reach_kernel[" in both
    compile(both, "scan", "exec")


def test_both_knobs_are_in_the_template() -> None:
    """So its digest is that of configs with them, and without."""
    config = default_config("scan", PROBLEM).replace(segments="parallel")
    found = {template_digest(config.replace(**x)) for x in ({}, {"reach": 32}, {"merge": "cut"})}
    assert found == {text_digest([template_name(config.form)])}
    assert template_digest(config.replace(reach=64, pdl="wait")) not in found
