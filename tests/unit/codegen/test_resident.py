"""prepare with as many programs as run at once: carried out in Python, the same bits as without."""

from __future__ import annotations

from collections import Counter, defaultdict
from types import ModuleType
from typing import Final

import pytest
import tilelang_threads
import torch
from tilelang_configs import tilelang_by_chunk
from tilelang_standin import body_of, language, programs
from torch import Tensor

from gdn2gen.base.errors import TemplateError
from gdn2gen.codegen import _resident
from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config

BT, K = 32, 32
PROBLEM: Final = Problem(K=K, V=32)
PACKED: Final = Problem(K=K, V=32, varlen=True)
BOUNDED: Final = Problem(K=K, V=32, gate="sigmoid", has_A_log=True, bound=2)


def config_of(problem: Problem) -> Config:
    return tilelang_by_chunk("prepare", problem, chunks=1)


def module_of(problem: Problem, config: Config) -> ModuleType:
    return load(render(problem, "prepare", config))


def reciprocal(n_chunks: int) -> int:
    return -(-(2**44) // n_chunks)


def given(B: int, T: int, H: int, NT: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    x = {name: torch.randn(B, T, H, K, generator=rng).bfloat16() for name in ("q", "k", "b")}
    x["g"] = -torch.rand(B, T, H, K, generator=rng)
    tiles = NT, H, BT
    shapes = {"A": (*tiles, BT), "Aqk": (*tiles, BT)}
    shapes |= dict.fromkeys(("Qg", "Y", "Ktail"), (*tiles, K))
    x |= {name: torch.full(size, torch.nan).bfloat16() for name, size in shapes.items()}
    x |= {name: torch.full(tiles, torch.nan) for name in ("q_rstd", "k_rstd")}
    return x | {"gamma_C": torch.full((NT, H, K), torch.nan)}


def compare(problem: Problem, tensors: dict[str, Tensor], n_slots: int, chunks: int) -> None:
    """The first `chunks`, which have tokens."""
    B, T, H, _ = tensors["q"].shape
    NT = len(tensors["A"])
    sizes = {"B": B, "T": T, "H": H, "HV": H, "HG": H, "NT": NT}
    config = config_of(problem)
    own = tilelang_threads.run_all(module_of(problem, config), tensors, sizes, 0.25, 0.0)
    other = module_of(problem, config.replace(programs="resident", pdl="signal"))
    given = (n_slots,) if problem.varlen else (n_slots, reciprocal(-(-T // BT)))
    all_at_once = tilelang_threads.run_all(other, tensors, sizes, 0.25, 0.0, *given)
    written = {name for name in own if torch.isnan(tensors[name]).any()}
    assert len(written) == 8
    for name in written:
        assert not own[name][:chunks].isnan().any(), name
        assert torch.equal(own[name][:chunks], all_at_once[name][:chunks]), name


@pytest.mark.slow
def test_programs_make_what_those_of_a_chunk_do() -> None:
    """Three programs take two sequences of two chunks, the second of which is not full."""
    compare(PROBLEM, given(B=2, T=40, H=1, NT=4), n_slots=3, chunks=4)


@pytest.mark.slow
def test_programs_make_the_same_of_a_packed_batch() -> None:
    """The last one has no tokens."""
    tensors = given(B=1, T=60, H=2, NT=4)
    table = torch.tensor([[0, 20], [20, 32], [52, 8], [60, 0]], dtype=torch.int32)
    compare(PACKED, tensors | {"chunk_table": table}, n_slots=2, chunks=3)


class _Any:
    """A tile or a tensor that is asked for anything, and notes where."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def __getitem__(self, index: object) -> _Any:
        self.seen.append(index)
        return self

    def __setitem__(self, index: object, value: object) -> None:
        self.seen.append(index)

    def __mul__(self, other: object) -> _Any:
        return self

    __rmul__ = __add__ = __mul__

    def __abs__(self) -> _Any:
        return self

    def __le__(self, other: object) -> bool:
        return True


def taken(problem: Problem, B: int, T: int, HV: int, n_slots: int) -> Counter[tuple[int, ...]]:
    """Chunk, head, sequence and first token of all that is loaded and stored, and how often."""
    NT = B * -(-T // BT)
    sizes = {"B": B, "T": T, "H": HV, "HV": HV, "HG": HV, "NT": NT}
    names = vars(language(sizes))
    nothing = "copy tma_copy gemm clear alloc_shared alloc_fragment alloc_local exp2 rsqrt"
    cast = names["cast"]
    names |= dict.fromkeys(nothing.split(), lambda *_, **__: _Any())
    none = "Parallel unroll vectorized grid"
    names |= dict.fromkeys(none.split(), lambda *_: ())
    names["get_thread_binding"] = lambda: 64
    names["cast"] = lambda x, dtype: x if isinstance(x, _Any) else cast(x, dtype)
    module = module_of(problem, config_of(problem).replace(programs="resident"))
    body = body_of(module, names)
    operands = config_of(problem).operands(problem)
    tensors = {x.name: _Any() for x in operands}
    scalars = 1.0, 0.0, n_slots, reciprocal(-(-T // BT))
    found: Counter[tuple[int, ...]] = Counter()
    for _ in programs(body, tensors, scalars):
        for x in tensors.values():
            x.seen.clear()
        body(*tensors.values(), *scalars)
        loaded = [(x[0], x[1].start, x[2]) for x in tensors["g"].seen]
        stored = [x[:2] for x in tensors["Ktail"].seen]
        assert loaded and len(loaded) == len(stored)
        for (i_b, i_row, head), (i_c, i_h) in zip(loaded, stored, strict=True):
            assert head == i_h
            found[i_c, i_h, i_b, i_row] += 1
    return found


@pytest.mark.parametrize("n_slots", [1, 3, 4, 6])
@pytest.mark.parametrize(("B", "T", "HV"), [(2, 70, 3), (1, 200, 1), (3, 64, 2)])
def test_every_chunk_is_taken_once(B: int, T: int, HV: int, n_slots: int) -> None:
    n_chunks = -(-T // BT)
    wanted = {
        (i_b * n_chunks + i, i_h, i_b, i * BT)
        for i_b in range(B)
        for i in range(n_chunks)
        for i_h in range(HV)
    }
    assert taken(PROBLEM, B, T, HV, n_slots) == dict.fromkeys(wanted, 1)


@pytest.mark.parametrize("sequences", [1, 3, 1000])
@pytest.mark.parametrize("n_chunks", [1, 2, 3, 7, 128, 1000, 2**16 - 1])
def test_a_product_stands_for_the_division(n_chunks: int, sequences: int) -> None:
    """At both ends of a sequence."""
    module = module_of(PROBLEM, config_of(PROBLEM).replace(programs="resident"))
    found = module.reciprocal_of(n_chunks, n_chunks * sequences)
    assert found == reciprocal(n_chunks)
    for i in {0, sequences // 2, sequences - 1}:
        for chunk in (i * n_chunks, (i + 1) * n_chunks - 1):
            assert chunk * found >> 44 == i and chunk * found < 2**63


def test_a_product_that_could_not_is_refused() -> None:
    module = module_of(PROBLEM, config_of(PROBLEM).replace(programs="resident"))
    n_chunks = 2**22 + 1
    assert (2**6 * n_chunks - 1) * reciprocal(n_chunks) >> 44 != 2**6 - 1
    with pytest.raises(OverflowError, match="told apart"):
        module.reciprocal_of(n_chunks, 2**6 * n_chunks)


@pytest.mark.parametrize(("multiprocessors", "heads", "slots"), [(132, 16, 24), (132, 500, 1)])
def test_programs_run_all_at_once(
    multiprocessors: int, heads: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as have room, but no more for a head than it has chunks."""
    config = config_of(Problem()).replace(programs="resident")
    module = module_of(Problem(), config)
    assert module.PROGRAMS == 3  # 80 registers a thread
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "multiprocessors", lambda _: multiprocessors)
    assert module.slots(512, heads) == slots
    assert module.slots(min(slots, 5), heads) == min(slots, 5)


@pytest.mark.parametrize("problem", [PROBLEM, PACKED, BOUNDED], ids=["own", "packed", "bounded"])
def test_launch_says_how_many_programs(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(problem).replace(programs="resident")
    if problem.bound:
        config = config.replace(decay="bounded")
    module = module_of(problem, config)
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr(module, "compiled", lambda: lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(module, "slots", lambda n_chunks, heads: ("slots", n_chunks, heads))
    monkeypatch.setattr(module, "later_frames_kernel", defaultdict(_Launch), raising=False)
    operands = [x.name for x in config.operands(problem)]
    module.launch(*operands, scale=1.0, lower_bound=0.0, n_chunks=9, T=40, H=1, HV=2, HG=1)
    batch = () if problem.varlen else (reciprocal(2),)
    assert seen == [(*operands, 1.0, 0.0, ("slots", 9, 2), *batch)]


class _Launch:
    """Of a kernel, in any grid."""

    def __call__(self, *arguments: object, **options: object) -> None:
        pass


def test_a_text_that_reads_otherwise_is_refused() -> None:
    source = render(PROBLEM, "prepare", config_of(PROBLEM)).source
    changed = source.replace("i_first = i_x * CHUNKS", "i_first = CHUNKS * i_x")
    with pytest.raises(TemplateError, match="0 places, not one"):
        _resident.resident(changed, PROBLEM, config_of(PROBLEM))
