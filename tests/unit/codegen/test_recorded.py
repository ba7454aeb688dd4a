"""What a program launches, recorded: of a program in C that is made as TileLang makes its own."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdn2gen.codegen import _driver, _recorded, programs
from gdn2gen.codegen._frame import Frame
from gdn2gen.codegen._library import Entry, Type, read_code
from gdn2gen.codegen._ready import FLOAT, INT, At, Described, Kernel, Map, Program

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="nothing compiles C here")

_SOURCE = Path(__file__).parents[2] / "support" / "toy_program.c"
_TYPES = (Type(30, 64), Type(3, 64), Type(2, 32), Type(0, 32))
_TAGS = (
    "tirx.use_programtic_dependent_launch",
    *("blockIdx.x", "blockIdx.y", "threadIdx.x", "tirx.use_dyn_shared_memory"),
)
_TENSORS = [Described((4,), (1,), torch.bfloat16)] * 3
_REST = tuple(range(101, 116))
_HALF = int.from_bytes(struct.pack("<f", 0.5), "little")
FUNCTION = 4711


def _number(x: int) -> bytes:
    return struct.pack("<Q", x)


def _text(x: bytes) -> bytes:
    return _number(len(x)) + x


def _packed(tags: Sequence[str] = _TAGS, image: bytes = b"\x7fELF and so on") -> bytes:
    types = b"".join(struct.pack("<BBH", *x, 1) for x in _TYPES)
    named = b"".join(_text(x.encode()) for x in tags)
    entry = _text(b"toy_kernel") * 2 + _number(len(_TYPES)) + types + _number(len(tags)) + named
    module = _text(b"cubin") + _number(1) + entry + _number(0) + _text(image)
    tree = b"".join(map(_number, (3, 0, 1, 1, 1, 1)))
    return _text(tree + _text(b"_lib") + _text(b"cuda") + _text(module))


def _library(folder: Path, *defined: str, **packed: Any) -> Path:
    """Kept as `programs` keeps it."""
    content = ",".join(map(str, _packed(**packed)))
    (folder / "packed.h").write_text(
        f"const unsigned char __tvm_ffi__library_bin[] = {{{content}}};\n"
    )
    made = folder / "made.so"
    command = ["cc", "-shared", "-fPIC", "-w", f"-I{folder}", *(f"-D{x}" for x in defined)]
    subprocess.run([*command, str(_SOURCE), "-o", str(made)], check=True)
    digest = programs._digest(made.read_bytes(), "toy")
    return made.rename(folder / f"toy-{digest}.so")


class _Driver:
    """Loads any code, and notes launches: configuration, and parameters by their bytes."""

    def __init__(self) -> None:
        self.launched: list[tuple[tuple[int, ...], list[bytes]]] = []
        self.sizes, self.capturing, self.device = [128, 8, 4, 4], 0, 0
        self.attributes: list[tuple[int, tuple[int, ...]]] = []
        address = ctypes.c_void_p
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, *[address] * 4)(self._launch)

    def _launch(self, config: int, function: int, parameters: int, _: int | None) -> int:
        assert function == FUNCTION
        places = struct.unpack("<4Q", ctypes.string_at(parameters, 32))
        given = [ctypes.string_at(x, n) for x, n in zip(places, self.sizes, strict=True)]
        size = struct.unpack("<8IQQQ", ctypes.string_at(config, 56))
        for i in range(size[10]):
            number, *value = struct.unpack("<I4x3I", ctypes.string_at(size[9] + 72 * i, 20))
            self.attributes.append((number, tuple(value)))
        self.launched.append((size, given))
        return 0

    def cuCtxGetDevice(self, found: Any) -> int:
        found._obj.value = self.device
        return 0

    def cuStreamIsCapturing(self, _: Any, found: Any) -> int:
        found._obj.value = self.capturing
        return 0


@pytest.fixture(name="driver")
def _driver_of_tests(monkeypatch: pytest.MonkeyPatch) -> _Driver:
    pytest.importorskip("tilelang")
    found = _Driver()
    monkeypatch.delenv("GDN2GEN_BOUND", raising=False)
    monkeypatch.setattr(_driver, "driver", lambda: found)
    monkeypatch.setattr(_driver, "load_kernel", lambda *_: FUNCTION)
    monkeypatch.setattr(_driver, "parameters_of", lambda _: found.sizes)
    monkeypatch.setattr(_recorded, "streams", lambda: lambda _: 0)
    return found


def _program(path: Path) -> Program:
    return Program(programs._load(path), (2, 0), ((INT, 12),))


def test_parameters_are_known_but_for_addresses(driver: _Driver, tmp_path: Path) -> None:
    program = _program(_library(tmp_path))
    (found,) = _recorded.recorded(program, _TENSORS, 0)
    parameters = (Map(0, _REST), At(2), _HALF, 12)
    assert found == Kernel(
        "toy_kernel", FUNCTION, (7, 3, 1), (256, 1, 1), 4096, parameters, dependent=True
    )
    frame = Frame([found], _TENSORS, 0)
    for stream in (0, 2**40):
        addresses = [2**33 + stream, 16, 2**46 - 128]
        frame.run(addresses, stream)
        ((config, given),) = driver.launched
        driver.launched.clear()
        assert config[:9] == (7, 3, 1, 256, 1, 1, 4096, 0, stream) and config[10] == 1
        assert struct.unpack("<16Q", given[0]) == (addresses[0], *_REST)
        assert struct.unpack("<Q", given[1]) == (addresses[2],)
        assert struct.unpack("<fi", given[2] + given[3]) == (0.5, 12)


def test_programs_of_a_cluster_run_together(driver: _Driver, tmp_path: Path) -> None:
    tags = (*(f"tir.cluster_dim_{x}" for x in ("x", "y", "z")), _TAGS[4])
    program = _program(_library(tmp_path, tags=tags))
    assert _recorded.recorded(program, _TENSORS, 0) == [program]  # 7 by 3 by 256 are too many
    size = Entry(_TYPES, tags).sizes((2, 1, 1, 64))
    assert size is not None and size.cluster == (2, 1, 1) and size.grid == (1, 1, 1)
    place = "toy_kernel", FUNCTION, (8,), (32,), 64, (Map(0, _REST), At(1), 2, 3)
    Frame([Kernel(*place, dependent=True, cluster=(4, 2, 1))], _TENSORS, 0).run([16] * 3, 0)
    assert driver.attributes == [(4, (4, 2, 1)), (6, (1, 0, 0))]


def test_an_address_is_written_once(driver: _Driver) -> None:
    """For all maps that are alike; and a tensor that has one is read of there."""
    place = "toy_kernel", FUNCTION, (8,), (32,), 64
    first, second = Map(0, _REST), Map(0, _REST[::-1])
    pairs = (first, At(0)), (second, At(2)), (first, At(2)), (Map(1, _REST), At(1))
    launches = [Kernel(*place, (*x, 1, 2), dependent=False) for x in pairs]
    frame, addresses = Frame(launches, _TENSORS, 0), (512, 1024, 2048)
    assert len(frame._written) == len({first, second, Map(1, _REST), At(2)})
    for shift in (0, 2**45):
        driver.launched.clear()
        lying = [x + shift for x in addresses]
        frame.run(lying, 0)
        for (_, given), (mapped, at) in zip(driver.launched, pairs, strict=True):
            assert struct.unpack("<16Q", given[0]) == (lying[mapped.tensor], *mapped.rest)
            assert struct.unpack("<Q", given[1]) == (lying[at.tensor],)


def test_kernels_and_programs_of_a_pass_share_addresses(
    driver: _Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps of several launches lie one after the other; of programs whole tensors are kept."""
    program = _program(_library(tmp_path))
    (found,) = _recorded.recorded(program, _TENSORS, 0)
    assert isinstance(found, Kernel)
    other = found._replace(parameters=(Map(1, _REST[::-1]), At(0), 1, 2))
    said: list[tuple[Any, ...]] = []
    monkeypatch.setattr(_driver, "load_kernel", None)
    import tvm_ffi

    (tmp_path / "other").mkdir()
    module = tvm_ffi.load_module(str(_library(tmp_path / "other")))
    module.clear_imports()  # no driver here runs its own kernel
    tvm_ffi.register_global_func("toy_kernel", lambda *x: said.append(x), override=True)
    try:
        own = program._replace(function=module.get_function("main"))
        Frame([found, own, other], _TENSORS, 0).run([512, 1024, 2048], 0)
    finally:
        tvm_ffi.remove_global_func("toy_kernel")
    maps = [struct.unpack("<16Q", given[0]) for _, given in driver.launched]
    assert maps == [(512, *_REST), (1024, *_REST[::-1])]
    assert [struct.unpack("<Q", given[1])[0] for _, given in driver.launched] == [2048, 512]
    assert [x[1].value for x in said] == [2048] and said[0][3] == 12


