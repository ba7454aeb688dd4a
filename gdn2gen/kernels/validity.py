"""Which configs can serve a problem, decided from their knobs alone."""

from __future__ import annotations

from typing import Final

from gdn2gen.family.problem import Problem
from gdn2gen.kernels.anchors import FROM_START, why_unbounded
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.kernels.stages import MAX_SEGMENTS

# Both from one template.
_SUMS: Final = ("reprepare", "sum_decay")


def why_invalid(config: Config, problem: Problem) -> str | None:
    """Say why `config` cannot serve `problem`, or None if it can. Decides without compiling."""
    if "BK" in config and config.size("BK") > problem.K:
        return f"BK={config['BK']} exceeds the key head dim K={problem.K}"
    if "BV" in config and config.size("BV") > problem.V:
        return f"BV={config['BV']} exceeds the value head dim V={problem.V}"
    if language_of(config) == "triton":
        if config.stage != "grad_key" and config.get("chunks", 1) != 1:
            return f"the Triton {config.stage} takes one chunk a program, not {config['chunks']}"
        if config.stage in _SUMS and config["num_stages"] != 1:
            return f"the Triton {config.stage} has no loop: num_stages={config['num_stages']}"
        if config.get("solve") == "halves":
            return "solve=halves is TileLang's way to invert; Triton's always goes by blocks"
        if config.stage == "prepare" and config["maxnreg"] == 64:
            return "the Triton prepare spills in 64 registers; four TileLang programs share them"
    if "decay" in config:
        reason = _why_not_placed(config, problem)
        if reason is not None:
            return reason
    if config.get("segments") == "parallel":
        reason = _why_not_parallel(config, problem)
        if reason is not None:
            return reason
    elif config.max_segments != MAX_SEGMENTS:
        return f"max_segments={config.max_segments} is of the parallel scans' segments"
    return _why_not_tilelang(config, problem) if language_of(config) == "tilelang" else None


def _why_not_placed(config: Config, problem: Problem) -> str | None:
    """Whether the placement of the decay goes with the other knobs."""
    decay = config["decay"]
    if decay in FROM_START:
        if problem.dtype == "fp16":
            return f"{decay} factors reach 2^96, which fp16 cannot hold: use a dyadic placement"
        if "BV" in config and config.size("BV") != problem.V:
            return f"the {decay} placement takes all of V={problem.V} at once, not {config['BV']}"
        if decay == "bounded":
            return why_unbounded(problem, config.stage, config.size("BT"))
        return None
    if config.stage == "prepare" and (config["BK"], config["num_warps"]) != (32, 1):
        # it reads back what it wrote, and 64 channels at a time would spill 2 KB a thread
        return f"dyadic placements of prepare are for BK=32 and num_warps=1, not {config}"
    if config.get("chunks", 1) != 1:
        return f"placements with dyadic blocks take one chunk a program, not {config['chunks']}"
    return None


def _why_not_parallel(config: Config, problem: Problem) -> str | None:
    if problem.varlen:
        return "sequences of a packed batch are one segment each: nothing to run side by side"
    if config.size("BV") > problem.K:
        return f"BV={config['BV']} rows of the transition, which has K={problem.K}"
    return None


def _why_not_tilelang(config: Config, problem: Problem) -> str | None:
    if config.stage in ("prepare", "grad_key"):
        return _why_not_tilelang_anchored(config, problem)
    if config.stage in ("grad_value", *_SUMS):
        return _why_not_tilelang_whole(config, problem)
    if problem.dtype == "fp32":
        return "the TileLang scans multiply 16-bit operands, but the problem is fp32"
    if config.size("BV") != 64 or config.size("num_warps") != 4:
        return (
            f"the TileLang scans give a warp group of 4 warps 64 rows of the state, but "
            f"BV={config['BV']} and num_warps={config['num_warps']}"
        )
    return None


def _why_not_tilelang_whole(config: Config, problem: Problem) -> str | None:
    """Of grad_value, which takes all of V at once, and of reprepare and sum_decay: all of K."""
    of_values = config.stage == "grad_value"
    tile, dim, size = ("BV", "V", problem.V) if of_values else ("BK", "K", problem.K)
    if problem.dtype == "fp32":
        return f"the TileLang {config.stage} has 16-bit operands, but the problem is fp32"
    if config.size(tile) != size or config.size("num_warps") != 4:
        return (
            f"the TileLang {config.stage} takes all of {dim}={size} with 4 warps, but "
            f"{tile}={config[tile]} and num_warps={config['num_warps']}"
        )
    if config["maxnreg"] not in (0, 80, 128):
        return f"the TileLang {config.stage} takes maxnreg of 0, 80 or 128, not {config['maxnreg']}"
    if config["BT"] == 16 and of_values:
        return "the TileLang grad_value multiplies tiles of 32 tokens and more, but BT=16"
    if config["BT"] == 16 and config.size("num_stages") > 1:
        return "a token's norms are 64 bytes in chunks of 16: of two stages one would be off"
    return None


def _why_not_tilelang_anchored(config: Config, problem: Problem) -> str | None:
    """Of prepare and grad_key."""
    if config["decay"] not in FROM_START or problem.dtype != "bf16":
        return f"the TileLang {config.stage} is anchored and for bf16: {config} {problem.dtype}"
    channels = problem.K if config.stage == "prepare" else 64
    if config.size("BK") != channels or config.size("num_warps") != 4:
        return (
            f"the TileLang {config.stage} gives a warp group of 4 warps {channels} channels, but "
            f"BK={config['BK']} and num_warps={config['num_warps']}"
        )
    if config.get("solve", "ieee") not in ("ieee", "halves"):
        return f"the TileLang prepare substitutes in fp32: solve=ieee, not {config['solve']}"
    if config.get("solve") == "halves" and config["BT"] != 32:
        return f"solve=halves gives two columns to a thread in chunks of 32, not {config['BT']}"
    # one program to a multiprocessor, two, three, or four: where their shared memory allows them,
    # and 128 sums a thread (the norms of 64 tokens) their registers
    shared: tuple[int, ...] = (0, 128)
    if config.stage == "prepare" and config.size("BT") < 64:
        shared = (0, 80, 128) if problem.K == 128 else (0, 64, 80, 128)
    if config["maxnreg"] not in shared:
        return (
            f"the TileLang {config.stage} with K={problem.K} and BT={config['BT']} takes "
            f"maxnreg of {shared}, not {config['maxnreg']}"
        )
    if config.stage == "grad_key" and config["BT"] == 16 and config.size("num_stages") > 1:
        # "misaligned address" on an H200: TMA writes to multiples of 128 bytes
        return "a token's sums are 64 bytes in chunks of 16: of several stages, every second is off"
    return None
