"""fold of the parallel scans, written so that it leaves out what has decayed before it counts.

Of a segment's chunks the rows of values need those that reach its end: what all later chunks leave
of them is 2^-BITS or more. Rows of the transition need the chunks until nothing of the segment's
start is left. A kernel before fold counts both, from the decay of every chunk, so that each head
has its own: of 16 heads as a layer draws them, 8 segments of 128 chunks each, 36% of what fold
does is left at 100 bits, and 26% at 64. What is longest is a head that forgets nothing, as before.

Where keys are normalised, which the knob wants (`l2norm`), a step makes a state longer by
|1 - beta| at most, and not at all while beta is in [0, 2]: then decay alone bounds what is left. By
what other steps of a segment, or a decay above 1, could make it longer as much more has to have
decayed. Beside a state of ordinary numbers 2^-BITS is nothing in fp32 from 32 bits on; more bits
are for values that differ by as much. A NaN in decay or beta bounds nothing: all chunks count.

Counts lie where merge_kernel writes the state that the first segment starts from, after fold.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from gdn2gen.base.errors import TemplateError


class _Edit(NamedTuple):
    """A place in the text, how often it is there, and what stands there then."""

    pattern: str
    text: str
    counts: tuple[int, ...] = (1,)


# Chunks of a segment that reach_kernel reads at once.
_AT_ONCE: Final = 128
_KERNEL: Final = '''@triton.jit(do_not_specialize=["T", "HV", "NS", "segment", "H"])
def reach_kernel(
{operands}
    BC: tl.constexpr,
):
    """Count the chunks that fold needs, of one segment and head."""
    i_nh, i_s = tl.program_id(0) // (NS - 1), tl.program_id(0) % (NS - 1){after}
    i_n, i_h = i_nh // HV, i_nh % HV
    n_all = tl.cdiv(T, BT)
    i_first = i_n * n_all + i_s * segment
    n_all = tl.minimum(n_all - i_s * segment, segment)
    # log2 of what steps could make a state longer by, in all: 0 where beta is in [0, 2]
    grown = 0.0
    for i_c in range(0, n_all, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < n_all
        p_c = (i_first + o_c).to(tl.int64) * HV + i_h
        p_t = p_c[:, None] * BT + tl.arange(0, BT)[None, :]
        b_gamma = tl.load(gamma_C + p_c, mask=m_c, other=1.0)
        b_step = tl.abs(1.0 - tl.load(k_beta + p_t, mask=m_c[:, None], other=0.0))
        # not a maximum: a NaN has to stay one, and then all chunks count
        b_step = tl.log2(tl.where(b_step <= 1.0, 1.0, b_step))
        grown += tl.sum(tl.log2(tl.where(b_gamma > 1.0, b_gamma, 1.0)) + tl.sum(b_step, 1), 0)
    least = -BITS - grown
    # log2 of what is left over the chunks so far, from the start on and from the end back
    left, left_back = 0.0, 0.0
    n_front, n_back = 0, 0
    for i_c in range(0, n_all, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < n_all
        p_front = (i_first + o_c).to(tl.int64) * HV + i_h
        p_back = (i_first + n_all - 1 - o_c).to(tl.int64) * HV + i_h
        b_front = tl.load(gamma_C + p_front, mask=m_c, other=1.0)
        b_back = tl.load(gamma_C + p_back, mask=m_c, other=1.0)
        # differences of sums have to be finite; a NaN stays one, and counts as no decay
        b_front = tl.where(b_front < 2.0**-120, 2.0**-120, b_front)
        b_back = tl.where(b_back < 2.0**-120, 2.0**-120, b_back)
        b_front = tl.log2(tl.where(b_front > 1.0, 1.0, b_front))
        b_back = tl.log2(tl.where(b_back > 1.0, 1.0, b_back))
        # over those before a chunk
        b_over = left + tl.cumsum(b_front, 0) - b_front
        b_over_back = left_back + tl.cumsum(b_back, 0) - b_back
        n_front += tl.sum(tl.where(m_c & (b_over < least), 0, m_c.to(tl.int32)), 0)
        n_back += tl.sum(tl.where(m_c & (b_over_back < least), 0, m_c.to(tl.int32)), 0)
        left += tl.sum(b_front, 0)
        left_back += tl.sum(b_back, 0)
    p_counts = {kept} + (i_nh.to(tl.int64) * NS + {slot}) * K * V + i_s
    tl.store(p_counts, {of_values}.to(tl.float32))
    tl.store(p_counts + K * V // 2, {of_transition}.to(tl.float32))


'''
_LAUNCH_TILELANG: Final = """        reach_kernel[(n_sequences * HV * (NS - 1),)](
            {arguments},
            K=K, V=V, BT=BT, BC=BC, num_warps=4,
        )
