"""What a library of a TileLang program holds besides its host code: kernels, as tvm packs them.

The symbol `__tvm_ffi__library_bin` is a number of bytes, then the modules that the library imports:
a tree of them, and the kind and content of each. That of kind `cuda` names each kernel, with the
types of its parameters and what of a launch comes after them, and ends with the compiled code.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

_MAP: Final = 30  # the type code of what lies in a kernel's parameters for good: a tensor map
_HANDLE: Final = 3
_INTEGERS: Final = (0, 1)
_REAL: Final = 2
_MAP_WORDS: Final = "<16Q"
_ELF: Final = b"\x7fELF"
_DYNAMIC_SYMBOLS: Final = 11
_FAT: Final = bytes.fromhex("50ed55ba")
_OF_GRID: Final = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
_OF_BLOCK: Final = ("threadIdx.x", "threadIdx.y", "threadIdx.z")
_OF_CLUSTER: Final = ("tir.cluster_dim_x", "tir.cluster_dim_y", "tir.cluster_dim_z")
_SHARED: Final = "tirx.use_dyn_shared_memory"
_USED: Final = {b"TVMBackendGetFuncFromEnv", b"TVMFFIErrorSetRaisedFromCStr", b"TVMFFIFunctionCall"}
_CALLED: Final = {b"__tvm_set_device", b"__tvm_tensormap_create_tiled"}
_RUNTIME: Final = re.compile(rb"\0(__tvm_[a-z_0-9]+)(?=\0)")
# spelled as tvm spells it
_DEPENDENT: Final = "tirx.use_programtic_dependent_launch"


class Type(NamedTuple):
    """Of a kernel's parameter, in tvm's numbers."""

    code: int
    bits: int

    @property
    def nbytes(self) -> int:
        return struct.calcsize(_MAP_WORDS) if self.code == _MAP else self.bits // 8

    def words(self, given: Any) -> int | tuple[int, ...]:
        """What a launch is `given` as a word, or a tensor map as its words. Raises ValueError."""
        if self.code == _MAP:
            return struct.unpack(_MAP_WORDS, ctypes.string_at(given.value, self.nbytes))
        if self.code == _HANDLE:
            return 0 if given is None else int(given.value or 0)
        if self.code == _REAL and self.bits in (32, 64):
            packed = struct.pack("<f4x" if self.bits == 32 else "<d", given)
            return int.from_bytes(packed, "little")
        if self.code in _INTEGERS and self.bits in (32, 64):
            found: int = given & (2**self.bits - 1)
            return found
        raise ValueError(f"a kernel's parameter is of type {self}")


class Size(NamedTuple):
    """Of a launch."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    dependent: bool
    cluster: tuple[int, ...]
    """Empty where the kernel names none."""


class Entry(NamedTuple):
    """A kernel: its parameters, and what a launch of it takes after them."""

    types: tuple[Type, ...]
    tags: tuple[str, ...]

    @property
    def nbytes(self) -> list[int]:
        return [x.nbytes for x in self.types]

    def sizes(self, given: Sequence[int]) -> Size | None:
        """None where something of it is not known here."""
        tags = [x for x in self.tags if x != _DEPENDENT]
        if len(tags) != len(given):
            return None
        found = dict(zip(tags, given, strict=True))
        if not found.keys() <= {*_OF_GRID, *_OF_BLOCK, *_OF_CLUSTER, _SHARED}:
            return None
        named = not found.keys().isdisjoint(_OF_CLUSTER)
        cluster = tuple([found.get(x, 1) for x in _OF_CLUSTER if named])
        return Size(
            tuple([found.get(x, 1) for x in _OF_GRID]),
            tuple([found.get(x, 1) for x in _OF_BLOCK]),
            found.get(_SHARED, 0),
            _DEPENDENT in self.tags,
            cluster,
        )


class Code(NamedTuple):
    """Compiled code, and its kernels by name."""

    image: bytes
    kernels: Mapping[str, Entry]


def read_code(library: bytes) -> Code | None:
    """The code of a program's library; None where it is not found as it is described above, is no
    machine code, or where its host code does more than to set the device, make tensor maps and
    launch."""
    try:
        symbols = _symbols(library)
        used = {name for name, content in symbols.items() if not content}
        called = {x for x in _RUNTIME.findall(library) if not x.startswith(b"__tvm_ffi_")}
        if not ({x for x in used if x.startswith(b"TVM")} <= _USED and called <= _CALLED):
            return None
        return _code(_Reader(symbols.get(b"__tvm_ffi__library_bin", b"")))
    except (IndexError, struct.error, UnicodeDecodeError, ValueError):
        return None


def _code(reader: _Reader) -> Code | None:
    content = _Reader(reader.bytes())
    content.skip(8 * content.number())  # where the children of each module begin
    content.skip(8 * content.number())  # these children
    while (kind := content.bytes()) == b"_lib":
        pass
    if kind != b"cuda":
        return None
    module = _Reader(content.bytes())
    form = module.bytes()
    kernels = {}
    for _ in range(module.number()):
        name = module.bytes()
        if module.bytes() != name:
            return None
        types = [Type(*struct.unpack("<BBxx", module.take(4))) for _ in range(module.number())]
        tags = [module.bytes().decode() for _ in range(module.number())]
        if module.number():  # parameters of other kinds than these
            return None
        kernels[name.decode()] = Entry(tuple(types), tuple(tags))
    image = module.bytes()
    if not module.at_end or form not in (b"cubin", b"fatbin"):
        return None
    return Code(image, kernels) if image[:4] in (_ELF, _FAT) else None


class _Reader:
    """Numbers of 8 bytes, and bytes that follow their number."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def take(self, count: int) -> bytes:
        found = self._content[self._at : self._at + count]
        if len(found) < count:
            raise ValueError("it ends too early")
        self._at += count
        return found

    def skip(self, count: int) -> None:
        self.take(count)

    def number(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def bytes(self) -> bytes:
        return self.take(self.number())

    @property
    def at_end(self) -> bool:
        return self._at == len(self._content)


def _symbols(library: bytes) -> dict[bytes, bytes]:
    """The dynamic symbols of a 64-bit ELF library, and what lies there, as long as it is said to
    be: nothing where they are another library's."""
    found: dict[bytes, bytes] = {}
    if library[:5] != _ELF + b"\x02":
        return found
    (start,) = struct.unpack_from("<Q", library, 40)
    each, count = struct.unpack_from("<HH", library, 58)
    sections = [struct.unpack_from("<IIQQQQII", library, start + each * i) for i in range(count)]
    for _, kind, _, _, begin, nbytes, strings, _ in sections:
        if kind != _DYNAMIC_SYMBOLS:
            continue
        names = sections[strings][4]
        for place in range(begin, begin + nbytes, 24):
            name, _, _, where, value, size = struct.unpack_from("<IBBHQQ", library, place)
            there = slice(0, 0)
            if 0 < where < count:
                first = value - sections[where][3] + sections[where][4]
                there = slice(first, first + size)
            found[library[names + name : library.index(b"\0", names + name)]] = library[there]
    return found
