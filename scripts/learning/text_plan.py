"""What all runs of `scripts/text.py` share: the experiment, and a small one for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from learning.corpus import VOCABULARY
from learning.models import Sizes, build, parameters, with_parameters


@dataclass(frozen=True)
class Experiment:
    """What all runs share."""

    sizes: Sizes
    batch: int = 16
    length: int = 2048
    steps: int = 1500
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    search: float = 0.1
    """The part of all steps that a rate is tried for."""
    every: int = 100
    """Steps from one look at what is held out to the next."""
    held_out: int = 64
    """Windows of it."""
    bytes: int = 64 * 2**20
    seed: int = 0
    small: bool = False
    """Told from the full one in the names of rows, and in them."""

    @property
    def search_steps(self) -> int:
        return max(1, round(self.search * self.steps))


# State of Mamba's layers: 2 x 512 channels in heads of 64, times 64.
FULL: Final = Experiment(Sizes(VOCABULARY, 512, 6, 4, 128, expand=2.0))
SMALL: Final = Experiment(
    Sizes(VOCABULARY, 32, 1, 2, 16, inner=64, expand=2.0, mamba_head_dim=16),
    batch=8, length=32, steps=200, rates=(1e-2, 2e-2), every=50, held_out=32, bytes=2**20,
    small=True,
)  # fmt: skip


def sizes_of(experiment: Experiment, model: str) -> Sizes:
    """As many parameters as GDN-2's."""
    with torch.device("meta"):
        wanted = parameters(build("gdn2", experiment.sizes, 0))
    return with_parameters(model, experiment.sizes, wanted)
