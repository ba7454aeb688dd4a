"""Sequences that ask for what they said before, made on the device from a seed; no files.

A row has pairs of a key and what belongs to it, among tokens that mean nothing (noise). Keys of a
row are all different, and each is asked for at most once; the loss is of the answers alone.

mqar    multi-query associative recall: the row begins with its pairs, k v k v ..; later each key
        comes again, in any order and anywhere, and the token after it should have been its value
needle  needles `mark k v v` anywhere in the noise; the row ends with some of their keys, each as
        `ask k v v`, of which both values count. One pair a row is single-key retrieval; of many,
        all but those that are asked for distract
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

IGNORED: Final = -100
"""The target of a token that does not count."""
NEEDLE: Final = 4
"""Tokens of a needle, and of a question."""


@dataclass(frozen=True)
class Task:
    """Rows of one kind, and at which sizes they are trained on and tested."""

    name: str
    kind: str
    pairs: tuple[int, ...]
    """How many there are in a row of training: any of these."""
    length: int
    tests: tuple[tuple[int, int], ...]
    """Pairs and length of each test."""
    keys: int = 256
    values: int = 256
    noise: int = 62
    asked: int = 4
    """Needles that a row asks for, at most."""

    def __post_init__(self) -> None:
        for pairs, length in ((max(self.pairs), self.length), *self.tests):
            needed = 3 * pairs
            if self.kind == "needle":
                needed = NEEDLE * (pairs + min(pairs, self.asked))
            if needed > length or pairs > self.keys:
                raise ValueError(f"{self.name}: {pairs} pairs want {needed} of {length} tokens")

    @property
    def vocabulary(self) -> int:
        """Keys, values, noise, and the tokens `mark` and `ask`."""
        return self.keys + self.values + self.noise + 2

    def rows(
        self, count: int, seed: int, device: torch.device | str, test: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens and targets [count, length]: of training, or of one of the tests. The same seed
        gives the same rows on the same kind of device."""
        pairs, length = ((test[0],), test[1]) if test else (self.pairs, self.length)
        made = _Rows(self, count, length, pairs, torch.Generator(device).manual_seed(seed))
        return made.mqar() if self.kind == "mqar" else made.needle()


TASKS: Final = {
    x.name: x
    for x in (
        Task(
            "mqar", "mqar", (8, 16, 32, 64), 256,
            tuple(
                (pairs, length)
                for pairs in (8, 16, 32, 64, 128)
                for length in (256, 512, 1024)
                if 3 * pairs <= length
            ),
        ),
        Task(
            "single-needle", "needle", (1,), 256,
            tuple((1, length) for length in (128, 256, 512, 1024, 2048)),
        ),
        Task(
            "multi-needle", "needle", (2, 4, 8, 16, 32), 256,
            tuple(
                (pairs, length)
                for pairs in (4, 8, 16, 32, 64)
                for length in (256, 512, 1024, 2048)
                if NEEDLE * (pairs + 4) <= length
            ),
        ),
    )
}  # fmt: skip


class _Rows:
    """Rows in the making: everything is [count, length], or [count, most pairs]."""

    def __init__(
        self,
        task: Task,
        count: int,
        length: int,
        pairs: tuple[int, ...],
        generator: torch.Generator,
    ) -> None:
        self.task, self.count, self.length = task, count, length
        self.generator, self.device = generator, generator.device
        self.most = max(pairs)
        choice = torch.tensor(pairs, device=self.device)
        self.pairs = choice[self._below(len(pairs), 1)]  # [count, 1]
        # the first of a random order of all keys
        self.keys = self._order(task.keys)[:, : self.most]
        self.at = torch.arange(length, device=self.device).expand(count, -1)
        first = task.keys + task.values
        self.tokens = first + self._below(task.noise, length)
        self.targets = torch.full_like(self.tokens, IGNORED)
        self.mark, self.ask = first + task.noise, first + task.noise + 1

    def _below(self, most: int, *size: int) -> Tensor:
        shape = (self.count, *size)
        return torch.randint(most, shape, device=self.device, generator=self.generator)

    def _order(self, size: int) -> Tensor:
        """A random order of so many, in each row."""
        drawn = torch.rand(self.count, size, device=self.device, generator=self.generator)
        return drawn.argsort(stable=True, dim=-1)

    def _values(self) -> Tensor:
        return self.task.keys + self._below(self.task.values, self.most)

    def mqar(self) -> tuple[Tensor, Tensor]:
        values = self._values()
        place = (self.at // 2).clamp(max=self.most - 1)
        pair = torch.where(self.at % 2 == 0, self.keys.gather(1, place), values.gather(1, place))
        in_pairs = self.at < 2 * self.pairs
        # later tokens in a random order: the first of it are questions, for one key each
        late = torch.rand(self.at.shape, device=self.device, generator=self.generator) + in_pairs
        order = late.argsort(stable=True, dim=-1).argsort(stable=True, dim=-1)
        asks, which = order < self.pairs, order.clamp(max=self.most - 1)
        tokens = torch.where(asks, self.keys.gather(1, which), self.tokens)
        tokens = torch.where(in_pairs, pair, tokens)
        return tokens, torch.where(asks, values.gather(1, which), self.targets)

    def needle(self) -> tuple[Tensor, Tensor]:
        first, second = self._values(), self._values()
        asked = self.pairs.clamp(max=self.task.asked)
        space = self.length - NEEDLE * asked  # [count, 1]
        # needles and tokens of noise in any order; those that are no needle in this row come last
        items = space - (NEEDLE - 1) * self.pairs
        drawn = torch.rand(self.at.shape, device=self.device, generator=self.generator)
        order = (drawn + (self.at >= items)).argsort(stable=True, dim=-1)[:, : self.most]
        number = torch.arange(self.most, device=self.device)
        order = (
            torch.where(number < self.pairs, order, self.length).sort(stable=True, dim=-1).values
        )
        starts = order + (NEEDLE - 1) * number
        place = torch.searchsorted(starts, self.at.contiguous(), right=True) - 1
        offset = self.at - starts.gather(1, place.clamp(min=0))
        lies = (place >= 0) & (offset < NEEDLE) & (place < self.pairs) & (self.at < space)
        # the row's end asks for its first needles by a random order
        question = ((self.at - space) // NEEDLE).clamp(0, self.most - 1)
        chosen = torch.rand(self.count, self.most, device=self.device, generator=self.generator)
        chosen = (chosen + (number >= self.pairs)).argsort(stable=True, dim=-1)
        ends = self.at >= space
        which = torch.where(ends, chosen.gather(1, question), place.clamp(min=0))
        part = torch.where(ends, (self.at - space) % NEEDLE, offset.clamp(0, NEEDLE - 1))
        sign = torch.where(ends, self.ask, self.mark)
        parts = (sign, *(x.gather(1, which) for x in (self.keys, first, second)))
        tokens = torch.stack(parts, -1).gather(-1, part[..., None]).squeeze(-1)
        tokens = torch.where(lies | ends, tokens, self.tokens)
        answers = torch.stack((parts[2], parts[3]), -1)
        answer = answers.gather(-1, (part - 1).clamp(0, 1)[..., None]).squeeze(-1)
        counts = ends & (part >= 1) & (part < NEEDLE - 1)
        return tokens, torch.where(counts, answer, self.targets)
