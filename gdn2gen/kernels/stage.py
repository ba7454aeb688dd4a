"""Stage: a kernel's contract, and its forms: the kernels that keep it, each with its own knobs.

Symbols in `dims` (the same as in the templates' glossaries):

    B batch          T tokens of a sequence (all tokens of a packed batch: B = 1)
    H heads of q, k  HV heads of v, w, o     HG heads of g, b (H or HV); beta has HV
    K, V head dims   N sequences             NT chunks over all sequences, BT tokens each
    NK slices of K, as many as a config makes programs of them
    HP programs of grad_group for a chunk: each group's heads, as many at once as a config says
    NB sub-blocks of a chunk, 16 tokens each
    NS segments of a sequence, of equal length (see `Call.segments`)
    NT2, NT4 blocks of so many chunks, over all sequences (see `Call.blocks`)
    NZ groups of 16 values

Per chunk the workspace holds whole tiles of BT tokens, so only user-facing tensors need masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Final

from gdn2gen.base.dtypes import DTYPE
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.prefill import PrefillProblem
from gdn2gen.family.problem import Problem
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.languages import LANGUAGE_NAMES, LANGUAGES, TILED_BY, multiple_of
from gdn2gen.kernels.limits import (
    CHUNKS,
    Domain,
    Knob,
    Limit,
    Place,
    Setting,
    Where,
    rounded_up,
)
from gdn2gen.kernels.rows import row_of
from gdn2gen.kernels.slices import covering


@dataclass(frozen=True)
class Operand:
    """One tensor of a stage: name in the kernel, dims by symbol, dtype or its role.

    dtype `io` is the problem's dtype, `gate` the dtype of g, `factor` that of beta, `fp32` and
    `int32` themselves.
    `when` names the condition under which the kernel has this argument (see `has_operand`); `of`
    the members of the family that have it, by their decay (see `OF`).
    `scratch` is what kernels of one form hand to each other: an argument of those that name it.
    `extra` is the knob of `EXTRAS` without which no kernel has this argument.
    """

    name: str
    dims: str
    dtype: str = "io"
    when: str = "always"
    scratch: bool = False
    of: str = "all"
    extra: str = ""

    def dtype_in(self, problem: Compiled) -> str:
        return problem.dtype_of(self.dtype)

    def nbytes(self, problem: Compiled, sizes: Mapping[str, int]) -> int:
        """Bytes of the whole tensor, for the given value of each symbol in `dims`."""
        elements = prod(int(x) if x.isdigit() else sizes[x] for x in self.dims.split())
        return elements * DTYPE[self.dtype_in(problem)].nbytes


# Members by what their decay has one number for, see `Recurrence.decays_by`. `outside`: the decay,
# if there is one, is outside of products over channels.
OF: Final[Mapping[str, tuple[str, ...]]] = {
    "all": ("channel", "head", "none", "step"),
    "channel": ("channel",),
    "head": ("head",),
    "outside": ("head", "none"),
}


def is_of(operand: Operand, op: str) -> bool:
    """Whether the kernels of a member may have this operand; there is one of its name at most."""
    return recurrence_named(op).decays_by in OF[operand.of]


def keeps_checkpoints(problem: Compiled) -> bool:
    """Whether its scan keeps states on the way, for a cache of prefixes."""
    return isinstance(problem, PrefillProblem) and problem.checkpoints != ""


def in_slices(problem: Problem) -> bool:
    """Whether programs of grad_blocks whose decay is outside of products have a slice of channels
    each: else all of them."""
    return problem.K > 128 or problem.dtype == "fp32"


def has_operand(operand: Operand, problem: Problem) -> bool:
    """Whether the kernels of `problem` take this operand."""
    member = recurrence_named(problem.op)
    return member.decays_by in OF[operand.of] and _WHEN[operand.when](problem, member)


_WHEN: Final[Mapping[str, Callable[[Problem, Recurrence], bool]]] = {
    "always": lambda problem, member: True,
    "b": lambda problem, member: "b" in member.named,
    "w": lambda problem, member: "w" in member.named,
    "w, rounded": lambda problem, member: "w" in member.named and problem.dtype != "fp32",
    "beta": lambda problem, member: "beta" in member.named,
    "erases": lambda problem, member: member.erases,
    "only writes": lambda problem, member: not member.erases,
    "l2norm": lambda problem, member: problem.l2norm,
    "l2norm, in slices": lambda problem, member: problem.l2norm and in_slices(problem),
    "gate": lambda problem, member: problem.gate != "none",
    "A_log": lambda problem, member: problem.has_A_log,
    "dt_bias": lambda problem, member: problem.has_dt_bias,
    "rate": lambda problem, member: problem.has_rate,
    "D": lambda problem, member: problem.has_D,
    "z": lambda problem, member: problem.has_z,
    "D and z": lambda problem, member: problem.has_D and problem.has_z,
    "D, no z": lambda problem, member: problem.has_D and not problem.has_z,
    "no z": lambda problem, member: not problem.has_z,
    "varlen": lambda problem, member: problem.varlen,
    "initial_state": lambda problem, member: problem.initial_state,
    "final_state": lambda problem, member: problem.final_state,
    "checkpoints": lambda problem, member: keeps_checkpoints(problem),
    "segments": lambda problem, member: not keeps_checkpoints(problem),
}


@dataclass(frozen=True)
class Product:
    """A matrix product that not all members make; `when` and `of` as of `Operand`."""

    sizes: str
    """Rows, columns and what is summed over."""
    when: str = "always"
    of: str = "all"


def erasing(*sizes: str) -> tuple[Product, ...]:
    """Products of members that erase."""
    return tuple(Product(x, "erases") for x in sizes)


# Tiles, and the head dims that they are slices of.
TILES: Final = (("BK", "K"), ("BV", "V"))


@dataclass(frozen=True, eq=False)
class Form:
    """One of the kernels that keep a stage's contract: a template with knobs of its own.

    A config is of the form that its `language` and the stage's `selector` name.
    """

    name: str
    """The value of the stage's selector; without one, what it is called."""
    language: str
    template: str
    """Its name among those of the language."""
    knobs: Mapping[str, Domain]
    """What each knob may be. Every combination is a kernel, within the limits."""
    defaults: tuple[Setting, ...] = ()
    """Where a search of it starts, and a call without tuning: later ones win; a knob without any is
    the first of its domain."""
    leads: Where | None = None
    """Where the stage's default is of this form, if of none after it; {} is everywhere."""
    limits: tuple[Limit, ...] = ()
    tiles: tuple[tuple[str, str], ...] = TILES
    """Tiles, and the head dims that they need not be wider than."""
    whole: tuple[str, ...] = ()
    """Tiles that are as wide as they may be."""
    exact: bool = False
    """Whether those take the head dim as it is, and not the power of two that covers it."""
    refuses: Callable[[Place], str | None] | None = None
    """Why it cannot run there, where no limit can say it."""
    ahead: tuple[Operand, ...] = ()
    """Tiles that its loop loads `num_stages - 1` times ahead."""
    scratch: tuple[str, ...] = ()
    """Scratch that it makes use of."""
    tiled_by: int = TILED_BY
    """In steps of so many channels, or values, its tiles of whole head dims come."""
    steady: bool = True
    """Whether its time hardly depends on how strong the decay is."""

    def __post_init__(self) -> None:
        for name, value in (x for setting in self.defaults for x in setting.knobs.items()):
            if value not in self.knobs.get(name, ()):
                raise ValueError(
                    f"{self.title}: {name}={value} is a default, but may only be one of "
                    f"{self.knobs.get(name, ())}"
                )

    @property
    def title(self) -> str:
        return f"{self.name} {LANGUAGE_NAMES[self.language]}"

    def uses(self, operand: Operand) -> bool:
        return not operand.scratch or operand.name in self.scratch

    def serves(self, place: Place) -> bool:
        """Whether it has any kernel there."""
        place = self.tiled(place)
        limits = (x for x in self.limits_at(place) if x.name not in self.knobs)
        if any(place[x.name] not in x.values for x in limits):
            return False
        if self.refuses is not None and self.refuses(place) is not None:
            return False
        return all(self.domains(place).values())

    def domains(self, place: Place) -> dict[str, Domain]:
        """What each knob may be there, in the order of `knobs`; may be empty."""
        place = self.tiled(place)
        found = dict(self.knobs)
        for tile, dim in self.tiles:
            if tile in found:
                widest, whole = self.widest(tile, place[dim]), tile in self.whole
                found[tile] = tuple(
                    x for x in found[tile] if x == widest or (int(x) < widest and not whole)
                )
        for limit in self.limits_at(place):
            if limit.name in found:
                found[limit.name] = tuple(x for x in found[limit.name] if x in limit.values)
        return found

    def limits_at(self, place: Place) -> list[Limit]:
        """What holds there: the language's, as far as it has such knobs, and its own."""
        place = self.tiled(place)
        given = (*LANGUAGES[self.language], *self.limits)
        return [
            x for x in given if (x.name in self.knobs or x.name in place) and place.is_in(x.where)
        ]

    def default(self, place: Place) -> dict[str, Knob]:
        """Its knobs without tuning; where it cannot run, values that it does not take."""
        place = self.tiled(place)
        found = {name: values[0] for name, values in self.knobs.items()}
        for setting in self.defaults:
            if place.is_in(setting.where):
                found |= setting.knobs
        for tile, dim in self.tiles:
            if tile in found:
                widest = self.widest(tile, place[dim])
                found[tile] = widest if tile in self.whole else min(int(found[tile]), widest)
        return found

    def tiled(self, place: Place) -> Place:
        """The same with head dims as its tiles take them."""
        return replace(place, multiple=multiple_of(self.language, place.arch, self.tiled_by))

    def widest(self, tile: str, size: object) -> int:
        """What a tile may be at most, for a head dim: it covers it, or is its knob's largest."""
        assert isinstance(size, int)
        exactly = self.exact and tile in self.whole
        covers = rounded_up(size, TILED_BY) if exactly else covering(size)
        return min(covers, max(map(int, self.knobs[tile])))


