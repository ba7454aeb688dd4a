"""Head dims in slices, and what is made of sizes that have no kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gdn2gen.base.errors import UnsupportedError
from gdn2gen.family.problem import DIMS, USUAL_DIMS, Problem
from gdn2gen.kernels.slices import slices_of


@pytest.mark.parametrize("size", DIMS["V"])
def test_slices_cover_a_size_once_and_hardly_more(size: int) -> None:
    slices = slices_of(size)
    end = 0
    for x in slices:
        assert x.start == end and x.width in (16, 32, 64, 128)
        end += x.width
    assert end - slices[-1].width < size <= end
    widths = [x.width for x in slices]
    assert widths == sorted(widths, reverse=True)
    assert len([x for x in widths if x < 128]) <= 2
    # no more than the next power of two would, nor than whole slices of 128
    assert end <= 1 << (size - 1).bit_length() and end < size + 128


def test_sizes_that_two_slices_make_have_no_rest() -> None:
    assert {x: [s.width for s in slices_of(x)] for x in (80, 96, 160, 192, 256)} == {
        80: [64, 16],
        96: [64, 32],
        160: [128, 32],
        192: [128, 64],
        256: [128, 128],
    }
    assert all([s.width for s in slices_of(x)] == [x] for x in (16, *USUAL_DIMS))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((100, 64), r"K=100 .*of 8 from 16 to 256; use 96 or 104: .*to 104 .*scale=100\*\*-0.5"),
        ((64, 100), r"V=100 .*from 16 to 512; use 96 or 104: pad v.* to 104 .*o\[..., :100\]"),
        ((8, 64), "K=8 .*use 16: pad"),
        ((264, 64), "K=264 .*it may be 16 at least and 256 at most$"),
        ((0, 64), "K=0 .*it may be 16 at least and 256 at most$"),
        ((64, 520), "V=520 .*it may be 16 at least and 512 at most$"),
    ],
)
def test_other_sizes_are_refused_with_what_to_do(size: tuple[int, int], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        Problem(K=size[0], V=size[1])


def test_sizes_that_were_not_verified_run_only_where_that_is_wanted(
    interpreter: Callable[..., Any],
) -> None:
    for value in ("", "0"):
        outcome, warned = interpreter("kernel_cases:unverified_call", value)
        assert "K=48, V=40 in fp32 were not verified on a GPU" in outcome and not warned
        assert "GDN2GEN_UNVERIFIED=1" in outcome
        assert "`gdn2gen verify --op gdn2 --head-dim 48,40`" in outcome
        made = "gdn2gen generate --op gdn2 --head-dim 48,40 --dtype fp32 --out DIR"
        assert f"`{made}` makes a package" in outcome
    assert interpreter("kernel_cases:unverified_call", "verify") == ("finite True", [])
    outcome, warned = interpreter("kernel_cases:unverified_call", "1")
    assert outcome == "finite True"
    assert [x.split(" were")[0] for x in warned] == [
        "gdn2's kernels for head dims K=48, V=40 in fp32"  # once
    ]
