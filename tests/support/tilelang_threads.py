"""TileLang programs whose threads do different things, carried out in Python: `get_thread_binding`.

A thread of Python for each of the program's; tiles are shared between them. What all do together, a
product say, one of them does while the others wait: more barriers than the program has, so that
what it computes is seen, but no race.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tilelang_standin import Tile, body_of, language, programs, tiles_of

TOGETHER = "clear copy gemm reduce_sum reduce_min tma_copy wgmma_gemm"


class Threads:
    """The threads of a program, and the tiles that they share."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count)
        self.lock = threading.Lock()
        self.tiles: list[Tile] = []
        self.own = threading.local()
        self.warps = [threading.Barrier(32) for _ in range(count // 32)]
        self.lanes: list[Any] = [None] * count

    def wait(self) -> None:
        self.barrier.wait(timeout=120)

    def together(self, work: Callable[..., None]) -> Callable[..., None]:
        def by_one(*args: Any, **kwargs: Any) -> None:
            self.wait()
            if self.own.index == 0:
                work(*args, **kwargs)
            self.wait()

        return by_one

    def parallel(self, elements: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def by_one(*extents: int) -> Iterator[Any]:
            self.wait()
            if self.own.index == 0:
                yield from elements(*extents)
            self.wait()

        return by_one

    def shared(self, shape: list[int], dtype: str) -> Tile:
        with self.lock:
            number, self.own.tiles = self.own.tiles, self.own.tiles + 1
            if number == len(self.tiles):
                self.tiles.append(Tile(np.full(shape, np.nan, np.float32), dtype))
            return self.tiles[number]

    def shuffled(self, source: Callable[[int, int], int]) -> Callable[[Any, int], Any]:
        """What a lane has of another one, `source` of its own number; of none, what it gave."""

        def by_lane(value: Any, distance: int) -> Any:
            index = self.own.index
            self.lanes[index] = value
            self.warps[index // 32].wait(timeout=120)
            other = source(index % 32, distance)
            found = self.lanes[index // 32 * 32 + other] if 0 <= other < 32 else value
            self.warps[index // 32].wait(timeout=120)
            return found

        return by_lane

    def run(self, work: Callable[[], None]) -> None:
        faults: list[BaseException] = []
        self.tiles.clear()

        def one(index: int) -> None:
            self.own.index, self.own.tiles = index, 0
            try:
                work()
            except BaseException as fault:
                faults.append(fault)
                for barrier in (self.barrier, *self.warps):
                    barrier.abort()

        threads = [threading.Thread(target=one, args=(x,)) for x in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            real = [x for x in faults if not isinstance(x, threading.BrokenBarrierError)]
            raise [*real, *faults][0]


def run_all(
    module: ModuleType, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int], *scalars: float
) -> dict[str, torch.Tensor]:
    """As `tilelang_standin.run_all`."""
    threads, names = Threads(getattr(module, "THREADS", 128)), vars(language(sizes))
    names |= {x: threads.together(names[x]) for x in TOGETHER.split()}
    names |= dict.fromkeys(("alloc_shared", "alloc_fragment"), threads.shared)
    names |= {
        "Parallel": threads.parallel(names["Parallel"]),
        "get_thread_binding": lambda: threads.own.index,
        "grid": names["Parallel"],
        "shfl_down": threads.shuffled(operator.add),
        "shfl_up": threads.shuffled(operator.sub),
        "shfl_xor": threads.shuffled(operator.xor),
        "sync_threads": threads.wait,
        "vectorized": range,
    }
    body = body_of(module, names)
    tensors = tiles_of(body, given)
    for _ in programs(body, tensors, scalars):
        threads.run(lambda: body(*tensors.values(), *scalars))
    return {name: torch.from_numpy(x.array) for name, x in tensors.items()}
