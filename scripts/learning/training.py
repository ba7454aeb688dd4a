"""Training runs, several at a time on one GPU.

A small model keeps a GPU waiting for its host: a step of two layers is some hundred kernels of
microseconds each. So a step, with its data, its rate and its optimizer, is captured once as a CUDA
graph and replayed; runs that go together (rates of a search, seeds) each have a graph and a stream
of their own, so that their kernels lie beside each other on the GPU. torch.compile would make fewer
kernels, at a minute of compiling for every mixer and length; batching seeds into one model would
want every op to take a batch of weights. On the CPU a step is called as it is.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from gdn2gen.nn import Observatory
from gdn2gen.nn.layer import Layer

Block = Callable[[int], tuple[Tensor, Tensor]]
"""Tokens and targets [steps of a block, batch, length] of the block with that number."""
WARM: Final = 3
"""Steps that are called as they are before one is captured: kernels compile and are chosen then."""


@dataclass(frozen=True)
class Schedule:
    """How long, and at which rates: up to `lr` within `warmup` of all steps, then down to `least`
    of it along a cosine."""

    steps: int
    lr: float
    block: int = 50
    warmup: float = 0.05
    least: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    look: int = 500
    """Steps from one look of the observatory to the next: a multiple of `block`."""

    def rate(self, step: int) -> float:
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.lr * (self.least + (1 - self.least) * 0.5 * (1 + math.cos(math.pi * done)))


class Trainer:
    """One run."""

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        blocks: Block,
        device: torch.device,
        *,
        graph: bool = True,
    ) -> None:
        self.model, self.schedule, self.device = model.to(device), schedule, device
        self._blocks = blocks
        on_gpu = device.type == "cuda"
        self._stream = _stream(device) if on_gpu else None
        self._wants_graph = graph and on_gpu
        self._graph: Any = None
        self.launched = "eager"
        # a tensor, so that a graph reads what it is now
        self._rate = torch.zeros((), device=device) if on_gpu else None
        self._optimizer = torch.optim.AdamW(
            groups(self.model, schedule.weight_decay),
            lr=0.0 if self._rate is None else self._rate,
            betas=(0.9, 0.95),
            **({"fused": True, "capturable": True} if on_gpu else {}),
        )
        rates = [schedule.rate(step) for step in range(schedule.steps)]
        self._rates = torch.tensor(rates, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._total = torch.zeros((), device=device)
        self._data: tuple[Tensor, Tensor] | None = None
        self.step_number = 0
        self.losses: list[tuple[int, float, float]] = []
        """Steps done, the mean loss of the block up to there, and seconds of training."""
        self.diverged: int | None = None
        looks = any(isinstance(x, Layer) for x in model.modules())
        self.observatory = Observatory(model) if looks else None

    @contextmanager
    def testing(self) -> Iterator[None]:
        """Inside, forwards are as in training: on its stream, in its dtypes."""
        with self._on_stream(), self._autocast(), torch.no_grad():
            yield

    def _on_stream(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def load(self, number: int) -> None:
        """The data of a block, where steps read them."""
        with self._on_stream():
            made = self._blocks(number)
            if self._data is None:
                self._data = made
            else:
                for kept, new in zip(self._data, made, strict=True):
                    kept.copy_(new)

    def step(self) -> None:
        """The next one: called, or from the fourth on replayed."""
        if self._wants_graph and self.step_number == WARM:
            self._capture()
        with self._on_stream():
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        self.step_number += 1

    def _capture(self) -> None:
        self._wants_graph = False
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:  # a peer's layer may wait for the GPU: then without
            self.launched = f"eager: {str(error).splitlines()[0][:200]}"
            torch.cuda.synchronize()
            return
        self._graph, self.launched = graph, "graph"

    def _step(self) -> None:
        assert self._data is not None
        place = self._at % self.schedule.block
        tokens, targets = (x.index_select(0, place)[0] for x in self._data)
        if self._rate is not None:
            self._rate.copy_(self._rates.index_select(0, self._at)[0])
        else:
            for group in self._optimizer.param_groups:
                group["lr"] = self.schedule.rate(self.step_number)
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.model(tokens, targets=targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
        self._optimizer.step()
        self._total += loss.detach()
        self._at += 1

    def _autocast(self) -> Any:
        # the cache would outlive a graph's memory
        on_gpu = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False)

    def end_block(self, steps: int, seconds: float) -> None:
        """Read the loss, and look."""
        with self.testing():
            loss = float(self._total) / steps
            self._total.zero_()
            self.losses.append((self.step_number, loss, seconds))
            if not math.isfinite(loss):
                self.diverged = self.step_number
            if self.observatory is not None and self._data is not None:
                done = self.step_number
                if done % self.schedule.look == 0 or done == self.schedule.steps:
                    self.observatory.look_now(self.step_number, self._data[0][0])

    def digest(self) -> str:
        """Of all weights and losses: the same bits give the same."""
        found = hashlib.sha256(repr([loss[:2] for loss in self.losses]).encode())
        for name, x in self.model.state_dict().items():
            found.update(name.encode())
            found.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def seen(self) -> dict[str, Any]:
        """What the observatory has to say; of gradients as they are after clipping."""
        if self.observatory is None or not self.observatory.sightings:
            return {}
        sightings = self.observatory.sightings
        alarms = [f"step {x.step}: {alarm}" for x in sightings for alarm in x.alarms]
        return {
            "alarms": alarms,
            "states": max(max(x.states, default=0.0) for x in sightings),
            "gradients": max(x.gradient for x in sightings),
            "decays": sightings[-1].decays,
        }


def train(trainers: Sequence[Trainer], after: Callable[[Trainer], None] | None = None) -> None:
    """Run them to their ends, step by step beside each other; those that diverge stop.

    `after` is called with each after each of its blocks, outside of the time that counts.
    """
    spent = 0.0
    steps, block = trainers[0].schedule.steps, trainers[0].schedule.block
    for number in range(-(-steps // block)):
        going = [x for x in trainers if x.diverged is None]
        count = min(block, steps - number * block)
        spent += train_block(going, number, count)
        for trainer in going:
            trainer.end_block(count, spent)
            if after is not None:
                after(trainer)


def train_block(trainers: Sequence[Trainer], number: int, count: int) -> float:
    """The data of a block and so many steps of it; seconds, from a GPU at rest to a GPU at rest."""
    _wait(trainers)
    started = time.perf_counter()
    for trainer in trainers:
        trainer.load(number)
    for _ in range(count):
        for trainer in trainers:
            trainer.step()
    _wait(trainers)
    return time.perf_counter() - started


def tokens_per_second(trainer: Trainer, tokens_per_step: int, beside: int) -> float | None:
    """Of all runs beside each other together, without the first block, where kernels compile."""
    (first, _, began), (last, _, ended) = trainer.losses[0], trainer.losses[-1]
    if ended <= began:
        return None
    return tokens_per_step * beside * (last - first) / (ended - began)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _wait(trainers: Sequence[Trainer]) -> None:
    if trainers and trainers[0].device.type == "cuda":
        torch.cuda.synchronize()


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and what is marked do not."""
    plain: list[Tensor] = []
    decayed: list[Tensor] = []
    for x in model.parameters():
        marked = getattr(x, "_no_weight_decay", False) or x.dim() < 2
        (plain if marked else decayed).append(x)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
