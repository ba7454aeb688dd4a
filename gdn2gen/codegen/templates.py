"""Jinja's environment, and digests of what a template says.

A digest hashes the parsed text of a template and of all macros that it calls: not the names of
files and macros, nor places, comments, and macros that nothing calls. So a macro may move to
another file, and no entry becomes stale by a change that its kernels do not see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import jinja2
from jinja2 import nodes

from gdn2gen.base.errors import TemplateError
from gdn2gen.base.paths import templates_dir


class _Parsed(jinja2.BaseLoader):
    """Compiles the trees that digests are made of: parsing takes longer than all the rest."""

    def load(
        self,
        environment: jinja2.Environment,
        name: str,
        globals: MutableMapping[str, Any] | None = None,
    ) -> jinja2.Template:
        file = _parsed(name)
        code = environment.compile(file.tree, name, str(templates_dir() / name))
        return environment.template_class.from_code(environment, code, globals or {})


@cache
def templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=_Parsed(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def text_digest(names: Iterable[str]) -> str:
    """Digest of what these templates say, in any order: 16 hex digits."""
    found = sorted(_template_digest(name) for name in names)
    return found[0] if len(found) == 1 else _hash(found)


@cache
def _template_digest(name: str) -> str:
    return _hash(_parsed(name).body)


@cache
def _macro_digest(file: str, name: str) -> str:
    definitions = _parsed(file).definitions
    if name not in definitions:
        raise TemplateError(f"there is no {name} in the template {file}")
    return _hash(definitions[name])


def _hash(words: Iterable[_Word]) -> str:
    text = "".join(x if isinstance(x, str) else f"<{_macro_digest(*x)}>" for x in words)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_Word = str | tuple[str, str]
"""A piece of a syntax tree, or what is called there: its file and its name."""


@dataclass(frozen=True)
class _File:
    """A parsed template; what it defines and what it prints are read before the tree is compiled,
    which changes it."""

    tree: nodes.Template
    definitions: Mapping[str, tuple[_Word, ...]]
    """Its macros, and what it sets once and outside of any block."""
    body: tuple[_Word, ...]
    """What it prints by itself."""


@cache
def _parsed(name: str) -> _File:
    path = templates_dir() / name
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise jinja2.TemplateNotFound(name) from error
    tree = templates().parse(text, name, str(path))
    for other in tree.find_all((nodes.FromImport, nodes.Include, nodes.Extends)):
        raise TemplateError(
            f"{name}, line {other.lineno}: digests do not follow {type(other).__name__}; "
            "import the template by an alias"
        )
    found: dict[str, list[nodes.Node]] = {}
    for x in tree.body:
        if isinstance(x, nodes.Macro):
            found.setdefault(x.name, []).append(x)
        elif isinstance(x, nodes.Assign) and isinstance(x.target, nodes.Name):
            found.setdefault(x.target.name, []).append(x)
    defined = {key: x[0] for key, x in found.items() if len(x) == 1}
    imports = {x.target: _imported(name, x) for x in tree.find_all(nodes.Import)}
    if clash := sorted({*found} & {*imports}):
        raise TemplateError(f"{name}: {clash} are both aliases of imports and defined")
    own = {key: (name, key) for key in defined}
    apart = {id(x) for x in defined.values()}
    body = [x for x in tree.body if id(x) not in apart and not isinstance(x, nodes.Import)]
    return _File(
        tree,
        {key: _read(_contents(x), own, imports) for key, x in defined.items()},
        _read(body, own, imports),
    )


def _imported(name: str, node: nodes.Import) -> str:
    if not isinstance(node.template, nodes.Const):
        raise TemplateError(f"{name}, line {node.lineno}: imports a template by a computed name")
    return str(node.template.value)


def _contents(definition: nodes.Node) -> list[nodes.Node]:
    """A macro without its name, or the value that is set."""
    if isinstance(definition, nodes.Macro):
        return [*definition.args, *definition.defaults, *definition.body]
    assert isinstance(definition, nodes.Assign)
    return [definition.node]


def _read(
    part: list[nodes.Node], own: Mapping[str, tuple[str, str]], imports: Mapping[str, str]
) -> tuple[_Word, ...]:
    """The words of a part of a file, given what the file defines, and its imports by alias."""
    bound = {x.name for x in nodes.Template(part).find_all(nodes.Name) if x.ctx != "load"}

    found: list[_Word] = []

    def read(value: object) -> None:
        match value:
            case str() | bool() | int() | float() | None:
                found.append(f"{value!r},")
            case nodes.Name(name=name, ctx="load") if name in own and name not in bound:
                found.append(own[name])
            case nodes.Getattr(node=nodes.Name(name=name), attr=attr) if name in imports:
                found.append((imports[name], attr))
            case nodes.Node():
                found.append(f"{type(value).__name__}(")
                for field in value.fields:
                    read(getattr(value, field))
                found.append(")")
            case list() | tuple():
                found.append("[")
                for x in _joined(value):
                    read(x)
                found.append("]")
            case _:
                raise TypeError(f"a {type(value).__name__} in a syntax tree: {value!r}")

    read(part)
    return tuple(found)


def _joined(values: Iterable[object]) -> Iterator[object]:
    """The same with neighbouring pieces of text as one: comments and definitions divide them."""
    pieces = (y for x in values for y in (x.nodes if isinstance(x, nodes.Output) else [x]))
    for is_text, group in groupby(pieces, lambda x: isinstance(x, nodes.TemplateData)):
        if is_text:
            yield "".join(x.data for x in group if isinstance(x, nodes.TemplateData))
        else:
            yield from group
