"""Predict how configs compare from what the compiler reports, where no GPU can time them."""

from __future__ import annotations

from typing import Final

from gdn2gen.bench import symbol_sizes
from gdn2gen.build import Resources
from gdn2gen.config import Config
from gdn2gen.device import Device
from gdn2gen.problem import Problem
from gdn2gen.shapes import Shape
from gdn2gen.stages import STAGES

_REGISTERS: Final = 65536
_THREADS_PER_WARP: Final = 32
_BLOCKS_PER_SM: Final = 32
_WARPS_PER_SM: Final = {"sm_86": 48, "sm_89": 48, "sm_120": 48}
# A block may opt in to all of an SM's shared memory but this reserve.
_SHARED_RESERVE: Final = 1024
# Resident warps below which kernels of this kind no longer stream at full rate: at 8 an SM they
# reached about half of it on an H200.
_ENOUGH_WARPS: Final = 16
# Slices of V run side by side, so most of what one reads again is in the L2.
_REREAD: Final = 0.25


def blocks_per_sm(resources: Resources, warps: int, device: Device) -> int:
    """Blocks that fit on one SM by registers, shared memory and warps; 0 if not even one does."""
    threads = warps * _THREADS_PER_WARP
    by_registers = _REGISTERS // max(1, resources.registers * threads)
    shared = device.shared_bytes + _SHARED_RESERVE
    by_shared = shared // (resources.shared_bytes + _SHARED_RESERVE)
    by_warps = _WARPS_PER_SM.get(device.arch, 64) // warps
    return min(by_registers, by_shared, by_warps, _BLOCKS_PER_SM)


def predicted_bytes(
    problem: Problem, config: Config, shape: Shape, resources: Resources, device: Device
) -> float:
    """Bytes moved, weighted by how far occupancy falls short: less is better.

    Over the bandwidth it is a time; that is a ranking, not a forecast. inf if it cannot run.
    """
    sizes = symbol_sizes(problem, shape, config.size("BT"))
    stage, warps = STAGES[config.stage], config.size("num_warps")
    programs, slices = sizes["NT"] * shape.H, 1
    if stage.template in ("scan", "reverse_scan"):
        slices = problem.V // config.size("BV")
        programs = sizes["N"] * shape.H * slices
    moved = float(stage.nbytes(problem, sizes))
    wide = sum(
        x.nbytes(problem, sizes)
        for x in stage.operands(problem)
        if x in stage.inputs and x.dims.split()[-1] != "V"
    )
    moved += _REREAD * (slices - 1) * wide
    moved += 2 * resources.spill_bytes * warps * _THREADS_PER_WARP * programs
    resident = min(blocks_per_sm(resources, warps, device), programs / device.sms) * warps
    if resident <= 0:
        return float("inf")
    return moved / min(1.0, resident / _ENOUGH_WARPS)
