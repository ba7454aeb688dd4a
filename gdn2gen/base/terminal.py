"""What a reader sees: text that is never taken for markup, and tables whose cells are never cut."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

# Columns of a log or a pipe, which has no width of its own.
_PIPE: Final = 100
# A column of words may be folded down to this.
_FOLDED: Final = 24


def console(*, stderr: bool = False) -> Console:
    """Where all that is styled is printed; the only one there is, so that data stays data.

    Reasons, paths and names may hold what rich would take for markup or emoji, such as `[/x]`.
    """
    stream = sys.stderr if stderr else sys.stdout
    known = "COLUMNS" in os.environ or stream is None or stream.isatty()
    width = None if known else _PIPE
    return _kind()(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


@cache
def _kind() -> type[Console]:
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            """Leave it to the command line, which knows how to end; rich would exit with 1."""
            raise BrokenPipeError

    return Plain


def text_width() -> int:
    """Columns that plain text on stdout is folded at: the terminal's, and 100 at most."""
    return min(_PIPE, console().width)


@contextmanager
def status(where: Console) -> Iterator[Callable[[str], None]]:
    """A line redrawn in place on a terminal while the block runs; call it with each text."""
    from rich.text import Text

    with where.status(Text()) as line:
        yield lambda words: line.update(Text(plain(words)))


def command_line(program: str = "gdn2gen", *, less: Container[str] = ()) -> str:
    """The command that runs, as a shell takes it, but for the options of `less`: they say where
    files of this machine lie, and what they name is no part of what was measured."""
    words, skipped = [], False
    for word in sys.argv[1:]:
        name, given, _ = word.partition("=")
        if not skipped and name not in less:
            words.append(word)
        skipped = not skipped and name in less and not given
    return f"{program} {shlex.join(words)}".rstrip()


def plain(text: str) -> str:
    """`text` with what no terminal should be sent (control codes, lone surrogates) spelled out."""
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() or x == "\n" else ascii(x)[1:-1] for x in text)


class Sheet:
    """A table; where the terminal is too narrow for it, a paragraph for each row.

    Columns named in `words` are aligned to the left and may be folded; the others hold numbers.
    """

    def __init__(self, title: str, columns: Sequence[str], words: Sequence[str]) -> None:
        self.title, self.columns, self.words = title, tuple(columns), {*words}
        self.rows: list[tuple[Text, ...]] = []

    def add(self, *cells: str | Text) -> None:
        """One row: a cell for each column."""
        from rich.text import Text

        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells were given for the columns {self.columns}")
        self.rows.append(tuple(Text(plain(x)) if isinstance(x, str) else x for x in cells))

    def __rich_console__(self, where: Console, options: ConsoleOptions) -> RenderResult:
        if self._least_width() <= options.max_width:
            yield from self._table()
        else:
            yield from self._paragraphs()

    def _least_width(self) -> int:
        """That of the table with every word column folded as far as it may be."""
        width = 1
        for place, name in enumerate(self.columns):
            longest = max(len(name), *(row[place].cell_len for row in self.rows), 0)
            width += 3 + (min(longest, _FOLDED) if name in self.words else longest)
        return width

    def _table(self) -> RenderResult:
        from rich.table import Table

        table = Table(title=self.title)
        for name in self.columns:
            if name in self.words:
                table.add_column(name, overflow="fold")
            else:
                table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        yield table

    def _paragraphs(self) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        yield Text(self.title, style="italic")
        for row in self.rows:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(no_wrap=True)
            grid.add_column(overflow="fold")
            for name, cell in zip(self.columns, row, strict=True):
                grid.add_row(Text(name, style="dim"), cell)
            yield grid
            yield Text()
