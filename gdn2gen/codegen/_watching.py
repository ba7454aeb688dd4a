"""What Triton's interpreter does for an operation on tiles, watched; and tiles made without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Function = Callable[..., Any]
Plans = dict[Any, Function]


class Watch:
    """What a process's interpreter asks its builder to compute."""

    def __init__(self, interpreter: Any, language: Any) -> None:
        self.interpreter = interpreter
        self.tensor = language.core.tensor
        self._seen: list[tuple[Any, ...]] | None = None
        self._watch(interpreter.InterpreterBuilder)

    def _watch(self, builder: Any) -> None:
        """Have `_seen` list what the builder is asked to compute, while there is such a list."""

        def watch(name: str, note: Function) -> None:
            method = getattr(builder, name)

            def noting(builder: Any, *args: Any) -> Any:
                made = method(builder, *args)
                if self._seen is not None:
                    self._seen.append(note(*args))
                return made

            setattr(builder, name, noting)

        for name in ("unary_op", "binary_op", "ternary_op"):
            watch(name, lambda *args: (args[-1], *args[:-1]))
        watch("create_idiv", lambda x, y: (_quotient, x, y))
        watch("create_addptr", lambda x, y: ("add to a pointer", x, y))
        for name in ("create_dot", "create_masked_load", "create_masked_store"):
            watch(name, lambda *args: args[:3])

    def learn(
        self,
        plans: Plans,
        key: Any,
        by_triton: Function,
        operands: tuple[Any, ...],
        planned: Function,
    ) -> Any:
        """Triton's result; what gives the same of these operands is kept for the next ones.

        `planned` makes that of the result and of the one thing that the builder computed for it.
        """
        self._seen, before = [], self._seen
        try:
            made = by_triton(*operands)
            seen = self._seen
        finally:
            self._seen = before
        plan = (planned(made, *seen[0]) if len(seen) == 1 else None) or by_triton
        plans[key] = plan if plan is by_triton or _are_same(made, plan(*operands)) else by_triton
        return made

    def maker(self, made: Any) -> Function:
        """What makes tiles of other data like this one."""
        shared = {name: x for name, x in vars(made).items() if name != "handle"}
        new, tensor, handle = object.__new__, self.tensor, self.interpreter.TensorHandle
        dtype = made.handle.dtype

        def make(data: Any) -> Any:
            held, tile = new(handle), new(tensor)
            held.data, held.dtype, held.attr = data, dtype, {}
            tile.__dict__.update(shared)
            tile.handle = held
            return tile

        return make


def _quotient(x: Any, y: Any) -> Any:
    return (x - np.fmod(x, y)) // y


def _are_same(x: Any, y: Any) -> bool:
    """Tiles of the same bits, which lie in memory in the same order."""
    if x is y:
        return True
    a, b = x.handle.data, y.handle.data
    if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
        return False
    return bool(x.dtype.is_ptr() or a.flags.c_contiguous == b.flags.c_contiguous)
