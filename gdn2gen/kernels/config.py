"""Config: one frozen set of knobs for a stage: domains, defaults, one validity predicate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from gdn2gen.base.errors import ConfigError
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.stages import MAX_SEGMENTS

Knob = int | str

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
        "chunks": (1, 2, 4, 8, 16),
        "BK": (32, 64, 128),
        "decay": ("log", "tree", "anchored", "bounded"),
        "solve": ("tf32", "tf32x3", "bf16x3", "ieee", "halves"),
        "num_warps": (1, 2, 4),
        "num_stages": _STAGES_AHEAD,
        "maxnreg": (0, 64, 80, 128, 168, 208),
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
            raise ConfigError(f"{stage} takes the knobs {sorted(domain)}, but got {sorted(knobs)}")
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


def language_of(config: Config) -> str:
    """The language of the kernel that the config asks for."""
    return str(config.get("language", "triton"))


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
    # slices of 32 channels spill up to 664 bytes a thread (fp16, sm_120, Triton 3.8); of 16, 16
    "grad_key": {"BK": 16, "BV": 128, "num_warps": 2, "decay": "log", "chunks": 1},
}
# But there spills, of up to 616 bytes in fp16 and 1144 in fp32, cost less than slices of 16: on an
# H200 at train4k fp16 takes 1.12 ms instead of 1.48, fp32 4.03 instead of 6.92.
_WIDE_SLICES: Final = "sm_90"
# Where products of 64 rows go to tensor memory, Triton 3.6 to 3.8 spill up to 888 bytes a thread in
# the loops of scans with 64 rows of the state (3.9: 56); with 32 rows none of them more than 16.
_TENSOR_MEMORY: Final = "sm_10"
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


def default_config(
    stage: str, problem: Problem, *, BT: int | None = None, arch: str | None = None
) -> Config:
    """The config used where nothing was tuned: valid for every problem and device.

    For GPUs of `arch` as in `sm_90`, or where that is not known.
    """
    domain = DOMAINS[stage]
    knobs: dict[str, Knob] = {"BT": BT or 32, "num_stages": 1, **_DEFAULTS[stage]}
    # grad_key's loads ahead take 250 KB of shared memory in chunks of 64 tokens
    if problem.dtype == "bf16" and not (stage == "grad_key" and knobs["BT"] == 64):
        knobs |= _ANCHORED.get(stage, {})
    wide = problem.dtype == "fp32"
    # fp32 products take three passes, and their operands the registers: scans of 32 rows spill
    most = 16 if "scan" in stage else 32
    if "scan" in stage and arch is not None and arch.startswith(_TENSOR_MEMORY):
        knobs["BV"] = 32
    for tile, size in (("BK", problem.K), ("BV", problem.V)):
        if tile in knobs:
            knobs[tile] = min(int(knobs[tile]), size, most if wide else size)
    if wide:
        knobs["num_stages"] = 1
    if stage == "grad_key" and knobs["decay"] == "log":
        if arch == _WIDE_SLICES and knobs["BT"] != 64:
            knobs["BK"] = 32
        elif wide or knobs["BT"] == 64:
            # two warps spill up to 448 bytes in fp32, and 1 KB in chunks of 64; four 136 and 248
            knobs["num_warps"] = 4
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
