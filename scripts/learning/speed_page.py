"""The table of tokens a second, ours beside a peer's, and the rows that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from learning.models import MIXERS, PEERS, TITLES, member_of
from learning.report import NOTHING, table
from learning.rows import Row


def tokens_a_second(row: Row) -> tuple[float, float, float]:
    """Of the slowest turn, the median one, the fastest."""
    tokens = row["turn"] * row["tokens_per_step"]
    speeds = [tokens / x for x in row["seconds"]]
    return min(speeds), median(speeds), max(speeds)


def merged(known: Sequence[Row], fresh: Sequence[Row]) -> list[Row]:
    """Rows of a mixer, a GPU and a way of launching give way to fresh ones together, for they were
    timed together; but not to fewer, and not to ones of which any failed, where none had."""
    kept = _groups(known)
    for key, rows in _groups(fresh).items():
        before = kept.get(key, [])
        if (len(rows) >= len(before) and (_failed(before) or not _failed(rows))) or not before:
            kept[key] = rows
    return [row for key in sorted(kept) for row in sorted(kept[key], key=_place)]


def _groups(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        how = row["machine"]["device"], row.get("small", False), row["graphs"]
        key = *how, MIXERS.index(member_of(row["model"]))
        found.setdefault(key, {})[row["model"]] = row
    return {key: [*mine.values()] for key, mine in found.items()}


def _failed(rows: Sequence[Row]) -> bool:
    return any(row["failed"] is not None for row in rows)


def _place(row: Row) -> int:
    return [*MIXERS, *PEERS].index(row["model"])


def page(rows: Sequence[Row]) -> str:
    """A line for each mixer and peer."""
    if not rows:
        return NOTHING
    titles = (
        "", "ours, tokens/s", "peer", "its tokens/s", "ours / its", "GiB, ours", "its", "launched",
    )  # fmt: skip
    lines, failed = [], []
    for group in _groups(rows).values():
        by_model = {row["model"]: row for row in group}
        member = member_of(group[0]["model"])
        ours = by_model.get(member)
        peers = [by_model[x] for x in PEERS if x in by_model]
        lines += [_line(member, ours, peer) for peer in peers or (None,)]
        failed += [f"- {x['model']}: {x['failed']}" for x in group if x["failed"] is not None]
    devices = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in row["machine"].items()) for row in rows
    )
    return "\n".join([table(titles, lines), "", *failed, *(f"- {x}" for x in devices)])


def _line(member: str, ours: Row | None, peer: Row | None) -> list[str]:
    launched = dict.fromkeys(x["launched"] for x in (ours, peer) if x is not None)
    return [
        TITLES[member],
        _speed(ours),
        "-" if peer is None else TITLES[peer["model"]].partition(", ")[2],
        _speed(peer),
        _ratio(ours, peer),
        _memory(ours),
        _memory(peer),
        " / ".join(launched),
    ]


def _speed(row: Row | None) -> str:
    if row is None or row["failed"] is not None:
        return "-"
    low, middle, high = tokens_a_second(row)
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def _ratio(ours: Row | None, peer: Row | None) -> str:
    """Of the medians, and of the turns that followed each other; of rows timed together alone."""
    if ours is None or peer is None or ours["at"] != peer["at"]:
        return "-"
    if _failed([ours, peer]):
        return "-"
    found = tokens_a_second(ours)[1] / tokens_a_second(peer)[1]
    each = [
        y / x * ours["tokens_per_step"] / peer["tokens_per_step"]
        for x, y in zip(ours["seconds"], peer["seconds"], strict=True)
    ]
    return f"{found:.2f} ({min(each):.2f} to {max(each):.2f})"


def _memory(row: Row | None) -> str:
    if row is None or row["failed"] is not None or row["peak_mib"] is None:
        return "-"
    return f"{row['peak_mib'] / 1024:.2f}"