"""
_LAUNCH_TRITON: Final = (
    "        reach_kernel[(heads * (NS - 1),)](*arguments, K=K, V=V, BT=BT, BC=BC, num_warps=4)\n"
)
_COUNTS_TILELANG: Final = """
            # of the segment's chunks those that count, held in variables as they are in addresses
            n_all = tile.min(segment, n_chunks - i_s * segment)
            n_own, i_skipped = tile.alloc_var("int32"), tile.alloc_var("int32")
            n_own = tile.cast(
                {kept}[
                    i_n, i_h, {slot}, tile.if_then_else(i_v * BV < V, 0, V // 2) + i_s // K, i_s % K
                ],
                "int32",
            )
            # rows of values begin with those that reach the end
            i_skipped = tile.if_then_else(i_v * BV < V, n_all - n_own, 0)
"""
_COUNTS_TRITON: Final = """\
    # of those the ones that count: rows of values begin with those that reach the end
    p_counts = {kept} + (i_nh.to(tl.int64) * NS + {slot}) * K * V + i_s
    n_all = n_chunks
    n_chunks = tl.load(p_counts + tl.where(i_v * BV < V, 0, K * V // 2)).to(tl.int32)
    i_skipped = tl.where(i_v * BV < V, n_all - n_chunks, 0)
    i_begin = {begin}
    i_first += i_begin
    i_start += i_begin * BT
    n_tokens -= i_begin * BT
"""
_START: Final = r"tile\.min\(\(i_s \+ 1\) \* segment, n_chunks\) - 1"
_TILELANG: Final = (
    _Edit(r"( {12}n_tokens = T\n)", r"\1{counts}"),
    _Edit(r"tile\.min\(segment, n_chunks - i_s \* segment\), (num_stages)", r"n_own, \1"),
    # a transition that nothing is left of
    _Edit(
        r"( +)(M_seg\[.*\] = )(b_d?S\[i, j\])",
        r"\1\2tile.if_then_else(\n\1    n_own < n_all, 0.0, \3\n\1)",
        (0, 1),
    ),
)
_ONWARD: Final = (
    _Edit(
        r"(gamma_C)\[(tile\.min\(i_first \+ i_s \* segment), NT - 1\), i_h\]",
        r"\1[\2 + i_skipped, NT - 1), i_h]",
    ),
    _Edit(r"(i_t = i_s \* segment) \+ i_chunk", r"\1 + i_skipped + i_chunk"),
    _Edit(r"if i_s == 0:", "if i_s + i_skipped == 0:", (0, 1)),
)
_BACK: Final = (
    _Edit(
        rf"( +)(x_gamma\[1\] = gamma_C\[)(tile\.min\(i_first \+ {_START}), NT - 1\), i_h\]",
        r"\1\2\n\1    \3 - i_skipped, NT - 1), i_h\n\1]",
    ),
    _Edit(rf"(i_t = {_START}) - i_chunk", r"\1 - i_skipped - i_chunk"),
    _Edit(r"if i_s == NS - 1:", "if i_s - i_skipped == NS - 1:", (0, 1)),
)
_TRITON: Final = (
    _Edit(r"( {4}n_tokens -= i_s \* segment \* BT\n)", r"\1{counts}"),
    _Edit(r"if i_s == 0:", "if i_s + i_skipped == 0:", (0, 1)),
    _Edit(r"if i_s == NS - 1:", "if i_s - i_skipped == NS - 1:", (0, 1)),
    _Edit(
        r"( +)(tl\.store\(M_seg \+ .*), (b_d?S)\)",
        r"\1\3 = tl.where(n_chunks < n_all, 0.0, \3)  # nothing is left\n\1\2, \3)",
        (0, 1),
    ),
)


def reaching(source: str, bits: int) -> str:
    """A module's text with a fold of what counts for 2^-bits and more."""
    back = "def reverse_scan" in source
    in_tilelang = "def fold_program" in source
    kept, slot = ("dS_seg", "NS - 1") if back else ("S_seg", "0")
    begin = "n_all - n_chunks - i_skipped" if back else "i_skipped"
    counts = (_COUNTS_TILELANG if in_tilelang else _COUNTS_TRITON).format(
        kept=kept, slot=slot, begin=begin
    )
    of_language = (*_TILELANG, *(_BACK if back else _ONWARD)) if in_tilelang else _TRITON
    start, end = _bounds(source, in_tilelang)
    edits = (x._replace(text=x.text.replace("{counts}", counts)) for x in of_language)
    source = source[:start] + _edited(source[start:end], [*edits]) + source[end:]
    return _with_kernel(source, bits, back, kept, slot, in_tilelang)


def _bounds(source: str, in_tilelang: bool) -> tuple[int, int]:
    """Where fold begins in a module, and where it ends."""
    name = "def fold_program" if in_tilelang else "def fold_kernel"
    return source.index(name), source.index("    return fold\n" if in_tilelang else "def merge")


def _with_kernel(
    source: str, bits: int, back: bool, kept: str, slot: str, in_tilelang: bool
) -> str:
    """With the kernel that counts, and its launch."""
    (signature,) = re.findall(r"def merge_kernel\(\n(.*?)\n    BM: tl", source, re.DOTALL)
    values, transition = ("n_front", "n_back") if back else ("n_back", "n_front")
    kernel = _KERNEL.format(
        operands=signature,
        after=" + 1" if back else "",
        kept=kept,
        slot=slot,
        of_values=values,
        of_transition=transition,
    )
    constants = f"BC = {_AT_ONCE}  # chunks that reach_kernel reads at once\n"
    constants += f"BITS = tl.constexpr({bits})  # what decays below 2^-BITS does not count\n"
    launch = _LAUNCH_TRITON
    if in_tilelang:
        (arguments,) = re.findall(r"merge_kernel\[.*\]\(\n +([^=]*?),\n +K=K", source)
        launch = _LAUNCH_TILELANG.format(arguments=re.sub(r"\n +", "\n            ", arguments))
    return _edited(
        source,
        [
            _Edit(r"(?m)^(BM = 16 .*\n)", rf"\1{constants}"),
            _Edit(r"(?m)^(@triton\.jit.*\ndef merge_kernel)", _quoted(kernel) + r"\1"),
            _Edit(r"(    if NS > 1:\n)( +(?:compiled_fold|fold_kernel))", rf"\1{launch}\2"),
            _Edit(r"Launch the three kernels", "Launch the four kernels"),
            _Edit(r"Three kernels,\n", "Three kernels,\nand one that counts what fold needs,\n"),
        ],
    )


def _quoted(text: str) -> str:
    """As a replacement that stands for itself."""
    return text.replace("\\", r"\\")


def _edited(text: str, edits: Sequence[_Edit]) -> str:
    for edit in edits:
        text, count = re.subn(edit.pattern, edit.text, text)
        if count not in edit.counts:
            raise TemplateError(
                f"fold's text has {count} places that read {edit.pattern!r}, which is not known"
            )
    return text
