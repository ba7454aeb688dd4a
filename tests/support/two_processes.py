"""Steps of a model's training in two processes, each with a row of the batch, and in one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gdn2gen.nn import LanguageModel

WORDS = 13
WAYS = ("ddp", "fsdp2")


def model_and_rows() -> tuple[LanguageModel, Tensor]:
    """The same in every process."""
    torch.manual_seed(0)
    model = LanguageModel(
        WORDS, hidden_size=32, num_layers=2, num_heads=2, head_dim=32, window=4, init_std=0.2
    )
    return model, torch.randint(WORDS, (2, 8))


def run(rank: int, device: str, backend: str, folder: str) -> None:
    """Write what each of `WAYS` finds, as rank 0."""
    distributed.init_process_group(
        backend,
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),  # where the other one never comes
    )
    try:
        torch.set_num_threads(1)
        found = {way: _two_steps(way, rank, device) for way in WAYS}
        if rank == 0:
            torch.save(found, Path(folder) / "found.pt")
    finally:
        distributed.destroy_process_group()


def _two_steps(way: str, rank: int, device: str) -> tuple[list[float], dict[str, Tensor]]:
    """The mean loss of both rows before and after a step, and the gradients of the first."""
    place = torch.device(device, rank if device == "cuda" else None)
    model, rows = model_and_rows()
    row, whole = rows[rank : rank + 1].to(place), model.to(place)
    parallel: torch.nn.Module = whole
    if way == "ddp":
        parallel = DistributedDataParallel(whole)
    else:
        mesh = distributed.init_device_mesh(device, (2,))
        for block in whole.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(whole, mesh=mesh)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    losses, first = [], {}
    for _ in range(2):
        optimizer.zero_grad()
        loss = parallel(row[:, :-1], targets=row[:, 1:])
        loss.backward()
        losses.append(_mean(loss.detach()))
        first = first or {name: _full(p.grad) for name, p in whole.named_parameters()}
        optimizer.step()
    return losses, first


def _second(_: int, *given: str) -> None:
    run(1, *given)


def compare(device: str, backend: str, folder: Path, near: float) -> None:
    """Assert that two processes find what this one does by itself with both rows."""
    model, rows = model_and_rows()
    model, rows = model.to(device), rows.to(device)
    given = (device, backend, str(folder))
    if device == "cpu":  # this process is one of the two: another takes 6 s of a core to begin
        other = multiprocessing.spawn(_second, given, nprocs=1, join=False)
        run(0, *given)
        while not other.join():
            pass
    else:
        multiprocessing.spawn(run, given, nprocs=2)
    found = torch.load(folder / "found.pt")
    for step in range(2):
        model.zero_grad()
        loss = model(rows[:, :-1], targets=rows[:, 1:])
        loss.backward()
        wanted = {name: _full(p.grad) for name, p in model.named_parameters()}
        for way in WAYS:
            losses, first = found[way]
            assert abs(losses[step] - loss.item()) < near * loss.item(), way
            for name in wanted if step == 0 else ():
                error = (first[name] - wanted[name]).norm() / wanted[name].norm()
                assert error < 10 * near, (way, name)
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def _mean(loss: Tensor) -> float:
    distributed.all_reduce(loss)
    return loss.item() / 2


def _full(x: Tensor | None) -> Tensor:
    assert x is not None
    whole = x.full_tensor() if isinstance(x, DTensor) else x
    return whole.detach().cpu().clone()
