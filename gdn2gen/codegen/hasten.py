"""Triton's interpreter hastened: most of its time goes into what it makes anew for every tile.

A kernel's time in it hardly depends on the size of its tiles: of 8.3 s that a forward and backward
of 96 by 40 channels took, products and sums of NumPy were 1.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import linecache
import opcode
from types import CodeType
from typing import Any, Final

from gdn2gen.codegen.shortcuts import Shortcuts

_KNOWN: Final = ("3.6.", "3.7.", "3.8.", "3.9.")
_TO_TENSOR: Final = ast.parse("interpreter_semantic.to_tensor", mode="eval").body
_FALSE: Final = ast.parse("False", mode="eval").body


def hasten() -> None:
    """Spare this process's interpreter most of its time, and change no bit of what it computes.

    Triton 3.6 to 3.9 check sums of integers for overflow only to drop what was found, make the
    table of NumPy's dtypes anew for every tile, and its shape and type, look through all their
    names at every call of a helper, take exclusive ors element by element, work out anew what each
    operation does (see `shortcuts`), and read a kernel's source twice.
    """
    if not importlib.metadata.version("triton").startswith(_KNOWN):
        return
    from triton.runtime import interpreter

    dtype_of = interpreter._get_np_dtype
    if dtype_of.__name__ == "hastened":
        return
    options = interpreter.interpreter_builder.options
    if not options.debug:  # an overflow is told by an assertion of its debug mode
        spared = dataclasses.replace(options, sanitize_overflow=False)
        interpreter.interpreter_builder.options = spared
    dtypes: dict[str, Any] = {}

    def hastened(dtype: Any) -> Any:
        if dtype.name not in dtypes:
            dtypes[dtype.name] = dtype_of(dtype)
        return dtypes[dtype.name]

    interpreter._get_np_dtype = hastened
    _reduce_at_once(interpreter)
    _patch_once(interpreter)
    _share_shapes()
    _unwrap_at_once()
    _rewrite_at_once(interpreter)


def _reduce_at_once(interpreter: Any) -> None:
    import numpy as np
    import triton.language as tl

    reduce = interpreter.ReduceOps.generic_reduce

    def reduce_at_once(reduction: Any, operands: Any) -> Any:
        if reduction.combine_fn is not tl.standard._xor_combine or reduction.axis is None:
            return reduce(reduction, operands)
        data = np.bitwise_xor.reduce(
            operands[0].handle.data, axis=reduction.axis, keepdims=reduction.keep_dims
        )
        return [reduction.to_tensor(data, operands[0].dtype)]

    interpreter.ReduceOps.generic_reduce = reduce_at_once


def _patch_once(interpreter: Any) -> None:
    """Replace the language for a launch, and not again for every helper that its kernel calls."""
    import triton.language as tl

    patch_all = interpreter._patch_lang
    builtins: dict[Any, list[str]] = {}
    languages: dict[Any, list[Any]] = {}
    shortcuts = Shortcuts(interpreter, tl)
    of_kernels: dict[tuple[Any, str], Any] = {}

    def patch(package: Any, builder: Any, scope: Any) -> None:
        if not builtins.get(package):
            members = inspect.getmembers(package, tl.core.is_builtin)
            builtins[package] = [name for name, _ in members]
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                if (package, name) not in of_kernels:
                    of_kernels[package, name] = shortcuts.of(package, name, member)
                scope.set_attr(package, name, of_kernels[package, name])

    def patch_once(function: Any) -> Any:
        if function not in languages:
            known = (x for x in function.__globals__.values() if x is tl or x is tl.core)
            languages[function] = list(known)
        found = languages[function]
        if not found or any(map(tl.core.is_builtin, _samples(found))):
            return patch_all(function)
        return interpreter._LangPatchScope()

    def _samples(found: list[Any]) -> list[Any]:
        return [tl.core.tensor.__add__, *(x.load for x in found)]

    interpreter._patch_builtin = patch
    interpreter._patch_lang = patch_once


def _share_shapes() -> None:
    """Have tiles of one shape share what Triton makes of it; what is shared is never changed."""
    import triton.language as tl
    from triton.language import semantic

    make_type, make_tensor = tl.core.block_type.__init__, tl.core.tensor.__init__
    broadcast = semantic.TritonSemantic.broadcast_impl_value
    constexpr = tl.core.constexpr
    types: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, dict[str, Any]]] = {}
    of_scalars: dict[str, Any] = {}

    def type_of(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([x.value if type(x) is constexpr else x for x in shape])
        key = (element_ty.name, sizes)
        if key not in types:
            make_type(self, element_ty, shape)
            made = {name: x for name, x in vars(self).items() if name != "element_ty"}
            made["shape"], made["of_tensors"] = shapes.setdefault(sizes, (self.shape, {}))
            types[key] = made
        self.__dict__.update(types[key])
        self.element_ty = element_ty

    def tensor_of(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("of_tensors", of_scalars)
        if not known:
            make_tensor(self, handle, type)
            known.update(shape=self.shape, numel=self.numel)
            return
        self.__dict__.update(known)
        self.handle, self.type, self.dtype = handle, type, type.scalar

    def broadcast_unless_alike(self: Any, x: Any, y: Any) -> Any:
        if x.type.__dict__.get("shape") is y.type.__dict__.get("shape"):
            return x, y  # of one shape, or both without
        return broadcast(self, x, y)

    tl.core.block_type.__init__ = type_of
    tl.core.tensor.__init__ = tensor_of
    semantic.TritonSemantic.broadcast_impl_value = broadcast_unless_alike


def _unwrap_at_once() -> None:
    """What holds no constants is not looked through for them."""
    import triton.language as tl

    unwrap = tl.core._unwrap_if_constexpr
    plain = frozenset((int, float, bool, str, tl.core.dtype, tl.core.tensor, tl.core.block_type))

    def unwrap_at_once(x: Any) -> Any:
        return x if type(x) in plain else unwrap(x)

    tl.core._unwrap_if_constexpr = unwrap_at_once


def _rewrite_at_once(interpreter: Any) -> None:
    """Parse a module once for all its functions, and go through their statements alone.

    Triton reads a function's source twice, token by token, and then goes through its tree three
    times: 20 ms of a kernel, which is as long as a program of it takes.
    """
    rewriter = interpreter.FunctionRewriter
    rewrite = rewriter.rewrite_ast

    def rewrite_at_once(self: Any) -> Any:
        code = self.fn.__code__
        path = code.co_filename
        if path not in _FUNCTIONS:
            try:
                _FUNCTIONS[path] = _functions(ast.parse("".join(linecache.getlines(path))))
            except SyntaxError:
                _FUNCTIONS[path] = {}
        # once: the tree is changed
        function = _FUNCTIONS[path].pop((code.co_name, code.co_firstlineno), None)
        if function is None or _has_chain(code):
            return rewrite(self)
        function.decorator_list = []
        _make_tensors(function.body)
        self.filename = path
        return self._compile_and_exec(ast.Module([function], []))

    rewriter.rewrite_ast = rewrite_at_once


def parse(source: str, name: str) -> None:
    """Raise SyntaxError where this is no Python; what was parsed is kept for `compiled`."""
    if len(_TREES) > 8:
        _TREES.clear()
    _TREES[source] = ast.parse(source, name)


def compiled(source: str, path: str) -> CodeType:
    """The code of a module, parsed here or before; and once for what is made of its kernels."""
    tree = _TREES.pop(source, None) or ast.parse(source, path)
    code = compile(tree, path, "exec", dont_inherit=True)
    _FUNCTIONS[path] = _functions(tree)
    return code


_Functions = dict[tuple[str, int], ast.FunctionDef]
_TREES: Final[dict[str, ast.Module]] = {}
"""By source, of what was parsed and not compiled yet."""
_FUNCTIONS: Final[dict[str, _Functions]] = {}
"""By file, of what was not rewritten yet."""


def _functions(tree: ast.Module) -> _Functions:
    """The kernels and helpers of a module, by name and first line."""
    found = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.decorator_list]
    return {(x.name, min(y.lineno for y in x.decorator_list)): x for x in found}


def _make_tensors(statements: list[ast.stmt]) -> None:
    """Have every value that is assigned be a tensor, as Triton's rewriter does."""
    for x in statements:
        if isinstance(x, ast.Assign):
            x.value = ast.copy_location(ast.Call(_TO_TENSOR, [x.value, _FALSE], []), x.value)
        for name in ("body", "orelse", "finalbody"):
            _make_tensors(getattr(x, name, []))


def _has_chain(code: Any) -> bool:
    """Whether there may be a comparison of three values, which Triton 3.9 writes anew."""
    nested = any(inspect.iscode(x) for x in code.co_consts)
    return nested or opcode.opmap["COPY"] in code.co_code[::2]
