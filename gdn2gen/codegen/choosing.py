"""Several items of a sequence at once, by functions in C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any


def chooser(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What gives the items at these places, of which there is one at least."""
    if [*places] == [*range(places[0], places[-1] + 1)]:
        return itemgetter(slice(places[0], places[-1] + 1))
    return itemgetter(*places)
