"""Operations on tiles in Triton's interpreter, by NumPy alone from the second time on.

Triton works out what an operation does to tiles of these types and shapes each time anew, in 60 to
200 us; what NumPy then does takes 2 to 20. Here Triton does each operation once for operands of a
kind (type and shape) and is watched: what it called of NumPy, and in which dtypes, is called alone
for the next operands of that kind. What it does in any other way is left to it, and so are errors,
which are Triton's own.

Bits are the same. Of each watched operation the shortcut's result is compared. And where Triton
makes a whole tile of a number, for a tile that lies in memory in another order (transposed), it
does so still: the order of the result is the order of later sums.
"""

from __future__ import annotations

from math import copysign
from typing import Any, Final

import numpy as np

from gdn2gen.codegen._watching import Function, Plans, Watch

_ARITHMETIC: Final = frozenset(("add", "sub", "mul", "truediv", "floordiv", "mod"))
_COMPARING: Final = frozenset(("lt", "le", "gt", "ge", "eq", "ne"))
_BINARY: Final = _ARITHMETIC | _COMPARING | {"and", "or", "xor", "lshift", "rshift"}
_REVERSED: Final = frozenset(f"r{x}" for x in _ARITHMETIC)
_UNARY: Final = frozenset(("exp", "exp2", "log", "log2", "sqrt"))
# NumPy holds these as they are; of bf16 and 8 bits it holds the bits.
_FLOATS: Final = frozenset(("fp16", "fp32", "fp64"))
_INTEGERS: Final = frozenset(("int32", "int64"))
_PLAIN: Final = _FLOATS | _INTEGERS | {"int1"}
_BITWISE: Final = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


