"""TileLang programs carried out in Python on arrays: what they compute, not how or how fast.

Of the language what the programs of blocks use. Tiles hold NaN until they are written; values are
rounded where a tile or tensor in bf16 takes them; products sum in fp64. Loads past the end of a
tensor give zeros, and stores there are dropped, as TMA's are. Barriers and layouts do nothing here,
so that races are not seen; products that TileLang makes of other rows than it is told are refused.
Threads that do different things are in `tilelang_threads`.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

BF16 = "bfloat16"
COLUMNS = "columns"  # a product's policy: a warp group has some columns, and all rows
PANEL = 64  # columns of a tile in 16 bits that lie together


def rounded(x: Any, dtype: str) -> Any:
    if dtype != BF16:
        return np.asarray(x, np.float32)
    return torch.as_tensor(np.asarray(x, np.float32)).to(torch.bfloat16).float().numpy()


class Tile:
    """A tile or a tensor, or what a slice of it names."""

    def __init__(self, array: Any, dtype: str, part: bool = False) -> None:
        self.array, self.dtype, self.part = array, dtype, part

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple) and isinstance(getattr(index[-1], "start", 0), np.ndarray):
            first, last = index[-1].start, index[-1].stop
            by_group = [self.array[:, a:b] for a, b in zip(first, last, strict=True)]
            return Tile(np.stack(by_group), self.dtype, True)
        try:
            found = self.array[index]
        except IndexError:
            if isinstance(index, tuple) and any(isinstance(x, slice) for x in index):
                inside = tuple(x if isinstance(x, slice) else 0 for x in index)
                return Tile(np.zeros_like(self.array[inside]), self.dtype, True)
            # within `if_then_else`, both of whose sides are evaluated here
            return np.float32(0)
        return Tile(found, self.dtype, True) if isinstance(found, np.ndarray) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        # what is past the end of a tensor is dropped
        with suppress(IndexError):
            self.array[index] = rounded(value, self.dtype)


class Kernel:
    """The grid; outside of `run_all` a program begins, says how large it is, and ends."""

    grid: tuple[int, ...] = ()
    warp_groups = 1
    at: tuple[int, ...] | None = None

    def __init__(self, *grid: int, threads: int) -> None:
        Kernel.grid = tuple(map(int, grid))
        Kernel.warp_groups = threads // 128

    def __enter__(self) -> tuple[int, ...]:
        if Kernel.at is None:
            raise _GridKnown
        return Kernel.at

    def __exit__(self, *_: object) -> None:
        pass


class _GridKnown(Exception):
    pass


def copy(source: Tile, target: Tile, disable_tma: bool = False) -> None:
    given = rounded(source.array, target.dtype)
    given = given[tuple(map(slice, target.array.shape))]
    target.array[...] = 0
    target.array[tuple(map(slice, given.shape))] = given


def _finds_columns(b: Any) -> bool:
    """Whether each warp group, to which a product gives columns of `b`, reads these in its rows.

    A tile is panels of 64 columns, each with all rows. TileLang 0.1.15 takes a group to its panel
    by the rows that the product has: of rows 64 to 128 of [128, 128], the second group to rows 0 to
    64 of the second panel.
    """
    all_rows = b.base is None or b.base.ndim != 2 or len(b) == len(b.base)
    return all_rows or Kernel.warp_groups == 1 or b.shape[1] <= PANEL


def gemm(
    a: Tile,
    b: Tile,
    c: Tile,
    transpose_A: bool = False,
    transpose_B: bool = False,
    policy: object = None,
    clear_accum: bool = False,
) -> None:
    assert a.dtype == b.dtype == BF16
    assert transpose_B or policy != COLUMNS or _finds_columns(b.array), (
        f"{b.array.shape} of {b.array.base.shape}: TileLang has a warp group's columns begin where "
        "they would without the other rows"
    )
    left = a.array.T if transpose_A else a.array
    right = b.array.T if transpose_B else b.array
    before = 0.0 if clear_accum else c.array
    if b.array.ndim == 3:  # what each warp group multiplies its rows of the left operand by
        left = left.reshape(len(b.array), -1, left.shape[1])
        right = b.array
    product = left.astype(np.float64) @ right.astype(np.float64)
    c.array[...] = before + product.reshape(c.array.shape)


def reinterpret(x: Any, dtype: str) -> Any:
    """The bits of a number as another; of one in bf16 the first half of what fp32 has."""
    if dtype == "float32":
        return np.uint32(x).view(np.float32)
    bits = int(np.float32(x).view(np.uint32))
    return bits >> 16 if dtype == "uint16" else bits


def chosen(condition: Any, a: Any, b: Any) -> Any:
    """By one condition, or by each lane's own."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, *(getattr(x, "array", x) for x in (a, b)))
    return a if condition else b


def least(*given: Any) -> Any:
    """Of numbers, or element by element of what the lanes of a warp have; as there, not of NaN."""
    if all(isinstance(x, int) for x in given):
        return min(given)
    return functools.reduce(np.fmin, (getattr(x, "array", x) for x in given))


