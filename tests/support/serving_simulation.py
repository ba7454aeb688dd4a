"""A server in small: sequences come and go, pages are freed and used again, tokens are guessed.

Every sequence's state is followed by itself, in fp64, by its own tokens alone: slots, padding and
batches are the server's affair, and of them the truth knows nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from decoding_cases import BOUNDS, SENTINEL, Case, error, public_op, same_bits
from torch import Tensor

from gdn2gen.base.environment import verifying
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.reference import recurrent
from gdn2gen.family.registry import recurrence_named

GUESSED: Final = 3
"""Tokens at most beside the one that is certain."""


@dataclass
class Sequence:
    """One that is served: its pages; its true state after each token of the last step."""

    left: int
    pages: list[int]
    states: list[Tensor]
    accepted: int = 1


@dataclass
class Server:
    """A pool of states and what runs in it."""

    case: Case
    device: str
    speculative: bool
    packed: bool
    capacity: int = 5
    seed: int = 0
    running: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        case, self.width = self.case, 1 + GUESSED if self.speculative else 1
        inner = (case.V, case.K) if case.values_first else (case.K, case.V)
        slots = self.capacity * self.width + 3
        size = case.HV * case.K * case.V
        self.storage = torch.full(
            (slots, size + case.gap), float("nan"), dtype=case.state_dtype, device=self.device
        )
        self.storage[:, size:] = SENTINEL
        self.pool = self.storage[:, :size].unflatten(1, (case.HV, *inner))
        free = [x for x in range(slots) if x != case.null_slot]
        self.free = free[:-1]
        self.guards = [free[-1]] + ([] if case.null_slot is None else [case.null_slot])
        self.pool[self.guards] = SENTINEL
        self.before = self.storage.clone()
        self.worst = 0.0
        self.served = 0
        self.member: Recurrence = recurrence_named(case.op)

    def step(self, number: int) -> None:
        """Some come, all that run are given tokens, some go."""
        self._admit()
        batch = self.running + [None] * (self.capacity - len(self.running))  # type: ignore[list-item]
        self.random.shuffle(batch)
        counts = [self._tokens(x) for x in batch]
        inputs = self._draw(counts, number)
        o = self._call(batch, counts, inputs)
        self._follow(batch, counts, inputs, o)
        for x in [x for x in self.running if x.left <= 0]:
            self.running.remove(x)
            self.free += x.pages

    def _admit(self) -> None:
        while len(self.running) < self.capacity and self.random.random() < 0.4:
            pages = [
                self.free.pop(self.random.randrange(len(self.free))) for _ in range(self.width)
            ]
            self.pool[pages[0]] = 0.0  # and the others are as they were left
            state = torch.zeros(1, *self.pool.shape[1:], dtype=torch.float64)
            self.running.append(Sequence(self.random.randint(1, 12), pages, [state]))
            self.served += 1

    def _tokens(self, x: Sequence | None) -> int:
        if not self.packed:
            return self.width
        return self.random.randint(0 if x is None else 1, self.width)

    def _draw(self, counts: list[int], number: int) -> dict[str, Tensor]:
        case = self.case
        B, T = (1, max(1, sum(counts))) if self.packed else (self.capacity, self.width)
        inputs = make_inputs(
            B, T, case.H, case.K, case.V, op=case.op, HV=case.HV, dtype=case.dtype,
            gate_dtype=case.gate_dtype, seed=number + 1, pattern="layer",
        )  # fmt: skip
        if self.packed:
            inputs["cu_seqlens"] = torch.tensor([0, *counts]).cumsum(0)
        return inputs

    def _call(self, batch: list[Any], counts: list[int], inputs: dict[str, Tensor]) -> Tensor:
        case = self.case
        null = -1 if case.null_slot is None else case.null_slot
        rows = [[null] * self.width if x is None else x.pages for x in batch]
        indices = torch.tensor(rows, dtype=case.index_dtype, device=self.device)
        serving: dict[str, Any] = {
            "ssm_state_indices": indices if self.speculative else indices[:, 0]
        }
        if self.speculative:
            accepted = [self.random.randint(0, 9) if x is None else x.accepted for x in batch]
            serving["num_accepted_tokens"] = torch.tensor(accepted, device=self.device)
        if case.null_slot is not None:
            serving["null_slot"] = case.null_slot
        given = {name: x.to(self.device) for name, x in inputs.items()}
        out = torch.full_like(given["v"], float("nan"))
        with torch.no_grad(), verifying():
            o, _ = public_op(case.op)(
                **given, **serving, **case.flags, state_pool=self.pool, out=out
            )
        size = self.pool[0].numel()
        assert same_bits(self.storage[self.guards], self.before[self.guards]), "a slot of nobody"
        assert same_bits(self.storage[:, size:], self.before[:, size:]), "between slots"
        return o.cpu()

    def _follow(
        self, batch: list[Any], counts: list[int], inputs: dict[str, Tensor], o: Tensor
    ) -> None:
        """The truth of every sequence, beside what came out and lies in its pages."""
        case, start = self.case, 0
        rowwise = [x.name for x in self.member.required]
        for n, (x, count) in enumerate(zip(batch, counts, strict=True)):
            row, first = (0, start) if self.packed else (n, 0)
            start += count
            found = o[row, first : first + count]
            if x is None:
                assert not found.any(), "padding is zeros"
                continue
            state, states = x.states[min(x.accepted, len(x.states)) - 1], []
            for t in range(first, first + count):
                token = {y: inputs[y][row : row + 1, t : t + 1].double() for y in rowwise}
                exact, state = recurrent(
                    self.member, {**token, "initial_state": state}, **case.flags
                )
                # where q . k is small by chance, o of a young state is, too: its rounding is not
                scale = case.K**-0.5 if case.scale is None else case.scale
                usual = scale * float(state.square().mean().sqrt())
                self._compare(found[t - first], exact[0, 0], f"o of token {t - first}", usual)
                states.append(state)
                if self.speculative:
                    self._compare(self.pool[x.pages[t - first]], state[0], f"page {t - first}")
            if not self.speculative:
                self._compare(self.pool[x.pages[0]], state[0], "page")
                states = [state]
            x.states, x.accepted = states, self.random.randint(1, len(states))
            x.left -= x.accepted

    def _compare(self, found: Tensor, exact: Tensor, what: str, usual: float = 0.0) -> None:
        """Hold `found` against the bound, relative to what is largest in `exact`, or usual."""
        size = float(exact.abs().max())
        wrong = error(found, exact) * size / max(size, usual, 1e-30)
        self.worst = max(self.worst, wrong)
        # a state is rounded in each of up to 12 steps
        bound = 4 * max(BOUNDS[self.case.dtype], BOUNDS[self.case.state_dtype])
        assert wrong < bound, f"{what}: {wrong}, with {self.case}"


def simulate(
    case: Case, steps: int, device: str, *, speculative: bool, packed: bool, seed: int = 0
) -> tuple[float, int]:
    """The worst error of `steps` steps, and how many sequences were served."""
    server = Server(case, device, speculative, packed, seed=seed)
    for number in range(steps):
        server.step(1000 * seed + number)
    return server.worst, server.served
