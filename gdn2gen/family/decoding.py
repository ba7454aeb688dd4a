"""DecodingProblem: a recurrence token by token, with its states in place, as serving wants it.

Words: a *slot* is one sequence's state, [HV, K, V], in a *pool* of them. Indices say which slots a
sequence has: one for its state, or one more for each token that is guessed ahead (*speculation*):
then the state after every token lies in a slot of its own, and how many tokens were accepted says
from which of them the next step goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gdn2gen.base.errors import InputError
from gdn2gen.family.problem import EXTRAS, Problem

# Keywords of the ops over a few tokens, beside what flash-linear-attention takes.
KEYWORDS: Final = ("state_pool", "ssm_state_indices", "num_accepted_tokens", "null_slot", "out")
# Flags of DecodingProblem, as --with calls them, too.
DECODING_FLAGS: Final = (
    "state_bf16",
    "pool",
    "indexed",
    "speculative",
    "accepted",
    "one_token",
    "strided",
    "odd_slots",
    "tied_D",
)
DECODING_EXTRAS: Final = {**EXTRAS, **{x: x for x in DECODING_FLAGS}}


@dataclass(frozen=True, order=True)
class DecodingProblem(Problem):
    """One recurrence in the mode `recurrent`, with everything that is compiled in."""

    state_bf16: bool = False
    """States are bf16 where they lie; fp32 otherwise. They are carried in fp32 either way."""
    pool: bool = False
    """States are read from slots of a pool, and written to slots of it: there is neither an
    initial nor a final state."""
    indexed: bool = False
    """Indices say which slots; without them sequence n has slot n."""
    speculative: bool = False
    """Indices are [N, 1+S]: the state after token t is stored in slot indices[n, t]."""
    accepted: bool = False
    """The state is read from slot indices[n, accepted[n] - 1], not from indices[n, 0]."""
    one_token: bool = False
    """Every sequence has one token: no loop."""
    strided: bool = False
    """Rows of tokens do not follow each other at once, as in views of a packed projection."""
    odd_slots: bool = False
    """Slots do not begin at multiples of 8 elements, which vector loads want."""
    tied_D: bool = False
    """D is one number a head, repeated by a stride of 0: it is read once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool and (self.initial_state or self.final_state):
            raise InputError("with a pool of states there is neither initial_state nor final_state")
        needs = {
            "indexed": "pool",
            "odd_slots": "pool",
            "speculative": "indexed",
            "accepted": "speculative",
            "tied_D": "has_D",
        }
        for name, needed in needs.items():
            if getattr(self, name) and not getattr(self, needed):
                raise InputError(f"a decoding problem with {name} needs {needed}")
        if self.one_token and self.varlen:
            raise InputError("how many tokens packed sequences have is not known: no one_token")

    def dtype_of(self, role: str) -> str:
        if role == "state":
            return "bf16" if self.state_bf16 else "fp32"
        return super().dtype_of(role)

    @property
    def extras(self) -> tuple[str, ...]:
        return tuple(name for name, field in DECODING_EXTRAS.items() if getattr(self, field))
