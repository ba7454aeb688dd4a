"""Config: one frozen set of knobs for a stage: domains, defaults, one validity predicate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from gdn2gen.anchors import FROM_START, why_unbounded
from gdn2gen.errors import ConfigError
from gdn2gen.problem import Problem
from gdn2gen.stages import MAX_SEGMENTS

Knob = int | str

# Both from one template.
_SUMS: Final = ("reprepare", "sum_decay")
# BT is shared by all stages of a plan: the chunk is the unit of the workspace between them.
SHARED_KNOBS: Final = ("BT",)
CHUNKS: Final = (16, 32, 64)

_STAGES_AHEAD: Final = (1, 2, 3)
_REGISTERS: Final = (0, 96, 128, 168, 208)
_SCAN: Final[Mapping[str, tuple[Knob, ...]]] = {
    "language": ("triton", "tilelang"),
    "BV": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}
_SEGMENTS: Final[Mapping[str, tuple[Knob, ...]]] = {
    "segments": ("serial", "parallel"),
    "max_segments": (64, 112, MAX_SEGMENTS),
}
# What only the host reads: configs that differ in these have the same kernels.
HOST_KNOBS: Final = ("max_segments",)
_OWN: Final[Mapping[str, Mapping[str, tuple[Knob, ...]]]] = {
    "prepare": {
        "language": ("triton", "tilelang"),
        "chunks": (1, 2, 4, 16),
        "BK": (32, 64, 128),
        "decay": ("log", "tree", "anchored", "bounded"),
        "solve": ("tf32", "tf32x3", "bf16x3", "ieee"),
        "num_warps": (1, 2, 4),
        "num_stages": _STAGES_AHEAD,
        "maxnreg": (0, 80, 128, 168, 208),
    },
    "reprepare": {
        "language": ("triton", "tilelang"),
        "chunks": (1, 4, 16),
        "BK": (32, 64, 128),
        "num_warps": (1, 2, 4, 8),
        "num_stages": _STAGES_AHEAD,
        "maxnreg": (0, 64, 80, 96, 128),
    },
    "sum_decay": {
        "language": ("triton", "tilelang"),
        "chunks": (1, 4, 16),
        "BK": (32, 64, 128),
        "num_warps": (1, 2, 4),
        "num_stages": _STAGES_AHEAD,
        "maxnreg": (0,),
    },
    "scan": {**_SCAN, **_SEGMENTS},
    "scan_states": {**_SCAN, **_SEGMENTS},
    "rescan": _SCAN,
    "reverse_scan": {**_SCAN, **_SEGMENTS},
    "grad_value": {
        "language": ("triton", "tilelang"),
        "chunks": (1, 4, 16),
        "BV": (32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": _STAGES_AHEAD,
        "maxnreg": (0, 80, 96, 128, 168, 208),
    },
    "grad_key": {
        "language": ("triton", "tilelang"),
        "decay": ("log", "anchored", "bounded"),
        "chunks": (1, 4, 16),
        "BK": (16, 32, 64, 128),
        "BV": (32, 64, 128),
        "num_warps": (1, 2, 4, 8),
        "num_stages": _STAGES_AHEAD,
        "maxnreg": _REGISTERS,
    },
}
DOMAINS: Final[Mapping[str, Mapping[str, tuple[Knob, ...]]]] = {
    stage: {"BT": CHUNKS, **own} for stage, own in _OWN.items()
}

# Knobs that came after entries had been filed, and what configs on file that lack them mean.
LATER_KNOBS: Final[Mapping[str, Mapping[str, Knob]]] = {
    "prepare": {"language": "triton", "chunks": 1},
    "reprepare": {"language": "triton", "chunks": 1},
    "sum_decay": {"language": "triton", "chunks": 1},
    "grad_value": {"language": "triton", "chunks": 1},
    "grad_key": {"language": "triton"},
    "scan": {"max_segments": MAX_SEGMENTS},
    "reverse_scan": {"max_segments": MAX_SEGMENTS},
}


@dataclass(frozen=True)
class Config(Mapping[str, Knob]):
    """One frozen set of knobs of one stage; reads like a mapping and sorts its knobs by name."""

    stage: str
    knobs: tuple[tuple[str, Knob], ...]

    @classmethod
    def of(cls, stage: str, knobs: Mapping[str, Knob]) -> Config:
        """Check `knobs` against the domains of `stage` (all must be given) and freeze them."""
        if stage not in DOMAINS:
            raise ConfigError(f"unknown stage {stage!r}; known: {', '.join(DOMAINS)}")
        domain = DOMAINS[stage]
        if set(knobs) != set(domain):
            raise ConfigError(
                f"{stage} takes the knobs {sorted(domain)}, but got {sorted(knobs)}"
            )
        for name, value in knobs.items():
            if value not in domain[name]:
                raise ConfigError(
                    f"{stage}.{name} must be one of {domain[name]}, but got {value!r}"
                )
        return cls(stage, tuple(sorted(knobs.items())))

    def __getitem__(self, name: str) -> Knob:
        for key, value in self.knobs:
            if key == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.knobs)

    def __len__(self) -> int:
        return len(self.knobs)

    def size(self, name: str) -> int:
        """An integer knob."""
        value = self[name]
        assert isinstance(value, int), f"{self.stage}.{name} is not a size: {value!r}"
        return value

    def replace(self, **knobs: Knob) -> Config:
        return Config.of(self.stage, {**self, **knobs})

    @property
    def max_segments(self) -> int:
        """Of all heads and sequences together; the usual where the stage has no such knob."""
        return self.size("max_segments") if "max_segments" in self else MAX_SEGMENTS

    @property
    def of_kernel(self) -> Config:
        """Less what only the host reads, for templates."""
        knobs = tuple(knob for knob in self.knobs if knob[0] not in HOST_KNOBS)
        return Config(self.stage, knobs)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.knobs)


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


def language_of(config: Config) -> str:
    """The language of the kernel that the config asks for."""
    return str(config.get("language", "triton"))


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
    if config.stage == "grad_value":
        return _why_not_tilelang_grad_value(config, problem)
    if config.stage in _SUMS:
        return _why_not_tilelang_sums(config, problem)
    if problem.dtype == "fp32":
        return "the TileLang scans multiply 16-bit operands, but the problem is fp32"
    if config.size("BV") != 64 or config.size("num_warps") != 4:
        return (
            f"the TileLang scans give a warp group of 4 warps 64 rows of the state, but "
            f"BV={config['BV']} and num_warps={config['num_warps']}"
        )
    return None


def _why_not_tilelang_grad_value(config: Config, problem: Problem) -> str | None:
    if problem.dtype == "fp32":
        return "the TileLang grad_value multiplies 16-bit operands, but the problem is fp32"
    if config.size("BV") != problem.V or config.size("num_warps") != 4:
        return (
            f"the TileLang grad_value takes all of V={problem.V} with 4 warps, but "
            f"BV={config['BV']} and num_warps={config['num_warps']}"
        )
    if config["maxnreg"] not in (0, 80, 128):
        return f"the TileLang grad_value takes maxnreg of 0, 80 or 128, not {config['maxnreg']}"
    if config["BT"] == 16:
        return "the TileLang grad_value multiplies tiles of 32 tokens and more, but BT=16"
    return None


def _why_not_tilelang_sums(config: Config, problem: Problem) -> str | None:
    """Of reprepare and sum_decay."""
    if problem.dtype == "fp32":
        return f"the TileLang {config.stage} makes 16-bit factors, but the problem is fp32"
    if config.size("BK") != problem.K or config.size("num_warps") != 4:
        return (
            f"the TileLang {config.stage} takes all of K={problem.K} with 4 warps, but "
            f"BK={config['BK']} and num_warps={config['num_warps']}"
        )
    if config["maxnreg"] not in (0, 80, 128):
        return f"the TileLang {config.stage} takes maxnreg of 0, 80 or 128, not {config['maxnreg']}"
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
    if config.get("solve", "ieee") != "ieee":
        return f"the TileLang prepare substitutes in fp32: solve=ieee, not {config['solve']}"
    # one program to a multiprocessor, three, or two
    shared = (0, 80, 128) if config.stage == "prepare" else (0, 128)
    if config["maxnreg"] not in shared:
        return f"the TileLang {config.stage} takes maxnreg of {shared}, not {config['maxnreg']}"
    if config.stage == "grad_key" and config["BT"] == 16 and config.size("num_stages") > 1:
        # "misaligned address" on an H200: TMA writes to multiples of 128 bytes
        return "a token's sums are 64 bytes in chunks of 16: of several stages, every second is off"
    return None


# Measured on an H200 at train4k, then kept small enough for GPUs with 99 KB of shared memory: at
# BT = 64 the scans alone need 114 KB.
_DEFAULTS: Final[Mapping[str, Mapping[str, Knob]]] = {
    "prepare": {"BK": 32, "num_warps": 1, "decay": "tree", "chunks": 1},
    "reprepare": {"BK": 64, "num_warps": 2, "chunks": 1},
    "sum_decay": {"BK": 64, "num_warps": 2, "chunks": 1},
    "scan": {"BV": 64, "num_warps": 4, "num_stages": 2},
    "scan_states": {"BV": 64, "num_warps": 4, "num_stages": 2},
    "rescan": {"BV": 64, "num_warps": 4, "num_stages": 2},
    "reverse_scan": {"BV": 64, "num_warps": 4, "num_stages": 2},
    "grad_value": {"BV": 64, "num_warps": 4, "chunks": 1},
    "grad_key": {"BK": 32, "BV": 128, "num_warps": 2, "decay": "log", "chunks": 1},
}
# Where the operands are bf16, whose exponents reach as far as those of fp32.
_ANCHORED: Final[Mapping[str, Mapping[str, Knob]]] = {
    "prepare": {"BK": 64, "num_warps": 2, "decay": "anchored"},
    "grad_key": {
        "BK": 64,
        "BV": 128,
        "num_warps": 4,
        "num_stages": 2,
        "decay": "anchored",
        "chunks": 4,
    },
}


def default_config(stage: str, problem: Problem, *, BT: int | None = None) -> Config:
    """The config used where nothing was tuned: valid for every problem and device."""
    domain = DOMAINS[stage]
    knobs: dict[str, Knob] = {"BT": BT or 32, "num_stages": 1, **_DEFAULTS[stage]}
    # grad_key's loads ahead take 250 KB of shared memory in chunks of 64 tokens
    if problem.dtype == "bf16" and not (stage == "grad_key" and knobs["BT"] == 64):
        knobs |= _ANCHORED.get(stage, {})
    wide = problem.dtype == "fp32"
    # fp32 products take three passes, and their operands the registers: scans of 32 rows spill
    most = 16 if "scan" in stage else 32
    for tile, size in (("BK", problem.K), ("BV", problem.V)):
        if tile in knobs:
            knobs[tile] = min(int(knobs[tile]), size, most if wide else size)
    if wide:
        knobs["num_stages"] = 1
    if "solve" in domain:
        # A is rounded to 8 bits in bf16: the inverse with 10 is as good, and 0.16 ms faster
        knobs["solve"] = "tf32" if problem.dtype == "bf16" else "tf32x3"
    if "segments" in domain:
        knobs |= {"segments": "serial", "max_segments": MAX_SEGMENTS}
    if "language" in domain:
        knobs["language"] = "triton"
    if "maxnreg" in domain:
        knobs["maxnreg"] = 0
    return Config.of(stage, knobs)
