"""Short convolutions and the gated norm: kernels beside fp64; what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import part_cases
import pytest
import torch
from part_cases import BOUNDS, Convolution, Norm, ProjectedNorm, Stream, Window

from gdn2gen import gated_rms_norm, short_convolution, short_convolution_step
from gdn2gen.base.errors import InputError
from gdn2gen.ops import parts as ops

Check = Callable[..., Any]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

WORDS: Final = (("words", 1), ("overlap", 1), ("read_once", 1))
SPREAD: Final = (("spread", 1),)
# Turns on their way through shared memory, in runs of 16 tokens.
STAGED: Final = (*WORDS, ("num_stages", 4), ("early", 0))
IN_RUNS: Final = (*STAGED, ("BT", 16), ("BR", 1), ("BD", 64), ("num_warps", 1))
CONVOLUTIONS: Final = {
    "three tensors": Convolution(),
    "tails": Convolution(width=3, bias=True, tail=True, T=33),
    "fewer tokens than taps": Convolution(T=2, B=3),
    "one token": Convolution(width=2, T=1, B=3, tail=True),
    "packed": Convolution(lengths=(7, 0, 1, 2, 0, 18, 12)),
    "packed, and more": Convolution(lengths=(0, 7, 0, 1, 2, 0, 20), T=37, tail=True, bias=True),
    "views": Convolution(channels=(64, 24), dtype=BF16, tail=True, views=True, T=40),
    "fp32 weights": Convolution(channels=(136,), dtype=BF16, weight_dtype=FP32, lengths=(21, 19)),
    "fp16": Convolution(channels=(8, 16), dtype=FP16, B=1, T=35),
    "two taps": Convolution(channels=(24,), width=2, dtype=BF16, bias=True, T=18),
    "loads when they are wanted": Convolution(
        T=37, knobs=(("early", 0), ("ahead", 2), ("read_once", 1))
    ),
    "loads of part of what is after": Convolution(
        channels=(16, 8), T=37, lengths=(5, 1, 12, 19), tail=True, knobs=(("ahead", 2),)
    ),
    "one turn": Convolution(channels=(8,), T=35, knobs=(("ahead", 16), ("BT", 16))),
    "words": Convolution(channels=(136, 24), dtype=BF16, T=37, backward=WORDS),
    "words of fp16, packed": Convolution(
        channels=(64, 24, 40), dtype=FP16, lengths=(7, 0, 1, 2, 0, 18, 12), tail=True, bias=True,
        backward=(*WORDS, ("prefetch", 1)),
    ),
    "words of views": Convolution(
        channels=(64, 24), width=3, dtype=BF16, tail=True, views=True, T=40,
        backward=(*WORDS, ("ahead", 2), ("BT", 16), ("prefetch", 2)),
    ),
    "words, two taps": Convolution(
        channels=(8,), width=2, dtype=BF16, weight_dtype=FP32, bias=True, T=18,
        backward=(*WORDS, ("early", 0), ("ahead", 4), ("prefetch", 1)),
    ),
    # less is loaded ahead than comes after a run; and one number is one word
    "words, little ahead": Convolution(
        channels=(16, 8), T=37, lengths=(5, 1, 12, 19), backward=(*WORDS, ("ahead", 2))
    ),
    "words of fp32": Convolution(T=33, bias=True, tail=True, width=3, backward=WORDS),
    # runs: three, the last with 5 tokens; of views; one of 16 and one of 1; full ones; less than
    # one, with fewer tokens than are handed back; and by turns of eight
    "staged": Convolution(channels=(136, 24), dtype=BF16, T=37, backward=IN_RUNS),
    "staged, tails of views": Convolution(
        channels=(64, 24), width=3, dtype=BF16, tail=True, bias=True, views=True, T=17,
        backward=IN_RUNS,
    ),
    "staged, full runs": Convolution(
        channels=(72, 8, 64), dtype=FP16, tail=True, T=48, backward=IN_RUNS
    ),
    "staged, few tokens": Convolution(
        channels=(8,), dtype=BF16, weight_dtype=FP32, T=2, B=3, tail=True, backward=IN_RUNS
    ),
    "staged, turns of eight": Convolution(
        channels=(24,), width=2, dtype=FP16, bias=True, T=45,
        backward=(*IN_RUNS, ("ahead", 8), ("num_stages", 3)),
    ),
    # which are loaded as without: packed ones, and several runs
    "not staged, packed": Convolution(dtype=BF16, lengths=(7, 0, 1, 2, 30), backward=IN_RUNS),
    "not staged, several runs": Convolution(
        dtype=FP16, T=40, backward=(*IN_RUNS, ("BR", 2))
    ),
}  # fmt: skip
NORMS: Final = {
    "silu": Norm(),
    "sigmoid": Norm(activation="sigmoid", size=96, eps=0.1),
    "fp32 weights": Norm(dtype=BF16, weight_dtype=FP32, size=256, rows=(2, 5, 3)),
    "narrow": Norm(dtype=FP16, size=8, rows=(70,)),
    "wide": Norm(size=512, rows=(1,)),
    "loads when they are wanted": Norm(
        rows=(45,), knobs=(("early", 0), ("BT", 2), ("BR", 4), ("read_once", 1))
    ),
    "loads early": Norm(size=96, rows=(45,), knobs=(("early", 1), ("BT", 4), ("BR", 4))),
    "words": Norm(rows=(45,), dtype=BF16, backward=(*WORDS, ("BT", 4), ("BR", 4))),
    "words, spread": Norm(
        size=96, rows=(45,), dtype=FP16, activation="sigmoid",
        backward=(*WORDS, *SPREAD, ("BT", 2), ("BR", 4)),
    ),
    "words of fp32, spread": Norm(
        rows=(45,), activation="sigmoid", backward=(*WORDS, *SPREAD, ("early", 0), ("BR", 2))
    ),
    "staged": Norm(rows=(45,), dtype=BF16, backward=(*STAGED, ("BT", 4), ("BR", 4))),
    "staged, spread": Norm(
        size=96, rows=(45,), dtype=FP16, activation="sigmoid",
        backward=(*STAGED, *SPREAD, ("BT", 2), ("BR", 4), ("num_stages", 3)),
    ),
    "spread": Norm(rows=(45,), size=96, backward=(*SPREAD, ("BT", 4), ("BR", 4))),
}  # fmt: skip
STREAMS: Final = {
    "a sum": Stream(),
    "no sum": Stream(added=False, eps=0.1),
    "narrowed": Stream(dtype=BF16, size=96),
    "narrowed, no sum": Stream(dtype=FP16, size=8, rows=(70,), added=False),
    "a narrow stream": Stream(stream_dtype=BF16, dtype=BF16, weight_dtype=BF16, size=256),
    "wide": Stream(size=2048, rows=(3,), dtype=BF16),
    "loads early": Stream(rows=(45,), knobs=(("early", 1), ("BT", 4), ("BR", 4))),
    "loads when they are wanted": Stream(rows=(45,), knobs=(("early", 0), ("BT", 2), ("BR", 2))),
}
PROJECTED: Final = {
    "a tile": ProjectedNorm(),
    "turns": ProjectedNorm(
        dtype=BF16, activation="silu", bias=False, rank=64, tokens=150,
        knobs=(("turns", 2), ("num_stages", 2), ("BM", 32)),
    ),
    "few tokens": ProjectedNorm(tokens=3, size=32, heads=3),
}  # fmt: skip
WINDOWS: Final = {
    "several runs": Window(),
    "one run": Window(size=16, window=5, seen=(3, 4, 5)),
    "one row": Window(size=8, window=1, seen=(0, 1, 9), heads=1),
    "at the end of a run": Window(seen=(62, 63, 64, 127), window=64),
    "narrow": Window(dtype=BF16, size=64, heads=1),
    "by the rule": Window(window=200, seen=(130, 1000), heads=1, tokens=1, knobs=()),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_kernels(name: str, interpreter: Check) -> None:
    case = CONVOLUTIONS[name]
    assert interpreter("part_cases:convolve", case) < BOUNDS[case.dtype]


@pytest.mark.parametrize("name", NORMS)
def test_norm_kernels(name: str, interpreter: Check) -> None:
    assert interpreter("part_cases:norm", NORMS[name]) < BOUNDS[NORMS[name].dtype]


@pytest.mark.parametrize("name", STREAMS)
def test_kernels_of_the_stream(name: str, interpreter: Check) -> None:
    case = STREAMS[name]
    assert interpreter("part_cases:stream_norm", case) < BOUNDS[case.dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("shape", "rows"), [((2, 5, 3, 24), 1), ((3, 11, 4, 16), 3)])
def test_rotary_kernels(
    shape: tuple[int, ...], rows: int, dtype: torch.dtype, interpreter: Check
) -> None:
    assert interpreter("part_cases:rotary", shape, dtype, rows) < BOUNDS[dtype]


@pytest.mark.parametrize("name", WINDOWS)
def test_a_token_over_a_window(name: str, interpreter: Check) -> None:
    case = WINDOWS[name]
    assert interpreter("part_cases:window_step", case) < BOUNDS[case.dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_swiglu_kernels(dtype: torch.dtype, interpreter: Check) -> None:
    assert interpreter("part_cases:swiglu", (3, 7, 72), dtype) < BOUNDS[dtype]


@pytest.mark.parametrize("name", PROJECTED)
def test_norms_that_project_their_gates(name: str, interpreter: Check) -> None:
    case = PROJECTED[name]
    assert interpreter("part_cases:projected_norm", case) < BOUNDS[case.dtype]


def test_a_layers_norm_projects_where_it_can(interpreter: Check) -> None:
    assert interpreter("part_cases:projected_in_a_layer") == 1


@pytest.mark.parametrize("dtype", BOUNDS)
def test_what_a_sigmoid_hands_back(dtype: torch.dtype, interpreter: Check) -> None:
    assert interpreter("part_cases:sigmoid_backward", 13, 264, dtype) < BOUNDS[dtype]


def test_a_model_by_kernels_between_its_mixers(interpreter: Check) -> None:
    assert interpreter("part_cases:model_by_kernels") < 2e-5


def test_steps(interpreter: Check) -> None:
    interpreter("part_cases:step", Convolution(T=1, B=5, bias=True, tail=True))
    interpreter("part_cases:step", Convolution(T=1, B=1, width=2, dtype=BF16, tail=True))


def test_no_length_leads_out_of_the_batch(interpreter: Check) -> None:
    part_cases.bad_lengths()
    interpreter("part_cases:bad_lengths")


def test_calls_like_one_before(interpreter: Check) -> None:
    # of seven pairs of calls all but the first, and one of other rows
    assert interpreter("part_cases:known") == 14 - 2 - 1


def test_compiled(interpreter: Check) -> None:
    interpreter("part_cases:compiled")


def test_by_torch_where_no_kernel_serves(interpreter: Check) -> None:
    """Channels that are no multiple of 8, fp64, and a gradient of tails, too."""
    case = Convolution(channels=(6, 5), bias=True, tail=True, T=9)
    assert interpreter("part_cases:convolve", case) < 1e-6
    x, tail = (torch.randn(1, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 3))
    weight = torch.randn(8, 4, dtype=torch.float64)

    def y_and_tail(x: torch.Tensor, tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (y,), last = short_convolution([x], [weight], tail=[tail], output_final_tail=True)
        assert last is not None
        return y, last[0]

    assert torch.autograd.gradcheck(y_and_tail, (x, tail))


X, W = torch.zeros(2, 5, 8), torch.zeros(8, 4)
ENDS = torch.tensor([0, 5])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": []}, "x and weight must be 1 to 3 tensors each"),
        ({"weight": [W, W]}, "as many of one as of the other, but got 1 and 2"),
        ({"x": [X[0]]}, "x must be tensors [B, T, D] of the same B and T, but x[0] is (5, 8)"),
        ({"weight": [W[:, :1]]}, "with D=8 as in x and W one of (2, 3, 4), but got (8, 1)"),
        ({"bias": [W]}, "bias[0] must be [8], but got (8, 4)"),
        ({"bias": [W[:, 0]] * 2}, "bias must be 1 tensors, as x, but got 2"),
        ({"tail": [X[:, :2]]}, "tail must be (2, 3, 8), but got (2, 2, 8)"),
        ({"cu_seqlens": ENDS}, "cu_seqlens wants B=1, but x has B=2"),
        ({"cu_seqlens": ENDS.float()}, "cu_seqlens must be int32 or int64"),
        ({"cu_seqlens": ENDS[:1]}, "cu_seqlens must be [N+1] with N >= 1"),
        ({"x": [X.to("meta")]}, "all tensors must be on one device, but got x[0] on meta"),
    ],
)
def test_convolutions_that_do_not_fit(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        short_convolution(**{"x": [X], "weight": [W], **given})


def test_steps_that_do_not_fit() -> None:
    tail = X[:, :3].clone()
    with pytest.raises(InputError, match=re.escape("a step is of one token, but x is (2, 5, 8)")):
        short_convolution_step([X], [W], tail=[tail])
    with pytest.raises(InputError, match="has no gradient"):
        short_convolution_step([X[:, :1]], [W.clone().requires_grad_()], tail=[tail])
    with pytest.raises(InputError, match=r"must be torch.float32 without gaps, but got torch\.bf"):
        short_convolution_step([X[:, :1]], [W], tail=[tail.bfloat16()])


def test_norms_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=re.escape("must both be [..., D] and weight [D], but")):
        gated_rms_norm(X, X[:1], W[:, 0])
    with pytest.raises(InputError, match="but got 'relu'"):
        gated_rms_norm(X, X, W[:, 0], activation="relu")


def test_more_channels_than_kernels_can_count_are_convolved_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even rows without gaps are then too far apart."""
    x, weight = (torch.zeros(shape, device="meta") for shape in ((1, 2, 16), (16, 4)))
    monkeypatch.setattr(ops, "by_kernels", lambda device: True)
    assert ops._convolved_by_kernels([x], [weight], [], [])
    monkeypatch.setattr(ops, "FARTHEST", 8)
    assert not ops._convolved_by_kernels([x], [weight], [], [])
