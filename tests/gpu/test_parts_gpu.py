"""Short convolutions and the gated norm on a GPU: beside fp64, in any layout, as they compile."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import part_cases
import projection_cases
import pytest
import torch
from gpu_support import DEVICE
from part_cases import BOUNDS, Convolution, Norm, ProjectedNorm, Stream, Window

from gdn2gen import short_convolution
from gdn2gen.runtime import parts_ops

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WORDS: Final = (("words", 1), ("overlap", 1), ("read_once", 1))
STAGED: Final = (*WORDS, ("num_stages", 4), ("early", 0), ("BR", 1), ("num_warps", 1))
SPREAD: Final = (("spread", 1),)
CONVOLUTIONS: Final = {
    # runs of all lengths, and tokens that are no multiple of any
    "many": Convolution(channels=(2048, 2048, 2048), B=4, T=1031, dtype=BF16),
    "packed": Convolution(
        channels=(512, 512, 1024), lengths=(700, 0, 1, 2, 0, 3000, 297), T=4000, dtype=BF16,
        tail=True, bias=True,
    ),
    "few": Convolution(channels=(264,), B=1, T=5, tail=True, dtype=FP16, width=3),
    "fp32": Convolution(B=2, T=517, channels=(128, 24), bias=True, width=2),
    "loads when they are wanted": Convolution(
        channels=(512, 256), T=517, dtype=BF16,
        knobs=(("early", 0), ("ahead", 4), ("BD", 256), ("read_once", 1)),
    ),
    "one turn": Convolution(
        channels=(512,), T=517, dtype=BF16, knobs=(("early", 0), ("ahead", 16), ("BT", 16))
    ),
    "views": Convolution(
        channels=(256, 256, 512), B=2, T=300, dtype=BF16, weight_dtype=FP32, views=True
    ),
    "words": Convolution(
        channels=(2048, 2048, 2048), B=4, T=1031, dtype=BF16,
        backward=(*WORDS, ("maxnreg", 128), ("prefetch", 1)),
    ),
    "words, packed": Convolution(
        channels=(512, 512, 1024), lengths=(700, 0, 1, 2, 0, 3000, 297), T=4000, dtype=BF16,
        tail=True, bias=True, backward=(*WORDS, ("ahead", 2), ("BT", 64), ("prefetch", 4)),
    ),
    "words of views": Convolution(
        channels=(256, 256, 512), width=3, B=2, T=300, dtype=FP16, views=True,
        backward=(*WORDS, ("BR", 2), ("num_warps", 2), ("BT", 40)),
    ),
    "words, half as many channels": Convolution(
        channels=(264,), width=2, B=3, T=500, dtype=BF16, bias=True, tail=True,
        backward=(*WORDS, ("BD", 64), ("ahead", 8), ("early", 0), ("prefetch", 2)),
    ),
    "staged": Convolution(
        channels=(2048, 2048, 2048), B=4, T=1031, dtype=BF16,
        backward=(*STAGED, ("BT", 296), ("maxnreg", 96)),
    ),
    "staged, tails of views": Convolution(
        channels=(256, 264, 512), width=3, B=2, T=321, dtype=FP16, views=True, tail=True, bias=True,
        backward=(*STAGED, ("BT", 64), ("BD", 256), ("num_warps", 2), ("num_stages", 5)),
    ),
    "staged, turns of eight": Convolution(
        channels=(264,), width=2, B=3, T=512, dtype=BF16, weight_dtype=FP32,
        backward=(*STAGED, ("BT", 128), ("ahead", 8), ("num_stages", 3)),
    ),
}  # fmt: skip
NORMS: Final = {
    "many": Norm(rows=(4, 1031, 16), dtype=BF16),
    "few": Norm(rows=(3,), size=256, activation="sigmoid", dtype=FP16),
    "wide": Norm(rows=(2, 500), size=512, dtype=BF16, weight_dtype=FP32),
    "odd": Norm(rows=(2, 777), size=96, eps=0.1),
    "loads early": Norm(rows=(2, 777), dtype=BF16, knobs=(("early", 1), ("BT", 4), ("BR", 8))),
    "loads when they are wanted": Norm(
        rows=(777,), dtype=BF16, knobs=(("early", 0), ("BT", 16), ("read_once", 1))
    ),
    "words": Norm(rows=(4, 1031, 16), dtype=BF16, backward=(*WORDS, ("BR", 8), ("BT", 31))),
    "words, spread": Norm(
        rows=(4, 1031, 16), dtype=BF16, activation="sigmoid", backward=(*WORDS, *SPREAD)
    ),
    "words of fp16, spread": Norm(
        rows=(2, 777), size=96, dtype=FP16, backward=(*WORDS, *SPREAD, ("early", 0))
    ),
    "staged": Norm(rows=(4, 1031, 16), dtype=BF16, backward=(*STAGED, ("BR", 4), ("BT", 31))),
    "staged, spread": Norm(
        rows=(2, 777), size=96, dtype=FP16, activation="sigmoid",
        backward=(*STAGED, *SPREAD, ("BR", 16), ("num_warps", 4), ("num_stages", 3)),
    ),
    "spread": Norm(rows=(2, 777), backward=SPREAD),
}  # fmt: skip
PROJECTED: Final = {
    "by the rule": ProjectedNorm(tokens=4133, heads=16, size=128, rank=128, dtype=BF16),
    "turns": ProjectedNorm(
        tokens=4133, heads=3, size=128, rank=64, dtype=FP16, activation="silu", bias=False,
        knobs=(("turns", 4), ("num_stages", 2)),
    ),
    "small": ProjectedNorm(
        tokens=5, size=32, dtype=BF16, knobs=(("BM", 32), ("turns", 2), ("num_stages", 3))
    ),
}  # fmt: skip
STREAMS: Final = {
    "many": Stream(rows=(4, 1031), size=2048, dtype=BF16),
    "many, no sum": Stream(rows=(4, 1031), size=2048, dtype=BF16, added=False),
    "few": Stream(rows=(3,), size=256, dtype=FP16),
    "a narrow stream": Stream(
        rows=(2, 500), size=1536, stream_dtype=BF16, dtype=BF16, weight_dtype=BF16
    ),
    "odd": Stream(rows=(2, 777), size=96, eps=0.1),
    "wide": Stream(rows=(300,), size=8192, dtype=BF16),
    "a token": Stream(rows=(1, 1), size=2048, stream_dtype=BF16, dtype=BF16, weight_dtype=BF16),
    "loads when they are wanted": Stream(rows=(777,), knobs=(("early", 0), ("BT", 16))),
}


WINDOWS: Final = {
    "one sequence": Window(seen=(1024,), window=2048, heads=16, size=128, dtype=BF16, knobs=()),
    "many": Window(
        seen=tuple(range(0, 4096, 64)), window=2048, heads=16, size=128, dtype=BF16, knobs=()
    ),
    "a large head": Window(size=256, window=300, seen=(10, 299, 300), dtype=FP16, knobs=()),
    "odd": Window(size=40, window=77, seen=(0, 76, 77, 500), knobs=()),
    "small tiles": Window(size=64, window=130, seen=(128, 129), heads=3),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    case = replace(CONVOLUTIONS[name], device=str(DEVICE))
    assert part_cases.convolve(case) < BOUNDS[case.dtype]


@pytest.mark.parametrize("name", NORMS)
def test_norm(name: str) -> None:
    case = replace(NORMS[name], device=str(DEVICE))
    assert part_cases.norm(case) < BOUNDS[case.dtype]


@pytest.mark.parametrize("name", STREAMS)
def test_stream_norm(name: str) -> None:
    case = replace(STREAMS[name], device=str(DEVICE))
    assert part_cases.stream_norm(case) < BOUNDS[case.dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("shape", "rows"), [((4, 1031, 16, 128), 1), ((3, 777, 5, 40), 3), ((1, 2, 1, 256), 1)]
)
def test_rotary(shape: tuple[int, ...], rows: int, dtype: torch.dtype) -> None:
    assert part_cases.rotary(shape, dtype, rows, str(DEVICE)) < BOUNDS[dtype]


@pytest.mark.parametrize("name", WINDOWS)
def test_a_token_over_a_window(name: str) -> None:
    case = replace(WINDOWS[name], device=str(DEVICE))
    assert part_cases.window_step(case) < BOUNDS[case.dtype]


@pytest.mark.parametrize("shape", [(1, 1, 5504), (3, 777, 72), (4, 1031, 5504)])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert part_cases.swiglu(shape, dtype, str(DEVICE)) < BOUNDS[dtype]


@pytest.mark.parametrize("name", PROJECTED)
def test_norms_that_project_their_gates(name: str) -> None:
    case = replace(PROJECTED[name], device=str(DEVICE))
    assert part_cases.projected_norm(case) < BOUNDS[case.dtype]


@pytest.mark.parametrize("shape", [(1, 8), (777, 264), (4 * 1031, 2048)])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_what_a_sigmoid_hands_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert part_cases.sigmoid_backward(*shape, dtype, str(DEVICE)) < BOUNDS[dtype]


def test_steps() -> None:
    for N in (1, 5, 300):
        case = Convolution(T=1, B=N, channels=(2048, 2048, 4096), dtype=BF16, tail=True)
        part_cases.step(replace(case, device=str(DEVICE)))


def test_no_length_leads_out_of_the_batch() -> None:
    part_cases.bad_lengths(str(DEVICE))


def test_calls_like_one_before() -> None:
    assert part_cases.known(str(DEVICE)) >= 11


@pytest.mark.parametrize("together", [False, True])
def test_projections_before_a_convolution(together: bool) -> None:
    assert projection_cases.convolved(str(DEVICE), together) == 4


def test_layouts_have_the_same_bits() -> None:
    """Rows, packed rows, and pieces of rows, each in kernels of its own."""
    case = Convolution(channels=(512, 256), B=3, T=200, dtype=BF16, device=str(DEVICE))
    given = case.inputs()
    whole, _ = short_convolution(**given)
    flat = [part.flatten(0, 1)[None] for part in given["x"]]
    lengths = torch.tensor([0, 200, 400, 600], device=DEVICE)
    packed, _ = short_convolution(flat, given["weight"], cu_seqlens=lengths)
    start = [part[:, :77] for part in given["x"]]
    first, tail = short_convolution(start, given["weight"], output_final_tail=True)
    rest = [part[:, 77:] for part in given["x"]]
    second, _ = short_convolution(rest, given["weight"], tail=tail)
    for i, wanted in enumerate(whole):
        assert torch.equal(packed[i].view_as(wanted), wanted)
        assert torch.equal(torch.cat((first[i], second[i]), 1), wanted)


def test_as_torch_sees_them() -> None:
    x = torch.randn(1, 9, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(16, 4, device=DEVICE, requires_grad=True)
    lengths = torch.tensor([0, 4, 9], device=DEVICE)
    torch.library.opcheck(parts_ops.CONVOLVE, ([x], [weight], [], [], lengths, False))
    scale = torch.randn(16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(parts_ops.NORM, (x, x.detach().clone(), scale, 1e-5, "silu"))
