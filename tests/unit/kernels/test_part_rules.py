"""The rules by which a layer's parts have their knobs."""

from __future__ import annotations

import pytest

from gdn2gen.family.parts import ConvolutionProblem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.parts import SHORT_CONV_BACKWARD, convolution_knobs, partial_rows
from gdn2gen.kernels.validity import why_invalid

# Programs that 132 multiprocessors have room for at once: eight of two warps each.
ROUND = 8 * 132


@pytest.mark.parametrize(
    ("rows", "T", "channels", "BT", "rounds"),
    [
        (4, 4096, 6144, 376, 1.0),  # as it was measured
        (2, 4096, 12288, 376, 1.0),
        (16, 4096, 6144, 376, 4.0),
        (8, 2048, 6144, 416, 0.91),  # five runs to a row, for there are none of 376 alone
        (4, 4096, 2048, 32, 3.88),  # long runs would leave most of the GPU without any
        (64, 4096, 6144, 256, 23.27),  # so many rounds that the last one is little
    ],
)
def test_runs_of_the_backward_fill_whole_rounds(
    rows: int, T: int, channels: int, BT: int, rounds: float
) -> None:
    problem = ConvolutionProblem(dtype="bf16")
    knobs = convolution_knobs(SHORT_CONV_BACKWARD, problem, rows, T, channels, 132)
    assert knobs["BT"] == BT
    programs = partial_rows(BT, int(knobs["BR"]), rows, T) * -(-channels // int(knobs["BD"]))
    assert programs / ROUND == pytest.approx(rounds, abs=0.01)
    config = default_config(SHORT_CONV_BACKWARD.name, problem).replace(**knobs)
    assert why_invalid(config, problem, "sm_90") is None


def test_packed_and_fp32_have_runs_as_before() -> None:
    for problem in (ConvolutionProblem(dtype="fp32"), ConvolutionProblem(packed=True)):
        knobs = convolution_knobs(SHORT_CONV_BACKWARD, problem, 4, 4096, 6144, 132)
        assert knobs["BT"] in (128, 256) and "words" not in knobs