@dataclass(frozen=True, eq=False, kw_only=True)
class Stage:
    """A kernel's contract: what it reads and what it writes; and the forms that keep it."""

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    scalars: tuple[str, ...]
    outside_scalars: tuple[str, ...] = ()
    """More of them where scans read q and k themselves."""
    checkpoint_scalars: tuple[str, ...] = ()
    """And where states are kept on the way."""
    rows: tuple[str, ...] = ()
    """Operands whose rows of a token may lie apart: a scalar more says how far (`row_of`)."""
    count: str = "n_chunks"
    """The scalar that counts its programs, beside heads and slices; `n_sequences` of those that go
    from chunk to chunk."""
    products: tuple[str | Product, ...] = ()
    """Matrix products of a chunk and head, each as rows, columns and what is summed over. Scores
    count as one product each, as where one anchor serves a chunk, and so does the inverse."""
    forms: tuple[Form, ...]
    selector: str | None = None
    """The knob whose value is the form's name."""
    later: Mapping[str, Knob] = field(default_factory=dict)
    """Knobs that came after entries had been filed, and what configs without them mean."""
    chunks: Domain = CHUNKS
    """What BT may be: 1 of those that go from token to token."""
    every: int = 0
    """Chunks from one kept state to the next, of stages that keep them or read them so; else 0."""

    def __post_init__(self) -> None:
        names = {frozenset(x.knobs) for x in self.forms}
        if len(names) != 1:
            raise ValueError(f"forms of {self.name} have different knobs: {[*map(sorted, names)]}")

    def operands(self, problem: Compiled, extras: Iterable[str] = ()) -> list[Operand]:
        """Inputs, then outputs, in the order of the kernels' arguments: any form's."""
        assert isinstance(problem, Problem)
        given = ("", *extras)
        every = (*self.inputs, *self.outputs)
        return [x for x in every if x.extra in given and has_operand(x, problem)]

    def scalars_of(self, problem: Compiled) -> tuple[str, ...]:
        """In the order of the kernels' arguments."""
        assert isinstance(problem, Problem)
        outside = recurrence_named(problem.op).decays_by in OF["outside"]
        kept = self.checkpoint_scalars if keeps_checkpoints(problem) else ()
        return (
            *(*self.scalars, *(self.outside_scalars if outside else ()), *kept),
            *self.rows_of(problem),
        )

    def rows_of(self, problem: Problem) -> tuple[str, ...]:
        """Those of them that say how far rows lie apart."""
        given = {x.name for x in self.operands(problem)} if self.rows else ()
        return tuple(row_of(x) for x in self.rows if x in given)

    def nbytes(self, problem: Compiled, sizes: Mapping[str, int]) -> int:
        """Least bytes to move: every operand but scratch, read or written once."""
        return sum(x.nbytes(problem, sizes) for x in self.operands(problem) if not x.scratch)

    def products_of(self, problem: Problem) -> tuple[str, ...]:
        """Those that kernels of `problem` make."""
        member = recurrence_named(problem.op)
        known = ("always", "erases" if member.erases else "only writes")
        given = [Product(x) if isinstance(x, str) else x for x in self.products]
        made = [x for x in given if x.when in known and member.decays_by in OF[x.of]]
        return tuple(x.sizes for x in made)

    def flops(self, problem: Problem, sizes: Mapping[str, int]) -> int:
        """Operations of its products, two for each multiplication; scans count as serial ones."""
        made = self.products_of(problem)
        chunk = sum(prod(sizes[symbol] for symbol in one.split()) for one in made)
        return 2 * chunk * sizes["NT"] * sizes["HV"]

    @property
    def languages(self) -> frozenset[str]:
        """Those that it has a form in."""
        return frozenset(x.language for x in self.forms)

    @property
    def is_chain(self) -> bool:
        """Whether its programs go from chunk to chunk."""
        return self.count == "n_sequences"

    def selecting(self, form: Form) -> dict[str, Knob]:
        """The knobs that tell a form of this stage from the others."""
        found: dict[str, Knob] = {"language": form.language}
        return found | ({self.selector: form.name} if self.selector else {})

    def form_of(self, knobs: Mapping[str, Knob]) -> Form | None:
        """The form that the knobs select, or None where there is none: with `tile_step`, an extra,
        of tiles in other steps."""
        selected = tuple(knobs[name] for name in self._selectors)
        form, tiles = self._by_selection.get(selected), knobs.get("tile_step")
        if form is None or not isinstance(tiles, int):
            return form
        return self._tiled.setdefault((selected, tiles), replace(form, tiled_by=tiles))

    def why_no_form(self, knobs: Mapping[str, Knob]) -> str:
        """Says that `form_of` found none."""
        given = " ".join(f"{name}={knobs[name]}" for name in self._selectors)
        known = ", ".join(
            " ".join(f"{name}={x}" for name, x in self.selecting(form).items())
            for form in self.forms
        )
        return f"{self.name} has no form with {given}; use one of {known}"

    def default_form(self, place: Place) -> Form:
        """The form of the config without tuning."""
        leading = [x for x in self.forms if x.leads is not None and place.is_in(x.leads)]
        return leading[-1]

    @cached_property
    def domains(self) -> dict[str, Domain]:
        """Knobs of its configs, and what each may be in some form."""
        return {"BT": self.chunks, **self._united((form, form.knobs) for form in self.forms)}

    def domains_at(self, place: Place) -> dict[str, Domain]:
        """The same of the forms that serve there, as far as they take it there."""
        serving = (form for form in self.forms if form.serves(place))
        return {"BT": (place.BT,), **self._united((x, x.domains(place)) for x in serving)}

    def _united(self, given: Iterable[tuple[Form, Mapping[str, Domain]]]) -> dict[str, Domain]:
        found: dict[str, dict[Knob, None]] = {}
        for form, domains in given:
            selecting = {name: (x,) for name, x in self.selecting(form).items()}
            for name, values in {**selecting, **domains}.items():
                found.setdefault(name, {}).update(dict.fromkeys(values))
        return {name: _in_order(tuple(values)) for name, values in found.items()}

    @cached_property
    def _selectors(self) -> tuple[str, ...]:
        return tuple(self.selecting(self.forms[0]))

    @cached_property
    def _tiled(self) -> dict[tuple[tuple[Knob, ...], int], Form]:
        """Forms that were asked for with tiles in other steps: the same each time."""
        return {}

    @cached_property
    def _by_selection(self) -> dict[tuple[Knob, ...], Form]:
        return {tuple(self.selecting(x).values()): x for x in self.forms}


def _in_order(values: Domain) -> Domain:
    return tuple(sorted(values)) if all(isinstance(x, int) for x in values) else values
