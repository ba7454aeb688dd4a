"""TileLang programs, or clusters of them, whose groups of 128 threads do different things.

A thread of Python for each thread of a cluster's programs. Barriers in shared memory are real, with
their phases, and copies by TMA and products under way happen late: a copy some time after it was
issued, a product when it is waited for. So what reads too early reads NaN or another chunk's
values, and what waits for what never comes is seen as such. What a group does together, a product
say, one of its threads does while the others wait: races within a group are not seen.
"""

from __future__ import annotations

import itertools
import operator
import random
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tilelang_standin import BF16, Tile, _GridKnown, body_of, language, tiles_of

PATIENCE = 60  # seconds until a wait counts as one for ever


def rounded(x: Any, dtype: str) -> Any:
    """As `tilelang_standin.rounded`, fast for single numbers, too."""
    if (
        dtype == "int32"
    ):  # of what is no number 0, as the GPU has it; past either end it begins anew
        x = np.nan_to_num(np.asarray(x)).astype(np.int64)
        return (x + 2**31) % 2**32 - 2**31
    x = np.asarray(x, np.float32)
    if dtype != BF16:
        return x
    bits = np.atleast_1d(x).view(np.uint32)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    nan = np.isnan(np.atleast_1d(x))
    return np.where(nan, np.float32("nan"), up.view(np.float32)).reshape(x.shape)


class Fast(Tile):
    def __getitem__(self, index: Any) -> Any:
        try:
            found = self.array[index]
        except IndexError:  # a side that `if_then_else` does not choose
            return np.float32(0)
        return Fast(found, self.dtype, True) if isinstance(found, np.ndarray) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        self.array[index] = rounded(value, self.dtype)


class Barrier:
    """One in shared memory: `count` arrivals, and the bytes announced, complete a phase."""

    def __init__(self, count: int, cluster: Cluster, at: tuple[int, int, int]) -> None:
        self.count, self.cluster, self.at = count, cluster, at
        self.left, self.bytes, self.phase = count, 0, 0

    def change(self, arrivals: int, announced: int) -> None:
        with self.cluster.changed:
            self.left -= arrivals
            self.bytes += announced
            assert self.left >= 0, f"more arrivals than {self.count} at barrier {self.at}"
            if self.left == 0 and self.bytes == 0:
                self.left, self.phase = self.count, self.phase + 1
            self.cluster.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.cluster.changed:
            done = self.cluster.changed.wait_for(
                lambda: self.cluster.broken or self.phase % 2 != parity, PATIENCE
            )
        if self.cluster.broken or not done:
            raise TimeoutError(f"barrier {self.at}: phase {self.phase}, parity {parity}")


