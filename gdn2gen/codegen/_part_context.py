"""What templates of a layer's parts are given."""

from __future__ import annotations

import math
from typing import Final

from gdn2gen.base import environment
from gdn2gen.base.dtypes import DTYPE
from gdn2gen.codegen._glossary import aligned
from gdn2gen.codegen._mamba3_context import mamba3_context, tilelang_context
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.parts import (
    ConvolutionProblem,
    DecayGateProblem,
    NormProblem,
    PartProblem,
    RotaryProblem,
    StreamNormProblem,
    WindowProblem,
)
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.kernels.glossary import WORDS
from gdn2gen.kernels.parts import suffixes
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.stage import Operand, Stage

_SUMMED: Final = ("dweight", "dbias", "dA_log", "ddt_bias")
_OF_TAILS: Final = ("x", "initial_tail", "cu_seqlens", "final_tail")


def part_context(problem: PartProblem, stage: Stage, config: Config) -> dict[str, object]:
    operands = [x.name for x in stage.operands(problem)]
    scalars = list(stage.scalars_of(problem))
    common = {
        "problem": problem,
        "config": config,
        "operands": operands,
        "scalars": scalars,
        "glossary": _glossary(problem, stage.operands(problem)),
        # a page may say in which dtype a decay comes
        "decays": False,
    }
    if language_of(config) == "tilelang":
        assert isinstance(problem, Mamba3Problem)
        return common | tilelang_context(problem, stage)
    tensors = suffixes(problem)
    units = [f"units{n}" for n in tensors]
    sized = NormProblem | StreamNormProblem | DecayGateProblem
    size = problem.size if isinstance(problem, sized) else 0
    covered = covering(size) if size else 0
    more = mamba3_context(problem, config) if isinstance(problem, Mamba3Problem) else {}
    if isinstance(problem, RotaryProblem | WindowProblem):
        # scores are multiplied so that exponentials are of 2
        scale = problem.size**-0.5 / math.log(2)
        more = {"half_covered": covering(problem.size // 2), "score_scale": scale}
    return (
        common
        | more
        | {
            # Triton's interpreter knows no assembly
            "interpreted": not environment.knows_assembly(),
            "io_dtype": _in_triton(problem.dtype),
            "stream_dtype": _in_triton(problem.dtype_of("stream"))
            if isinstance(problem, StreamNormProblem)
            else "",
            "weight_dtype": _in_triton(problem.weight_dtype),
            # what ends the names of what there is for each tensor of a launch
            "tensors": tensors,
            # channels of each tensor, in units of 8
            "units": units,
            "sizes_of_tensors": [f"{x}{n}" for x in ("units", "x_row", "dx_row") for n in tensors],
            # operands of the stage's own kernel, of the one that adds up partial sums, and of tails
            "own": [x for x in operands if _base(x) not in (*_SUMMED, "cu_seqlens", "final_tail")],
            "summed": [x for x in operands if _base(x) in _SUMMED],
            "tail_operands": [x for x in operands if _base(x) in _OF_TAILS],
            # bits of all taps of a channel, where they are a number that a kernel can read at once
            "tap_bits": _tap_bits(problem),
            "covered": covered,
            "d_inside": "o_d < D" if size != covered else "",
        }
    )


def _tap_bits(problem: PartProblem) -> int:
    if not isinstance(problem, ConvolutionProblem) or DTYPE[problem.weight_dtype].nbytes != 2:
        return 0
    return 16 * problem.width if problem.width in (2, 4) else 0


# What is otherwise in kernels of a decay's gate.
_OF_GATES: Final = {
    "x": "pre-activation of the log decay",
    "dt_bias": "added to x",
    "dg": "gradient of g",
    "dA_log": "gradient of A_log",
    "ddt_bias": "gradient of dt_bias",
}


def _glossary(problem: PartProblem, operands: list[Operand]) -> list[str]:
    words = {**WORDS, **_OF_GATES} if isinstance(problem, DecayGateProblem) else WORDS
    rows = [
        (
            x.name,
            f"[{', '.join(x.dims.split())}]",
            x.dtype_in(problem),
            words[_base(x.name)],
        )
        for x in operands
    ]
    return aligned(rows)


def _base(name: str) -> str:
    """The name of an operand without its tensor's number."""
    return name.rstrip("0123456789")


def _in_triton(dtype: str) -> str:
    return f"tl.{DTYPE[dtype].full_name}"
