"""What a recurrence declares of its public op, beside the op itself."""

from __future__ import annotations

import inspect

import pytest

from gdn2gen.family.prefill import PREFILL_KEYWORDS
from gdn2gen.family.registry import CHANNEL_OPS, OPS, recurrence_named
from gdn2gen.measure.accuracy import public_op


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_declared_in_their_order(op: str) -> None:
    member = recurrence_named(op)
    names = (*(x.name for x in member.required), *member.public.arguments)
    parameters = inspect.signature(public_op(op)).parameters
    keywords = [x for x, y in parameters.items() if y.kind is inspect.Parameter.KEYWORD_ONLY]
    assert tuple(x for x in parameters if x not in keywords) == names
    states = () if "return_intermediate_states" in names else ("return_intermediate_states",)
    graphs = ("use_graph", "max_num_seqs") if op == "kda" else ()
    decays = ("expected_decay",) if op in CHANNEL_OPS else ()
    assert (*keywords,) == (*states, *graphs, *PREFILL_KEYWORDS, *decays)