class Cluster:
    """The threads of a cluster of `programs`, their tiles and barriers."""

    def __init__(self, programs: int, threads: tuple[int, ...], seed: int) -> None:
        self.programs, self.sizes, self.threads = programs, threads, prod(threads)
        self.changed = threading.Condition()
        self.broken = False
        self.own = threading.local()
        self.lock = threading.Lock()
        self.kept: dict[Any, Any] = {}
        self.pending: dict[Any, int] = defaultdict(int)  # stores of a group that were not read yet
        self.products: dict[Any, deque[Callable[[], None]]] = defaultdict(deque)
        self.late: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self.random = random.Random(seed)
        self.everyone = threading.Barrier(self.programs * self.threads)

    # what a thread is

    @property
    def rank(self) -> int:
        return self.own.index // self.threads

    @property
    def thread(self) -> int:
        return self.own.index % self.threads

    @property
    def group(self) -> tuple[int, int]:
        return self.rank, self.thread // 128

    def binding(self, dim: int) -> int:
        self.own.apart = True  # what is allocated from here on is the group's own
        return self.thread // prod(self.sizes[:dim]) % self.sizes[dim]

    def allocate(self, make: Callable[[Any], Any]) -> Any:
        owner = self.group if self.own.apart else (self.rank,)
        number, self.own.made = self.own.made, self.own.made + 1
        with self.lock:
            if (*owner, number) not in self.kept:
                self.kept[(*owner, number)] = make(number)
            return self.kept[(*owner, number)]

    # what threads do together

    def sync(self, name: int, count: int) -> None:
        with self.lock:
            barrier = self.kept.setdefault(("sync", self.rank, name), threading.Barrier(count))
        barrier.wait(PATIENCE)

    def together(self, work: Callable[..., None]) -> Callable[..., None]:
        def by_one(*args: Any, **kwargs: Any) -> None:
            self.sync(100 + self.group[1], 128)
            if self.thread % 128 == 0:
                work(*args, **kwargs)
            self.sync(100 + self.group[1], 128)

        return by_one

    # what happens later

    def later(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        with self.changed:
            self.late.append((work, done))
            self.changed.notify_all()

    def engine(self, stop: threading.Event) -> None:
        """Copies that were issued, in any order but those of one group's stores."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.late or stop.is_set(), 0.01)
                if not self.late:
                    if stop.is_set():
                        return
                    continue
                work, done = self.late.pop(self.random.randrange(len(self.late)))
            stop.wait(self.random.choice((0, 0, 0.02)))
            work()
            done()

    def run(self, body: Callable[[int], None]) -> None:
        faults: list[BaseException] = []

        def one(index: int) -> None:
            self.own.index, self.own.made, self.own.apart = index, 0, False
            try:
                body(index // self.threads)
            except BaseException as fault:
                faults.append(fault)
                with self.changed:
                    self.broken = True
                    self.changed.notify_all()
                for barrier in (self.everyone, *self.kept.values()):
                    if isinstance(barrier, threading.Barrier):
                        barrier.abort()

        stop = threading.Event()
        engine = threading.Thread(target=self.engine, args=(stop,))
        threads = [
            threading.Thread(target=one, args=(x,)) for x in range(self.programs * self.threads)
        ]
        for thread in (engine, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        engine.join()
        if faults:
            real = [x for x in faults if not isinstance(x, threading.BrokenBarrierError)]
            raise [*real, *faults][0]


def _names(current: Callable[[], Cluster], sizes: Mapping[str, int]) -> dict[str, Any]:
    def tile(shape: list[int], dtype: str) -> Fast:
        empty = (
            np.zeros(shape, np.int64) if dtype == "int32" else np.full(shape, np.nan, np.float32)
        )
        return Fast(empty, dtype)

    def shared(shape: list[int], dtype: str) -> Fast:
        return current().allocate(lambda _: tile(shape, dtype))

    def barriers(counts: list[int]) -> list[Barrier]:
        cluster = current()
        rank = cluster.rank
        return cluster.allocate(
            lambda number: [Barrier(x, cluster, (rank, number, i)) for i, x in enumerate(counts)]
        )

    def cluster_barriers(counts: list[int]) -> list[Barrier]:
        """The other program may arrive at them, and write beside them, once they are there."""
        found = barriers(counts)
        current().everyone.wait(PATIENCE)
        return found

    def arrive(barrier: Barrier, program: int | None = None) -> None:
        rank, number, i = barrier.at
        if program is not None and program != rank:
            barrier = current().kept[(program, number)][i]
        barrier.change(1, 0)

    def copy(source: Tile, target: Tile, disable_tma: bool = False) -> None:
        given = rounded(source.array, target.dtype)
        given = given[tuple(map(slice, target.array.shape))]
        target.array[...] = 0
        target.array[tuple(map(slice, given.shape))] = given

    def tma_copy(source: Tile, target: Tile, barrier: Barrier | None = None) -> None:
        cluster = current()
        size = source.array.size

        def work() -> None:
            if barrier is None:  # nothing is stored past the end
                inside = tuple(map(slice, target.array.shape))
                target.array[...] = rounded(source.array[inside], target.dtype)
            else:
                copy(source, target)

        def issue() -> None:
            group = cluster.group
            if barrier is not None:
                target.array[...] = np.nan
                barrier.change(0, size + 1)  # the rest of a tile past the end counts, too
                cluster.later(work, lambda: barrier.change(0, -size - 1))
                return
            with cluster.changed:
                cluster.pending[group] += 1

            def stored() -> None:
                with cluster.changed:
                    cluster.pending[group] -= 1
                    cluster.changed.notify_all()

            cluster.later(work, stored)

        cluster.together(issue)()

    def tma_store_wait(count: int) -> None:
        cluster = current()
        if cluster.thread % 128:
            return
        with cluster.changed:
            assert cluster.changed.wait_for(
                lambda: cluster.broken or cluster.pending[cluster.group] <= count, PATIENCE
            )

    def copy_cluster(
        source: Fast, target: Fast, *, dst_block: int, remote_barrier: Barrier
    ) -> None:
        """`source` and `target` are parts of one tile, here and in the other program."""
        cluster = current()
        _, number, i = remote_barrier.at
        other = cluster.kept[(dst_block, number)][i]
        base = source.array.base
        here = next(
            key
            for key, x in cluster.kept.items()
            if isinstance(x, Fast) and x.array is base and key[0] == cluster.rank
        )
        start = (source.array.ctypes.data - base.ctypes.data) // source.array.itemsize
        there = cluster.kept[(dst_block, *here[1:])].array.reshape(-1)
        size = source.array.size

        def work() -> None:
            there[start : start + size] = source.array.reshape(-1)

        other.change(1, size)
        cluster.later(work, lambda: other.change(0, -size))

    def wgmma_gemm(*args: Any, **kwargs: Any) -> None:
        cluster = current()
        kwargs.pop("policy", None)

        def issue() -> None:
            cluster.products[cluster.group].append(lambda: names["_gemm"](*args, **kwargs))

        cluster.together(issue)()

    def wait_wgmma(count: int) -> None:
        cluster = current()

        def finish() -> None:
            queue = cluster.products[cluster.group]
            while len(queue) > count:
                queue.popleft()()

        cluster.together(finish)()

    def parallel(*extents: int) -> Iterator[Any]:
        cluster = current()
        cluster.sync(100 + cluster.group[1], 128)
        if cluster.thread % 128 == 0:
            yield from (x if len(x) > 1 else x[0] for x in itertools.product(*map(range, extents)))
        cluster.sync(100 + cluster.group[1], 128)

    def shuffled(value: Any, distance: int, other: Callable[[int, int], int] = operator.add) -> Any:
        """What the lane so far up has of the value; past the warp's ends a lane's own."""
        cluster = current()
        lane, warp = cluster.thread % 32, cluster.thread // 32
        key = ("shuffle", cluster.rank, warp)
        with cluster.lock:
            given = cluster.kept.setdefault(key, [np.float32(0)] * 32)
        given[lane] = value
        cluster.sync(200 + warp, 32)
        source = other(lane, distance)
        found = given[source] if 0 <= source < 32 else value
        cluster.sync(200 + warp, 32)
        return found

    def by_one(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: current().together(names[f"_{name}"])(*args, **kwargs)

    names = vars(language(sizes))
    names |= {"_copy": copy, "_gemm": names["gemm"], "_clear": names["clear"]}
    names |= {x: by_one(x) for x in ("copy", "gemm", "clear")}
    names |= {
        "And": lambda a, b: bool(a) and bool(b),
        "Parallel": parallel,
        "alloc_barrier": barriers,
        "alloc_cluster_barrier": cluster_barriers,
        "alloc_fragment": shared,
        "alloc_local": tile,
        "alloc_shared": shared,
        "barrier_arrive": arrive,
        "cast": lambda x, dtype: rounded(x, dtype)[()],
        "cos": lambda x: np.cos(np.float64(x)).astype(np.float32),
        "sin": lambda x: np.sin(np.float64(x)).astype(np.float32),
        "floor": lambda x: np.floor(np.float32(x)),
        "cluster_sync": lambda: current().everyone.wait(PATIENCE) and None,
        "copy_cluster": copy_cluster,
        "get_thread_binding": lambda dim=0: current().binding(dim),
        "grid": lambda *x: itertools.product(*map(range, x)),
        "int32": "int32",
        "macro": lambda f: f,
        "mbarrier_arrive": arrive,
        "mbarrier_wait_parity": lambda barrier, parity: barrier.wait(int(parity)),
        "rsqrt": lambda x: np.float32(1 / np.sqrt(np.float64(x))),
        "shfl_down": lambda x, distance: shuffled(x, distance),
        "shfl_sync": lambda x, lane: x,
        "shfl_up": lambda x, distance: shuffled(x, -distance),
        "shfl_xor": lambda x, mask: shuffled(x, mask, operator.xor),
        "shuffle_elect": lambda _: current().thread % 128 == 0,
        "sync_warp": lambda: current().sync(200 + current().thread // 32, 32),
        "sync_threads": lambda name, count: current().sync(name, count),
        "tma_copy": tma_copy,
        "tma_store_wait": tma_store_wait,
        "vectorized": range,
        "wait_wgmma": wait_wgmma,
        "wgmma_gemm": wgmma_gemm,
    }
    return names


class _Launch:
    """The kernel of a cluster, or of programs alone: one of it is what runs in this thread."""

    grid: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()
    programs = 0
    at: tuple[int, ...] | None = None

    def __init__(self, *grid: int, threads: tuple[int, ...], cluster_dims: int = 0) -> None:
        _Launch.grid, _Launch.threads, _Launch.programs = tuple(grid), threads, cluster_dims

    def __enter__(self) -> tuple[int, ...]:
        if _Launch.at is None:
            raise _GridKnown
        return (_current().rank, *_Launch.at) if _Launch.programs else _Launch.at

    def __exit__(self, *_: object) -> None:
        pass


_running: list[Cluster] = []


def _current() -> Cluster:
    return _running[-1]


def run_all(
    module: ModuleType,
    given: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    *scalars: float,
    seed: int = 0,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The tensors after all clusters of `module.program(**options)`; `given` stays as it is."""
    names = _names(_current, sizes) | {"Kernel": _Launch}
    body = body_of(_With(module, options), names)
    tensors = {name: Fast(x.array, x.dtype) for name, x in tiles_of(body, given).items()}
    _Launch.at = None
    with suppress(_GridKnown):
        body(*tensors.values(), *scalars)
    # programs of a cluster lie along the first dim
    for at in itertools.product(*map(range, _Launch.grid[min(_Launch.programs, 1) :])):
        _Launch.at = at
        _running.append(Cluster(max(_Launch.programs, 1), _Launch.threads, seed))
        try:
            _running[-1].run(lambda _: body(*tensors.values(), *scalars))
        finally:
            _running.pop()
    return {name: torch.from_numpy(x.array) for name, x in tensors.items()}


class _With:
    """A module whose program is made with options."""

    def __init__(self, module: ModuleType, options: Mapping[str, Any]) -> None:
        self.module, self.options = module, options

    def program(self) -> Any:
        return self.module.program(**self.options)