def language(sizes: Mapping[str, int]) -> SimpleNamespace:
    def allocate(shape: list[int], dtype: str) -> Tile:
        if dtype == "int32":
            return Tile(np.zeros(shape, np.int64), dtype)
        return Tile(np.full(shape, np.nan, np.float32), dtype)

    def parallel(*extents: int) -> Iterator[Any]:
        return (x if len(x) > 1 else x[0] for x in itertools.product(*map(range, extents)))

    def fill_zero(x: Tile) -> None:
        x.array[...] = 0

    def reduce_sum(x: Tile, y: Tile, dim: int) -> None:
        y.array[...] = x.array.sum(axis=dim)

    def reduce_min(x: Tile, y: Tile, dim: int) -> None:
        y.array[...] = np.fmin.reduce(x.array, axis=dim)

    idle = (
        "annotate_min_blocks_per_sm annotate_producer_reg_dealloc annotate_consumer_reg_alloc "
        "annotate_layout tma_store_wait sync_threads wait_wgmma Fragment alloc_var "
        "fence_proxy_async pdl_sync pdl_trigger inc_max_nreg dec_max_nreg"
    )
    return SimpleNamespace(
        **dict.fromkeys(idle.split(), lambda *_, **__: None),
        Tensor=lambda *_: None,
        abs=abs,
        StridedTensor=lambda *_: None,
        Kernel=Kernel,
        GemmWarpPolicy=SimpleNamespace(FullRow=None, FullCol=COLUMNS),
        Parallel=parallel,
        Pipelined=lambda n, num_stages: range(n),
        alloc_shared=allocate,
        alloc_fragment=allocate,
        alloc_local=allocate,
        cast=lambda x, dtype: int(x) if "int" in dtype else rounded(x, dtype)[()],
        ceildiv=lambda a, b: -(-a // b),
        clear=fill_zero,
        copy=copy,
        dynamic=lambda name, dtype="int32": sizes[name],
        exp=lambda x: np.exp(np.float32(x)),
        exp2=lambda x: np.exp2(np.float32(x)),
        float32="float32",
        gemm=gemm,
        int32="int32",
        int64="int64",
        if_then_else=chosen,
        get_lane_idx=lambda: np.arange(32),
        get_thread_binding=lambda: np.arange(0, 256, 128),  # a thread of either warp group
        min=least,
        max=max,
        prim_func=lambda f: f,
        reduce_min=reduce_min,
        reinterpret=reinterpret,
        reduce_sum=reduce_sum,
        rsqrt=lambda x: np.float32(1) / np.sqrt(np.float32(x)),
        serial=range,
        uint32=int,
        unroll=lambda *bounds, unroll_factor=0: range(*bounds),
        warp_reduce_min=np.fmin.reduce,
        tma_copy=copy,
        wgmma_gemm=gemm,
    )


@contextmanager
def _imported_as_tilelang(names: Mapping[str, Any]) -> Iterator[None]:
    modules = {x: ModuleType(x) for x in ("tilelang", "tilelang.language", "tilelang.layout")}
    vars(modules["tilelang.language"]).update(names)
    vars(modules["tilelang"])["language"] = modules["tilelang.language"]
    vars(modules["tilelang.layout"])["make_swizzled_layout"] = lambda _: None
    before = {x: sys.modules.pop(x, None) for x in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _array(x: torch.Tensor) -> Any:
    return (x.float() if x.is_floating_point() else x).numpy().copy()


def body_of(module: ModuleType, names: Mapping[str, Any], program: str = "program") -> Any:
    """A program of the module, with TileLang's names as given."""
    with _imported_as_tilelang(names):
        return getattr(module, program)()


def tiles_of(body: Any, given: Mapping[str, torch.Tensor]) -> dict[str, Tile]:
    """Copies of its tensors, in the order of its parameters."""
    return {
        name: Tile(_array(given[name]), str(given[name].dtype).split(".")[1])
        for name in body.__annotations__
        if name in given
    }


def programs(body: Any, tensors: Mapping[str, Tile], scalars: tuple[float, ...]) -> Iterator[None]:
    """Each program of the grid in turn, for the caller to run."""
    Kernel.at = None
    with suppress(_GridKnown):
        body(*tensors.values(), *scalars)
    for at in itertools.product(*map(range, Kernel.grid)):
        Kernel.at = at
        yield


def run_all(
    module: ModuleType,
    given: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    *scalars: float,
    program: str = "program",
    unwritten: float = float("nan"),
) -> dict[str, torch.Tensor]:
    """The tensors after all of a module's programs, one after the other; `given` stays as it is.

    What is `unwritten` at first may be written by one of them: which is last on a GPU nobody knows.
    """
    body = body_of(module, vars(language(sizes)), program)
    tensors = tiles_of(body, given)
    for _ in programs(body, tensors, scalars):
        before = {name: x.array.copy() for name, x in tensors.items()}
        body(*tensors.values(), *scalars)
        for name, x in tensors.items():
            was = before[name]
            again = (x.array != was) & (was == was) & (was != unwritten)
            assert not again.any(), f"two programs write to {name}"
    return {name: torch.from_numpy(x.array) for name, x in tensors.items()}