@pytest.mark.parametrize(
    ("defined", "packed"),
    [
        (("TWISTED",), {}),  # the map's first word is no address
        (("UNEVEN",), {}),  # it does not launch the same each time
        (("WORKSPACE",), {}),  # it calls what is not known
        ((), {"tags": (*_TAGS, "clusterDim.x")}),
        ((), {"tags": ("gridDim", *_TAGS[2:])}),
        ((), {"image": b"// PTX, which would be compiled once more"}),
    ],
)
def test_what_is_not_understood_stays_a_program(
    defined: tuple[str, ...], packed: dict[str, Any], driver: _Driver, tmp_path: Path
) -> None:
    program = _program(_library(tmp_path, *defined, **packed))
    assert _recorded.recorded(program, _TENSORS, 0) == [program]


@pytest.mark.parametrize("what", ["environment", "capture", "device", "sizes", "file", "foreign"])
def test_some_surroundings_leave_a_program_as_it_is(
    what: str, driver: _Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _library(tmp_path)
    program = _program(path)
    if what == "environment":
        monkeypatch.setenv("GDN2GEN_BOUND", "programs")
    elif what == "capture":
        driver.capturing = 1
    elif what == "device":
        driver.device = 1
    elif what == "sizes":
        driver.sizes = [128, 8, 4, 8]
    elif what == "file":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        program = program._replace(function=SimpleNamespace(__chandle__=lambda: 1))
    assert _recorded.recorded(program, _TENSORS, 0) == [program]


def test_no_fault_of_recording_reaches_a_call(
    driver: _Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass is bound after it has run: what it computed is there, and is not lost for this."""

    class OfAnotherVersion(Exception):
        """As libraries raise that have exceptions of their own."""

    def fails(*_: Any) -> int:
        raise OfAnotherVersion

    import tvm_ffi

    program = _program(_library(tmp_path))
    before = tvm_ffi.get_global_func("toy_kernel", allow_missing=True)
    monkeypatch.setattr(_driver, "load_kernel", fails)
    assert _recorded.recorded(program, _TENSORS, 0) == [program]
    assert before is None and tvm_ffi.get_global_func("toy_kernel", allow_missing=True) is None


def test_code_is_read_as_it_was_packed(tmp_path: Path) -> None:
    library = _library(tmp_path).read_bytes()
    code = read_code(library)
    assert code is not None and code.image == b"\x7fELF and so on"
    assert code.kernels == {"toy_kernel": Entry(_TYPES, _TAGS)}
    assert code.kernels["toy_kernel"].nbytes == [128, 8, 4, 4]
    begin = library.index(_packed())
    for end in (begin + 9, begin + len(_packed()) // 2, len(library) // 3):
        cut = library[:end] + bytes(len(library) - end)
        assert read_code(cut) is None
    assert read_code(b"") is None and read_code(b"\x7fELF") is None


def test_scalars_become_words() -> None:
    assert Type(0, 32).words(-1) == 2**32 - 1
    assert Type(0, 64).words(-1) == 2**64 - 1
    assert Type(2, 64).words(1.0) == int.from_bytes(struct.pack("<d", 1.0), "little")
    assert Type(3, 64).words(None) == 0
    with pytest.raises(ValueError, match="parameter"):
        Type(4, 16).words(1)
    assert FLOAT != INT
