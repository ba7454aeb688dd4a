"""Functions of another library, and what stands for them: shared by the integrations.

A function is exchanged by identity, wherever it is kept by name: in loaded modules, in what a
function there closes over (transformers' wrappers keep it so), and in attributes of models.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from inspect import Parameter, signature
from threading import local
from types import FunctionType
from typing import Any, Final

from torch import nn

from gdn2gen.base.errors import InputError, UnsupportedError

Given = dict[str, Any]
Function = Callable[..., Any]

SILU: Final = ("silu", "swish")
# Say how a result is made, and not what it is: chunks here are as tuned.
_ONLY_HOW: Final = frozenset({"chunk_size", "chunk_indices", "backend"})
# Older names of theirs.
_RENAMED: Final = {"transpose_state_layout": "state_v_first"}


class Refused(Exception):
    """Why a call goes to the original."""


@dataclass(frozen=True)
class Replacement:
    """A function of theirs, and what ours makes of its arguments, by name."""

    module: str
    name: str
    run: Callable[[Given], Any]
    """Raises `Refused`, InputError or UnsupportedError before it changes anything."""


@dataclass(frozen=True)
class Report:
    """What `register` did."""

    replaced: Mapping[str, tuple[str, ...]]
    """Functions of theirs, and the modules where ours stand for them."""
    missing: Mapping[str, str]
    """Functions that were not found, and why."""

    def __str__(self) -> str:
        lines = [f"{name}: in {', '.join(places)}" for name, places in self.replaced.items()]
        lines += [f"{name}: not replaced, {why}" for name, why in self.missing.items()]
        return "\n".join(lines)


class _Theirs(local):
    """Whether an original runs on this thread: what it calls of its own stays its own."""

    running = False


_theirs = _Theirs()


class Library:
    """A library some of whose functions ours may stand for.

    Args:
        package: what is imported.
        install: its name in a package registry.
        replacements: the functions.
    """

    def __init__(
        self, package: str, install: str, replacements: Callable[[], Iterable[Replacement]]
    ) -> None:
        self._package = package
        self._install = install
        self._replacements = replacements
        self._originals: dict[Function, Function] = {}
        """By what stands for them."""
        self._counts: dict[str, dict[str, int]] = {}
        """Calls that went to the original, by function and reason."""

    def register(self, models: tuple[nn.Module, ...]) -> Report:
        """Raises UnsupportedError where the library cannot be imported."""
        try:
            import_module(self._package)
        except ImportError as error:
            raise UnsupportedError(
                f"{self._install} cannot be imported ({error}): pip install {self._install}, and "
                "register again"
            ) from error
        known = {original: ours for ours, original in self._originals.items()}
        missing: dict[str, str] = {}
        for replacement in self._replacements():
            label = f"{replacement.module}.{replacement.name}"
            try:
                found = getattr(import_module(replacement.module), replacement.name)
            except (ImportError, AttributeError) as error:
                missing[label] = str(error)
                continue
            if found not in self._originals and found not in known:
                known[found] = self._standing_for(found, replacement)
        self._originals = {ours: original for original, ours in known.items()}
        places = _exchange(known, models)
        return Report({_label(x): tuple(dict.fromkeys(y)) for x, y in places.items()}, missing)

    def unregister(self, models: tuple[nn.Module, ...]) -> None:
        _exchange(self._originals, models)
        self._originals.clear()
        self._counts.clear()

    def refused(self) -> dict[str, dict[str, int]]:
        return {name: dict(reasons) for name, reasons in self._counts.items()}

    def _standing_for(self, original: Function, replacement: Replacement) -> Function:
        """What stands for a function of theirs, and calls it where ours refuses."""
        parameters = signature(original).parameters.values()
        named = [x.name for x in parameters if x.kind is Parameter.POSITIONAL_OR_KEYWORD]
        label = f"{replacement.module}.{replacement.name}"

        @wraps(original)
        def ours(*args: Any, **keywords: Any) -> Any:
            twice = any(name in keywords for name in named[: len(args)])
            if twice or len(args) > len(named) or _theirs.running:
                return original(*args, **keywords)  # which says what is wrong, if anything is
            try:
                return replacement.run({**dict(zip(named, args, strict=False)), **keywords})
            except (Refused, InputError, UnsupportedError) as refusal:
                self._note(label, str(refusal))
            _theirs.running = True
            try:
                return original(*args, **keywords)
            finally:
                _theirs.running = False

        return ours

    def _note(self, label: str, reason: str) -> None:
        reasons = self._counts.setdefault(label, {})
        if reason not in reasons:
            warnings.warn(f"{label} runs as it was: {reason}", RuntimeWarning, stacklevel=4)
        reasons[reason] = reasons.get(reason, 0) + 1


def runs(ours: Function) -> Callable[[Given], Any]:
    """An op of ours, for the arguments of theirs."""
    parameters = signature(ours).parameters
    # some of ours refuse what only says how, for who calls them knows what they are
    how = {x for x in _ONLY_HOW & parameters.keys() if parameters[x].default is None}
    takes = frozenset(parameters) - how
    wants = [name for name, x in parameters.items() if x.default is Parameter.empty]

    def run(given: Given) -> Any:
        named = {_RENAMED.get(name, name): x for name, x in given.items()}
        refuse_others(named, takes)
        if missing := [name for name in wants if named.get(name) is None]:
            raise Refused(f"{', '.join(missing)} is not given, which ours needs")
        return ours(**{name: x for name, x in named.items() if name in takes})

    return run


def refuse_others(given: Given, takes: frozenset[str]) -> None:
    """What is not taken must say nothing."""
    for name, x in given.items():
        if name not in takes and name not in _ONLY_HOW and x is not None and x is not False:
            raise Refused(f"{name} is given, which ours does not take")


def _label(function: Function) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _exchange(
    known: Mapping[Function, Function], models: tuple[nn.Module, ...]
) -> dict[Function, list[str]]:
    """Let others stand for functions, by identity, wherever somebody keeps them; the places."""
    by_id = {id(old): (old, new) for old, new in known.items()}
    # What stands for a function closes over it, and goes on to.
    own = {id(x) for pair in known.items() for x in pair}
    places: dict[Function, list[str]] = {}
    for name, namespace in _namespaces(models):
        for attribute, x in list(namespace.items()):
            if id(x) in by_id:
                old, namespace[attribute] = by_id[id(x)]
                places.setdefault(old, []).append(name)
            elif type(x) is FunctionType and x.__closure__ and id(x) not in own:
                for old in _exchange_in_closure(x, by_id):
                    places.setdefault(old, []).append(name)
    return places


def _exchange_in_closure(
    function: FunctionType, by_id: Mapping[int, tuple[Function, Function]]
) -> Iterator[Function]:
    for cell in function.__closure__ or ():
        try:
            x = cell.cell_contents
        except ValueError:  # empty yet
            continue
        if id(x) in by_id:
            old, cell.cell_contents = by_id[id(x)]
            yield old


def _namespaces(models: tuple[nn.Module, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in list(sys.modules.items()):
        if module is not None and not name.startswith("gdn2gen"):
            yield name, vars(module)
    for model in models:
        for name, module in model.named_modules():
            yield f"{type(model).__name__}.{name}" if name else type(model).__name__, vars(module)
