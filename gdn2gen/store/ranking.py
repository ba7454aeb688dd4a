"""Which of several entries is better, and what others of its size are there for.

A size is a problem as it is filed, a regime, a level and a decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from gdn2gen.codegen import render
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.plans import plan_named
from gdn2gen.store.format import PROVENANCES, Entry


def stale_stages(entry: Entry) -> list[str]:
    """Stages of the entry whose template is not the one it was checked under."""
    stages = plan_named(entry.plan).stages
    return [name for name in stages if entry.templates.get(name) != digest_of(entry.configs[name])]


def is_stale(entry: Entry) -> bool:
    """Whether any template of the entry changed (or is missing) since the entry was checked."""
    return bool(stale_stages(entry))


def digest_of(config: Config) -> str:
    """Digest of the template of a config; none fits where it cannot be read."""
    try:
        return render.template_digest(config)
    except OSError:
        return "<no template>"


def rank(entry: Entry) -> tuple[float, ...]:
    """Less is better: not stale, then provenance, then milliseconds, or the cost that is predicted.

    A later ranking of a target knows all that an earlier one did.
    """
    return (is_stale(entry), *speed(entry))


def speed(entry: Entry) -> tuple[float, ...]:
    """The same whether it is stale or not."""
    cost = entry.measured.get("predicted_bytes")
    return (
        PROVENANCES.index(entry.provenance),
        entry.measured.get("forward_backward_ms", math.inf),
        entry.measured.get("forward_ms", math.inf),
        cost if isinstance(cost, int | float) else math.inf,
    )


def by_size(entries: Iterable[Entry]) -> dict[tuple[str, ...], list[Entry]]:
    """Those of one problem, regime, level and decay together, the fastest first."""
    found: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.size, []).append(entry)
    return {size: sorted(rivals, key=speed) for size, rivals in found.items()}


def stand_ins(entries: Iterable[Entry]) -> dict[tuple[str, ...], str]:
    """Keys of the entries beside which there is a faster one of their size, and what they are there
    for: machines with no compiler for TileLang, calls with options that the faster ones refuse."""
    found = {}
    for rivals in by_size(entries).values():
        for number, entry in enumerate(rivals[1:], start=1):
            faster, words = rivals[:number], []
            if entry.needs_triton_alone and not any(x.needs_triton_alone for x in faster):
                words.append("Triton alone")
            if entry.serves_every_option and not any(x.serves_every_option for x in faster):
                words.append("every option")
            found[entry.key] = ", ".join(words)
    return found


def drop_outdone(best: dict[tuple[str, ...], Entry]) -> None:
    """Of the entries of a size, drop what is no better than one that serves as much; and what is
    stale, or was not measured, where the best is neither.
    """
    for rivals in by_size(best.values()).values():
        if len(rivals) == 1:
            continue
        ranks = {x.key: rank(x) for x in rivals}
        least = min(ranks.values())
        for entry in rivals:
            mine = ranks[entry.key]
            more = (x for x in rivals if x.key != entry.key and serves_as_much(x, entry))
            if mine[:2] > least[:2] or any(ranks[x.key] <= mine for x in more):
                del best[entry.key]


def serves_as_much(a: Entry, b: Entry) -> bool:
    """Whether `a` serves all machines and all calls that `b` does."""
    return (a.needs_triton_alone or not b.needs_triton_alone) and (
        a.serves_every_option or not b.serves_every_option
    )
