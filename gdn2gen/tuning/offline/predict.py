"""Predict how configs compare from what the compiler reports, where no GPU can time them."""

from __future__ import annotations

import itertools
from typing import Final

from gdn2gen.base.device import Device
from gdn2gen.codegen.build import Resources
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.stages import STAGES
from gdn2gen.measure.timing import symbol_sizes

_REGISTERS: Final = 65536
_THREADS_PER_WARP: Final = 32
_BLOCKS_PER_SM: Final = 32
_WARPS_PER_SM: Final = {"sm_86": 48, "sm_89": 48, "sm_120": 48}
# A block may opt in to all of an SM's shared memory but this reserve.
_SHARED_RESERVE: Final = 1024
# Resident warps below which kernels of this kind no longer stream at full rate: at 8 an SM they
# reached about half of it on an H200.
_ENOUGH_WARPS: Final = 16
# A scan's chunk by its stages of loads: none ahead, one, two or more; microseconds, serial and
# parallel scans of 16 heads and 32768 tokens on an H200 (docs/search). Warps with less than a tile
# of 16 rows each take longer, and so do spills inside the loop.
_CHUNK_US: Final = (3.2, 1.5, 1.05)
_FEW_ROWS: Final = 1.6
_SPILL_DOUBLES: Final = 100
_BYTES_PER_US: Final = 4.3e6
# Slices of V run side by side, so most of what one reads again is in the L2.
_REREAD: Final = 0.25


def blocks_per_sm(resources: Resources, device: Device) -> int:
    """Blocks that fit on one SM by registers, shared memory and warps; 0 if not even one does."""
    by_registers = _REGISTERS // max(1, resources.registers * resources.threads)
    shared = device.shared_bytes + _SHARED_RESERVE
    by_shared = shared // (resources.shared_bytes + _SHARED_RESERVE)
    by_warps = _WARPS_PER_SM.get(device.arch, 64) * _THREADS_PER_WARP // resources.threads
    return min(by_registers, by_shared, by_warps, _BLOCKS_PER_SM)


def predicted_bytes(
    problem: Problem, config: Config, shape: Shape, resources: Resources, device: Device
) -> float:
    """What a config costs, in bytes: less is better.

    Bytes moved, weighted by how far occupancy falls short; for scans, which go from chunk to chunk,
    also what an H200 could have moved meanwhile. Over the bandwidth it is a time; that is a
    ranking, not a forecast. inf if it cannot run.
    """
    blocks = blocks_per_sm(resources, device)
    if blocks <= 0:
        return float("inf")
    BT, slots = config.size("BT"), blocks * device.sms
    sizes = symbol_sizes(problem, shape, BT, config.max_segments)
    if STAGES[config.stage].is_chain:
        return _bytes_of_scan(problem, config, sizes, shape, resources, slots)
    programs = sizes["NT"] * shape.H
    moved = float(STAGES[config.stage].nbytes(problem, sizes))
    moved += 2 * resources.spill_bytes * resources.threads * programs
    resident = min(slots, programs) / device.sms * resources.threads / _THREADS_PER_WARP
    return moved / min(1.0, resident / _ENOUGH_WARPS)


def _bytes_of_scan(
    problem: Problem,
    config: Config,
    sizes: dict[str, int],
    shape: Shape,
    resources: Resources,
    slots: int,
) -> float:
    """Both phases of a parallel scan: the segments' ends and transitions, then the scan itself."""
    stage, BV = STAGES[config.stage], config.size("BV")
    inputs = [x for x in stage.operands(problem) if x in stage.inputs]
    wide = sum(x.nbytes(problem, sizes) for x in inputs if x.dims.split()[-1] != "V")
    slices = -(-problem.V // BV)
    moved = stage.nbytes(problem, sizes) + _REREAD * (slices - 1) * wide
    heads, NS = sizes["N"] * shape.H, sizes["NS"]
    chunks = -(-_longest(shape) // config.size("BT"))
    parallel = config.get("segments") == "parallel"
    # rescan has a program for each segment whatever its form
    segments = NS if parallel or config.stage.startswith("rescan") else 1
    phases = [heads * slices * segments]
    if parallel and NS > 1:
        transition = -(-problem.K // BV)
        folded = (slices + transition) * (NS - 1) - transition
        phases.append(heads * folded)
        read = sum(x.nbytes(problem, sizes) for x in inputs)
        moved += read * (NS - 1) / NS + _REREAD * max(0.0, folded / NS - 1) * wide
    steps = sum(-(-chunks // segments) * max(1.0, programs / slots) for programs in phases)
    return moved + steps * _chunk_us(config, resources) * _BYTES_PER_US


def _chunk_us(config: Config, resources: Resources) -> float:
    """Time of one chunk in a scan's chain."""
    us = _CHUNK_US[min(config.size("num_stages"), len(_CHUNK_US)) - 1]
    BV, warps = config.size("BV"), config.size("num_warps")
    if 16 < BV < 16 * warps:
        us *= _FEW_ROWS
    return us * (1 + resources.spill_bytes / _SPILL_DOUBLES)


def _longest(shape: Shape) -> int:
    """Tokens of the longest sequence."""
    if shape.cu_seqlens is None:
        return shape.T
    return max(end - start for start, end in itertools.pairwise(shape.cu_seqlens))
