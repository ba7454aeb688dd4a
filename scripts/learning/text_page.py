"""The table and the pictures of what came out of `scripts/text.py train`."""

from __future__ import annotations

from collections.abc import Sequence

from learning.models import MIXERS, PEERS, TITLES
from learning.plots import Panel, Point, picture
from learning.report import NOTHING, table
from learning.rows import Row


def page(rows: Sequence[Row]) -> str:
    """Held-out loss and speed of each model, of one corpus below the other."""
    if not rows:
        return NOTHING
    parts = []
    for digest in dict.fromkeys(x["corpus"]["digest"] for x in rows):
        mine = sorted((x for x in rows if x["corpus"]["digest"] == digest), key=_place)
        corpus, machine = mine[0]["corpus"], mine[0]["machine"]
        titles = (
            "", "parameters", "lr", "nats a byte, held out", "bits", "tokens/s", "launched",
            "alarms",
        )  # fmt: skip
        lines = [
            [
                TITLES[x["model"]],
                f"{x['parameters']:,}",
                f"{x['lr']:g}",
                "diverged" if x["diverged"] is not None else f"{x['held_out'][-1][2]:.4f}",
                "-" if x["diverged"] is not None else f"{x['held_out'][-1][2] / 0.693147:.4f}",
                f"{x['tokens_per_second']:,.0f}" if x["tokens_per_second"] else "-",
                x["launched"],
                # nothing looks at a peer's layers
                str(len(x["seen"]["alarms"])) if x["seen"] else "-",
            ]
            for x in mine
        ]
        tokens = mine[0]["steps"] * mine[0]["tokens_per_step"]
        said = ", ".join(f"{name} {value}" for name, value in machine.items())
        parts += [
            f"{tokens:,} tokens of {corpus['bytes']:,} bytes in {corpus['files']:,} files, digest "
            f"{digest}; {said}",
            "",
            table(titles, lines),
            "",
        ]
    return "\n".join(parts).rstrip()


def _place(row: Row) -> tuple[int, bool]:
    return [*MIXERS, *PEERS].index(row["model"]), row["launched"] == "graph"


def pictured(rows: Sequence[Row]) -> str:
    """Held-out loss over tokens, and over seconds."""
    over_tokens, over_time = {}, {}
    for row in sorted(rows, key=_place):
        if row["diverged"] is not None:
            continue
        name = TITLES[row["model"]] + (", graphs" if row["launched"] == "graph" else "")
        over_tokens[name] = [
            Point(step * row["tokens_per_step"] / 1e6, loss) for step, _, loss in row["held_out"]
        ]
        over_time[name] = [Point(seconds, loss) for _, seconds, loss in row["held_out"]]
    return picture(
        [
            Panel("nats a byte, held out", "million tokens", over_tokens),
            Panel("the same", "seconds of training", over_time),
        ]
    )
