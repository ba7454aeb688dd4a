"""Words and lines of a package's files."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Iterable
from typing import Final

_LINE: Final = 100
_GENERATE: Final = "gdn2gen generate "


def made_for(source: str) -> str:
    """Digest of the docstring of a module, as the package compares it."""
    words = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def wrapped(words: Iterable[str], indent: int = 0) -> str:
    """Words with commas between them, in lines of at most 100 columns, each indented."""
    lines = textwrap.wrap(", ".join(words), _LINE - indent - 1)
    return "\n".join(" " * indent + line for line in lines) + ","


def wrapped_command(command: str) -> str:
    """A backslash ends every line but the last, for the shell as for the docstring."""
    program, words = command[: len(_GENERATE)], command[len(_GENERATE) :]
    lines = textwrap.wrap(words, _LINE - 25, break_long_words=False, break_on_hyphens=False)
    return program + " \\\n      ".join(lines)


def filled(origin: str) -> str:
    """Where configs are from, for a README."""
    return textwrap.fill(origin or "not said", _LINE, subsequent_indent="    ")
