"""What the template of the mode `recurrent` is given beside the rest: a member's roles and rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.recurrent import TokenStage
from gdn2gen.kernels.rows import UNIT, is_row_wise, row_of
from gdn2gen.kernels.stage import Operand

# The head that a program reads of a tensor with so many.
_HEADS: Final = {"H": "i_hq", "HV": "i_h", "HG": "i_hg"}


@dataclass(frozen=True)
class Role:
    """The input that decays, erases or writes, and how many numbers of it a token and head has."""

    name: str
    dim: str
    """K or V where it has one for each channel, "" where one for the head."""


def token_context(stage: TokenStage, problem: DecodingProblem, config: Config) -> dict[str, object]:
    member = recurrence_named(problem.op)
    operands = stage.operands(problem)
    token_rows = {
        x.name: _row(x.name, x.dims.split(), problem) for x in operands if is_row_wise(x.dims)
    }
    tiles = config.size("tiles")
    partial = problem.V % (config.size("BV") * tiles) != 0
    state = "state_pool" if problem.pool else "initial_state" if problem.initial_state else ""
    return {
        "recurrence": member,
        "decay": _role(member, member.decay.input if member.decay else None),
        "erase": _role(member, member.erase),
        "write": _role(member, member.write),
        "rows": token_rows,
        "parameters": {
            x.name: _parameter(x.symbols) for x in member.inputs if x.dtype == "parameter"
        },
        # whose elements are loaded one by one, from wherever they are
        "single": [x.name for x in operands if _is_single(x, problem)],
        "scalars": list(stage.scalars_of(problem)),
        # what the state is read from, "" where it begins with zeros
        "entry": state,
        # tiles of a program, by what their names end with; programs that take all values; and what
        # of the last one's is a value
        "row_tiles": [f"_{x}" for x in range(tiles)] if tiles > 1 else [""],
        "n_v": _programs(tiles, partial),
        "v_inside": "o_v < V" if partial else "",
        "v_rows": "(o_v < V)[:, None]" if partial else "",
        "slot_unit": "" if problem.odd_slots else f" * {UNIT}",
    }


def _programs(tiles: int, partial: bool) -> str:
    step = f"({tiles} * BV)" if tiles > 1 else "BV"
    return f"(V // {step} + 1)" if partial else f"(V // {step})"


def _is_single(x: Operand, problem: DecodingProblem) -> bool:
    return not {"K", "V"} & {*x.dims.split()} or (x.name == "D" and problem.tied_D)


def _role(member: Recurrence, name: str | None) -> Role | None:
    if name is None:
        return None
    dims = member.named[name].symbols
    return Role(name, dims[3] if len(dims) > 3 else "")


def _row(name: str, dims: list[str], problem: DecodingProblem) -> str:
    """Where the program's part of a token's row begins, for the token i_row."""
    heads, dim = dims[2], (dims[3] if len(dims) > 3 else "")
    head = _HEADS[heads]
    if not problem.strided:
        first = f"i_row * {heads} + {head}"
        return f"({first}) * {dim}" if dim else first
    row = f"i_row * {row_of(name)}"
    return f"{row} * {UNIT} + {head} * {dim}" if dim else f"{row} + {head}"


def _parameter(dims: tuple[str, ...]) -> str:
    """Where a parameter begins for the program's head."""
    head = _HEADS[dims[0]]
    return f"{head} * {dims[1]}" if len(dims) > 1 else head
