"""Config: one frozen set of knobs for a stage: domains, defaults, one validity predicate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from gdn2gen.errors import ConfigError
from gdn2gen.problem import Problem

Knob = int | str

# BT is shared by all stages of a plan: the chunk is the unit of the workspace between them.
SHARED_KNOBS: Final = ("BT",)
CHUNKS: Final = (16, 32, 64)

DOMAINS: Final[Mapping[str, Mapping[str, tuple[Knob, ...]]]] = {
    "diagonal": {
        "BT": CHUNKS,
        "BK": (32, 64, 128),
        "decay": ("log", "tree"),
        "solve": ("tf32", "tf32x3", "ieee"),
        "vec": (1, 2, 4, 8),
        "num_warps": (1, 2),
        "num_stages": (1, 2),
        "maxnreg": (0, 96, 128, 168, 208),
    },
    "prepare": {
        "BT": CHUNKS,
        "BK": (32, 64, 128),
        "BV": (32, 64, 128),
        "solve": ("bf16x3", "tf32", "tf32x3", "ieee"),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3),
        "maxnreg": (0, 96, 128, 168, 208),
    },
    "prepare_keep": {
        "BT": CHUNKS,
        "BK": (32, 64, 128),
        "BV": (32, 64, 128),
        "solve": ("bf16x3", "tf32", "tf32x3", "ieee"),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3),
        "maxnreg": (0, 96, 128, 168, 208),
    },
    "reprepare": {
        "BT": CHUNKS,
        "BK": (32, 64, 128),
        "BV": (32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3),
        "maxnreg": (0, 96, 128, 168, 208),
    },
    "scan": {
        "BT": CHUNKS,
        "BV": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3, 4),
    },
    "rescan": {
        "BT": CHUNKS,
        "BV": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3, 4),
    },
    "reverse_scan": {
        "BT": CHUNKS,
        "BV": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3, 4),
    },
    "grad_value": {
        "BT": CHUNKS,
        "BV": (32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3),
        "maxnreg": (0, 96, 128, 168, 208),
    },
    "grad_key": {
        "BT": CHUNKS,
        "BK": (16, 32, 64, 128),
        "BV": (32, 64, 128),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (1, 2, 3),
        "maxnreg": (0, 96, 128, 168, 208),
    },
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

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.knobs)


def why_invalid(config: Config, problem: Problem) -> str | None:
    """Say why `config` cannot serve `problem`, or None if it can. Decides without compiling."""
    if "BK" in config and config.size("BK") > problem.K:
        return f"BK={config['BK']} exceeds the key head dim K={problem.K}"
    if "BV" in config and config.size("BV") > problem.V:
        return f"BV={config['BV']} exceeds the value head dim V={problem.V}"
    return None


# Measured on an H200 at train4k, then kept small enough for GPUs with 99 KB of shared memory: at
# BT = 64 the scans alone need 114 KB.
_DEFAULTS: Final[Mapping[str, Mapping[str, Knob]]] = {
    "diagonal": {"BK": 32, "vec": 8, "num_warps": 1},
    "prepare": {"BK": 64, "BV": 64, "num_warps": 2},
    "prepare_keep": {"BK": 64, "BV": 64, "num_warps": 2},
    "reprepare": {"BK": 64, "BV": 64, "num_warps": 4},
    "scan": {"BV": 64, "num_warps": 4, "num_stages": 2},
    "rescan": {"BV": 64, "num_warps": 4, "num_stages": 2},
    "reverse_scan": {"BV": 64, "num_warps": 4, "num_stages": 2},
    "grad_value": {"BV": 64, "num_warps": 4},
    "grad_key": {"BK": 32, "BV": 64, "num_warps": 2},
}


def default_config(stage: str, problem: Problem, *, BT: int | None = None) -> Config:
    """The config used where nothing was tuned: valid for every problem and device."""
    domain = DOMAINS[stage]
    knobs: dict[str, Knob] = {"BT": BT or 32, "num_stages": 1, **_DEFAULTS[stage]}
    wide = problem.dtype == "fp32"
    for tile, size in (("BK", problem.K), ("BV", problem.V)):
        if tile in knobs:
            knobs[tile] = min(int(knobs[tile]), size, 32 if wide else size)
    if wide:
        knobs["num_stages"] = 1
    if "decay" in domain:
        knobs["decay"] = "log"
    if "solve" in domain:
        knobs["solve"] = "tf32x3" if wide or "bf16x3" not in domain["solve"] else "bf16x3"
    if "maxnreg" in domain:
        knobs["maxnreg"] = 0
    return Config.of(stage, knobs)
