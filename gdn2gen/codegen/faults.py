"""Known faults of compilers, found in what they made of a kernel (docs/experiments.md tells more).

Neither can be seen in the kernel's text, and any knob may bring it or take it away. Both show in
what was compiled, so that such a kernel is refused before it runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

# As in `/*1760*/ @!UP3 UIADD3 UR8, UP0, UR60, 0x20, URZ ;`
_INSTRUCTION: Final = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL: Final = re.compile(r"^\s*(\.L\w+):")
_TARGET: Final = re.compile(r"`\((\.L\w+)\)")
_NUMBERED: Final = re.compile(r"(U?[RP])(\d+)")
# Registers that one operand may take.
_FOUR: Final = re.compile(r"128|^LDSM|^HMMA|^IMMA")
_TWO: Final = re.compile(r"64|WIDE|^CS2R|^D[A-Z]+")
# Of a descriptor's upper half those bits that say how the tile is swizzled, and those that are 0: a
# sum of addresses has none of the former, and -1 all of both.
_SWIZZLED: Final = 0b11 << 30
_UNUSED: Final = 0x3FFFC000
# `mul.wide.u32 %rd1, %r1, 268435456` is a number of 32 bits, shifted, that no thread may leave.
_PRODUCT: Final = re.compile(r"mul\.wide\.u32\s+(%rd\d+), %r\d+, (\d+);")
_SHIFTED: Final = re.compile(r"shl\.b64\s+(%rd\d+), %rd\d+, (\d+);")
_JOINED: Final = re.compile(r"or\.b64\s+%rd\d+, (%rd\d+), (%rd\d+);")
_MOST_THREADS: Final = 1024
_ZEROS: Final = frozenset(("RZ", "URZ"))
# What leaves no 0 in a register of a kernel that is right: a size or an address that was given, the
# number of a thread, a shift of either, a descriptor.
_NO_ZERO: Final = frozenset(
    ("LDC", "ULDC", "S2R", "S2UR", "SHF", "USHF", "IMAD", "UIMAD", "UIADD3")
)
_Written = dict[str, frozenset[str]]


def why_wrong(assembly: Mapping[str, Any]) -> str:
    """What is wrong with a kernel that Triton compiled, of what is known; empty if nothing is.

    `assembly`: its texts and its binary, by the names that Triton has for them.
    """
    ptx = assembly.get("ptx", "")
    found = mixed_halves(ptx)
    if not found and "wgmma.mma_async" in ptx and ".target sm_90" in ptx:
        found = lost_descriptor(_disassembled(assembly["cubin"]))
    return found


def mixed_halves(ptx: str) -> str:
    """LLVM's fault: the lower of two numbers in one register leaves it, and falsifies the upper.

    LLVM computes two values of 32 bits as one vector and drops what it has no use for, here of the
    lower one, whose shift it has called free of overflow. PTX multiplies that in 64 bits.
    """
    products = {x[1]: int(x[2]) for x in _PRODUCT.finditer(ptx)}
    uppers = {x[1] for x in _SHIFTED.finditer(ptx) if int(x[2]) >= 32}
    for joined in _JOINED.finditer(ptx):
        for lower, upper in (joined.groups(), joined.groups()[::-1]):
            if upper in uppers and products.get(lower, 0) * _MOST_THREADS > 2**32:
                return (
                    "LLVM joined two numbers of 32 bits of which the lower one overflows: "
                    f"{joined[0]} with a product by {products[lower]}"
                )
    return ""


def lost_descriptor(sass: str) -> str:
    """The fault of ptxas 12.8.93: an operand of wgmma whose address was in no register any more.

    The halves of its descriptor are sums with an immediate each: the lower one of an address, the
    upper one of 0. Either reads a register that nothing has written, or both read one value, of
    which only one half can be, or the upper one what only another purpose can have put there.
    """
    for block, known in _reached(_blocks(sass)):
        written = dict(known)
        last: dict[str, int] = {}
        lower: dict[str, tuple[str, int, bool]] = {}
        for i, x in enumerate(block):
            if x.is_upper:
                base, at, defined = lower.get(x.operands[4], ("", 0, True))
                source = x.operands[1]
                same = source == base and last.get(source, -1) == at
                before = written.get(source, frozenset())
                if source not in _ZEROS and (
                    same or (base and not before) or (before and before <= _NO_ZERO)
                ):
                    defined = False
                if not defined:
                    return (
                        "ptxas gives wgmma an operand at a wrong address: "
                        f"{x.name} {', '.join(x.operands)}"
                    )
            for register in x.writes:
                lower.pop(register, None)
            if x.is_lower:
                source = x.operands[2]
                lower[x.operands[1]] = (
                    source,
                    last.get(source, -1),
                    source in written or source in _ZEROS,
                )
            for register in x.writes:
                last[register] = i
            _write(x, written)
    return ""


@dataclass(frozen=True)
class _Instruction:
    name: str
    operands: tuple[str, ...]
    conditional: bool

    @property
    def is_lower(self) -> bool:
        """`UIADD3 UR8, UP0, UR60, 0x20, URZ`: with a carry."""
        return (
            self.name in ("IADD3", "UIADD3")
            and len(self.operands) == 5
            and self.operands[3].lstrip("-").startswith("0x")
        )

    @property
    def is_upper(self) -> bool:
        """`UIADD3.X UR9, UR60, -0x3ffffff0, URZ, UP0, !UPT`: of a descriptor, with that carry."""
        if self.name not in ("IADD3.X", "UIADD3.X") or len(self.operands) < 5:
            return False
        number = self.operands[2]
        if not number.lstrip("-").startswith("0x"):
            return False
        return bool(int(number, 16) & _SWIZZLED) and not int(number, 16) & _UNUSED

    @cached_property
    def writes(self) -> frozenset[str]:
        """Registers that it may write, and rather one too many."""
        found: set[str] = set()
        for operand in self.operands[:2] if self._second else self.operands[:1]:
            match = _NUMBERED.fullmatch(operand)
            if match:
                first = int(match[2])
                found |= {f"{match[1]}{i}" for i in range(first, first + self._width)}
        return frozenset(found)

    @property
    def left(self) -> str:
        """Its kind, which says what it leaves in a register; "" if that may be 0."""
        stem, _, rest = self.name.partition(".")
        wide = "64" in rest or "WIDE" in rest
        # a sum of 64 bits is a descriptor itself
        return "" if "MOV" in rest or (wide and self.name != "UIADD3.64") else stem

    @property
    def _second(self) -> bool:
        """Whether the second operand may be written, too: a carry, or what a vote leaves."""
        return any("P" in x for x in self.operands[:2])

    @property
    def _width(self) -> int:
        if self.name.startswith("HGMMA"):
            return int(self.name.split("x")[1]) // 2
        return 4 if _FOUR.search(self.name) else 2 if _TWO.search(self.name) else 1


def _blocks(sass: str) -> list[tuple[str, list[_Instruction], list[str]]]:
    """Label, instructions and the labels of what may follow, of each basic block in order."""
    blocks: list[tuple[str, list[_Instruction], list[str]]] = [("", [], [])]
    for line in sass.splitlines():
        label, found = _LABEL.match(line), _INSTRUCTION.search(line)
        if label:
            blocks[-1][2].append(label[1])
            blocks.append((label[1], [], []))
        if not found:
            continue
        operands = tuple(x.strip().removesuffix(".reuse") for x in found[3].split(","))
        x = _Instruction(found[2], operands, bool(found[1]))
        blocks[-1][1].append(x)
        blocks[-1][2].extend(_TARGET.findall(line))
        if x.name.split(".")[0] in ("BRA", "EXIT", "RET"):
            follows = f"after {len(blocks)}"
            # BRA.U has its condition among its operands
            if x.conditional or x.name not in ("BRA", "EXIT"):
                blocks[-1][2].append(follows)
            blocks.append((follows, [], []))
    return blocks


def _write(x: _Instruction, written: _Written) -> None:
    """Note by what `x` writes registers, beside what may be there where it is conditional."""
    for register in x.writes:
        before = written.get(register, frozenset()) if x.conditional else frozenset()
        written[register] = before | {x.left}


def _reached(
    blocks: list[tuple[str, list[_Instruction], list[str]]],
) -> Iterator[tuple[list[_Instruction], _Written]]:
    """Each block with what may have written each register last, on some way to it."""
    known: dict[str, _Written] = {label: {} for label, _, _ in blocks}
    waiting = [label for label, _, _ in blocks]
    named = {label: (block, following) for label, block, following in blocks}
    while waiting:
        label = waiting.pop(0)
        block, following = named[label]
        out = dict(known[label])
        for x in block:
            _write(x, out)
        for after in following:
            if after not in known:
                continue
            more = {r: y for r, y in out.items() if not y <= known[after].get(r, frozenset())}
            known[after] |= {r: y | known[after].get(r, frozenset()) for r, y in more.items()}
            if more and after not in waiting:
                waiting.append(after)
    return ((block, known[label]) for label, block, _ in blocks)


def _disassembled(cubin: bytes) -> str:
    """What Triton's own nvdisasm makes of a binary; empty where there is none."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            made = subprocess.run(
                [knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True
            )
        except (OSError, RuntimeError):  # a Triton that comes without it
            return ""
    return made.stdout
