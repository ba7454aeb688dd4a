"""Launches that begin before the one before them has ended, written into a module's text.

A kernel that is launched so does nothing but wait until all that came before has ended: of what is
in memory it reads and writes nothing before. So whatever holds of a pass whose launches follow each
other holds of one whose launches overlap, and what is won is the time that a launch takes.

- Waiting is for the kernel before, all of its programs and all that they wrote. It has waited
  itself, or was launched without the attribute, and then all before it had ended. So, link by link,
  has everything from the pass's first launch on, and what came before that.
- The first launch of a pass has no attribute: who launched the kernel before it, and whether that
  waited for its own predecessor, is not known. So a pass begins when all earlier work of the stream
  has ended: what wrote its inputs, and who last used the memory that it is given.
- The last stage says nothing to what comes after the pass, whose launch is not ours.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final, NamedTuple

from gdn2gen.base.errors import TemplateError

_WAIT: Final = "# all that the kernels before it wrote is there from here on\n"
_SAY: Final = "# the next kernel may begin, and wait there\n"
_CALLS: Final = {
    "triton": ("tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"),
    "tilelang": ("tile.pdl_sync()", "tile.pdl_trigger()"),
}
_NOTE: Final = """# Launched before the kernel before has ended; for that they wait first of all.
EARLY = ({names})


"""
_OPTION: Final = "launch_pdl=True"
WRITTEN: Final = repr((_WAIT, _SAY, _CALLS, _NOTE, _OPTION))
"""All that is written into a text, for digests: where it goes is each kernel's own first line."""


class Launched(NamedTuple):
    """A launch in a module's `launch`."""

    name: str
    """Of the kernel in Triton, or of the function that makes the program."""
    always: bool
    """Whether it is launched in every call that launches anything."""
    call: ast.Call


def launched(tree: ast.Module) -> list[Launched]:
    """What a module's `launch` launches, in order."""
    (launch,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "launch")
    return [*_launched(launch.body, True)]


def _launched(statements: list[ast.stmt], always: bool) -> Iterator[Launched]:
    for x in statements:
        if isinstance(x, ast.If):
            yield from _launched([*x.body, *x.orelse], False)
            continue
        calls = [y for y in ast.walk(x) if isinstance(y, ast.Call)]
        for call in sorted(calls, key=lambda y: (y.lineno, y.col_offset)):
            match call.func:
                case ast.Subscript(value=ast.Name(id=name)) if name.endswith("_kernel"):
                    yield Launched(name, always, call)
                case ast.Call(func=ast.Name(id=name)) if name.startswith("compiled"):
                    program = f"{name.removeprefix('compiled')}_program".removeprefix("_")
                    yield Launched(program, always, call)


def dependent(source: str, *, first: bool, says: bool) -> str:
    """A module's text with its launches dependent on programs of the ones before.

    `first`: of what it launches, the first has nothing before it in the pass. `says`: its kernels
    say as they begin that the next may.
    """
    tree = ast.parse(source)
    found = launched(tree)
    names = [x.name for x in found]
    after = 0
    if first:
        # the first of all, and what is first where those before it are not launched
        after = next(i for i, x in enumerate(found) if x.always) + 1
    waiting = [x for x in names if x in names[after:] and x not in names[:after]]
    lines = source.splitlines(keepends=True)
    edits: list[tuple[int, int, str]] = []
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name in names:
            edits.append(_beginning(function, lines, function.name in waiting, says))
    if len(edits) != len(set(names)):
        raise TemplateError(f"of the kernels {names} only {len(edits)} were found in the text")
    for x in found:
        if x.name in waiting and x.name.endswith("_kernel"):
            edits.append(_option(x.call, lines))
    (launch,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "launch")
    if waiting:
        words = ", ".join(f'"{x}"' for x in dict.fromkeys(waiting))
        words += "," * (len(set(waiting)) == 1)
        edits.append((launch.lineno - 1, 0, _NOTE.format(names=words)))
    for line, column, text in sorted(edits, reverse=True):
        lines[line] = lines[line][:column] + text + lines[line][column:]
    return "".join(lines)


def _beginning(
    function: ast.FunctionDef, lines: list[str], waits: bool, says: bool
) -> tuple[int, int, str]:
    """What a kernel begins with, and where."""
    body: list[ast.stmt] = function.body
    language, line = "triton", _end_of_header(function, lines)
    if function.name.endswith("_kernel"):
        if ast.get_docstring(function) is not None:
            line, body = body[0].end_lineno or line, body[1:]
    else:
        language = "tilelang"
        (grid,) = (x for x in ast.walk(function) if isinstance(x, ast.With))
        line, body = _end_of_header(grid, lines), grid.body
    pad = " " * body[0].col_offset
    wait, say = _CALLS[language]
    text = f"{pad}{_WAIT}{pad}{wait}\n" * waits + f"{pad}{_SAY}{pad}{say}\n" * says
    return line, 0, text


def _end_of_header(x: ast.FunctionDef | ast.With, lines: list[str]) -> int:
    """The line after that which ends the header of a function or of a `with`, counted from 0."""
    line = x.lineno - 1
    while not lines[line].rstrip().endswith(":"):
        line += 1
    return line + 1


def _option(call: ast.Call, lines: list[str]) -> tuple[int, int, str]:
    """The attribute in a kernel's launch, and where."""
    line, column = (call.end_lineno or 1) - 1, (call.end_col_offset or 1) - 1
    before = lines[line][:column]
    if before.strip():
        return line, column, f", {_OPTION}"
    if not lines[line - 1].rstrip().endswith(","):
        raise TemplateError(f"line {line} of a launch ends without a comma: {lines[line - 1]!r}")
    return line, 0, f"{before}    {_OPTION},\n"