class Shortcuts:
    """The operations of a process's interpreter that have shortcuts, by package and name."""

    def __init__(self, interpreter: Any, language: Any) -> None:
        self._interpreter = interpreter
        self._tensor = language.core.tensor
        self._constexpr = language.core.constexpr
        self._watch = Watch(interpreter, language)

    def of(self, package: Any, name: str, member: Function) -> Function:
        """`member` for a kernel, which gives no semantics: by a shortcut where there is one."""
        by_triton = self._bound(member)
        stem = name.strip("_")
        if package is self._tensor and name == f"__{stem}__":
            if stem in _BINARY | _REVERSED:
                return self._computed(by_triton, stem in _REVERSED)
            return self._indexed(by_triton) if stem == "getitem" else by_triton
        shortcuts = {"where": self._computed, "load": self._load, "store": self._store}
        shortcuts |= {**dict.fromkeys(_UNARY, self._computed), "dot": self._dot, "to": self._to}
        return shortcuts[name](by_triton) if name in shortcuts else by_triton

    def _bound(self, member: Function) -> Function:
        # without its check that semantics were given
        function = getattr(member, "__wrapped__", member)
        semantic = getattr(self._interpreter, "interpreter_semantic", None)
        if semantic is None:
            semantic = self._interpreter.TritonSemantic(self._interpreter.interpreter_builder)

        def by_triton(*args: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return function(*args, **named)

        return by_triton

    # What is computed element by element

    def _computed(self, by_triton: Function, is_reversed: bool = False) -> Function:
        plans: Plans = {}
        tensor, constexpr = self._tensor, self._constexpr

        def operate(*operands: Any, **named: Any) -> Any:
            if named:
                return by_triton(*operands, **named)
            key = tuple([x.type.name if type(x) is tensor else type(x) for x in operands])
            plan = plans.get(key)
            if plan is not None:
                return plan(*operands)
            if constexpr in key:
                return operate(*[x.value if type(x) is constexpr else x for x in operands])
            if all(type(x) is tensor or _is_usual(x) for x in operands):
                return self._watch.learn(plans, key, by_triton, operands, planned(operands))
            return by_triton(*operands)

        def planned(operands: tuple[Any, ...]) -> Function:
            def plan(made: Any, function: Any, *handles: Any) -> Function | None:
                if len(handles) != len(operands):
                    return None
                if not callable(function):
                    return self._pointer_plan(by_triton, made, operands, handles)
                if is_reversed:
                    function, handles = _reversed(function), handles[::-1]
                return self._plan(by_triton, made, function, handles, operands)

            return plan

        return operate

    def _plan(
        self, by_triton: Function, made: Any, function: Any, handles: Any, operands: Any
    ) -> Function | None:
        """What calls the same function of NumPy for tiles and numbers of these kinds."""
        is_tile = [type(x) is self._tensor for x in operands]
        tiles = [x for x in operands if type(x) is self._tensor]
        if not all(x.dtype.name in _PLAIN for x in (*handles, *tiles, made)):
            return None
        if len(handles) == 2 and handles[0].data.dtype == bool and function not in _BITWISE:
            return None  # Triton computes with bits, NumPy with truths
        wanted = [x.data.dtype for x in handles]
        reads = [_reader(x, y) for x, y in zip(wanted, operands, strict=True)]
        compute = _computing(function, reads, self._watch.maker(made))
        numbers = [i for i, known in enumerate(is_tile) if not known]
        blocks = [i for i, known in enumerate(is_tile) if known and operands[i].type.is_block()]
        if not numbers and len(blocks) in (0, len(operands)):
            return compute

        def plan(*operands: Any) -> Any:
            for i in numbers:
                if not _is_usual(operands[i]):
                    return by_triton(*operands)
            for i in blocks:  # Triton makes whole tiles of the others
                if not operands[i].handle.data.flags.c_contiguous:
                    return by_triton(*operands)
            return compute(*operands)

        return plan

    def _pointer_plan(
        self, by_triton: Function, made: Any, operands: Any, handles: Any
    ) -> Function | None:
        """A pointer and an offset, in whichever order; their order in memory says nothing."""
        pointer, offset = operands
        swapped = type(pointer) is not self._tensor or not pointer.dtype.is_ptr()
        if swapped:
            pointer, offset = offset, pointer
        width = max(1, handles[0].get_element_ty().primitive_bitwidth // 8)
        make = self._watch.maker(made)
        if type(offset) is int:

            def moved(pointer: Any, offset: Any) -> Any:
                if not _is_usual(offset):
                    return by_triton(pointer, offset)
                return make(pointer.handle.data + np.array([width * offset]).astype(np.uint64))

            return None if swapped else moved
        if type(offset) is not self._tensor or offset.dtype.name not in _INTEGERS:
            return None

        def added(pointer: Any, offset: Any) -> Any:
            if swapped:
                pointer, offset = offset, pointer
            return make(pointer.handle.data + width * offset.handle.data.astype(np.uint64))

        return added

    def _to(self, by_triton: Function) -> Function:
        plans: Plans = {}

        def to(x: Any, dtype: Any, *others: Any, **named: Any) -> Any:
            name = getattr(dtype, "name", None)
            if others or named or name is None:
                return by_triton(x, dtype, *others, **named)
            key = (x.type.name, name)
            if key not in plans:
                made = by_triton(x, dtype)
                plans[key] = planned(x, made) or by_triton
                return made
            return plans[key](x, dtype)

        def planned(x: Any, made: Any) -> Function | None:
            if made is x:
                return lambda x, _: x
            given, wanted = x.dtype.name, made.dtype.name
            exact = wanted in _INTEGERS and given not in _FLOATS
            if given not in _PLAIN or not (wanted in _FLOATS or exact):
                return None
            make, dtype = self._watch.maker(made), made.handle.data.dtype
            return lambda x, _: make(x.handle.data.astype(dtype))

        return to

    def _indexed(self, by_triton: Function) -> Function:
        """A tile with new axes of one."""
        plans: Plans = {}

        def indexed(x: Any, places: Any) -> Any:
            if type(places) is not tuple or not all(y is None or y == slice(None) for y in places):
                return by_triton(x, places)
            key = (x.type.name, *[y is None for y in places])
            if key not in plans:
                made = by_triton(x, places)
                make, shape = self._watch.maker(made), made.handle.data.shape
                plan = lambda x, _: make(x.handle.data.reshape(shape))  # noqa: E731
                plans[key] = plan if x.type.is_block() and made is not x else by_triton
                return made
            return plans[key](x, places)

        return indexed

    # Memory, and products

    def _load(self, by_triton: Function) -> Function:
        plans: Plans = {}
        tensor = self._tensor
        read = self._interpreter._interpreter.load

        def load(pointer: Any, mask: Any = None, other: Any = None, **named: Any) -> Any:
            is_given = type(mask) is tensor
            usual = (is_given or mask is None) and (other is None or _is_nought(other))
            if named or not usual or type(pointer) is not tensor:
                return by_triton(pointer, mask, other, **named)
            key = (pointer.type.name, mask.type.name if is_given else None, type(other))
            plan = plans.get(key)
            if plan is None:
                return self._watch.learn(plans, key, by_triton, (pointer, mask, other), planned)
            return plan(pointer, mask, other)

        def planned(made: Any, pointer: Any, mask: Any, other: Any) -> Function | None:
            make, data = self._watch.maker(made), made.handle.data
            shape, dtype = data.shape, data.dtype
            if pointer.data.shape != shape or mask.data.dtype != bool:
                return None
            everywhere, nought = np.ones(shape, bool), np.zeros(shape, dtype)

            def plan(pointer: Any, mask: Any, _: Any) -> Any:
                where = everywhere if mask is None else _whole(mask.handle.data, shape)
                return make(read(pointer.handle.data, where, nought, dtype))

            return plan

        return load

    def _store(self, by_triton: Function) -> Function:
        plans: Plans = {}
        tensor = self._tensor
        write = self._interpreter._interpreter.store

        def store(pointer: Any, value: Any, mask: Any = None, **named: Any) -> Any:
            is_given = type(mask) is tensor
            usual = (is_given or mask is None) and type(value) is type(pointer) is tensor
            if named or not usual:
                return by_triton(pointer, value, mask, **named)
            names = (pointer.type.name, value.type.name)
            key = (*names, mask.type.name if is_given else None)
            plan = plans.get(key)
            if plan is None:
                return self._watch.learn(
                    plans, key, by_triton, (pointer, value, mask), planned(value)
                )
            return plan(pointer, value, mask)

        def planned(value: Any) -> Function:
            given = value.handle

            def plan(made: Any, pointer: Any, stored: Any, mask: Any) -> Function | None:
                names = {given.dtype.name, stored.dtype.name}
                if pointer.data.shape != stored.data.shape or mask.data.dtype != bool:
                    return None
                if len(names) > 1 and not names <= _FLOATS:
                    return None
                shape, dtype = pointer.data.shape, stored.data.dtype
                everywhere = np.ones(shape, bool)

                def write_value(pointer: Any, value: Any, mask: Any) -> Any:
                    where = everywhere if mask is None else _whole(mask.handle.data, shape)
                    data = value.handle.data
                    data = data if data.dtype == dtype else data.astype(dtype)
                    write(pointer.handle.data, _whole(data, shape), where)
                    return made

                return write_value

            return plan

        return store

    def _dot(self, by_triton: Function) -> Function:
        plans: Plans = {}
        tensor = self._tensor

        def dot(x: Any, y: Any, acc: Any = None, input_precision: Any = None, **named: Any) -> Any:
            usual = type(x) is type(y) is tensor and (acc is None or type(acc) is tensor)
            if named or not usual:
                return by_triton(x, y, acc, input_precision, **named)
            names = (x.type.name, y.type.name, None if acc is None else acc.type.name)
            key = (*names, input_precision)
            plan = plans.get(key)
            if plan is None:
                operands = (x, y, acc, input_precision)
                return self._watch.learn(plans, key, by_triton, operands, planned)
            return plan(x, y, acc, input_precision)

        def planned(made: Any, x: Any, y: Any, total: Any) -> Function | None:
            if not {z.dtype.name for z in (x, y, total)} <= _FLOATS:
                return None
            make, dtype = self._watch.maker(made), total.data.dtype
            nought = dtype.type(0)

            def plan(x: Any, y: Any, acc: Any, _: Any) -> Any:
                product = np.matmul(x.handle.data, y.handle.data, dtype=dtype)
                return make(product + (nought if acc is None else acc.handle.data))

            return plan

        return dot


def _reversed(function: Function) -> Function:
    return lambda x, y: function(y, x)


def _is_usual(x: Any) -> bool:
    """Whether Triton takes a number for 32 bits, as nearly all of its type."""
    if type(x) is int:
        return -(2**31) <= x < 2**31
    return type(x) is float and (x == 0.0 or 2.0**-126 <= abs(x) <= 2.0**127)


def _is_nought(x: Any) -> bool:
    return type(x) in (int, float) and x == 0 and copysign(1.0, x) > 0


def _whole(data: Any, shape: tuple[int, ...]) -> Any:
    if data.shape == shape:
        return data
    full = np.empty(shape, data.dtype)
    full[...] = data
    return full


def _reader(wanted: Any, operand: Any) -> Function:
    """What reads an operand of this kind, as Triton had it when it computed."""
    handle = getattr(operand, "handle", None)
    if handle is None:
        found: Function = wanted.type
        return found
    if handle.data.dtype == wanted:
        return lambda x: x.handle.data
    return lambda x: x.handle.data.astype(wanted)


def _computing(function: Function, reads: list[Function], make: Function) -> Function:
    if len(reads) == 1:
        (one,) = reads
        return lambda x: make(function(one(x)))
    if len(reads) == 2:
        one, two = reads
        return lambda x, y: make(function(one(x), two(y)))
    one, two, three = reads
    return lambda x, y, z: make(function(one(x), two(y), three(z)))
