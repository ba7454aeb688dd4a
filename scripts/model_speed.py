"""Tokens a second of the paper's hybrid on random tokens, on our layers and on FLA's.

    python scripts/model_speed.py [--vs fla] [--only train decode] [--save] [--minutes 3]
    python scripts/model_speed.py --only train --shapes 4x4096 --profile     # where its time goes
    python scripts/model_speed.py --small      # a tiny model, two steps, on whatever there is

The model: 22 blocks of 2048 channels, 11 with GDN-2 (16 heads, K = V = 128: the paper's state of
262,144 numbers a layer) and 11 with attention over 2048 tokens in turn, SwiGLUs of 5504, a tied
vocabulary of 32,000. How deep the paper's is was not to be found: 22 blocks make 1.28 billion.
With --vs fla flash-linear-attention's layers take the place of ours in the same blocks, with the
same weights; all else (norms, attention, SwiGLUs, loss, optimizer) is the same code.

A training step: fp32 weights, bf16 autocast, forward, backward, clipping to 1, fused AdamW; medians
by CUDA events after two steps. --checkpoint keeps the inputs of blocks alone, --compile compiles
every block, --graphs replays the step as a CUDA graph; both sides get what is asked for, and a row
says how it was launched. Decoding: weights in bf16, a prompt, then the likeliest token again and
again; once called one kernel after another, once as a CUDA graph of one token. FLA's layers decode
by their own recurrent mode and states; in a graph their states are copied back to where they were.

--profile prints what one step of each (one token) spends its time on, beside how long all took.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from learning import autotuning  # noqa: E402
from learning.models import MIXERS, PEERS, Sizes, build, parameters  # noqa: E402
from learning.profiling import profiled  # noqa: E402
from learning.record import Row, record, recorded  # noqa: E402
from learning.report import NOTHING, put, table  # noqa: E402
from learning.rows import at_least_one, machine  # noqa: E402
from learning.training import groups  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from gdn2gen.base.device import slug_of  # noqa: E402
from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.errors import UnsupportedError  # noqa: E402
from gdn2gen.base.terminal import Sheet, console, plain  # noqa: E402
from gdn2gen.nn import Cache, LanguageModel  # noqa: E402
from gdn2gen.nn.layer import RATES  # noqa: E402

RECORDS: Final = ROOT / "docs/models"
PAGE: Final = ROOT / "docs/experiments.md"
KEY: Final = (
    *("what", "model", "parameters", "batch", "tokens", "launched"),
    *("checkpoint", "compiled"),
)
FULL: Final = Sizes(32_000, 2048, 22, 16, 128, inner=5504, window=2048)
SMALL: Final = Sizes(61, 32, 2, 2, 16, inner=64, window=8)
WARM: Final = 2
EAGER: Final = 16
"""Tokens at most that are decoded one kernel after another: the host takes 20 ms for one."""
# Of the paper.
RATE, DECAY = 4e-4, 0.1
COLUMNS: Final = (
    "", "sequences x tokens", "layers", "launched", "ms", "tokens/s", "of FLA's", "peak GiB",
)  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    args = _arguments(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    until = time.monotonic() + 60 * args.minutes
    rows: list[Row] = []
    said = console()
    with verifying():
        for what, model, *shape in _jobs(args):
            name = f"{what} {shape[0]} x {shape[1]}, {model}"
            if time.monotonic() > until:
                said.print(f"{name}: no time left")
                continue
            began = time.monotonic()
            peer, run = model in PEERS, _train if what == "train" else _decode
            try:
                with autotuning.alone() if peer else nullcontext():
                    made = run(args, device, model, *shape)
            except Exception as error:
                # ours that breaks is no result; a peer, or too little memory, takes no others along
                if not peer and not isinstance(error, UnsupportedError | torch.OutOfMemoryError):
                    raise
                words = str(error).splitlines()[0] if str(error) else ""
                said.print(plain(f"{name}: {type(error).__name__}: {words}"))
                continue
            rows += made
            for row in made:
                said.print(f"{name}, {row['launched']}: {row['tokens_per_second']:,.0f} tokens/s")
            said.print(f"{name}: done in {time.monotonic() - began:.0f} s, compiling included")
            if args.save:
                save(rows)
    sheet = Sheet(f"{args.mixer}: {_gpu()}", COLUMNS, words=("", "layers", "launched"))
    for cells in cells_of(rows):
        sheet.add(*cells)
    said.print(sheet)
    return 0 if rows else 1


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mixer", choices=MIXERS, default="gdn2")
    parser.add_argument("--vs", choices=("fla",), help="time the model on its layers, too")
    parser.add_argument("--only", nargs="+", choices=("train", "decode"))
    parser.add_argument("--shapes", nargs="+", type=_shape, help="of a step (4x4096 8x2048)")
    parser.add_argument("--steps", type=at_least_one, help="that are timed (6)")
    parser.add_argument("--checkpoint", action="store_true", help="checkpoint activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--graphs", action="store_true", help="replay a step as a CUDA graph")
    parser.add_argument("--batch", nargs="+", type=at_least_one, help="of decoding (1 64)")
    parser.add_argument("--prompt", type=at_least_one, help="tokens before (1024)")
    parser.add_argument("--count", type=at_least_one, help="tokens after it (128)")
    parser.add_argument(
        "--save", action="store_true", help="keep rows in docs/models, and the table"
    )
    parser.add_argument(
        "--profile", nargs="?", type=at_least_one, const=25, metavar="TOP",
        help="where one step's time goes, with so many of its kernels (25)",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="a tiny model, two steps")
    parser.add_argument("--minutes", type=float, default=3.0, help="then nothing begins (3)")
    args = parser.parse_args(words)
    if args.small and args.save:
        parser.error("--save keeps times of the full model, and --small is another")
    theirs = [x for x in PEERS if x.startswith("fla:")]
    if args.vs and f"fla:{args.mixer}" not in theirs:
        parser.error(f"of FLA's layers there are {', '.join(theirs)} here")
    full: dict[str, Any] = {
        "shapes": [(4, 4096), (8, 2048)], "steps": 6, "batch": [1, 64], "prompt": 1024, "count": 128
    }  # fmt: skip
    small = {"shapes": [(2, 16)], "steps": 2, "batch": [1, 2], "prompt": 5, "count": 4}
    for name, value in (small if args.small else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.sizes = SMALL if args.small else FULL
    return args


def _shape(word: str) -> tuple[int, int]:
    batch, _, tokens = word.partition("x")
    return at_least_one(batch), at_least_one(tokens)


def _jobs(args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    """What is to be timed, what matters most first; ours and theirs one after the other."""
    wanted = args.only or ("train", "decode")
    trains = [("train", *shape) for shape in args.shapes if "train" in wanted]
    decodes = [("decode", batch, args.prompt) for batch in args.batch if "decode" in wanted]
    models = (args.mixer, *((f"fla:{args.mixer}",) if args.vs else ()))
    for what, *shape in (*trains[:1], *decodes, *trains[1:]):
        for model in models:
            yield what, model, *shape


def _build(args: argparse.Namespace, device: torch.device, name: str) -> LanguageModel:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with device:
        model = build(name, args.sizes, 0)
    if args.compile:
        torch._dynamo.config.recompile_limit = 4 * args.sizes.layers
        for block in model.blocks:
            block.compile()
    return model


def _random(args: argparse.Namespace, device: torch.device, *shape: int) -> Tensor:
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(args.sizes.vocabulary, shape, generator=drawn).to(device)


def _row(
    args: argparse.Namespace, what: str, name: str, model: nn.Module, batch: int, tokens: int
) -> Row:
    return {
        "what": what, "model": name, "parameters": parameters(model), "batch": batch,
        "tokens": tokens, "checkpoint": args.checkpoint and what == "train",
        "compiled": args.compile,
    }  # fmt: skip


def _train(
    args: argparse.Namespace, device: torch.device, name: str, batch: int, count: int
) -> list[Row]:
    model, on_gpu = _build(args, device, name), device.type == "cuda"
    model.checkpoint_activations = args.checkpoint
    optimizer = torch.optim.AdamW(
        groups(model, DECAY), lr=RATE, betas=(0.9, 0.95), fused=True, capturable=on_gpu
    )
    seen = _random(args, device, batch, count + 1)
    tokens, targets = seen[:, :-1].contiguous(), seen[:, 1:].contiguous()
    loss = torch.zeros((), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        # a graph's weights change under what a cache would keep of them
        with torch.autocast(
            device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=not args.graphs
        ):
            found = model(tokens, targets=targets)
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.copy_(found.detach())

    step()
    first = float(loss)
    for _ in range(WARM - 1):
        step()
    launched, run = _captured(step, device) if args.graphs else ("eager", step)
    ms = median(_times(run, args.steps, device))
    _profile(args, device, f"train {batch} x {count}, {name}, {launched}", run)
    return [
        {
            **_row(args, "train", name, model, batch, count),
            "launched": launched,
            "ms": ms,
            "tokens_per_second": batch * count / ms * 1e3,
            "first_loss": first,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        }
    ]


def _decode(
    args: argparse.Namespace, device: torch.device, name: str, batch: int, prompt: int
) -> list[Row]:
    """Once called, and on a GPU once as a graph, from the same states."""
    model = narrowed(_build(args, device, name)).eval()
    given = _random(args, device, batch, prompt)
    rows = []
    with torch.no_grad():
        cache = Cache(batch)
        token = _next(model, given, cache)
        [prefill] = _times(lambda: _next(model, given, Cache(batch)), 1, device)
        for graph in (False, True) if device.type == "cuda" else (False,):
            own, last = cache.copy(), token.clone()

            def step(own: Cache = own, last: Tensor = last) -> None:
                last.copy_(_next(model, last, own))

            for _ in range(WARM):
                step()
            launched, run = _captured(step, device) if graph else ("eager", step)
            if graph and launched != "graph":
                console().print(f"{name}: no {launched}")
                continue

            count = args.count if graph else min(args.count, EAGER)

            def steps(run: Callable[[], None] = run, count: int = count) -> None:
                for _ in range(count):
                    run()

            [ms] = _times(steps, 1, device)
            _profile(args, device, f"decode {batch} x {prompt}, {name}, {launched}", run)
            row = {
                **_row(args, "decode", name, model, batch, prompt),
                "launched": launched,
                "ms": ms / count,
                "tokens_per_second": batch * count / ms * 1e3,
                "prefill_ms": prefill,
                "count": count,
                "peak_gib": None,
            }
            rows.append(row)
    return rows


def _profile(
    args: argparse.Namespace, device: torch.device, title: str, run: Callable[[], Any]
) -> None:
    """Print where the time of one step goes, if that is asked for."""
    if args.profile and device.type == "cuda":
        for part in profiled(run).sheets(title, args.profile):
            console().print(part)


def _next(model: LanguageModel, tokens: Tensor, cache: Cache) -> Tensor:
    """The likeliest token after these, [B, 1]."""
    return model._logits(model._hidden(tokens, cache)[:, -1]).argmax(-1, keepdim=True)


def narrowed(model: LanguageModel) -> LanguageModel:
    """In bf16, but for the rates of decays, which ours keep and theirs would not."""
    rates = {x: y.detach() for x, y in model.named_parameters() if x.endswith(RATES)}
    model.bfloat16()
    for name, x in rates.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(x.float()))
    return model


def _captured(step: Callable[[], None], device: torch.device) -> tuple[str, Callable[[], None]]:
    """A graph of a step, and that it is one; or the step, and why not."""
    if device.type != "cuda":
        return "eager", step
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:  # a peer's layer may wait for the GPU
        torch.cuda.synchronize()
        return f"graph: {str(error).splitlines()[0][:200]}", step
    return "graph", graph.replay


def _times(run: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """Milliseconds of each."""
    if device.type != "cuda":
        began = [time.perf_counter()]
        for _ in range(count):
            run()
            began.append(time.perf_counter())
        return [1e3 * (y - x) for x, y in pairwise(began)]
    event: Any = torch.cuda.Event
    marks = [event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [float(x.elapsed_time(y)) for x, y in pairwise(marks)]


def cells_of(rows: Sequence[Row]) -> list[list[str]]:
    """A line of a table for each row."""
    others = [x for x in KEY if x != "model"]
    fla = {
        tuple(x[name] for name in others): x["ms"] for x in rows if x["model"].startswith("fla:")
    }
    lines = []
    for row in rows:
        flags = [x for x in ("checkpoint", "compiled") if row[x]]
        beside = fla.get(tuple(row[name] for name in others))
        peak = row["peak_gib"]
        lines.append(
            [
                row["what"],
                f"{row['batch']} x {row['tokens']}",
                "FLA's" if row["model"].startswith("fla:") else "ours",
                ", ".join([row["launched"], *flags]),
                f"{row['ms']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
                "-" if beside is None else f"{beside / row['ms']:.2f}",
                "-" if peak is None else f"{peak:.1f}",
            ]
        )
    return lines


def save(rows: Sequence[Row]) -> None:
    """Rows into docs/models, and the table of all that there are into the page."""
    kept = [{**row, "machine": machine()} for row in rows]
    record(RECORDS / f"{slug_of(_gpu())}.json", _gpu(), kept, KEY)
    put(PAGE, "models", page(recorded(RECORDS)))


def page(rows: Sequence[Row]) -> str:
    """A table for each GPU and kind of model."""
    parts = []
    for gpu, member, size in dict.fromkeys(map(_group, rows)):
        mine = [x for x in rows if _group(x) == (gpu, member, size)]
        mine.sort(key=lambda x: (x["what"] != "train", x["batch"], x["launched"], x["compiled"]))
        words = ", ".join(f"{name} {value}" for name, value in mine[0]["machine"].items())
        parts += [f"{member}, {size:,} parameters; {words}", "", table(COLUMNS, cells_of(mine)), ""]
    return "\n".join(parts).rstrip() or NOTHING


def _group(row: Row) -> tuple[str, str, int]:
    return row["gpu"], row["model"].removeprefix("fla:"), row["parameters"]


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    sys.exit(main())
