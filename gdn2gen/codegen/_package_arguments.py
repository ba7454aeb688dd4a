"""What a package's op takes, and what it says of it, made of what its recurrence declares."""

from __future__ import annotations

from typing import Any, Final

from gdn2gen.family.problem import Problem
from gdn2gen.family.recurrence import Input, Recurrence
from gdn2gen.kernels.glossary import what

# Of the inputs whose shapes say how many heads there are.
_RANKS: Final = (("B", "T", "heads"), ("B", "T", "heads", "dim"))
_LINE: Final = 100
# Arguments that kernels may be given, and what they are by default.
_GIVEN: Final[dict[str, object]] = {
    "scale": None,
    "initial_state": None,
    "output_final_state": False,
    "A_log": None,
    "rate": None,
    "dt_bias": None,
    "D": None,
    "z": None,
    "cu_seqlens": None,
    "cu_seqlens_cpu": None,
    "lower_bound": None,
}


def of_recurrence(recurrence: Recurrence, problem: Problem) -> dict[str, Any]:
    """For the template of a package: what follows from the recurrence of its problem."""
    sized = [recurrence.inputs[place] for place in recurrence.sized_by]
    # a decay without heads of its own has those of v
    heads = {symbol: _bound(symbol, sized) or _bound("HV", sized) for symbol in ("HV", "HG")}
    return {
        "recurrence": recurrence,
        "name": recurrence.public.chunk,
        "required": recurrence.required,
        "decay": recurrence.decay and recurrence.decay.input,
        "by_channel": recurrence.decays_by == "channel",
        "defaults": _defaults(recurrence, problem),
        "refused": _refused(recurrence, problem),
        "described": lambda x: _described(x, recurrence, problem),
        "dtype_words": lambda x: _dtype_words(x, problem),
        "heads_words": _heads_words(recurrence),
        "sized": {dims: x for dims in _RANKS if (x := _pairs(sized, len(dims)))},
        "bound": f"{', '.join(heads)} = {', '.join(map(str, heads.values()))}",
        "grouped": _bound("HG", sized) is not None,
    }


def _pairs(inputs: list[Input], rank: int) -> str:
    """Name and tensor of those with so many dims, in the words of a tuple without its brackets."""
    pairs = [f'("{x.name}", {x.name})' for x in inputs if len(x.symbols) == rank]
    return f"{pairs[0]}," if len(pairs) == 1 else ", ".join(pairs)


def _bound(symbol: str, inputs: list[Input]) -> str | None:
    """The size that a symbol stands for, of the first input that has it."""
    for x in inputs:
        if symbol in x.symbols:
            return f"{x.name}.shape[{x.symbols.index(symbol)}]"
    return None


def _compiled(problem: Problem) -> dict[str, tuple[object, str]]:
    """Arguments whose value is compiled in, and the option that makes kernels for another."""
    gated = problem.gate != "none"
    found: dict[str, tuple[object, str]] = {
        "use_qk_l2norm_in_kernel": (
            problem.l2norm,
            "--no-l2norm" if problem.l2norm else "no --no-l2norm",
        ),
        "use_gate_in_kernel": (gated, "--gate none" if gated else "--gate softplus"),
    }
    for argument, flag, extras in (
        ("use_beta_sigmoid_in_kernel", "beta_sigmoid", "beta_sigmoid"),
        ("allow_neg_eigval", "neg_eigval", "beta_sigmoid,neg_eigval"),
        ("state_v_first", "state_v_first", "state_v_first"),
    ):
        given = getattr(problem, flag)
        found[argument] = (given, f"no --with {flag}" if given else f"--with {extras}")
    return found


def _unused(problem: Problem) -> dict[str, tuple[object, str]]:
    """The other arguments that the kernels take none of, what they have to be, and the same."""
    found: dict[str, tuple[object, str]] = {}
    if not problem.final_state:
        found["output_final_state"] = (False, "--with final_state")
    if not problem.initial_state:
        found["initial_state"] = (None, "--with initial_state")
    for name, given in (("A_log", problem.has_A_log), ("dt_bias", problem.has_dt_bias)):
        if not given:
            found[name] = (None, f"--with {name} and a --gate")
    for name, given in (("rate", problem.has_rate), ("D", problem.has_D), ("z", problem.has_z)):
        if not given:
            found[name] = (None, f"--with {name}")
    if not problem.varlen:
        found |= dict.fromkeys(("cu_seqlens", "cu_seqlens_cpu"), (None, "--with varlen"))
    if problem.gate != "sigmoid":
        found["lower_bound"] = (None, "--gate sigmoid")
    return found


def _defaults(recurrence: Recurrence, problem: Problem) -> dict[str, object]:
    """The arguments after the tensors that every call takes, and their defaults."""
    known = _GIVEN | {x: made_for for x, (made_for, _) in _compiled(problem).items()}
    return {x: known[x] for x in recurrence.public.arguments if x in known}


def _refused(recurrence: Recurrence, problem: Problem) -> list[str]:
    """What refuses other values of the arguments that take one, and names the option for those."""
    found = _compiled(problem) | _unused(problem)
    lines = []
    for name, (made_for, option) in found.items():
        words = f'"{name}", {name}, {made_for}, "{option}"'
        if name in recurrence.public.arguments:
            fits = len(words) < _LINE - len("    _refuse()")
            lines.append(f"_refuse({words})" if fits else f"_refuse(\n        {words}\n    )")
    return lines


def _described(x: Input, recurrence: Recurrence, problem: Problem) -> str:
    """A line on an input that every call takes."""
    dims = ", ".join("H or HV" if symbol == "HG" else symbol for symbol in x.symbols)
    words = what(x.name, "", problem)
    if recurrence.decay and x.name == recurrence.decay.input and problem.gate == "none":
        words += ", >= 0" if recurrence.stepped else ", <= 0"
    if x.name == recurrence.write and problem.beta_sigmoid:
        words += f", before it is {'2 * ' if problem.neg_eigval else ''}sigmoid({x.name})"
    if x.name == "v":
        words += "; HV is a multiple of H"
    return f"{x.name}: [{dims}], {words}."


def _dtype_words(x: Input, problem: Problem) -> str:
    """What an input that every call takes has to be of."""
    if x.dtype == "factor" and problem.beta_fp32:
        return "torch.float32"
    return "GATE_DTYPE" if x.dtype == "gate" else "DTYPE"


def _heads_words(recurrence: Recurrence) -> str:
    """Whose heads each symbol counts."""
    names = {
        symbol: ", ".join(x.name for x in recurrence.required if symbol in x.symbols)
        for symbol in ("H", "HV", "HG")
    }
    found = f"H heads of {names['H']}".ljust(17) + f"HV heads of {names['HV']}, o".ljust(24)
    return (found + f"HG heads of {names['HG']} (H or HV)" if names["HG"] else found).rstrip()
