"""The words for operands, and the glossaries that kernels have of them."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
from taken import having, of_op

from gdn2gen.codegen.render import render
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import DECODING_OPS, OPS
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.glossary import WORDS
from gdn2gen.kernels.mamba3 import MAMBA3_STAGES
from gdn2gen.kernels.mamba3_chunks import MAMBA3_CHUNK_STAGES
from gdn2gen.kernels.mamba3_reverse_scan import MAMBA3_REVERSE_STAGES
from gdn2gen.kernels.mamba3_turning_scan import TURNING_STAGES
from gdn2gen.kernels.parts import PART_STAGES
from gdn2gen.kernels.plans import stages_of
from gdn2gen.kernels.recurrent import RECURRENT
from gdn2gen.kernels.stages import EVERY_STAGE, STAGES
from gdn2gen.kernels.stream_parts import STREAM_STAGES

PLAIN = Problem()
FULL = Problem(
    gate="softplus",
    has_A_log=True,
    has_dt_bias=True,
    varlen=True,
    initial_state=True,
    final_state=True,
    state_v_first=True,
)


GUESSED = DecodingProblem(pool=True, indexed=True, speculative=True, accepted=True)


def glossary(problem: Problem, stage: str) -> dict[str, str]:
    """Lines of a kernel's docstring by the symbols that they begin with."""
    text = ast.get_docstring(
        ast.parse(render(problem, stage, default_config(stage, problem)).source)
    )
    assert text is not None
    names = {x.name for x in EVERY_STAGE[stage].operands(problem)}
    lines = [x for x in text.splitlines() if x.split() and x.split()[0] in names and "  [" in x]
    assert all(len(x) <= 100 for x in lines), max(lines, key=len)
    return {x.split()[0]: x for x in lines}


_PARTS = (
    *PART_STAGES,
    *STREAM_STAGES,
    *MAMBA3_STAGES,
    *MAMBA3_CHUNK_STAGES,
    *MAMBA3_REVERSE_STAGES,
    *TURNING_STAGES,
)


def test_there_are_words_for_operands_and_no_others() -> None:
    of_chunks = {y.name for x in STAGES.values() for y in (*x.inputs, *x.outputs)}
    of_tokens = {x.name for op in DECODING_OPS for x in RECURRENT.operands(of_op(GUESSED, op))}
    of_parts = {y.name for x in _PARTS for y in (*x.inputs, *x.outputs)}
    assert {*WORDS} == of_chunks | of_tokens | of_parts


@pytest.mark.parametrize(("op", "stage"), [(op, stage) for op in OPS for stage in stages_of(op)])
@pytest.mark.parametrize("problem", [PLAIN, FULL], ids=["plain", "full"])
def test_a_kernel_says_what_each_argument_is(problem: Problem, op: str, stage: str) -> None:
    if stage.startswith("forward"):
        problem = replace(PLAIN, K=64, V=64)
    problem = having(of_op(problem, op), stage)
    names = [x.name for x in default_config(stage, problem).operands(problem)]
    assert [*glossary(problem, stage)] == names


@pytest.mark.parametrize("op", DECODING_OPS)
def test_a_kernel_over_tokens_says_it_too(op: str) -> None:
    for problem in (GUESSED, DecodingProblem(initial_state=True, final_state=True)):
        problem = of_op(problem, op)
        names = [x.name for x in RECURRENT.operands(problem)]
        assert [*glossary(problem, "recurrent")] == names


def test_what_lines_say() -> None:
    plain, full = glossary(PLAIN, "scan"), glossary(FULL, "scan")
    assert "[NT, HV, K]" in plain["gamma_C"] and "fp32" in plain["gamma_C"]
    assert "M_seg" not in plain  # scratch of other forms
    assert "[N, HV, V, K]" in full["initial_state"]  # as the caller's tensor lies in memory
    assert glossary(FULL, "prepare")["g"].endswith("pre-activation of the log decay")
    assert glossary(PLAIN, "grad_key")["G"].endswith("dg takes its place")
