"""The command line: `gdn2gen COMMAND ...`, or `python -m gdn2gen COMMAND ...`."""

from __future__ import annotations

import argparse
import io
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TextIO

from gdn2gen import __version__
from gdn2gen.base.environment import hush, is_off
from gdn2gen.base.errors import Gdn2genError
from gdn2gen.base.terminal import plain
from gdn2gen.cli import compiled, inspect, ledger, measure, report, tune, tuned, verify

EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130


@dataclass(frozen=True)
class Command:
    """One subcommand: what it adds to its parser, and what --help says."""

    name: str
    add: Callable[[argparse.ArgumentParser], None]
    help: str
    description: str
    example: str


COMMANDS: Final = (
    Command(
        "quick",
        tune.add_quick,
        "tune one problem for a few minutes and compare with the default",
        "With a GPU: tune one problem for a few minutes, then time the default config against the "
        "tuned one. Without a GPU: compile for a named target, check in Triton's interpreter, and "
        "file the configs that rank best by their compiled resources as predicted.",
        "gdn2gen quick --budget 3",
    ),
    Command(
        "tune",
        tune.add_tune,
        "search for the fastest valid configs of this GPU",
        "Search for the fastest configs that pass the accuracy check, and file them per GPU: with "
        "no further word the standard shapes at head dims 128 and 64. A study "
        "that was stopped resumes when the same command is given again.",
        "gdn2gen tune --head-dim 128 --shapes train4k,wide8k --budget 20",
    ),
    Command(
        "explain",
        inspect.add_explain,
        "show what a call would run, and why",
        "Show the plan and the configs that a call would run, and where they come from.",
        "gdn2gen explain --shape train4k --head-dim 128 --device H200",
    ),
    Command(
        "generate",
        inspect.add_generate,
        "write the kernels to a folder, or print one",
        "Write a package of kernels that works without gdn2gen, or print one kernel.",
        "gdn2gen generate --stage scan --config 'BT=64 num_warps=8' --target sm_90",
    ),
    Command(
        "compile",
        compiled.add_compile,
        "compile kernels into a folder that ships in a container",
        "Compile what calls at these shapes run, forward, backward and over a few tokens, into a "
        "folder. A process that GDN2GEN_COMPILED_DIR points at it needs no nvcc, no C compiler and "
        "no folder to write to. Needs no GPU.",
        "gdn2gen compile --shapes train4k --decode 64x1x16 --target H200 --out kernels",
    ),
    Command(
        "verify",
        verify.add_verify,
        "check accuracy on this GPU, or in the interpreter",
        "Compare every output and gradient with the fp64 reference, and check causality and "
        "bitwise repetition. Exit code 1 if a case fails.",
        "gdn2gen verify 'bf16-*'",
    ),
    Command(
        "bench",
        measure.add_bench,
        "measure time, memory and accuracy",
        "Measure median time, its ratio to the memory floor and to flash-linear-attention, peak "
        "memory and errors on the present GPU.",
        "gdn2gen bench --shapes train4k,wide8k --vs fla",
    ),
    Command(
        "report",
        report.add_report,
        "write a page on what the tuner found, tried and refused",
        "Write one self-contained HTML page on a GPU: tuned against default and "
        "flash-linear-attention, stage by stage, what each knob is worth, what was refused.",
        "gdn2gen report --device H200 --out h200.html",
    ),
    Command(
        "tuned",
        tuned.add_tuned,
        "export, import, merge and compare tuned files",
        "Move tuned files between machines. A merge keeps the faster valid entry of each problem, "
        "and loses none when several processes write at once.",
        "gdn2gen tuned export --device H200 --to h200.json",
    ),
    Command(
        "ledger",
        ledger.add_ledger,
        "list configs that the tuner refused, or try them again",
        "List the configs that the tuner refused on a GPU, and why. They are not tried again until "
        "the toolchain or their templates change; --retest tries them now.",
        "gdn2gen ledger --stage grad_key --reason spills",
    ),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gdn2gen",
        description="Kernels for gated linear attention, made from templates and tuned per GPU.",
        epilog="Example: gdn2gen quick. `gdn2gen COMMAND --help` explains each command.",
    )
    parser.add_argument("--version", action="version", version=f"gdn2gen {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.help,
            description=command.description,
            epilog=f"Example: {command.example}",
        )
        command.add(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one line on stderr."""
    _mend_streams()
    hush()
    args = build_parser().parse_args(argv)
    format_of_python, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        return _run(args)
    except (Gdn2genError, OSError) as error:
        if _readers_are_gone() and isinstance(error, BrokenPipeError):
            return 0  # such as `head`, which has seen enough
        if not is_off(os.environ.get("GDN2GEN_DEBUG")):
            raise
        _complain(f"gdn2gen {args.command}: {error}")
        return EXIT_USAGE
    except KeyboardInterrupt:
        resumes = args.command in ("tune", "quick")
        hint = "; the same command resumes the study" if resumes else ""
        _complain(f"\ngdn2gen {args.command}: interrupted{hint}")
        return EXIT_INTERRUPTED
    finally:
        warnings.formatwarning = format_of_python


def _run(args: argparse.Namespace) -> int:
    code: int = args.run(args)
    sys.stdout.flush()
    return code


def _mend_streams() -> None:
    """Streams that were closed lead nowhere; what the others cannot encode is spelled out."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _readers_are_gone() -> bool:
    """Whether stdout or stderr takes no more; what waits there is dropped, not written at exit."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if _is_gone(stream)]
    for stream in gone:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(gone)


def _is_gone(stream: TextIO) -> bool:
    try:
        stream.flush()
        # without buffers nothing waits to be written that could fail again
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except io.UnsupportedOperation:
        return False  # no file of the system, such as a test's
    except OSError:
        return True


def _complain(text: str) -> None:
    with suppress(OSError):
        print(plain(text), file=sys.stderr)


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as a user reads it: what it says, not where in the package it was raised."""
    return f"warning: {plain(str(message))}\n"
