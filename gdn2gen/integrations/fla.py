"""flash-linear-attention's ops on ours: its layers, its models, and others' models that call it.

    from gdn2gen.integrations import fla

    print(fla.register())
    ...                     # models run as before, on these kernels where they apply
    print(fla.refused())    # and where they did not, why
    fla.unregister()

A function of flash-linear-attention is replaced by one with the same arguments wherever a loaded
module has it by name; modules that are imported later find it at home. A call that ours does not
take goes to the original, and says so once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from inspect import Parameter, signature
from threading import local
from typing import Any, Final

from torch import Tensor, nn

import gdn2gen
from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.family.registry import OPS, RECURRENCES
from gdn2gen.ops.parts import gated_rms_norm, short_convolution

Given = dict[str, Any]
Function = Callable[..., Any]

# Say how a result is made, and not what it is: chunks here are as tuned.
_ONLY_HOW: Final = frozenset({"chunk_size", "chunk_indices", "backend"})
# Older names of theirs.
_RENAMED: Final = {"transpose_state_layout": "state_v_first"}


class _Refused(Exception):
    """Why a call goes to the original."""


@dataclass(frozen=True)
class _Replacement:
    """A function of theirs, and what ours makes of its arguments, by name."""

    module: str
    name: str
    run: Callable[[Given], Any]
    """Raises `_Refused`, InputError or UnsupportedError before it changes anything."""


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


@dataclass
class _Standing:
    """What stands in their place now."""

    originals: dict[Function, Function] = field(default_factory=dict)
    """By what stands for them."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Calls that went to the original, by function and reason."""


class _Theirs(local):
    """Whether an original runs on this thread: what it calls of its own stays its own."""

    running = False


_standing = _Standing()
_theirs = _Theirs()


def register(*models: nn.Module) -> Report:
    """Let flash-linear-attention's ops run on ours; call it again after further imports.

    Args:
        models: models that exist already and keep functions as attributes of their modules, as
            those of transformers do.

    Returns:
        What was replaced, where, and what was not.

    Raises:
        UnsupportedError: flash-linear-attention cannot be imported.
    """
    try:
        import_module("fla")
    except ImportError as error:
        raise UnsupportedError(
            f"flash-linear-attention cannot be imported ({error}): pip install "
            "flash-linear-attention, and register again"
        ) from error
    known = {original: ours for ours, original in _standing.originals.items()}
    missing: dict[str, str] = {}
    for replacement in _replacements():
        label = f"{replacement.module}.{replacement.name}"
        try:
            found = getattr(import_module(replacement.module), replacement.name)
        except (ImportError, AttributeError) as error:
            missing[label] = str(error)
            continue
        if found not in _standing.originals and found not in known:
            known[found] = _standing_for(found, replacement)
    _standing.originals = {ours: original for original, ours in known.items()}
    places = _exchange(known, models)
    return Report({_label(x): tuple(dict.fromkeys(y)) for x, y in places.items()}, missing)


def unregister(*models: nn.Module) -> None:
    """Put the originals back, in all modules and in `models`; `refused` forgets what it counted."""
    _exchange(_standing.originals, models)
    _standing.originals.clear()
    _standing.counts.clear()


def refused() -> dict[str, dict[str, int]]:
    """How many calls went to the originals since `register`, by function and reason."""
    return {name: dict(reasons) for name, reasons in _standing.counts.items()}


def _replacements() -> Iterator[_Replacement]:
    for op in OPS:
        public = RECURRENCES[op].public
        for name in (public.chunk, public.recurrent):
            if name and public.fla and hasattr(gdn2gen, name):
                yield _Replacement(public.fla, name, _runs(getattr(gdn2gen, name)))
    yield _Replacement("fla.modules.convolution", "causal_conv1d", _convolve)
    yield _Replacement("fla.modules.fused_norm_gate", "rms_norm_gated", _norm)


def _runs(ours: Function) -> Callable[[Given], Any]:
    """An op of ours, for the arguments of theirs."""
    parameters = signature(ours).parameters
    takes = frozenset(parameters)
    wants = [name for name, x in parameters.items() if x.default is Parameter.empty]

    def run(given: Given) -> Any:
        named = {_RENAMED.get(name, name): x for name, x in given.items()}
        _refuse_others(named, takes)
        if missing := [name for name in wants if named.get(name) is None]:
            raise _Refused(f"{', '.join(missing)} is not given, which ours needs")
        return ours(**{name: x for name, x in named.items() if name in takes})

    return run


def _refuse_others(given: Given, takes: frozenset[str]) -> None:
    """What is not taken must say nothing."""
    for name, x in given.items():
        if name not in takes and name not in _ONLY_HOW and x is not None and x is not False:
            raise _Refused(f"{name} is given, which ours does not take")


_SILU: Final = ("silu", "swish")


def _convolve(given: Given) -> tuple[Tensor, None]:
    x, weight, bias = (given.get(name) for name in ("x", "weight", "bias"))
    others = {name: y for name, y in given.items() if name not in ("x", "weight", "bias")}
    if others.pop("activation", None) not in _SILU:
        raise _Refused("there is no SiLU after the convolution")
    _refuse_others(others, frozenset({"cu_seqlens", "cu_seqlens_cpu"}))
    if x is None or weight is None:
        raise _Refused("there is no weight")
    biases = None if bias is None else [bias]
    (y,), _ = short_convolution([x], [weight], biases, cu_seqlens=given.get("cu_seqlens"))
    return y, None


def _norm(given: Given) -> Tensor:
    known = ("x", "g", "weight", "bias", "activation", "eps")
    _refuse_others({name: y for name, y in given.items() if name not in known}, frozenset())
    if given.get("weight") is None or given.get("bias") is not None:
        raise _Refused("it has no weight, or a bias")
    activation = given.get("activation", "swish")
    activation = "silu" if activation in _SILU else activation
    eps = given.get("eps", 1e-6)
    return gated_rms_norm(given["x"], given["g"], given["weight"], eps=eps, activation=activation)


def _standing_for(original: Function, replacement: _Replacement) -> Function:
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
        except (_Refused, InputError, UnsupportedError) as refusal:
            _note(label, str(refusal))
        _theirs.running = True
        try:
            return original(*args, **keywords)
        finally:
            _theirs.running = False

    return ours


def _note(label: str, reason: str) -> None:
    reasons = _standing.counts.setdefault(label, {})
    if reason not in reasons:
        warnings.warn(f"{label} runs as it was: {reason}", RuntimeWarning, stacklevel=4)
    reasons[reason] = reasons.get(reason, 0) + 1


def _label(function: Function) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _exchange(
    known: Mapping[Function, Function], models: tuple[nn.Module, ...]
) -> dict[Function, list[str]]:
    """Let others stand for functions, by identity, wherever a module has them; the places."""
    by_id = {id(old): (old, new) for old, new in known.items()}
    places: dict[Function, list[str]] = {}
    for name, namespace in _namespaces(models):
        for attribute, x in list(namespace.items()):
            if id(x) in by_id:
                old, namespace[attribute] = by_id[id(x)]
                places.setdefault(old, []).append(name)
    return places


def _namespaces(models: tuple[nn.Module, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in list(sys.modules.items()):
        if module is not None and not name.startswith("gdn2gen"):
            yield name, vars(module)
    for model in models:
        for name, module in model.named_modules():
            yield f"{type(model).__name__}.{name}" if name else type(model).__name__, vars(module)
